"""Topologies by their names, and whether a mesh fits one, told without a compiler."""

import dataclasses
import io
import os
import sys
from pathlib import Path

import jax
import pytest

from jaxmem import cli
from jaxmem.planning import gpu_report, kernel_report, tpu
from jaxmem.planning.steps import Steps
from jaxmem.planning.training_plan import check
from jaxmem.sharding import MeshConfig, make_mesh
from jaxmem.training.experiment import load_experiment

TINY = load_experiment(Path(__file__).parent.parent / "training" / "tiny.py")


@pytest.mark.parametrize(
    "name, full, n_devices",
    [
        ("v4-8", "v4:2x2x1", 4),
        ("v4-64", "v4:2x4x4", 32),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v6e-8", "v6e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v5p-8192", "v5p:16x16x16", 4096),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("tpu7x-128", "tpu7x:4x4x4", 128),
        ("v5e", "v5e:2x2", 4),
        ("tpu7x:4x4x8", "tpu7x:4x4x8", 256),
    ],
)
def test_names_of_slices(name, full, n_devices):
    assert tpu.full_name(name) == full and tpu.count_devices(name) == n_devices


@pytest.mark.parametrize(
    "name, near",
    [
        ("v5litepod-17", "did you mean v5litepod-16 or v5litepod-"),
        ("v5p-100", "v5p-1024"),
        ("v6e_256", "did you mean v6e-256"),
        ("v7x-128", "tpu7x-128"),
        ("v5p:4x4", "got 'v5p:4x4'; did you mean v5p:4x4x"),
        ("v5p:0x4x4", "did you mean v5p:"),
        ("zzz", "got 'zzz'; change it"),
        ("", "got ''; change it"),
    ],
)
def test_names_of_none(name, near):
    with pytest.raises(
        ValueError, match="tpu topology: needs one of v4, v5e, v5p, v6e, tpu7x, such a name with"
    ) as error:
        tpu.full_name(name)
    assert near in str(error.value)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4-8", "v5litepod-16", "v6e-8", "v5p-32", "tpu7x-128"])
def test_slices_have_as_many_devices_as_their_names_say(name):
    tpu.use_compiler()
    assert len(tpu.devices(name)) == tpu.count_devices(name)


@pytest.mark.tpu
def test_sizes_that_libtpu_does_not_know_are_one_sentence():
    tpu.use_compiler()
    with pytest.raises(ValueError, match="tpu topology: needs one that libtpu knows, got 'v5e:3x5' "):
        tpu.devices("v5e:3x5")


def test_a_mesh_that_does_not_fit_is_told_as_in_training(monkeypatch):
    def told(call):
        with pytest.raises(ValueError) as error:
            call()
        return str(error.value)

    with_mesh = lambda **fields: dataclasses.replace(TINY, mesh=MeshConfig(**fields))
    assert told(lambda: check(with_mesh(data=3), "v6e-8")) == told(lambda: make_mesh(MeshConfig(data=3)))
    batch = "needs 'batch' divisible by the 8 devices of mesh axes dataxfsdp, got batch=4 in an array of shape (4, 32)"
    assert batch in told(lambda: check(TINY, "v6e-8"))
    long = dataclasses.replace(with_mesh(seq=4), data=dataclasses.replace(TINY.data, context_tokens=34))
    assert "needs 'time' divisible by the 4 devices of mesh axes seq, got time=34" in told(lambda: check(long, "v4-8"))
    zigzag = dataclasses.replace(
        long, mesh=MeshConfig(seq=4, layout="zigzag"), data=dataclasses.replace(TINY.data, context_tokens=36)
    )
    assert "needs a number of tokens that 8 divides, for zigzag over 4 devices, got 36" in told(
        lambda: check(zigzag, "v4-8")
    )
    assert check(with_mesh(data=2, fsdp=2), "v4-8") == "v4:2x2x1"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_compiled_now_is_said(monkeypatch, capsys):
    with Steps() as steps:
        steps.say("compiling this")
        steps.show("a result")
    out, errors = capsys.readouterr()
    assert out == "a result\n" and errors == "[0 s] compiling this\n"
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Steps() as steps:
        steps.say("compiling this")
        steps.say("compiling that")
    assert "compiling that" in shown.getvalue() and "0:00:0" in shown.getvalue()


def test_plan_and_kernels_say_what_they_do(monkeypatch, capsys, tmp_path):
    said = []
    monkeypatch.setattr(kernel_report, "environment", dict)
    monkeypatch.setattr(kernel_report, "static_cycles", lambda *_: (1.0, 0.5))
    lines = list(kernel_report.report("v5p", say=said.append))
    n = len(kernel_report.candidates())
    assert (
        len(said) == n and said[0].startswith("v5p: compiling jaxmem forward,") and said[-1].endswith(f"({n} of {n})")
    )
    assert len(lines) >= n

    code = "import sys; print('compiling', 'x', '1 of 1'); print('failed', 'x', 'why'); sys.stderr.write('dead'); sys.exit(3)"
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    os.chmod(fake, 0o755)
    monkeypatch.setattr(gpu_report, "environment", dict)
    monkeypatch.setattr(sys, "executable", str(fake))
    said.clear()
    with pytest.raises(RuntimeError, match="gpu compiler: dead"):
        gpu_report.report("sm_90", 128, said.append)
    assert said == ["sm_90: compiling x (1 of 1)"]


@pytest.mark.tpu
def test_plan_shows_its_steps(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent / "training")
    assert cli.main(["plan", "tiny.py", "--tpu", "v4-8"]) == 0
    out, errors = capsys.readouterr()
    assert "v4:2x2x1, 4 devices: compiled in" in out
    assert [line.split("] ")[1].split(" a step")[0] for line in errors.splitlines()] == [
        "v4:2x2x1: asking the compiler for its devices",
        "v4:2x2x1: tracing",
        "v4:2x2x1: compiling",
    ]
    assert jax.devices()[0].platform == "cpu"

"""A mixer of one's own: its file is kept with the run, nothing of it is run without leave, and what is missing is named."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import cli
from jaxmem.checkpoints import CheckpointConfig, CheckpointStore
from jaxmem.config import to_json
from jaxmem.training.experiment import load_experiment
from jaxmem.training.own_code import import_file, keep_code
from jaxmem.training.step import init_state

OWN = """
import dataclasses
from jaxmem.layers.attention import AttentionConfig
from own_helper import WideConfig
import tiny

@dataclasses.dataclass(frozen=True)
class NarrowConfig(AttentionConfig):
    note: str = "mine"

def config():
    base = tiny.config()
    model = dataclasses.replace(base.model, pattern=(NarrowConfig(n_heads=2), WideConfig(n_heads=2)))
    return dataclasses.replace(base, model=model)
"""
HELPER = """
import dataclasses
import pathlib
from jaxmem.layers.attention import AttentionConfig

pathlib.Path("executed").mkdir()

@dataclasses.dataclass(frozen=True)
class WideConfig(AttentionConfig):
    pass
"""
MODULES = ("own_experiment", "own_helper", "tiny", "renamed")


def forget_modules():
    """As in another process."""
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run with two mixers of one's own, one of them from a file beside the experiment; as another process finds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    (tmp_path / "there").mkdir()
    experiment = tmp_path / "there" / "own_experiment.py"
    experiment.write_text(OWN)
    (tmp_path / "there" / "own_helper.py").write_text(HELPER)
    shutil.copy(Path(__file__).with_name("tiny.py"), tmp_path / "there")
    forget_modules()
    config = load_experiment(experiment)
    abstract = {"params": jax.eval_shape(lambda: init_state(config)).params}
    draw = np.random.default_rng(0).normal
    arrays = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), abstract)
    run_dir = tmp_path / "run"
    with CheckpointStore(run_dir / "checkpoints", config.checkpoint, to_json(config)) as store:
        store.save(1, arrays, {})
    (run_dir / "config.json").write_text(json.dumps(to_json(config)))
    assert keep_code(run_dir, to_json(config), experiment, 0) == []
    shutil.rmtree(tmp_path / "there")
    (tmp_path / "executed").rmdir()
    forget_modules()
    yield Path("run")
    forget_modules()


def generate(*words) -> int:
    return cli.main(["generate", "run", "--max-tokens", "3", *map(str, words)])


def test_a_run_keeps_the_files_of_its_classes(run_dir):
    assert sorted(path.name for path in (run_dir / "code").iterdir()) == [
        "own_experiment.py",
        "own_helper.py",
        "tiny.py",
    ]


def test_nothing_is_run_without_leave(run_dir, capsys):
    assert generate() == 2
    assert capsys.readouterr().err == (
        "jaxmem: run: needs the class own_experiment.NarrowConfig of the run's own code, got no leave to run that; "
        "read run/code/own_experiment.py, and if you trust it add --import run/code/own_experiment.py\n"
    )
    assert not Path("executed").exists()


def test_the_runs_own_file_is_enough_with_leave(run_dir, capsys):
    assert generate("--import", run_dir / "code" / "own_experiment.py") == 0
    assert capsys.readouterr().err.startswith("\n3 tokens, ")
    assert Path("executed").exists()


def test_a_file_of_another_name_serves_too(run_dir, tmp_path):
    renamed = tmp_path / "renamed.py"
    text = (run_dir / "code" / "own_experiment.py").read_text()
    shutil.copy(run_dir / "code" / "own_helper.py", tmp_path)
    renamed.write_text(text.replace("import tiny\n", ""))
    assert generate("--import", renamed) == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (
            (),
            "run: needs the class own_experiment.NarrowConfig, got no file that defines it in run/code; "
            "find the file own_experiment.py with which the run was made and add --import FILE",
        ),
        (
            ("--import", "other.py"),
            "run: needs the class own_experiment.NarrowConfig, got other.py without it; "
            "find the file own_experiment.py with which the run was made and add --import FILE",
        ),
        (("--import", "gone.py"), "import: needs a Python file, got 'gone.py'; name one that ends in .py"),
        (("--import", "run"), "import: needs a Python file, got 'run'; name one that ends in .py"),
        (
            ("--import", "alone.py"),
            "experiment alone.py, line 4: needs a file that runs without an error, got ModuleNotFoundError: No module named "
            "'own_helper'; install own_helper, or put own_helper.py beside it",
        ),
        (
            ("--import", "wrong.py"),
            "experiment wrong.py, line 1: needs a file that runs without an error, got ZeroDivisionError: division by zero; "
            "correct it",
        ),
    ],
)
def test_what_is_missing_is_named(words, message, run_dir, capsys):
    shutil.rmtree(run_dir / "code")
    Path("other.py").write_text("")
    Path("alone.py").write_text(OWN)
    Path("wrong.py").write_text("1 / 0")
    assert generate(*words) == 2
    assert capsys.readouterr().err == f"jaxmem: {message}\n"


def test_code_that_changed_is_told_and_both_are_kept(run_dir, tmp_path):
    changed = tmp_path / "own_experiment.py"
    changed.write_text(OWN + "\n# another\n")
    (note,) = keep_code(run_dir, {}, changed, step=6)
    assert "own_experiment.py is not as it was when the run began" in note
    assert (run_dir / "code" / "own_experiment.py").read_text() == changed.read_text()
    assert (run_dir / "code" / "own_experiment.before_6.py").read_text() == OWN
    assert keep_code(run_dir, {}, changed, step=6) == []
    changed.write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    assert len(keep_code(run_dir, {}, changed, step=6)) == 1
    assert (run_dir / "code" / "own_experiment.py").read_bytes() == changed.read_bytes()
    assert (run_dir / "code" / "own_experiment.before_6.py").read_text() == OWN, "what the checkpoint was made with"


def test_a_class_in_a_function_is_refused_before_training():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        width: int = 1

    with pytest.raises(ValueError, match=r"needs classes that a file can name, got .*<locals>.Inner; move it out"):
        to_json(Inner())


def test_a_file_is_run_once(run_dir):
    path = run_dir / "code" / "own_helper.py"
    assert import_file(path) is import_file(path), "a second time, it could not make its folder"


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_class_that_this_version_lacks_is_told_with_where_it_stands(in_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    config = {"type": "jaxmem.training.experiment.FutureConfig"}
    if in_checkpoint:
        with CheckpointStore(Path("run", "checkpoints"), CheckpointConfig(), config) as store:
            store.save(4, {"params": jnp.ones(2)}, {})
    Path("run").mkdir(exist_ok=True)
    Path("run", "config.json").write_text(json.dumps(config))
    assert generate() == 2
    where = "run/checkpoints/4" if in_checkpoint else "run/config.json"
    assert capsys.readouterr().err.startswith(f"jaxmem: {where}: config: needs ")


@pytest.mark.slow
def test_a_mixer_of_ones_own_trains_and_then_writes(work, monkeypatch, capsys):
    """From the experiment's file alone to the text; the file is gone by then."""
    monkeypatch.chdir(work)
    experiment = Path("own_experiment.py")
    experiment.write_text(
        OWN.replace("from own_helper import WideConfig\n", "").replace(", WideConfig(n_heads=2)", ",")
    )
    shutil.copy(Path(__file__).with_name("tiny.py"), work)
    forget_modules()
    assert (
        cli.main(["train", str(experiment), "--out", "run", "--steps", "2", "--accumulate", "1", "--profile", "2"]) == 0
    )
    assert "profile of steps 2 to 2: run/profile, for xprof\n" in capsys.readouterr().out
    assert list(Path("run", "profile").rglob("*.xplane.pb"))
    experiment.unlink()
    forget_modules()
    capsys.readouterr()
    assert generate() == 2
    assert "add --import run/code/own_experiment.py" in capsys.readouterr().err
    assert generate("--import", "run/code/own_experiment.py", "--prompt", "memory") == 0
    found = capsys.readouterr()
    assert found.out.startswith("memory") and "3 tokens, " in found.err
    forget_modules()

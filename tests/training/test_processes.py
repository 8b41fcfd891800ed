"""One run on two processes that find each other over the network: killed, stopped by a signal, and gone on with.

Slow: every process compiles its own step.
"""

import dataclasses
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmem.checkpoints import complete_steps
from jaxmem.sharding import MeshConfig
from jaxmem.training.experiment import load_experiment
from jaxmem.training.loop import train
from jaxmem.training.metrics import read_metrics
from jaxmem.training.run import load_run

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny.py")
STEPS = 48
PATIENCE_S = 300
TOLD_S = 60
"""Within which the other processes of one that ends have ended too."""
OPTIONS = ("--steps", str(STEPS), "--checkpoint.every-steps", "8", "--eval-every-steps", "16")
MESH = MeshConfig(data=1, fsdp=2)  # every parameter is half on one process and half on the other
ON_MESH = ("--mesh.data", "1", "--mesh.fsdp", "2")
PEER_KILLS = int(os.environ.get("JAXMEM_PEER_KILLS", "2"))


ALONE = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TF_"))} | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
"""Of processes of one device."""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


class Group:
    """Processes of one device each that train the tiny experiment together.

    Args:
      work: where they are started, or where each of them is.
      options: for all of them.
      own: further options by process.
      environment: further variables by process.
    """

    def __init__(
        self,
        work: Path | list[Path],
        out: str,
        options: tuple[str, ...] = (*OPTIONS, *ON_MESH),
        n: int = 2,
        own: dict[int, tuple[str, ...]] | None = None,
        environment: dict[int, dict[str, str]] | None = None,
        file: Path = TINY,
    ):
        self.address = free_address()
        command = [sys.executable, "-m", "jaxmem.cli", "train", str(file), "--out", out, "--resume", *options]
        together = ["--coordinator", self.address, "--processes", str(n), "--process"]
        self.processes = [
            subprocess.Popen(
                [*command, *together, str(index), *(own or {}).get(index, ())],
                cwd=work[index] if isinstance(work, list) else work,
                env=ALONE | (environment or {}).get(index, {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(n)
        ]

    def finish(self) -> tuple[str, str]:
        """What both printed, when both are done and neither complained."""
        printed = [process.communicate(timeout=PATIENCE_S) for process in self.processes]
        for process, (_, errors) in zip(self.processes, printed, strict=True):
            assert (process.returncode, errors) == (0, ""), errors
        return printed[0][0], printed[1][0]

    def fail(self, code: int, killed: tuple[int, ...] = ()) -> list[str]:
        """The one sentence on stderr of each process that was not killed, all ended with this exit code."""
        sentences = []
        for index, process in enumerate(self.processes):
            _, errors = process.communicate(timeout=PATIENCE_S)
            if index not in killed:
                assert (process.returncode, errors.count("\n")) == (code, 1), (index, process.returncode, errors)
                sentences.append(errors.rstrip("\n"))
        return sentences

    def wait_until(self, happened) -> None:
        end = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < end and all(process.poll() is None for process in self.processes), [
                process.communicate() for process in self.processes
            ]
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


@pytest.fixture(scope="module")
def whole(work):
    printed = Group(work, "whole-by-two").finish()
    assert f"step {STEPS}/{STEPS}" in printed[0]
    assert not [line for line in printed[1].splitlines() if not line.startswith("[Gloo]")], "the first speaks for both"
    return work / "whole-by-two"


def test_killed_then_stopped_by_a_signal_to_one_and_gone_on_with(work, whole, compare):
    run_dir = work / "interrupted-by-two"
    checkpoints = run_dir / "checkpoints"
    killed = Group(work, run_dir.name)
    killed.wait_until(lambda: complete_steps(checkpoints))
    killed.kill()
    left = complete_steps(checkpoints)[-1]

    written = (run_dir / "metrics.jsonl").stat().st_mtime_ns
    stopped = Group(work, run_dir.name)
    stopped.wait_until(lambda: (run_dir / "metrics.jsonl").stat().st_mtime_ns != written)  # both have found each other
    stopped.processes[1].send_signal(signal.SIGTERM)
    printed, _ = stopped.finish()
    step = complete_steps(checkpoints)[-1]
    assert f"resumed from the checkpoint of step {left}" in printed
    assert f"another process's signal: stopped after step {step}, all is saved" in printed
    assert step % 16 == 0 and left < step < STEPS, "all processes stop at one step"

    printed = Group(work, run_dir.name).finish()
    assert f"resumed from the checkpoint of step {step}" in printed[0]
    config = dataclasses.replace(load_experiment(TINY), steps=STEPS)
    compare(config, run_dir, whole)


def test_bits_per_byte_are_over_the_bytes_of_both(whole):
    """A token is a byte here. What one process reads of a batch is not half of it."""
    lines = [line for line in read_metrics(whole) if line["kind"] in ("train", "eval")]
    assert len(lines) > STEPS
    assert [line["bits_per_byte"] for line in lines] == pytest.approx(
        [line["loss"] / math.log(2) for line in lines], rel=1e-6
    )


def test_a_sequence_that_two_processes_share(work):
    """Each reads all rows and holds half of their tokens; the losses are those of one process with one device."""
    steps = ("--steps", "6", "--eval-every-steps", "6")
    pair = Group(work, "sequence-by-two", (*steps, "--mesh.data", "1", "--mesh.seq", "2"))
    pair.finish()
    alone = subprocess.run(
        [sys.executable, "-m", "jaxmem.cli", "train", str(TINY), "--out", "sequence-by-one", *steps],
        cwd=work, env=ALONE, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    lines = lambda n: [line for line in read_metrics(work / f"sequence-by-{n}") if line["kind"] in ("train", "eval")]
    got, want = lines("two"), lines("one")
    assert len(got) == len(want) == 7
    for name in ("kind", "loss", "bits_per_byte"):
        assert [line[name] for line in got] == pytest.approx([line[name] for line in want], rel=1e-4)


def test_what_two_processes_made_is_read_by_one_but_goes_on_with_two(work, whole, monkeypatch):
    loaded = load_run(whole)
    assert loaded.step == STEPS and not loaded.notes
    assert loaded.config.mesh == MESH
    monkeypatch.chdir(work)
    config = dataclasses.replace(loaded.config, steps=STEPS + 1, mesh=MeshConfig(data=2, fsdp=2, model=2))
    with pytest.raises(ValueError, match="needs the 2 processes that read the data before, got 1; start as many"):
        train(config, whole, resume=True)


# Processes that differ, and processes that end


@pytest.mark.parametrize(
    "own, said",
    [
        (
            ("--seed", "3"),
            "needs the same on all 2 processes, got config.seed: 0 on process 0 and 3 on process 1; start",
        ),
        (
            ("--data.train", "other"),
            "processes, got the training data: .+ on process 0 and .+ on process 1; ",
        ),
        (
            ("--nonsense", "3"),
            "needs all 2 processes, got process 1 that has ended: train: needs an option that it has, got --nonsense",
        ),
    ],
    ids=["seed", "text", "option"],
)
def test_processes_that_differ_end_with_the_difference(work, own, said):
    """The text is another behind the same path: each process is started where its own is."""
    places = [work, work]
    if "other" in own:
        places[1] = work / "elsewhere"
        (places[1] / "text").mkdir(parents=True)
        for path in (work / "text").iterdir():
            (places[1] / "text" / path.name).write_bytes(path.read_bytes()[:-1])
        own = ()
    began = time.monotonic()
    group = Group(places, str(work / "differing"), own={1: own})
    sentences = [process.communicate(timeout=PATIENCE_S)[1] for process in group.processes]
    assert [process.returncode for process in group.processes] == [2, 2], sentences
    assert time.monotonic() - began < TOLD_S
    assert re.search(said, sentences[0]) and sentences[0].count("\n") == 1
    assert "has ended" in said or sentences[0] == sentences[1]
    assert not complete_steps(work / "differing" / "checkpoints")


def test_an_experiment_may_ask_for_devices(work):
    asks = work / "asks.py"
    asks.write_text(f"import jax\nassert jax.device_count() == 2\n{TINY.read_text()}")
    printed = Group(work, "asks", ("--steps", "2", "--eval-every-steps", "2", *ON_MESH), file=asks).finish()
    assert "step 2/2" in printed[0]


OWN_MIXER = """
import dataclasses
import jax
import tiny
from jaxmem.layers.attention import Attention, AttentionConfig

class Mixer(Attention):
    def __call__(self, *args, **kwargs):
        jax.process_index() / (1 - jax.process_index())
        return super().__call__(*args, **kwargs)

@dataclasses.dataclass(frozen=True)
class MixerConfig(AttentionConfig):
    def make(self, d_model, *, rngs):
        return Mixer(self, d_model, rngs=rngs)

def config():
    base = tiny.config()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, pattern=(MixerConfig(n_heads=2),)))
"""


def test_an_error_in_a_mixer_of_ones_own_is_told_to_the_others(work):
    folder = work / "own"
    folder.mkdir()
    (folder / "own_mixer.py").write_text(OWN_MIXER)
    (folder / "tiny.py").write_text(TINY.read_text())
    group = Group(work, "own-mixer", ("--steps", "2", *ON_MESH), file=folder / "own_mixer.py")
    line = 1 + OWN_MIXER.splitlines().index("        jax.process_index() / (1 - jax.process_index())")
    where = f"experiment {folder / 'own_mixer.py'}, line {line}"
    error = f"{where}: needs a file that runs without an error, got ZeroDivisionError: "
    assert [sentence.partition("division")[0] for sentence in group.fail(2)] == [
        f"jaxmem: train: needs all 2 processes, got process 1 that has ended: {error}",
        f"jaxmem: {error}",
    ]


def kill_one(work: Path, out: str, n: int, victim: int, number: signal.Signals) -> float:
    """Seconds until the others of n processes had ended, one of them killed (or stopped, as by a frozen machine)."""
    run_dir = work / out
    group = Group(work, out, ("--steps", "10000", *OPTIONS[2:], "--data.batch-size", "12", "--accumulate", "1"), n=n)
    written = lambda: (run_dir / "metrics.jsonl").stat().st_mtime_ns if (run_dir / "metrics.jsonl").exists() else 0
    before = written()
    group.wait_until(lambda: complete_steps(run_dir / "checkpoints") and written() != before)
    group.processes[victim].send_signal(number)
    began = time.monotonic()
    for index, process in enumerate(group.processes):
        if index != victim:
            process.wait(PATIENCE_S)
    took_s = time.monotonic() - began
    group.processes[victim].kill()
    for sentence in group.fail(1, killed=(victim,)):
        assert re.match(f"jaxmem: train: needs all {n} processes, lost (process {victim}|one of them)", sentence), (
            sentence
        )
        assert sentence.endswith("start all of them again with --resume, which goes on from the newest checkpoint")
    assert took_s < TOLD_S
    return took_s


@pytest.mark.parametrize(
    "n, victim, number",
    [
        pytest.param(3, 2, signal.SIGKILL, id="last-of-three"),
        pytest.param(2, 1, signal.SIGSTOP, id="frozen", marks=pytest.mark.full),
    ],
)
def test_the_others_end_when_one_is_gone(work, n, victim, number):
    kill_one(work, f"lost-{n}", n, victim, number)


@pytest.mark.full
def test_a_storm_of_killed_processes(work):
    """JAXMEM_PEER_KILLS=10 is the full proof: now one of two, now the other; what is left is gone on with."""
    chance, took_s = random.Random(PEER_KILLS), []
    for kill in range(PEER_KILLS):
        took_s.append(kill_one(work, "storm", 2, (kill + 1) % 2, signal.SIGKILL))
        time.sleep(chance.random())
    step = complete_steps(work / "storm" / "checkpoints")[-1]
    last = ("--steps", str(step + 4), *OPTIONS[2:], "--data.batch-size", "12", "--accumulate", "1")
    printed, _ = Group(work, "storm", last).finish()
    assert f"resumed from the checkpoint of step {step}" in printed
    print(
        f"\n{PEER_KILLS} kills of one of two processes: the other ended within {', '.join(f'{s:.0f}' for s in took_s)} s"
    )

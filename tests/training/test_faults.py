"""Kills, signals and full disks, on real processes: every run goes on and ends as if nothing had happened.

Slow: each is a process that compiles. The full proof is 60 kills, on steps compiled as for use, and 20 full disks:

    JAXMEM_KILLS=60 pytest -m slow tests/training/test_faults.py -k kill_9 -s
    JAXMEM_FULL_DISKS=20 pytest -m slow tests/training/test_faults.py -k full_disk -s
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmem.checkpoints import complete_steps
from jaxmem.training.experiment import load_experiment
from jaxmem.training.metrics import read_metrics

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny.py")
KILLS = int(os.environ.get("JAXMEM_KILLS", "3"))
FULL_DISKS = int(os.environ.get("JAXMEM_FULL_DISKS", "2"))
STEPS = 12 if KILLS <= 3 else 40
PATIENCE_S = 300
POLL_S = 0.002

LITTLE_ROOM = """
import resource, sys
room = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
from jaxmem.cli import main
sys.exit(main())
"""


class Runs:
    """Starts `jaxmem train` on the tiny experiment, in a folder of its own, on one device."""

    def __init__(self, work: Path):
        self.work = work
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TF_"))
        } | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        if KILLS <= 3:  # bits are compared between equally compiled runs, and compiling is most of their time
            self.environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

    def start(
        self, out: str, cache: bool = True, room: int | None = None, background: bool = False
    ) -> subprocess.Popen:
        """Goes on with the run `out`; `room`: bytes at which writing a file fails; `background`: SIGINT is ignored."""
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
        hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` of the tests has ignored
        try:
            return self._start(out, cache, room)
        finally:
            signal.signal(signal.SIGINT, ignored)
            signal.signal(signal.SIGHUP, hung_up)

    def _start(self, out: str, cache: bool, room: int | None) -> subprocess.Popen:
        program = ["-m", "jaxmem.cli"] if room is None else ["-c", LITTLE_ROOM, str(room)]
        command = [sys.executable, *program, "train", str(TINY), "--out", out, "--steps", str(STEPS)]
        return subprocess.Popen(
            [*command, "--resume"],
            cwd=self.work,
            env=self.environment | ({} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "0"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out: str, **how) -> str:
        """Runs to the end, without a word on stderr; returns what was printed."""
        process = self.start(out, **how)
        printed, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, ""), errors
        return printed


def wait_until(process: subprocess.Popen, happened, patience_s: float = PATIENCE_S) -> bool:
    """Whether `happened()` before the process ended or the time was over."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end and process.poll() is None:
        if happened():
            return True
        time.sleep(POLL_S)
    return False


def n_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saves_under_way(checkpoints: Path, from_step: int = 0) -> list[Path]:
    """Folders of saves that have begun and not ended."""
    begun = checkpoints.glob("*.orbax-checkpoint-tmp")
    return [path for path in begun if int(path.name.split(".")[0]) >= from_step]


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(load_experiment(TINY), steps=STEPS)


@pytest.fixture(scope="module")
def runs(work):
    return Runs(work)


@pytest.fixture(scope="module")
def whole(runs):
    """An uninterrupted run; its folder is given as a relative path, and it says nothing on stderr."""
    printed = runs.finish("whole")
    assert f"step {STEPS}/{STEPS}" in printed and "report: whole/report.html" in printed
    return runs.work / "whole"


def copy_as_of(whole: Path, run_dir: Path, step: int) -> None:
    """The run as it was when the checkpoint of this step was its newest."""
    shutil.copytree(whole, run_dir)
    for later in complete_steps(run_dir / "checkpoints"):
        if later > step:
            shutil.rmtree(run_dir / "checkpoints" / str(later))
    (run_dir / "report.html").unlink()


def test_kill_9_at_random_moments(runs, whole, config, compare):
    """In turn before the first checkpoint, in the middle of a save, and at any moment of a run."""
    chance = random.Random(KILLS)
    whole_s, n_runs, in_saves, before_first = 0.0, 1, 0, 0
    for kill in range(KILLS):
        run_dir = runs.work / f"killed_{n_runs}"
        checkpoints = run_dir / "checkpoints"
        first = max(complete_steps(checkpoints), default=0) + 2
        process, began = runs.start(run_dir.name), time.monotonic()
        if kill % 3 == 0 and first == 2:
            hit = wait_until(process, lambda run_dir=run_dir: n_lines(run_dir) > 0)
            whole_s = whole_s or 1.5 * (time.monotonic() - began)
        elif kill % 3 == 1:
            wanted = chance.randrange(first, STEPS + 1, 2)
            hit = wait_until(process, lambda at=checkpoints, wanted=wanted: saves_under_way(at, wanted))
            time.sleep(chance.choice((0, 0.03)) if in_saves else 0)
        else:
            moment_s = chance.uniform(0, whole_s)
            hit = not wait_until(process, lambda: False, moment_s) and process.poll() is None
        process.kill()
        _, errors = process.communicate()
        assert errors == ""
        in_saves += bool(saves_under_way(checkpoints))
        before_first += not complete_steps(checkpoints)
        if not hit or STEPS in complete_steps(checkpoints):
            runs.finish(run_dir.name)
            compare(config, run_dir, whole)
            n_runs += 1
    printed = runs.finish(f"killed_{n_runs}", cache=False)
    assert ("resumed from" in printed) or ("to resume from: starting at step 0" in printed)
    compare(config, runs.work / f"killed_{n_runs}", whole)
    print(f"\n{KILLS} kills: {in_saves} in a save, {before_first} before the first checkpoint; each restarted")
    print(f"{n_runs} runs of {STEPS} steps, each equal to the uninterrupted one; the last restart compiled anew")
    assert in_saves and before_first


@pytest.mark.parametrize("asks", [("SIGTERM", "SIGINT"), ("SIGHUP", None)], ids=["signals", "terminal"])
def test_what_asks_a_run_to_stop_saves_and_leaves_cleanly(asks, runs, whole, config, compare):
    """SIGHUP where SIGINT is ignored from the start, as in the background job of a script; None: nobody reads the output."""
    run_dir, before = runs.work / f"stopped_by_{asks[0]}", runs.work / f"before_{asks[0]}"

    def stop(number) -> tuple:
        """The process, what it printed, how long it took after the signal, and the step after which it stopped."""
        lines, background = n_lines(run_dir), number == signal.SIGHUP
        process = runs.start(run_dir.name, background=background)
        if number is None:
            process.stdout.readline()
            process.stdout.close()
        else:
            wait_until(process, lambda: n_lines(run_dir) not in (0, lines))
            if background:
                process.send_signal(signal.SIGINT)
            process.send_signal(number)
        sent = time.monotonic()
        told = (None, process.stderr.read()) if number is None else process.communicate(timeout=PATIENCE_S)
        took_s = time.monotonic() - sent
        process.wait(PATIENCE_S)
        return process, *told, took_s, complete_steps(run_dir / "checkpoints")[-1]

    for number in (name and signal.Signals[name] for name in asks):
        said = number.name if number is not None else "standard output was closed"
        if run_dir.exists():
            shutil.copytree(run_dir, before)
        for _ in range(5):  # on a busy machine a run of 12 steps may have ended when its first line is seen
            process, printed, errors, took_s, step = stop(number)
            if step < STEPS:
                break
            shutil.rmtree(run_dir)
            if before.exists():
                shutil.copytree(before, run_dir)
        sentence = f"{said}: stopped after step {step}, all is saved; --resume goes on from there"
        if number is None:
            assert (process.returncode, errors) == (0, f"jaxmem: {sentence}\n")
            process.stderr.close()
        else:
            assert (process.returncode, errors) == (0, "")
            assert sentence in printed
            assert took_s < 15, f"{took_s:.1f} s from the signal to the end"
        assert read_metrics(run_dir)[-1]["step"] == step < STEPS, "every step that was made is saved"
    runs.finish(run_dir.name)
    compare(config, run_dir, whole)


def test_a_second_run_in_the_folder_is_refused_and_the_first_is_not_disturbed(runs, whole, config, compare):
    first = runs.start("twice")
    assert wait_until(first, lambda: n_lines(runs.work / "twice") > 0)
    first.send_signal(signal.SIGSTOP)
    _, errors = (second := runs.start("twice")).communicate(timeout=PATIENCE_S)
    assert second.returncode == 2
    assert errors.startswith("jaxmem: run: needs a folder that no other run writes to, got 'twice', which process ")
    assert f"process {first.pid} on " in errors and errors.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=PATIENCE_S)
    assert (first.returncode, errors) == (0, "")
    compare(config, runs.work / "twice", whole)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(runs, whole, config, compare):
    """First there is no room for the arrays of a checkpoint, then none for a line of metrics, then by chance."""
    copy_as_of(whole, run_dir := runs.work / "full", STEPS - 4)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    n_metrics = sum(len(line) for line in lines if json.loads(line)["step"] <= STEPS - 4)
    n_arrays = max(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*"))
    room = n_metrics + 4000
    assert room < n_arrays // 4, (
        "there is room for metrics when there is none for arrays, however they are cut into files, but for the more steps "
        "of JAXMEM_KILLS: leave that away"
    )

    def told(n_bytes: int) -> str:
        process = runs.start(run_dir.name, cache=False, room=n_bytes)  # the cache would have no room either
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert complete_steps(run_dir / "checkpoints")[-1] == STEPS - 4
        assert errors.count("\n") == 1, errors
        return errors.rstrip("\n")

    checkpoint = told(room)
    assert checkpoint.startswith(f"jaxmem: checkpoint {STEPS - 2}: needs to be written to ")
    assert f"checkpoint {STEPS - 4} is intact; make room there or name another directory, and resume" in checkpoint
    metrics = told(n_metrics + 100)
    assert metrics == "jaxmem: run: needs to write to full, got File too large; make room there, and resume"
    chance = random.Random(0)
    rooms = sorted(round(100 * (room / 100) ** chance.random()) for _ in range(FULL_DISKS - 2))
    for n_bytes in rooms:
        assert "make room there" in (sentence := told(n_bytes)), (n_bytes, sentence)
    print(f"\n{2 + len(rooms)} disks were full, at {', '.join(map(str, rooms))} bytes a file by chance")
    runs.finish(run_dir.name)
    compare(config, run_dir, whole)

"""What `--resume` takes for the truth, what it lets change, and what it does not start over."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jaxmem.checkpoints import complete_steps
from jaxmem.config import to_json
from jaxmem.training.loop import Outcome, train
from jaxmem.training.metrics import METRICS_FILE, read_metrics
from jaxmem.training.resume import MAY_CHANGE, check_run_dir
from jaxmem.training.run_folder import locked


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compiled):
    """Runs of one config share their compiled functions."""


def other_seed(config):
    return dataclasses.replace(config, seed=1)


def lower_rate(config):
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.005, clip_norm=0.5)
    return dataclasses.replace(config, optimizer=optimizer, data=dataclasses.replace(config.data, read_threads=1))


# Which config a run has


@pytest.mark.parametrize("found", [None, "", "{", "[1]", "other"], ids=["missing", "empty", "cut", "a list", "another"])
def test_the_checkpoint_knows_its_config_whatever_config_json_says(found, config, killed_after):
    run_dir = killed_after(6)
    file = run_dir / "config.json"
    file.unlink() if found is None else file.write_text(
        json.dumps(to_json(other_seed(config))) if found == "other" else found
    )
    with pytest.raises(ValueError, match=r"got another: seed: checkpoint 0, now 1; use the same experiment"):
        train(other_seed(config), run_dir, resume=True)


def test_a_damaged_newest_checkpoint_does_not_decide(config, killed_after):
    """A flipped bit in its config looks like another run; the checksums know better."""
    run_dir = killed_after(6)
    copy = run_dir / "checkpoints" / "6" / "run_config" / "run_config.json"
    copy.write_text(copy.read_text().replace('"seed": 0', '"seed": 4'))
    check_run_dir(run_dir, config, resume=True)


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_step_with_a_lower_rate(config, killed_after, capsys):
    """After a divergence: later checkpoints and their lines are kept aside, what changed is told with both values."""
    run_dir = killed_after(8)
    (run_dir / "config.json").write_text("")
    before = read_metrics(run_dir)
    assert train(lower_rate(config), run_dir, resume=True, from_step=3) == Outcome(8, stopped=False)
    told = capsys.readouterr().out
    assert "resumed from the checkpoint of step 3" in told
    assert "optimizer.learning_rate: checkpoint 0.01, now 0.005; optimizer.clip_norm: checkpoint 1.0, now 0.5" in told
    assert "changed from here on: data.read_threads: checkpoint 0, now 1; " in told
    assert "set aside, and not deleted: the checkpoints of steps [6, 8]" in told
    assert "config.json, got an empty file: it is written again" in told
    assert "steps 4 to 8, which metrics.jsonl has already, are made again" in told
    assert json.loads((run_dir / "config.json").read_text()) == to_json(lower_rate(config))
    assert complete_steps(run_dir / "checkpoints") == [3, 6, 8]
    assert {"6.set-aside", "8.set-aside"} < {path.name for path in (run_dir / "checkpoints").iterdir()}
    aside = [json.loads(line) for line in (run_dir / "metrics.after_3.jsonl").read_text().splitlines()]
    assert aside == [line for line in before if line["step"] > 3]
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run_dir) if line["kind"] == "train"}
    earlier = {line["step"]: line["learning_rate"] for line in before if line["kind"] == "train"}
    assert rates == pytest.approx({at: rate if at <= 3 else rate / 2 for at, rate in earlier.items()})


def test_a_step_to_go_on_from_needs_resume(config, tmp_path):
    with pytest.raises(ValueError, match="needs --resume to go on from a step, got --from-step 3 alone; add it"):
        train(config, tmp_path / "run", from_step=3)


def test_every_field_that_may_change_is_one(config):
    """And none of those that decide what the state means."""
    for name in MAY_CHANGE:
        found = to_json(config)
        for part in name.split("."):
            assert part in found, name
            found = found[part]
    for name in ("seed", "model", "model.pattern", "data", "data.batch_size", "optimizer.kind", "checkpoint.tables"):
        assert name not in MAY_CHANGE
    after_nan = {f"optimizer.{name}" for name in ("learning_rate", "clip_norm", "weight_decay")}
    assert after_nan | {"steps", "mesh", "data.read_threads"} <= set(MAY_CHANGE)


def test_lines_that_are_missing_are_told(config, killed_after, capsys):
    run_dir = killed_after(8)
    (run_dir / METRICS_FILE).unlink()
    train(config, run_dir, resume=True)
    assert "metrics.jsonl has no lines of steps 1 to 8: they are lost, the run is not" in capsys.readouterr().out


# What starting again would lose


def damage_all(checkpoints):
    for step in complete_steps(checkpoints):
        (checkpoints / str(step)).rename(checkpoints / f"{step}.damaged")


def lose_all(checkpoints):
    for step in complete_steps(checkpoints):
        shutil.rmtree(checkpoints / str(step))


def unmount(checkpoints):
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()


@pytest.mark.parametrize(
    "lose, got",
    [
        (shutil.rmtree, r"got none \(is a disk not mounted\?\) in checkpoints/; put them back"),
        (unmount, r"got none \(is a disk not mounted\?\) in checkpoints/; put them back"),
        (damage_all, r"got only 3.damaged, 6.damaged in checkpoints/; put them back"),
        (lose_all, r"got none of them in checkpoints/; put them back"),
    ],
)
def test_a_run_without_its_checkpoints_is_not_started_over(lose, got, config, killed_after):
    run_dir = killed_after(6)
    lose(run_dir / "checkpoints")
    lines = (run_dir / METRICS_FILE).read_bytes()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"resume: needs the checkpoints .* has metrics.jsonl up to step 8, {got}"
        ):
            train(config, run_dir, resume=True)
    assert (run_dir / METRICS_FILE).read_bytes() == lines
    with pytest.raises(ValueError, match="needs a new folder for a new run"):
        train(config, run_dir)


def test_tables_alone_are_something_to_lose(config, tmp_path):
    (tmp_path / "tables" / "table.values").mkdir(parents=True)
    (tmp_path / "tables" / "table.values" / "manifest.ocdbt").write_bytes(b"rows")
    with pytest.raises(ValueError, match="needs a new folder for a new run"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match=r"which has tables/, got none \(is a disk not mounted"):
        train(config, tmp_path, resume=True)
    assert (tmp_path / "tables" / "table.values" / "manifest.ocdbt").exists()


@pytest.mark.parametrize("text", ["[]\n", "7\n", "\0\1\n", '{"step": "NaN", "kind": "train"}\n'])
def test_damaged_metrics_are_named_and_kept(text, config, killed_after):
    run_dir = killed_after(6)
    (run_dir / METRICS_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"got line=1 of .*metrics.jsonl without; repair or remove that line"):
        train(config, run_dir, resume=True)
    assert (run_dir / METRICS_FILE).read_text() == text


# One run at a time

HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"process 7 on somewhere since today")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(config, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir / "lock")], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    for resume in (False, True):
        with pytest.raises(ValueError) as error:
            train(config, run_dir, resume=resume)
        assert str(error.value) == (
            f"run: needs a folder that no other run writes to, got {str(run_dir)!r}, which process 7 on somewhere "
            "since today holds; wait for its end or stop it, or name another folder with --out"
        )
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with locked(run_dir) as note:
        assert note == ""
        assert (run_dir / "lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=rf"which process {os.getpid()} on .* holds; wait"), locked(run_dir):
            pass
    assert not any(run_dir.iterdir())
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists(), "nothing was written there"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path) as note:
        assert note == f"the file system of {tmp_path} has no locks: see to it that no second run writes there"


# A standard output that is closed


@pytest.mark.slow
def test_a_closed_output_saves_and_stops_after_the_step(config, whole, killed_after, compare, monkeypatch, capfd):
    run_dir = killed_after(3)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        patch.setattr(sys, "__stdout__", gone)
        assert train(config, run_dir, resume=True) == Outcome(4, stopped=True)
    assert complete_steps(run_dir / "checkpoints") == [3, 4]
    sentence = "jaxmem: standard output was closed: stopped after step 4, all is saved; --resume goes on from there\n"
    assert capfd.readouterr().err == sentence
    train(config, run_dir, resume=True)
    shutil.rmtree(run_dir / "checkpoints" / "4", ignore_errors=True)
    compare(config, run_dir, whole)

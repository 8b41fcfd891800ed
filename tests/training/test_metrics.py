"""What a run writes is read back, and survives kills at any byte."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from jaxmem.training.metrics import MetricsWriter, read_metrics


def kinds_and_steps(run_dir):
    return [(line["kind"], line["step"]) for line in read_metrics(run_dir)]


def write_steps(run_dir, first, last, resume_step=None):
    """Steps `first` to `last` of a loop that evaluates at every third step, and ends."""
    with MetricsWriter(run_dir, resume_step) as metrics:
        for step in range(first, last + 1):
            metrics.write("train", step, loss=1.0 / step)
            if step % 3 == 0:
                metrics.write("eval", step, bits_per_byte=2.0 / step)
        metrics.write("final", last, n_parameters=7)


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "a"


def test_a_line_is_on_disk_as_soon_as_it_is_written(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write("train", 1, loss=2.5, tokens=np.int64(3))
        assert (run_dir / "metrics.jsonl").read_text() == '{"kind": "train", "step": 1, "loss": 2.5, "tokens": 3}\n'


def test_arrays_and_dataclasses_become_lists_and_dicts(run_dir):
    @dataclass
    class Size:
        program: str
        n_bytes: int

    with MetricsWriter(run_dir) as metrics:
        metrics.write(
            "eval", 1, use=np.array([[0.25, 0.75]]), loss=np.float32(0.5), sizes=[Size("xz", 3)], edges=(0, 1)
        )
    assert read_metrics(run_dir) == [
        {
            "kind": "eval",
            "step": 1,
            "use": [[0.25, 0.75]],
            "loss": 0.5,
            "sizes": [{"program": "xz", "n_bytes": 3}],
            "edges": [0, 1],
        }
    ]


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write("train", 1, loss=math.nan, norms=np.array([math.inf, -math.inf, 1.0]))

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((run_dir / "metrics.jsonl").read_text(), parse_constant=refuse)
    (line,) = read_metrics(run_dir)
    assert math.isnan(line["loss"])
    assert line["norms"] == [math.inf, -math.inf, 1.0]


def test_scalars_are_tensorboard_events(run_dir):
    from tensorboardX.proto.event_pb2 import Event

    write_steps(run_dir, 1, 3)
    write_steps(run_dir, 3, 4, resume_step=2)
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # records: length of 8 bytes, its CRC of 4, the event, its CRC of 4
            n_bytes = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + n_bytes]))
            data = data[16 + n_bytes :]
    scalars = [(v.tag, e.step, v.simple_value) for e in events for v in e.summary.value]
    assert ("train/loss", 2, 0.5) in scalars
    assert ("eval/bits_per_byte", 3, pytest.approx(2 / 3)) in scalars
    assert not [tag for tag, _, _ in scalars if tag.endswith(("/step", "/kind"))]
    assert [e.step for e in events if e.session_log.status == 1] == [3]


@pytest.mark.parametrize("saved", [0, 4, 6, 9])
def test_a_resumed_run_has_one_line_per_kind_and_step(run_dir, tmp_path, saved):
    write_steps(tmp_path / "uninterrupted", 1, 12)
    write_steps(run_dir, 1, 9)
    write_steps(run_dir, saved + 1, 12, resume_step=saved)
    assert read_metrics(run_dir) == read_metrics(tmp_path / "uninterrupted")


def test_the_resumed_step_is_not_written_twice(run_dir):
    write_steps(run_dir, 1, 6)
    with MetricsWriter(run_dir, resume_step=6) as metrics:
        metrics.write("eval", 6, bits_per_byte=100.0)
        metrics.write("final", 6, n_parameters=8)
    lines = read_metrics(run_dir)
    assert [line["bits_per_byte"] for line in lines if (line["kind"], line["step"]) == ("eval", 6)] == [2.0 / 6]
    assert [line["n_parameters"] for line in lines if line["kind"] == "final"] == [8]


def test_a_last_line_torn_at_any_byte_is_dropped(run_dir):
    write_steps(run_dir, 1, 2)
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert kinds_and_steps(run_dir) == [("train", 1), ("train", 2)]
    MetricsWriter(run_dir, resume_step=2).close()
    assert path.read_bytes() == whole[:start]


def test_a_run_killed_while_writing_resumes(run_dir):
    code = """
import sys
from jaxmem.training.metrics import MetricsWriter
metrics = MetricsWriter(sys.argv[1])
for step in range(1, 10**9):
    metrics.write("train", step, loss=1.0 / step)
    if step == 50:
        print("running", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert len(read_metrics(run_dir)) >= 50
    with MetricsWriter(run_dir, resume_step=40) as metrics:
        metrics.write("train", 41, loss=0.0)
    assert kinds_and_steps(run_dir) == [("train", step) for step in range(1, 42)]


def test_a_failed_rewrite_leaves_the_old_lines(run_dir, monkeypatch):
    write_steps(run_dir, 1, 9)
    before = (run_dir / "metrics.jsonl").read_bytes()

    def full_disk(file_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(run_dir, resume_step=3)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_damaged_line_in_the_middle_is_an_error(run_dir):
    write_steps(run_dir, 1, 3)
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"kind": "train", "step": 2', b'{"kind": "tr'))
    with pytest.raises(
        ValueError, match=r"metrics: needs a JSON object with kind and step on every line, got line=2 of .*; repair"
    ):
        read_metrics(run_dir)


@pytest.mark.parametrize(
    "line",
    [b"[]", b"3", b'"text"', b"null", b"\0\0", b"\xff\xfe", b"{}", b'{"kind": "train", "step": "NaN"}', b"[" * 10**5],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_line_of_another_kind_is_named_with_its_file(line, place, run_dir):
    write_steps(run_dir, 1, 2)
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes()
    path.write_bytes(line + b"\n" + lines if place == "first" else lines + line + b"\n")
    number = 1 if place == "first" else 4
    with pytest.raises(ValueError, match=rf"got line={number} of {path} without; repair or remove that line"):
        read_metrics(run_dir)


@pytest.mark.parametrize(
    "line, got", [(b'"step": -1', "train step=-1 after 2;"), (b'"step": 2', "train step=2 after 2;")]
)
def test_a_step_that_does_not_rise_is_named(line, got, run_dir):
    write_steps(run_dir, 1, 2)
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", ' + line + b"}\n")
    with pytest.raises(ValueError, match=f"steps from 0 that rise .* got line=4 of {path} with {got} repair or remove"):
        read_metrics(run_dir)


def test_a_text_that_reads_like_a_number_stays_a_text(run_dir):
    texts = ["NaN", "Infinity", "-Infinity", "\\NaN", "\\\\-Infinity", "nan", "-NaN", "NaN "]
    numbers = [math.inf, -math.inf, 1.5]
    with MetricsWriter(run_dir) as metrics:
        metrics.write("train", 1, loss=math.nan)
        metrics.write("final", 1, sample="NaN", texts=texts, numbers=numbers)
    for _ in range(2):
        train, final = read_metrics(run_dir)
        assert math.isnan(train["loss"])
        assert (final["sample"], final["texts"], final["numbers"]) == ("NaN", texts, numbers)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        MetricsWriter(run_dir, resume_step=1).close()  # which writes what it read
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(lines[-1] + "\n")


def test_more_lines_than_a_kill_can_leave_are_kept_elsewhere(run_dir):
    write_steps(run_dir, 1, 9)
    with MetricsWriter(run_dir, resume_step=7, drop_steps=2) as metrics:
        assert metrics.notes == ["steps 8 to 9, which metrics.jsonl has already, are made again"]
    assert sorted(path.name for path in run_dir.glob("metrics*")) == ["metrics.jsonl"]
    with MetricsWriter(run_dir, resume_step=4, drop_steps=2) as metrics:
        assert metrics.notes[1] == f"their lines are kept in {run_dir / 'metrics.after_4.jsonl'}"
    kept = [json.loads(line) for line in (run_dir / "metrics.after_4.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in kept] == [("train", 5), ("train", 6), ("eval", 6), ("train", 7)]
    assert kinds_and_steps(run_dir)[-1] == ("train", 4)


def test_a_new_run_does_not_overwrite_another(run_dir):
    write_steps(run_dir, 1, 2)
    with pytest.raises(ValueError, match=r"metrics: needs a folder without a run, got run_dir=.* with 3 lines; choose"):
        MetricsWriter(run_dir)
    assert len(read_metrics(run_dir)) == 3


def test_steps_rise(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write("train", 5, loss=1.0)
        metrics.write("eval", 5, loss=1.0)
        for step in (4, 5):
            with pytest.raises(
                ValueError, match=rf"needs step > 5 after the last 'train' line, got step={step}; write"
            ):
                metrics.write("train", step, loss=1.0)


def test_kinds_are_three(run_dir):
    write = inspect.unwrap(MetricsWriter.write)  # past the type checker that tests may put around it
    with MetricsWriter(run_dir) as metrics, pytest.raises(ValueError, match=r"needs kind in .*, got kind='test'; use"):
        write(metrics, "test", 1)


def test_importing_metrics_does_not_import_tensorboard():
    code = "import sys, jaxmem.training.metrics; sys.exit('tensorboardX' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

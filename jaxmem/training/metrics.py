"""The numbers of a run: one JSON line each in metrics.jsonl, and the scalars among them as TensorBoard events.

A line is {"kind": ..., "step": ..., name: value, ...}. JSON has no word for NaN and infinity; they are written as the
strings "NaN", "Infinity" and "-Infinity", as in protobuf's JSON, and `read_metrics` gives them back as floats. A text that
reads so, as a sample may, is written with a backslash before it.

However often a run is killed and resumed, its file has one line per kind and step, in order: resuming at step k drops
what lies after k, and a line that the kill cut in half. What is more than a kill can leave goes to metrics.after_k.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["train", "eval", "final"]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_FLUSH_S = 10
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LIKE_NON_FINITE = re.compile(r"\\*(NaN|-?Infinity)")


class MetricsWriter:
    """Appends the numbers of a run to RUN_DIR/metrics.jsonl and RUN_DIR/tensorboard; a context manager.

    In a run of several processes, one of them has a writer.

    Args:
        run_dir: the run's folder; made if missing.
        resume_step: None for a new run. After an interruption, the step whose state was restored (0 when nothing was
            saved): lines of later steps are dropped, and so are "final" lines, since the run goes on.
        drop_steps: lines of more steps than these after `resume_step` are kept in another file, metrics.after_STEP.jsonl:
            they belong to checkpoints that are damaged, missing, or not wanted. None: they are dropped, however many.

    Attributes:
        notes: sentences on what was dropped, kept elsewhere, or is missing.

    Raises:
        ValueError: `resume_step` is None and the folder already has metrics.
        ValueError: metrics.jsonl has an unreadable line.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None = None, drop_steps: int | None = None):
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        records = read_metrics(run_dir) if path.exists() else []
        if records and resume_step is None:
            raise ValueError(
                f"metrics: needs a folder without a run, got run_dir={str(run_dir)!r} with {len(records)} lines; "
                "choose another folder, or resume the run in it"
            )
        kept = [r for r in records if r["step"] <= resume_step and r["kind"] != "final"]
        self.notes = _set_aside(path, records, resume_step, drop_steps) if resume_step else []
        replace_file(path, "".join(_to_line(_to_plain(r)) for r in kept))

        self._resume_step = resume_step
        self._last_step = {r["kind"]: r["step"] for r in kept}
        self._run_dir = run_dir
        with explain_failed_write(run_dir):
            self._lines = path.open("a", encoding="utf-8")
            self._events = _EventFile(run_dir / TENSORBOARD_FOLDER, resume_step)

    def write(self, kind: Kind, step: int, **values: Any) -> None:
        """Appends one line and flushes it to the operating system.

        Writing the resumed step's line a second time changes nothing: the line from before the interruption stands.

        Args:
            kind: "train" for one optimiser step, "eval" for one pass over held-out data, "final" for the run's end.
            step: optimiser steps taken so far; rises from line to line of one kind.
            **values: numbers, strings, arrays, dataclasses, and lists and dicts of them. Numbers also become the
                TensorBoard scalars KIND/NAME. A device array is waited for.

        Raises:
            ValueError: an unknown kind, or a step that does not rise.
            OSError: the disk is full; what was written before can be read, and resumed from.
            TypeError: a value that has no JSON form.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"metrics: needs kind in {get_args(Kind)}, got kind={kind!r}; use one of these")
        last_step = self._last_step.get(kind)
        if last_step is not None and step <= last_step:
            if step == last_step == self._resume_step:
                return
            raise ValueError(
                f"metrics: needs step > {last_step} after the last {kind!r} line, got step={step}; write each step once"
            )
        record = {"kind": kind, "step": int(step), **_to_plain(values)}
        scalars = {f"{kind}/{n}": v for n, v in record.items() if n != "step" and isinstance(v, (int, float))}
        line = _to_line(record)
        with explain_failed_write(self._run_dir):
            self._lines.write(line)
            self._lines.flush()
            self._events.write(step, scalars)
        self._last_step[kind] = record["step"]

    def close(self) -> None:
        """Writes out what TensorBoard has buffered and closes both files."""
        with explain_failed_write(self._run_dir), self._lines, contextlib.closing(self._events):
            pass

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _EventFile:
    """One TensorBoard file of scalars, written by this thread.

    tensorboardX's own writer has a thread for it, whose end on a full disk blocks the run for ever.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        # names have whole seconds: a quick resume must not overwrite
        self._writer = EventsWriter(str(folder / "events"), f".step{resume_step or 0}")
        self._flush_due_s = 0.0
        if resume_step is not None:  # hides what lies behind that step in older files
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends the scalars; they are on disk after TENSORBOARD_FLUSH_S at the latest, if the run writes on."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._writer.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        if time.monotonic() >= self._flush_due_s:
            self._writer.flush()
            self._flush_due_s = time.monotonic() + TENSORBOARD_FLUSH_S

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Says where a file cannot be written, which the operating system's message does not."""
    try:
        yield
    except OSError as error:
        advice = "make room there, and resume" if error.errno in NO_ROOM else "correct that, or name another folder"
        reason = error.strerror or error
        raise OSError(f"run: needs to write to {path}, got {reason}; {advice}") from error


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of RUN_DIR/metrics.jsonl in order, also while the run is writing; a half-written last line is left out.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
        ValueError: a line, other than a last one that does not end, is no JSON object with a kind and a step,
            or has a step that is not above that of the line of its kind before it.
    """
    path = Path(run_dir) / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    records, last_step = [], {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            record = None
        if not (isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int):
            raise ValueError(
                f"metrics: needs a JSON object with kind and step on every line, got line={number} of {path} without; "
                "repair or remove that line"
            )
        kind, step = record["kind"], record["step"]
        if step <= (before := last_step.get(kind, -1)):
            raise ValueError(
                f"metrics: needs steps from 0 that rise among the lines of a kind, got line={number} of {path} with {kind} "
                f"step={step}{f' after {before}' if before >= 0 else ''}; repair or remove that line"
            )
        last_step[kind] = step
        records.append(_with_non_finite(record))
    return records


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _set_aside(path: Path, records: list[dict[str, Any]], step: int, drop_steps: int | None) -> list[str]:
    """Keeps the lines of more than `drop_steps` steps after `step` in a file of their own; returns what to tell."""
    last = max((r["step"] for r in records if r["kind"] == "train"), default=0)
    if last < step:
        return [f"{path} has no lines of {_steps(last + 1, step)}: they are lost, the run is not"]
    later = "".join(_to_line(_to_plain(r)) for r in records if r["step"] > step)
    if last == step or not later:
        return []
    notes = [
        f"{_steps(step + 1, last)}, which metrics.jsonl has already, {'are' if last > step + 1 else 'is'} made again"
    ]
    if drop_steps is not None and last > step + drop_steps:
        other = path.with_name(f"{path.stem}.after_{step}{path.suffix}")
        before = other.read_text(encoding="utf-8") if other.exists() else ""
        replace_file(other, before + later)
        notes.append(f"their lines are kept in {other}")
    return notes


def replace_file(path: Path, content: str | bytes) -> None:
    """Gives `path` this content in one step: a kill or a full disk leaves the old content.

    What is no UTF-8, as an undecodable byte of the command line, is written as an escape.
    """
    part = path.with_name(path.name + ".part")
    with explain_failed_write(path):
        with part.open("wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def _to_line(plain: dict[str, Any]) -> str:
    return json.dumps(plain, allow_nan=False) + "\n"


def _to_plain(value: Any) -> Any:
    """`value` in JSON's own types: arrays as lists, dataclasses as dicts, non-finite floats as strings."""
    if isinstance(value, dict):
        return {str(name): _to_plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        return _to_plain(dataclasses.asdict(value))
    if hasattr(value, "tolist"):
        return _to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and _LIKE_NON_FINITE.fullmatch(value):
        return "\\" + value
    return value


def _with_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_non_finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_with_non_finite(v) for v in value]
    if isinstance(value, str) and _LIKE_NON_FINITE.fullmatch(value):
        return NON_FINITE[value] if value in NON_FINITE else value[1:]
    return value

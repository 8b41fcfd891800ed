"""The progress line on a terminal, in a log, and what it costs."""

import io
import math
import re
import time

import pytest
from rich.console import Console

from jaxmem.training import progress as progress_module
from jaxmem.training.progress import Progress


@pytest.fixture
def log():
    return Console(file=io.StringIO(), width=40)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0]` in seconds."""
    now_s = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now_s[0])
    return now_s


def run(progress, clock, first, last, step_s=1.0):
    for step in range(first, last + 1):
        clock[0] += step_s
        progress.update(step, loss=2.0, bits_per_byte=1.5, tokens_per_s=12_345)


def test_a_log_has_a_line_every_ten_seconds_and_the_last(log, clock):
    with Progress(35, start_step=10, console=log) as progress:
        run(progress, clock, 11, 35)
    lines = log.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/35" for step in (11, 21, 31, 35)]
    assert lines[1] == "step 21/35  loss 2.0000  1.500 bits/byte  12.3k tokens/s  ETA 0:00:14"
    assert lines[-1].endswith("ETA 0:00:00")


def test_the_time_to_go_leaves_out_compilation(log, clock):
    with Progress(1000, console=log) as progress:
        clock[0] += 300
        run(progress, clock, 1, 101, step_s=10)
    assert log.file.getvalue().splitlines()[-1].endswith("ETA 2:29:50")


def test_an_interrupted_run_shows_its_last_step(log, clock):
    with pytest.raises(KeyboardInterrupt), Progress(100, console=log) as progress:
        run(progress, clock, 1, 3)
        raise KeyboardInterrupt
    assert log.file.getvalue().splitlines()[-1].startswith("step 3/100")


def test_a_diverged_loss_is_shown(log):
    with Progress(2, console=log) as progress:
        progress.update(1, math.nan, math.inf, 0.0)
    assert "loss nan  inf bits/byte  0 tokens/s" in log.file.getvalue()


def test_a_terminal_has_one_live_line_and_text_above_it():
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    with Progress(20_000, console=terminal) as progress:
        progress.update(1, 2.0, 1.5, 950)
        progress.say("saved [step 1]")
        progress.update(20_000, 1.0, 0.75, 4_560_000)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())
    assert "saved [step 1]\n" in text
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert re.fullmatch(r"20,000/20,000 ━+ loss 1\.0000  0\.750 bits/byte  4\.56M tokens/s  ETA 0:00:00", last.strip())


@pytest.mark.parametrize(
    "width, shown",
    [
        (44, ["loss 2.0000", "ETA -:--:--"]),
        (80, ["loss 2.0000", "1.500 bits/byte", "950 tokens/s", "ETA -:--:--"]),
        (140, ["loss 2.0000", "1.500 bits/byte", "950 tokens/s", "MFU 12.3%", "1.25 GiB", "ETA -:--:--"]),
    ],
)
def test_a_terminal_shows_what_it_has_room_for(width, shown):
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    with Progress(20_000, console=terminal) as progress:
        progress.update(1, 2.0, 1.5, 950, ["MFU 12.3%", "1.25 GiB"])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())
    lines = text.replace("\r", "\n").strip().splitlines()
    assert len(lines[-1].strip()) <= width and re.split(r"  +", lines[-1].strip().partition("━ ")[2].strip()) == shown


def test_values_are_read_only_when_shown(log):
    class DeviceArray:
        n_reads = 0

        def __float__(self):
            DeviceArray.n_reads += 1
            return 1.0

    with Progress(1000, console=log) as progress:
        for step in range(1, 1001):
            progress.update(step, DeviceArray(), 1.0, 1.0)
    assert DeviceArray.n_reads == 2


def test_an_update_that_is_not_due_is_cheap(log):
    with Progress(10_000, console=log) as progress:
        progress.update(1, 1.0, 1.0, 1.0)
        start_s = time.perf_counter()
        for step in range(2, 10_001):
            progress.update(step, 1.0, 1.0, 1.0)
        assert (time.perf_counter() - start_s) / 10_000 < 1e-4


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950.4, "950"), (999.9, "1.00k"), (12_345, "12.3k"), (999_999, "1.00M"), (2e9, "2.00G")],
)
def test_speeds_have_three_digits(number, text):
    assert progress_module._with_prefix(number) == text

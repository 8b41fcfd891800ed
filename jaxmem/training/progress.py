"""One line that says how a run is doing: steps, loss, bits per byte, speed, time to go.

On a terminal it is a live line under whatever else is printed; in a log it is a plain line now and then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as LiveProgress

from jaxmem import output

TERMINAL_INTERVAL_S = 0.25
LOG_INTERVAL_S = 10.0


class Progress:
    """The progress line of a run; a context manager.

    Args:
        total_steps: the step at which the run ends.
        start_step: the step it starts from, above 0 after a resume.
        console: where to print; None is standard output.
        on_closed: called once when nothing can be printed any more: `| head` has read enough, the terminal is gone, the
            disk of a log is full.

    >>> with Progress(total_steps=2) as progress:
    ...     progress.say("reading data")
    reading data
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        on_closed: Callable[[], None] = lambda: None,
    ):
        self._console = console or _Console()
        self._on_closed = on_closed
        self._total_steps = total_steps
        self._start_step = start_step
        self._first: tuple[float, int] | None = None  # time and step of the first update: compilation is behind us
        self._latest: tuple[int, SupportsFloat, SupportsFloat, SupportsFloat, Sequence[str]] | None = None
        self._is_shown = True
        self._due_s = -math.inf
        self._interval_s = TERMINAL_INTERVAL_S if self._console.is_terminal else LOG_INTERVAL_S
        self._live: LiveProgress | None = None
        self._closed = False

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            live = LiveProgress(
                TextColumn("{task.completed:,}/{task.total:,}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
                auto_refresh=False,
                expand=True,
            )
            self._task = live.add_task("", total=self._total_steps, completed=self._start_step, numbers="")
            self._live = live
            self._write(live.start)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_shown:
            self._show()
        if self._live is not None:
            self._write(self._live.stop)

    def update(
        self,
        step: int,
        loss: SupportsFloat,
        bits_per_byte: SupportsFloat,
        tokens_per_s: SupportsFloat,
        more: Sequence[str] = (),
    ) -> None:
        """Takes note of a finished step and shows it if the last one shown is old enough.

        Arrays on a device are waited for only when they are shown, so calling this after every step costs nothing.

        Args:
            step: optimiser steps taken so far.
            loss: nats per token.
            bits_per_byte: the loss in bits per byte of text.
            tokens_per_s: speed of the whole machine.
            more: what else is shown where there is room, what matters most first.
        """
        now_s = time.monotonic()
        if self._first is None:
            self._first = (now_s, step)
        self._latest = (step, loss, bits_per_byte, tokens_per_s, more)
        self._is_shown = False
        if now_s >= self._due_s:
            self._show()
            self._due_s = time.monotonic() + self._interval_s

    def say(self, text: str, always: bool = False) -> None:
        """Prints `text` on lines of its own: on a terminal above the progress line, in a log below the latest step.

        Args:
            always: say it on standard error if nobody reads standard output.
        """
        if self._live is None and not self._is_shown:
            self._show()
        self._print(text)
        if always and self._closed:
            output.complain(f"jaxmem: {text}")

    def _print(self, text: str) -> None:
        self._write(lambda: self._console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _write(self, write: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._console.file.closed:  # what a closed stream raises
                raise
            self._closed = True
            output.abandon()
            self._on_closed()

    def _show(self) -> None:
        step, loss, bits_per_byte, tokens_per_s, more = self._latest
        parts = [f"loss {float(loss):.4f}", f"ETA {self._time_to_go(step)}", f"{float(bits_per_byte):.3f} bits/byte"]
        parts += [f"{_with_prefix(float(tokens_per_s))} tokens/s", *more]
        if self._live is not None:  # one line, with a bar of eight columns at least
            room = self._console.width - len(f"{step:,}/{self._total_steps:,}") - 8
            fits = [sum(len(part) + 2 for part in parts[: n + 1]) <= room for n in range(len(parts))]
            parts = parts[: max(fits.count(True), 1)]
        numbers = "  ".join([parts[0], *parts[2:], *parts[1:2]])
        if self._live is not None:
            self._write(lambda: self._live.update(self._task, completed=step, numbers=numbers, refresh=True))
        else:
            self._print(f"step {step:,}/{self._total_steps:,}  {numbers}")
        self._is_shown = True

    def _time_to_go(self, step: int) -> str:
        """Hours, minutes and seconds at the mean speed since the first update, evaluations and checkpoints included."""
        first_s, first_step = self._first
        if step == self._total_steps:
            return "0:00:00"
        if step <= first_step:
            return "-:--:--"
        step_s = (time.monotonic() - first_s) / (step - first_step)
        return str(timedelta(seconds=round(step_s * (self._total_steps - step))))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called where the error was caught; rich's own would end the program there, with nothing saved."""
        raise


def _with_prefix(number: int | float) -> str:
    """Three digits and a prefix: 950, 12.3k, 4.56M."""
    number = float(f"{number:.3g}")
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:#.3g}".rstrip(".") + prefix
    return f"{number:g}"

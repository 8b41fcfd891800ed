"""What a command that compiles for minutes is doing, on standard error: one line that counts the seconds, or plain lines."""

import sys
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """A context in which `say` names what is being done now; where standard error is no terminal, with the seconds so far.

    >>> with Steps() as steps:
    ...     steps.say("compiling")
    """

    def __init__(self):
        console = Console(stderr=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self._began = time.monotonic()
        self._live = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = None

    def __enter__(self) -> "Steps":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        if self._live is None:
            print(f"[{time.monotonic() - self._began:.0f} s] {text}", file=sys.stderr, flush=True)
            return
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(text)

    def show(self, text: str) -> None:
        """A part of the result, on standard output."""
        if self._live is not None and sys.stdout.isatty():
            self._live.console.file.flush()
            self._live.stop()
        print(text, flush=True)
        if self._live is not None and sys.stdout.isatty():
            self._live.start()

"""Signals that ask a run to save and stop."""

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self):
        self.by: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes the first SIGTERM or Ctrl-C instead of dying of it; a second one acts as usual."""
    stop = Stop()
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        stop.by = signal.Signals(number)
        for noted, handler in usual.items():
            signal.signal(noted, handler)

    for number in usual:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)

"""What asks a run to save and stop: SIGTERM, SIGHUP, Ctrl-C, and a standard output that nobody reads any more."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
TERMINAL_GONE = getattr(signal, "SIGHUP", None)


class Stop:
    """Whether the run was asked to stop, and by what."""

    def __init__(self):
        self.by: signal.Signals | None = None
        self.output_closed = False

    def __bool__(self) -> bool:
        return self.by is not None or self.output_closed

    def __str__(self) -> str:
        if self.by is not None:
            return self.by.name
        return "standard output was closed" if self.output_closed else "another process's signal"

    def close_output(self) -> None:
        """Nobody reads standard output any more."""
        self.output_closed = True


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes the first signal instead of dying of it; a second one acts as usual.

    A signal that is ignored when the run starts stays ignored: SIGHUP under nohup, Ctrl-C in a script's background job. A
    second SIGHUP is ignored too, since a terminal that goes sends it more than once, and systemd behind its SIGTERM.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    usual = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def note(number, frame):
        stop.by = signal.Signals(number)
        for noted, handler in usual.items():
            signal.signal(noted, signal.SIG_IGN if noted == TERMINAL_GONE else handler)

    for number in usual:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)

"""What a step takes: wall seconds, and how long the device waited in them."""

import time


class Clock:
    """Wall seconds of each step, from when the one before was read, and how long the device had nothing to do in them."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """What happened since the last step does not count to the next."""
        self._last_read = time.perf_counter()
        self._waits: list[float] = []

    def dispatch(self, *, idle: bool) -> None:
        """A step is about to be dispatched; if the device is idle, all time since the last read counts as waiting."""
        self._waits.append(time.perf_counter() - self._last_read if idle else 0.0)

    def read(self) -> tuple[float, float]:
        """A step was read: its seconds, and those of them spent waiting, an upper bound."""
        now = time.perf_counter()
        step_s, self._last_read = now - self._last_read, now
        return step_s, min(self._waits.pop(0), step_s)

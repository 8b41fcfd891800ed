"""A trace of some steps of a run, for `xprof RUN/profile` (or TensorBoard's profile plugin) and for ui.perfetto.dev."""

import re
from pathlib import Path

import jax

PROFILE = "profile"


class Profile:
    """Traces the steps first..last of a run, each from before it is dispatched to when it is read.

    Raises: ValueError for steps that this run does not make.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, made: int, total: int):
        self._folder, self._first, self._last, self._traces = run_dir / PROFILE, 0, -1, False
        if steps is None:
            return
        self._first, self._last = steps
        if not made < self._first <= self._last <= total:
            raise ValueError(
                f"train: needs steps of this run to profile, of {made + 1}..{total}, got {steps[0]}..{steps[1]}; change them"
            )

    def begins_at(self, step: int) -> bool:
        return step == self._first

    def ends_at(self, step: int) -> bool:
        return step == self._last

    def begin(self) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._traces = True

    def end(self) -> str:
        """Also of a run that stops in the middle; returns what to tell."""
        if not self._traces:
            return ""
        jax.profiler.stop_trace()
        self._traces = False
        return f"profile of steps {self._first} to {self._last}: {self._folder}, for xprof"


def steps_to_profile(text: str) -> tuple[int, int]:
    """
    >>> steps_to_profile("10..12"), steps_to_profile("7")
    ((10, 12), (7, 7))
    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if found is None:
        raise ValueError(f"train: needs --profile to be a step or two, as 10..12, got {text!r}; change it")
    return int(found[1]), int(found[2] or found[1])

"""What the fields of a config may be: said once, by its annotation, and checked whenever a config is made.

    @dataclasses.dataclass(frozen=True)
    @checked
    class OwnConfig:
        width: Count
        kind: Literal["plain", "gated"] = "plain"
        dropout: Annotated[float, Bounds("[0, 1)")] | None = None

Checked are closed sets, kinds of numbers and their ranges, tuples and nested configs. What means the same is made the same:
a list where a tuple belongs, NumPy's numbers, whole floats such as 1e3 where integers belong.
"""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval in the notation of mathematics, for `Annotated[float, Bounds("[0, 1)")]`; nothing infinite is in it.

    >>> 0.5 in Bounds("(0, 1]"), 0 in Bounds("(0, 1]"), float("nan") in Bounds("(-inf, inf)")
    (True, False, False)
    >>> str(Bounds("[1, inf)")), str(Bounds("(0, 1]"))
    ('>= 1', 'in (0, 1]')
    """

    interval: str

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, number: float) -> bool:
        low, high = self.ends
        above = number >= low if self.interval[0] == "[" else number > low
        return math.isfinite(number) and above and (number <= high if self.interval[-1] == "]" else number < high)

    def __str__(self) -> str:
        low, high = self.interval[1:-1].split(",")
        if self.ends[1] < math.inf:
            return (
                f"in {self.interval}" if self.ends[0] > -math.inf else f"{'<' + '=' * (self.interval[-1] == ']')}{high}"
            )
        return f"{'>' + '=' * (self.interval[0] == '[')} {low}" if self.ends[0] > -math.inf else "that is finite"


Count = Annotated[int, Bounds("[1, inf)")]
Natural = Annotated[int, Bounds("[0, inf)")]
Seed = Annotated[int, Bounds("[0, 4294967296)")]
Finite = Annotated[float, Bounds("(-inf, inf)")]
Positive = Annotated[float, Bounds("(0, inf)")]
NonNegative = Annotated[float, Bounds("[0, inf)")]
Fraction = Annotated[float, Bounds("[0, 1]")]
Decay = Annotated[float, Bounds("[0, 1)")]

_Config = TypeVar("_Config")


def checked(cls: type[_Config]) -> type[_Config]:
    """Below `@dataclasses.dataclass(frozen=True)`: its fields are checked before its own `__post_init__`."""
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self):
        check_fields(self)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def check_fields(config: Any) -> None:
    """Raises ValueError for the first field whose value its annotation does not allow; brings the others into its form."""
    for name, kind in kinds(type(config)).items():
        value = getattr(config, name)
        fitted = check(f"{type(config).__name__}", name, value, kind)
        if fitted is not value:
            object.__setattr__(config, name, fitted)


def check(what: str, name: str, value: Any, kind: Any) -> Any:
    """`value` in the form that `kind` asks for.

    Raises: ValueError if it has none.

    >>> check("OptimizerConfig", "steps", 1e3, Count)
    1000
    """
    try:
        return fit(value, kind)
    except _Misfit as misfit:
        place, got = f"{name}{misfit.place}", misfit.value
        advice = _advice(got, misfit.kind)
        raise ValueError(
            f"{what}: needs {place} to be {describe(misfit.kind)}, got {place}={shown(got)}; {advice}"
        ) from None


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """The annotation of every field of a dataclass; none if they name what only the function that made it knows."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


class _Misfit(Exception):
    """A value, or a part of it, that is not of its kind."""

    def __init__(self, value: Any, kind: Any, place: str = ""):
        self.value, self.kind, self.place = value, kind, place


def fit(value: Any, kind: Any) -> Any:
    """`value` as `kind` has it; raises _Misfit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        try:
            fitted = fit(value, args[0])
        except _Misfit as misfit:
            raise _Misfit(misfit.value, kind if not misfit.place else misfit.kind, misfit.place) from None
        if not all(fitted in bounds for bounds in args[1:] if isinstance(bounds, Bounds)):
            raise _Misfit(value, kind)
        return fitted
    if origin in (Union, types.UnionType):
        return _fit_any(value, kind, args)
    if origin is Literal:
        if any(type(value) is type(known) and value == known for known in args):
            return value
        raise _Misfit(value, kind)
    if origin is tuple:
        return _fit_tuple(value, kind, args)
    if kind in _PLAIN:
        return _fit_plain(value, kind)
    if kind is Any:
        if isinstance(value, type):
            raise _Misfit(value, kind)
        return value
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        holds = callable(value)
    elif isinstance(origin or kind, type) and not getattr(kind, "_is_protocol", False):
        holds = isinstance(value, origin or kind)
    else:
        holds = True
    if not holds:
        raise _Misfit(value, kind)
    return value


_PLAIN = (bool, int, float, str, types.NoneType)


def _fit_plain(value: Any, kind: type) -> Any:
    is_bool = isinstance(value, bool | np.bool_)
    if kind is types.NoneType and value is None:
        return None
    if kind is bool and is_bool:
        return bool(value)
    if kind is str and isinstance(value, str):
        return value
    is_number = isinstance(value, numbers.Real) and not is_bool
    if kind is int and is_number and abs(value) < 2**63 and int(value) == value:
        return value if type(value) is int else int(value)
    if kind is float and is_number:
        with contextlib.suppress(OverflowError):  # 10**400
            return value if type(value) is float else float(value)
    raise _Misfit(value, kind)


def _fit_any(value: Any, kind: Any, args: tuple[Any, ...]) -> Any:
    """`value` as the first of several kinds that takes it."""
    if value is None and types.NoneType in args:
        return None
    inside = None
    for arm in args:
        try:
            return fit(value, arm)
        except _Misfit as misfit:
            inside = misfit if misfit.place else inside
    raise inside or _Misfit(value, kind)


def _fit_tuple(value: Any, kind: Any, args: tuple[Any, ...]) -> tuple:
    if not isinstance(value, tuple | list):
        raise _Misfit(value, kind)
    items = args[:1] * len(value) if args[-1:] == (...,) else args
    if len(items) != len(value):
        raise _Misfit(value, kind)
    if len(value) > 64 and all(type(item) is int for item in value) and args[-1:] == (...,):
        for item in (min(value), max(value)):  # a routing has an entry for every word
            try:
                fit(item, args[0])
            except _Misfit as misfit:
                raise _Misfit(item, misfit.kind, f"[{value.index(item)}]") from None
        return tuple(value)
    fitted = []
    for i, (item, of) in enumerate(zip(value, items, strict=True)):
        try:
            fitted.append(fit(item, of))
        except _Misfit as misfit:
            raise _Misfit(misfit.value, misfit.kind, f"[{i}]{misfit.place}") from None
    same = isinstance(value, tuple) and all(a is b for a, b in zip(value, fitted, strict=True))
    return value if same else tuple(fitted)


def describe(kind: Any) -> str:
    """A kind in words.

    >>> describe(Count | None), describe(Literal["a", "b"]), describe(tuple[str, ...])
    ('an integer >= 1 or None', 'one of a, b', 'a tuple of strings')
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return " ".join([describe(args[0]), *(str(bounds) for bounds in args[1:] if isinstance(bounds, Bounds))])
    if origin in (Union, types.UnionType):
        words = [describe(arm) for arm in args if arm is not types.NoneType]
        return " or ".join(words + ["None"] * (types.NoneType in args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        words = describe(args[0]).removeprefix("an ").removeprefix("a ")
        plural = {"number": "numbers", "integer": "integers", "string": "strings", "instance": "instances"}
        return f"a tuple of {' '.join(plural.get(word, word) for word in words.split())}"
    known = {bool: "True or False", int: "an integer", float: "a number", str: "a string", Any: "an instance"}
    if kind in known or kind is types.NoneType:
        return known.get(kind, "None")
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return "a function"
    if issubclass(origin or kind, Mapping):
        return "a dict"
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _advice(value: Any, kind: Any) -> str:
    args = typing.get_args(kind)
    choices = [choice for arm in (kind, *args) if typing.get_origin(arm) is Literal for choice in typing.get_args(arm)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, map(str, choices), 1)):
        return f"did you mean {near[0]}?"
    if isinstance(value, type) and value.__name__ in choices:  # jnp.bfloat16
        return f"write {value.__name__!r}"
    if isinstance(value, type) and value not in _PLAIN:
        return f"write {value.__name__}(...)"
    for arm in (kind, *args):
        if typing.get_origin(arm) is tuple and not isinstance(value, tuple | list | type):
            try:
                fit((value,), arm)
            except _Misfit:
                continue
            shown = repr(value) if isinstance(value, str) else f"{type(value).__name__}(...)"
            return f"write ({shown},)" if dataclasses.is_dataclass(value) or isinstance(value, str) else "write a tuple"
    return "change it"


def shown(value: Any) -> str:
    """`value` as an error shows it: on one line, and not much of it."""
    if isinstance(value, type) or inspect.isroutine(value):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    try:
        text = repr(value)
    except Exception:
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."

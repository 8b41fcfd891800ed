"""Configs as JSON: frozen dataclasses out and in, so that a run's folder says exactly what was run.

Every dataclass is written as an object with its qualified name under "type". Reading takes classes from jaxmem and from
modules that the program has imported already; it imports no others, since a file may come from anywhere.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class UnknownClass(ValueError):
    """A config names a class that is neither in jaxmem nor in a module that was imported."""

    def __init__(self, name: str):
        super().__init__(
            f"config: needs the name of a config class, got {name!r}; import the module that defines it first, "
            "or use the version of jaxmem that wrote the file"
        )
        self.name = name


def to_json(config: Any) -> Any:
    """A config as dicts, lists and plain values.

    >>> from jaxmem.sharding.attention import Scheme
    >>> to_json(Scheme("ring", ulysses=2))
    {'type': 'jaxmem.sharding.attention.Scheme', 'keys': 'ring', 'ulysses': 2}
    """
    if dataclasses.is_dataclass(config):
        if "<locals>" in type(config).__qualname__:
            raise ValueError(
                f"config: needs classes that a file can name, got {type(config).__qualname__}; move it out of the function"
            )
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{type(config).__module__}.{type(config).__qualname__}"} | fields
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ValueError(f"config: needs plain values, tuples and dataclasses, got {config!r}; change that field's type")


def from_json(data: Any, own: Sequence[ModuleType] = ()) -> Any:
    """The config that `to_json` wrote; lists come back as tuples.

    Args:
      own: modules in which to look for classes that are not where they were, as in a file that has another name now; what
        they import from jaxmem is not meant.

    Raises:
      UnknownClass: a class that cannot be found.
      ValueError: fields that a class does not have, that it needs, or whose values it does not take.
    """
    if isinstance(data, list):
        return tuple(from_json(item, own) for item in data)
    if not isinstance(data, dict):
        return data
    cls = _find_class(data.get("type", "(nothing)"), own)
    fields = {name: from_json(value, own) for name, value in data.items() if name != "type"}
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := fields.keys() - known.keys():
        raise ValueError(f"config: needs fields of {cls.__name__}, got {', '.join(sorted(unknown))}; {_OTHER_VERSION}")
    if missing := [name for name, f in known.items() if _is_required(f) and name not in fields]:
        raise ValueError(f"config: needs values for {', '.join(missing)} of {cls.__name__}, got none; {_OTHER_VERSION}")
    try:
        return cls(**fields)
    except (TypeError, AttributeError) as error:  # a text where its checks need a number
        raise ValueError(
            f"config: needs values that {cls.__name__} takes, got some that it does not ({error}); the file was changed"
        ) from error


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """What a file holds that must be a JSON object.

    Args:
      advice: what to do if it is none.

    Raises: ValueError, with the name of the file, for one that is missing, empty, cut, or holds something else.
    """
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
    except OSError as error:
        got = f"none ({error.strerror})"
    except (ValueError, RecursionError) as error:
        got = f"other text ({error})" if raw.strip() else "an empty file"
    else:
        if isinstance(data, dict):
            return data
        got = f"a {type(data).__name__}"
    raise ValueError(f"run: needs a JSON object in {path}, got {got}; {advice}")


_OTHER_VERSION = "the file was written by another version of jaxmem, use that one"


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _find_class(name: Any, own: Sequence[ModuleType]) -> type:
    """`name` is "module.Class" or "module.Outer.Inner", the module itself of one part or more."""
    parts = name.split(".") if isinstance(name, str) else [""]
    for n in range(len(parts) - 1, 0, -1):
        there = _module(".".join(parts[:n]))
        for module in (there, *own):
            found = module
            for part in parts[n:]:
                found = getattr(found, part, None)
            is_meant = module is there or not _is_jaxmem(getattr(found, "__module__", ""))
            if isinstance(found, type) and dataclasses.is_dataclass(found) and is_meant:
                return found
    raise UnknownClass(str(name))


def _is_jaxmem(module: str) -> bool:
    return module == "jaxmem" or module.startswith("jaxmem.")


def _module(name: str) -> ModuleType | None:
    if _is_jaxmem(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return None
    return sys.modules.get(name)

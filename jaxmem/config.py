"""Configs as JSON: frozen dataclasses out and in, so that a run's folder says exactly what was run.

Every dataclass is written as an object with its qualified name under "type"; reading needs that class to be importable
from jaxmem or from a module that the program has imported already.
"""

import dataclasses
import importlib
import sys
from typing import Any


def to_json(config: Any) -> Any:
    """A config as dicts, lists and plain values.

    >>> from jaxmem.sharding.attention import Scheme
    >>> to_json(Scheme("ring", ulysses=2))
    {'type': 'jaxmem.sharding.attention.Scheme', 'keys': 'ring', 'ulysses': 2}
    """
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{type(config).__module__}.{type(config).__qualname__}"} | fields
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ValueError(f"config: needs plain values, tuples and dataclasses, got {config!r}; change that field's type")


def from_json(data: Any) -> Any:
    """The config that `to_json` wrote; lists come back as tuples.

    Raises: ValueError for a class that cannot be found, fields that it does not have, and fields that it needs.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    cls = _find_class(data.get("type", "(nothing)"))
    fields = {name: from_json(value) for name, value in data.items() if name != "type"}
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := fields.keys() - known.keys():
        raise ValueError(f"config: needs fields of {cls.__name__}, got {', '.join(sorted(unknown))}; {_OTHER_VERSION}")
    if missing := [name for name, f in known.items() if _is_required(f) and name not in fields]:
        raise ValueError(f"config: needs values for {', '.join(missing)} of {cls.__name__}, got none; {_OTHER_VERSION}")
    return cls(**fields)


_OTHER_VERSION = "the file was written by another version of jaxmem, use that one"


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _find_class(name: str) -> type:
    module_name, _, class_name = name.rpartition(".")
    if module_name == "jaxmem" or module_name.startswith("jaxmem."):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            module = None
    else:
        module = sys.modules.get(module_name)
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(
            f"config: needs the name of a config class, got {name!r}; import the module that defines it first, "
            "or use the version of jaxmem that wrote the file"
        )
    return cls

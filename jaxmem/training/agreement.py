"""What all processes of a run must have in common, compared before the first of them waits for another's numbers.

Processes that differ would train on without a word, or abort in an exchange of arrays of other shapes.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

import jaxmem
from jaxmem.checkpoints import complete_steps
from jaxmem.config import to_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_JAX_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_DAY_MS = 86_400_000  # a process that dies meanwhile ends the others
_MOST_SHOWN = 5
_rounds = itertools.count()


class Disagreement(ValueError):
    """Processes of one run that differ; each of them raises it with the same message."""


def agree(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Returns when all processes have called this with the same facts; one process alone always agrees.

    Args:
      facts: called where there are several: JSON values by name, in the order in which to tell of them.

    Raises: Disagreement, which names what differs and on which processes.
    """
    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    key = f"jaxmem/facts/{next(_rounds)}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(facts()))
    texts = [state.client.blocking_key_value_get(f"{key}/{n}", _DAY_MS) for n in range(state.num_processes)]
    if lines := differences([json.loads(text) for text in texts]):
        more = f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
        raise Disagreement(
            f"train: needs the same on all {len(texts)} processes, got {'; '.join(lines[:_MOST_SHOWN])}{more}; "
            "start all of them with the same experiment, options, data and code"
        )


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each fact that is not the same on every process.

    >>> differences([{"seed": 0, "lr": 1.0}, {"seed": 0, "lr": 2.0}, {"seed": 0, "lr": 1.0}])
    ['lr: 1.0 on processes 0, 2 and 2.0 on process 1']
    """
    lines = []
    for name in dict.fromkeys(name for one in facts for name in one):
        held: dict[str, list[int]] = {}
        for process, one in enumerate(facts):
            held.setdefault(repr(one[name]) if name in one else "nothing", []).append(process)
        if len(held) > 1:
            on = [f"{value} on process{'es' * (len(at) > 1)} {', '.join(map(str, at))}" for value, at in held.items()]
            lines.append(f"{name}: {' and '.join(on)}")
    return lines


def run_facts(config: Any, run_dir: Path, resume: bool) -> dict[str, Any]:
    """All that decides a run but its text, which takes time to read: config, folder, versions and code."""
    folder = {
        "--resume": resume,
        "--out": str(run_dir),
        "checkpoints of the run": complete_steps(run_dir / "checkpoints"),
    }
    devices = {"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"}
    versions = {"jaxmem": jaxmem.__version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    options = {name: str(getattr(jax.config, name, None)) for name in _JAX_OPTIONS}
    return {**dict(_flat("config", to_json(config))), **folder, **versions, **options, **devices, **_code(config)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested configs by the names of their options.

    >>> list(_flat("config", {"type": "T", "model": {"pattern": [{"width": 8}, "mlp"]}}))
    [('config.type', 'T'), ('config.model.pattern.0.width', 8), ('config.model.pattern.1', 'mlp')]
    """
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _code(config: Any) -> dict[str, str]:
    """A digest of each file of jaxmem, and of those that define other classes of the config."""
    root = Path(jaxmem.__file__).parent
    files = {f"code of jaxmem/{path.relative_to(root)}": path for path in sorted(root.rglob("*.py"))}
    for cls in _classes(config):
        if not cls.__module__.startswith("jaxmem."):
            files[f"code of {cls.__module__}"] = Path(inspect.getsourcefile(cls) or root / "__init__.py")
    return {name: hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() for name, path in files.items()}


def _classes(config: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(config):
        yield type(config)
        for field in dataclasses.fields(config):
            yield from _classes(getattr(config, field.name))
    elif isinstance(config, tuple | list):
        for item in config:
            yield from _classes(item)

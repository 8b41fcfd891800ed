"""What the benchmarks share: fair timing of several functions in one run, and a line that says where."""

import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax


def interleaved_ms(functions: dict[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, float]:
    """Median milliseconds of each function, run in turns so that noise meets all alike; of `calls` in a row, all but the last
    of which nobody waits for.

    Each is called once more before it is timed: what ran before it may have emptied caches and given memory back.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            began = time.perf_counter()
            jax.block_until_ready([function() for _ in range(calls)][-1])
            times[name].append(1e3 * (time.perf_counter() - began) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def where() -> str:
    """Device, machine and versions."""
    device = jax.devices()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "numpy"))
    machine = f"{jax.device_count()} x {device.device_kind} ({platform.machine()})"
    return f"{machine}, Python {platform.python_version()}, {packages}"

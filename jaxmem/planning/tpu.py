"""TPUs that are not here: the compiler of the libtpu package, and devices of a topology to compile for."""

import difflib
import importlib.util
import math
import os

import jax
from jax.experimental import topologies

from jaxmem.sharding.device_order import wraps

ONE_HOST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each generation that kernels are made for."""
GENERATIONS = {"v4": "v4:2x2x1"} | ONE_HOST

_SQUARES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip

SLICES = {
    **{f"v5litepod-{n}": f"v5e:{sizes}" for n, sizes in _SQUARES.items()},
    **{f"v6e-{n}": f"v6e:{sizes}" for n, sizes in _SQUARES.items()},
    **{f"{kind}-{2 * n}": f"{kind}:{sizes}" for kind in ("v4", "v5p", "tpu7x") for n, sizes in _CUBES.items()},
}
"""What clouds call a slice -> its topology where no other is asked for. The number counts chips of v5e and v6e, and
TensorCores, two per chip, of the others (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x)."""


def environment() -> dict[str, str]:
    """What a process that compiles for TPUs needs in its environment before it imports JAX.

    Raises: RuntimeError without the libtpu package.
    """
    found = importlib.util.find_spec("libtpu")
    if found is None:
        raise RuntimeError("tpu compiler: needs the package libtpu, got none; pip install 'jaxmem[tpu-compiler]'")
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LIBRARY_PATH": os.path.join(next(iter(found.submodule_search_locations)), "libtpu.so"),
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def use_compiler() -> None:
    """Lets this process compile for TPUs; to be called before anything has run on a device.

    Raises: RuntimeError without the libtpu package.
    """
    os.environ.update(environment())
    jax.config.update("jax_platforms", "cpu")


def full_name(topology: str) -> str:
    """Of a topology such as "v5p:4x4x4", of a slice as clouds name it such as "v5p-128", or of the smallest of a generation.

    Raises: ValueError for a name that is none of these, with names like it.

    >>> full_name("v6e"), full_name("v5p:4x4x4"), full_name("v5p-128"), full_name("v5litepod-16")
    ('v6e:2x2', 'v5p:4x4x4', 'v5p:4x4x4', 'v5e:4x4')
    """
    name = GENERATIONS.get(topology) or SLICES.get(topology, topology)
    generation, _, sizes = name.partition(":")
    dims = [int(size) if size.isdecimal() else 0 for size in sizes.split("x")]
    if generation in GENERATIONS and all(dims) and len(dims) == len(GENERATIONS[generation].split(":")[1].split("x")):
        return name
    clouds = topology.replace("v5e-", "v5litepod-")
    if clouds in SLICES:
        return SLICES[clouds]
    near = difflib.get_close_matches(topology, [*GENERATIONS, *SLICES, *SLICES.values()], 3, cutoff=0.6)
    raise ValueError(
        f"tpu topology: needs one of {', '.join(GENERATIONS)}, such a name with sizes, e.g. v5p:4x4x4 or v6e:4x8, or that of "
        f"a slice, e.g. v5litepod-16, got {topology!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else "change it")
    )


def count_devices(topology: str) -> int:
    """Of a topology: JAX sees two on a chip of tpu7x, one on others.

    >>> count_devices("v5p-128"), count_devices("tpu7x:2x2x1")
    (64, 8)
    """
    generation, _, sizes = full_name(topology).partition(":")
    return math.prod(map(int, sizes.split("x"))) * (2 if generation == "tpu7x" else 1)


def devices(topology: str) -> list[jax.Device]:
    """Of a topology as `full_name` takes it; links wrapped as they really are.

    Raises: ValueError for another name.
    """
    name = full_name(topology)
    dims = [int(size) for size in name.partition(":")[2].split("x")]
    wrap = (*wraps(dims, flat=len(dims) == 2), False)[:3]
    chip = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, wrap=wrap, **chip).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"tpu topology: needs one that libtpu knows, got {topology!r} ({str(error).splitlines()[0]}); change its sizes"
        ) from error

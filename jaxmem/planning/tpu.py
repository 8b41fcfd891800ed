"""TPUs that are not here: the compiler of the libtpu package, and devices of a topology to compile for."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from jaxmem.sharding.device_order import wraps

ONE_HOST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each generation."""


def environment() -> dict[str, str]:
    """What a process that compiles for TPUs needs in its environment before it imports JAX.

    Raises: RuntimeError without the libtpu package.
    """
    found = importlib.util.find_spec("libtpu")
    if found is None:
        raise RuntimeError("tpu compiler: needs the package libtpu, got none; pip install libtpu")
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
    """Of a topology such as "v5p:4x4x4", or of the smallest of a generation such as "v5p".

    Raises: ValueError for a name that is neither.

    >>> full_name("v6e"), full_name("v5p:4x4x4")
    ('v6e:2x2', 'v5p:4x4x4')
    """
    name = ONE_HOST.get(topology, topology)
    generation, _, sizes = name.partition(":")
    if generation not in ONE_HOST or not all(size.isdigit() for size in sizes.split("x")):
        raise ValueError(
            f"tpu topology: needs one of {', '.join(ONE_HOST)} or such a name with sizes, e.g. v5p:4x4x4, "
            f"got {topology!r}; change it"
        )
    return name


def devices(topology: str) -> list[jax.Device]:
    """Of a topology as `full_name` takes it; links wrapped as they really are.

    Raises: ValueError for another name.
    """
    name = full_name(topology)
    dims = [int(size) for size in name.partition(":")[2].split("x")]
    wrap = (*wraps(dims, flat=len(dims) == 2), False)[:3]
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, wrap=wrap).devices)

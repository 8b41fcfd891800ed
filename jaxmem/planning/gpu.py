"""NVIDIA GPUs that are not here: the compiler of JAX's CUDA plugin, and devices of a topology to compile for.

Needs `pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin` of jax's own version, and nvidia-cuda-runtime-cu12 and
nvidia-cuda-nvcc-cu12 for the last step from PTX to machine code. No driver.
"""

import dataclasses
import importlib.util

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """What XLA's compiler asks of a GPU."""

    name: str
    capability: tuple[int, int]
    n_cores: int
    """Streaming multiprocessors."""
    clock_ghz: float
    shared_bytes: int
    """Shared memory of a core."""
    program_bytes: int
    """The most of it for one program."""
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: int


CHIPS = {
    "sm_80": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 167936, 166912, 40 * 2**20, 80 * 2**30, 2039 * 10**9),
    "sm_90": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 233472, 232448, 50 * 2**20, 80 * 2**30, 3352 * 10**9),
}


def environment() -> dict[str, str]:
    """What a process that compiles for GPUs needs in its environment before it imports JAX.

    Raises: RuntimeError without JAX's CUDA plugin.
    """
    packages = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, packages)):
        raise RuntimeError(
            "gpu compiler: needs JAX's CUDA plugin, got none; "
            "pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin of jax's version"
        )
    return {"JAX_PLATFORMS": "cpu"}


def devices(chip: str, topology: str = "1x1x1") -> list[jax.Device]:
    """Of a chip such as "sm_90"; topology is slices x hosts x GPUs of a host.

    Raises: ValueError for another chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"gpu: needs one of {', '.join(CHIPS)}, got {chip!r}; change it")
    return list(
        topologies.get_topology_desc(platform="cuda", target_config=target(CHIPS[chip]), topology=topology).devices
    )


def target(chip: Chip) -> str:
    """XLA's description of a GPU, a GpuTargetConfigProto in text."""
    major, minor = chip.capability
    limits = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": chip.shared_bytes, "shared_memory_per_block_optin": chip.program_bytes,
        "threads_per_core_limit": 2048, "core_count": chip.n_cores, "fpus_per_core": 128 if major >= 9 else 64,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": chip.memory_bytes_per_s, "l2_cache_size": chip.l2_bytes, "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": chip.memory_bytes, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    }  # fmt: skip
    numbers = " ".join(f"{name}: {value}" for name, value in limits.items())
    return (
        f"gpu_device_info {{ {numbers} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 7 }\nruntime_version { major: 12 minor: 8 }\n'
        f'device_description_str: "{chip.name}"'
    )

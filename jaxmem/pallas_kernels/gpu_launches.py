"""How attention's GPU kernels are cut into programs: tokens of a block, warps, and loads that are on their way."""

from typing import NamedTuple


class Launch(NamedTuple):
    """How a kernel is cut into programs."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    """Blocks of the other side that are on their way."""


LAUNCHES = {
    2: {
        64: {"forward": Launch(128, 64, 8, 3), "dq": Launch(64, 64, 4, 3), "dkv": Launch(64, 64, 4, 3)},
        128: {"forward": Launch(128, 64, 8, 3), "dq": Launch(128, 64, 8, 3), "dkv": Launch(64, 64, 4, 2)},
        192: {"forward": Launch(64, 32, 4, 2), "dq": Launch(64, 32, 4, 3), "dkv": Launch(32, 128, 8, 2)},
        256: {"forward": Launch(64, 32, 4, 3), "dq": Launch(64, 32, 4, 3), "dkv": Launch(64, 64, 8, 2)},
        512: {"forward": Launch(64, 32, 8, 1), "dq": Launch(32, 32, 8, 1), "dkv": Launch(32, 32, 8, 1)},
    },
    4: {
        64: {"forward": Launch(64, 64, 8, 2), "dq": Launch(64, 64, 8, 2), "dkv": Launch(64, 64, 8, 2)},
        128: {"forward": Launch(32, 32, 4, 2), "dq": Launch(32, 32, 4, 2), "dkv": Launch(64, 32, 8, 2)},
        256: {"forward": Launch(64, 32, 8, 1), "dq": Launch(32, 32, 8, 1), "dkv": Launch(32, 32, 8, 1)},
        512: {"forward": Launch(32, 16, 8, 1), "dq": Launch(16, 16, 8, 1), "dkv": Launch(16, 16, 8, 1)},
    },
}
"""Of bytes per number and widths of heads up to some: the fastest of a few on an H200 with jax 0.11.2; beyond 256 wide, in 32
bits beyond 128, the largest blocks tried that spill next to no registers on sm_90. All fit in the shared memory of sm_80,
163 KiB (`jaxmem kernels --gpu`)."""


def default_launch(kernel: str, width: int, itemsize: int) -> Launch:
    """Of "forward", "dq" or "dkv", for heads of that width; beyond the widest of `LAUNCHES`, as for that one."""
    of_widths = LAUNCHES[2 if itemsize <= 2 else 4]
    return of_widths[min((w for w in of_widths if w >= width), default=max(of_widths))][kernel]


def decode_launch(rows: int, width: int, itemsize: int) -> Launch:
    """Of decoding with so many rows per kv head: its programs read keys and do little else."""
    block_k = max(16, min(128, 2**14 // (width * itemsize)))  # 16 KiB of keys
    return Launch(rows, 1 << block_k.bit_length() - 1, 4 if rows < 64 else 8, 3)

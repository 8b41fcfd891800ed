"""What a table on disk is made of: arrays, their chunks, and what rows read as before they are written."""

import contextlib
import dataclasses
import json
import math
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmem.fields import Count, Finite, NonNegative, Seed, checked
from jaxmem.typing import Bool, Float, Int, Shaped

CHUNK_BYTES = 4096
"""For scattered rows of 1 KiB of a table of 128 MiB, larger chunks read no faster and write 14 times the rows' bytes at 16
KiB, 41 times at 64; chunks of one row read whole tables five times slower."""
_NEVER_WRITTEN = {"float32": 0x7FA5A5A5, "float16": 0x7D5A, "bfloat16": 0x7FA5}
"""A signalling NaN, which arithmetic never makes: what stands in rows to be drawn."""
DTYPES = (*_NEVER_WRITTEN, "int8", "uint8", "int32", "uint32")


@dataclasses.dataclass(frozen=True)
@checked
class RowArray:
    """One array of a table.

    Raises: ValueError for a width below 1, an unknown dtype, or numbers to be drawn in a dtype of integers.
    """

    width: Count
    dtype: str = "float32"
    fill: Finite = 0.0
    """What never-written rows read as."""
    stddev: NonNegative | None = None
    """Of the normal numbers that they read as instead; None: `fill`."""
    seed: Seed = 0

    def __post_init__(self):
        known = DTYPES if self.stddev is None else tuple(_NEVER_WRITTEN)
        if self.dtype not in known:
            drawn = "" if self.stddev is None else " in rows that begin as drawn numbers"
            raise ValueError(
                f"table: needs dtype to be one of {', '.join(known)}{drawn}, got dtype={self.dtype!r}; change it"
            )

    @property
    def row_bytes(self) -> int:
        return self.width * jnp.dtype(self.dtype).itemsize

    @property
    def chunk_rows(self) -> int:
        return max(1, CHUNK_BYTES // self.row_bytes)


class TableInfo(NamedTuple):
    n_rows: int
    arrays: dict[str, RowArray]
    n_chunks: int
    """That were ever written."""
    live_bytes: int
    """Of the newest version."""
    disk_bytes: int
    """Of all that are kept, and of what waits to be deleted."""
    steps: list[int]
    n_versions: int

    def __str__(self) -> str:
        lines = [f"{self.n_rows:,} rows"]
        for name, array in self.arrays.items():
            new = (
                f"{array.fill:g}"
                if array.stddev is None
                else f"normal, deviation {array.stddev:.3g}, seed {array.seed}"
            )
            shape = f"{array.dtype}[{self.n_rows}, {array.width}]"
            lines.append(f"{name}: {shape}, {array.chunk_rows} rows a chunk, new rows: {new}")
        lines.append(f"{self.n_chunks:,} chunks written, {self.live_bytes:,} bytes; {self.disk_bytes:,} bytes on disk")
        steps = ", ".join(map(str, self.steps)) or "none"
        return "\n".join([*lines, f"steps: {steps} ({self.n_versions} versions)"])


def initial_rows(array: RowArray, rows: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n width"]:
    """What rows to be drawn read as: normal numbers of Philox blocks that belong to the row, by Box and Muller's method.

    >>> array = RowArray(3, stddev=1.0, seed=5)
    >>> bool(np.all(initial_rows(array, np.arange(9))[[7, 2]] == initial_rows(array, np.array([7, 2]))))
    True
    """
    n_numbers = array.width + array.width % 2
    n_blocks = -(-n_numbers // 4)
    order = np.argsort(rows, kind="stable")
    ascending = np.asarray(rows)[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-2) != 1)
    generator, reached, bits = np.random.Philox(key=array.seed), 0, np.empty((len(rows), n_blocks * 4), np.uint64)
    for start, end in zip(starts, (*starts[1:], len(rows))):
        n_ahead = int(ascending[start]) - reached
        generator.advance(n_ahead * n_blocks % 2**256)
        bits[start:end] = generator.random_raw((end - start) * n_blocks * 4).reshape(end - start, -1)
        reached = int(ascending[end - 1]) + 1
    uniform = ((bits[:, :n_numbers] >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, ::2])), 2 * math.pi * uniform[:, 1::2]
    normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(len(rows), n_numbers)
    drawn = np.empty((len(rows), array.width), jnp.dtype(array.dtype))
    drawn[order] = (array.stddev * normal[:, : array.width]).astype(drawn.dtype)
    return drawn


def is_mark(x: Shaped[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
    """Where a number stands for one that is to be drawn."""
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    return bits == _NEVER_WRITTEN[str(x.dtype)]


def zarr_spec(array: RowArray, n_rows: int) -> dict[str, Any]:
    """For TensorStore, which needs to know where besides."""
    mark = None if array.stddev is None else hex(_NEVER_WRITTEN[array.dtype])
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": [n_rows, array.width],
            "data_type": array.dtype,
            "fill_value": array.fill if mark is None else mark,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [array.chunk_rows, array.width]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }


def sealed(about: dict[str, Any]) -> bytes:
    """JSON, which keeps its order, with its CRC-32."""
    text = json.dumps(about)
    return json.dumps({"about": about, "crc32": zlib.crc32(text.encode())}).encode()


def unsealed(text: bytes) -> dict[str, Any] | None:
    """What was sealed; None if anything of it has changed."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        about = json.loads(text)["about"]
        return about if sealed(about) == text else None

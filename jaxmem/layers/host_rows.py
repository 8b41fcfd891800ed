"""Where the rows of a table are that is not on the device: what an `OffloadedTable` asks of it, and arrays of host memory."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxmem.typing import Int


@runtime_checkable
class Rows(Protocol):
    """Where the rows of a table are; `HostRows`, or `DiskRows` of `jaxmem.checkpoints`."""

    n_rows: int

    def like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape [width] and dtype of a row of each array."""

    def read(self, rows: Int[np.ndarray, "n"]) -> dict[str, np.ndarray]:
        """Of all arrays; may be called by a thread."""

    def write(self, rows: Int[np.ndarray, "n"], arrays: dict[str, np.ndarray]) -> None:
        """Of all arrays."""


def row_numbers(rows: Any, n_rows: int, what: str) -> Int[np.ndarray, "..."]:
    """Numbers of rows as int64.

    Raises: ValueError for a mask, for floats, and for numbers that are no row's.

    >>> row_numbers([3, 0], 4, "table").tolist()
    [3, 0]
    """
    numbers = np.asarray(rows if hasattr(rows, "__array__") or isinstance(rows, list | tuple) else list(rows))
    if not numbers.size:
        return numbers.astype(np.int64)
    if numbers.dtype.kind not in "iu":
        raise ValueError(
            f"{what}: needs the numbers of rows as integers, got {numbers.dtype}{list(numbers.shape)}; "
            + ("use np.flatnonzero(mask)" if numbers.dtype == bool else "convert them")
        )
    if numbers.min() < 0 or numbers.max() >= n_rows:
        raise ValueError(
            f"{what}: needs rows in 0..{n_rows - 1}, got {numbers.min()}..{numbers.max()}; grow the table, or change them"
        )
    return numbers.astype(np.int64)


class HostRows:
    """Arrays of host memory, `np.memmap` too, which are written in place."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        """Raises: ValueError for arrays that have not all as many rows."""
        if len({len(array) for array in arrays.values()}) != 1:
            lengths = {name: len(array) for name, array in arrays.items()}
            raise ValueError(f"offloaded table: needs arrays of as many rows, got {lengths}; change them")
        self.arrays, self.n_rows = arrays, len(next(iter(arrays.values())))

    def like(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in self.arrays.items()}

    def read(self, rows: Int[np.ndarray, "n"]) -> dict[str, np.ndarray]:
        rows = row_numbers(rows, self.n_rows, "offloaded table")
        return {name: array[rows] for name, array in self.arrays.items()}

    def write(self, rows: Int[np.ndarray, "n"], arrays: dict[str, np.ndarray]) -> None:
        rows = row_numbers(rows, self.n_rows, "offloaded table")
        for name, array in arrays.items():
            self.arrays[name][rows] = array

"""Where the rows of a table are that is not on the device: what an `OffloadedTable` asks of it, and arrays of host memory."""

from typing import Protocol, runtime_checkable

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
        return {name: array[rows] for name, array in self.arrays.items()}

    def write(self, rows: Int[np.ndarray, "n"], arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            self.arrays[name][rows] = array

"""A table on disk as the place of an `OffloadedTable`'s rows: read row by row, written as one step when that is saved."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.checkpoints.table_store import TableStore
from jaxmem.layers.host_rows import row_numbers
from jaxmem.typing import Int


class DiskRows:
    """The arrays of a `TableStore`; rows written since the last step are in host memory, and nothing of them on disk.

    So a kill between steps leaves the last step. To go on from it: `store.rewind(step)`, and a new cache.

    In a run:

        disk = DiskRows(TableStore(directory))
        table = OffloadedTable(disk, n_slots=2**16)
        ...
        cache = table.flush(cache)
        disk.save(step, keep_last=3)
    """

    def __init__(self, store: TableStore | str | os.PathLike):
        self.store = store if isinstance(store, TableStore) else TableStore(store)
        self._lock = threading.Lock()
        self._forget()

    @property
    def n_rows(self) -> int:
        return self.store.n_rows

    def like(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = self.store.arrays
        return {name: jax.ShapeDtypeStruct((array.width,), jnp.dtype(array.dtype)) for name, array in arrays.items()}

    def read(self, rows: Int[np.ndarray, "n"]) -> dict[str, np.ndarray]:
        """Raises: CheckpointError for a damaged chunk."""
        rows = row_numbers(rows, self.n_rows, f"table {self.store.directory}")
        with self._lock:
            places = np.array([self._places.get(row, -1) for row in rows.tolist()], np.int64)
            unsaved = places >= 0
            read = {name: self.store.read(name, rows[~unsaved]) for name in self._buffers}
            if not unsaved.any():
                return read
            found = {}
            for name, buffer in self._buffers.items():
                found[name] = np.empty((len(rows), buffer.shape[1]), buffer.dtype)
                found[name][unsaved], found[name][~unsaved] = buffer[places[unsaved]], read[name]
            return found

    def write(self, rows: Int[np.ndarray, "n"], arrays: dict[str, np.ndarray]) -> None:
        """In host memory, until `save`.

        Raises: ValueError for rows or arrays that could not be saved, all of which are needed; nothing is written then.
        """
        rows = row_numbers(rows, self.n_rows, f"table {self.store.directory}")
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.store.expect(arrays)
        lengths = {name: len(arrays[name]) if name in arrays else 0 for name in self._buffers}
        if set(lengths.values()) != {len(rows)} or len(np.unique(rows)) < len(rows):
            raise ValueError(
                f"table {self.store.directory}: needs each row once, and {len(rows)} rows of all arrays, "
                f"got {lengths}; pass them"
            )
        with self._lock:
            places = np.array([self._places.setdefault(row, len(self._places)) for row in rows.tolist()], np.int64)
            for name, array in arrays.items():
                buffer = self._buffers[name]
                if len(buffer) < len(self._places):
                    more = np.empty((2 * len(self._places) - len(buffer), buffer.shape[1]), buffer.dtype)
                    buffer = self._buffers[name] = np.concatenate([buffer, more])
                buffer[places] = array

    def save(self, step: int, keep_last: int | None = None) -> int:
        """Writes the rows of this step, of which `flush` has put back all, in one commit; returns how many.

        Raises: as `TableStore.write`; the rows are still here then, and may be saved again. ValueError for keep_last < 1.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(
                f"table {self.store.directory}: needs keep_last of at least 1, got keep_last={keep_last}; raise it"
            )
        with self._lock:
            rows = np.fromiter(self._places, np.int64, len(self._places))
            order = np.argsort(rows)
            self.store.write(rows[order], {name: buffer[order] for name, buffer in self._buffers.items()}, step)
            self._forget()
            if keep_last is not None:
                self.store.keep_or_warn(self.store.steps()[-keep_last:])
            return len(rows)

    def _forget(self) -> None:
        self._places: dict[int, int] = {}
        like = self.like()
        self._buffers = {name: np.empty((0, *row.shape), row.dtype) for name, row in like.items()}

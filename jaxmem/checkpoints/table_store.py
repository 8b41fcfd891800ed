"""Tables on disk: arrays [M, width] of the same M rows, made, grown, read and written by rows, in any part.

A table is a directory: an OCDBT database (`table_versions`) with a zarr3 array for each name, in chunks of about 4 KiB with a
CRC-32C each, and `table.json`. Every write is one commit, which a kill or a full disk leaves out or in, never in between; a
write that ends a step gives the commit that step's name, and a step can be read as long as it is kept.

Rows that were never written take no space. They read as a constant, or as normal numbers that are a function of seed and row.

Cost: a read or write of n scattered rows touches n chunks, i.e. max(4 KiB, a row) for each, whatever M.
"""

import dataclasses
import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmem.checkpoints.reading import CheckpointError
from jaxmem.checkpoints.table_rows import (
    CHUNK_BYTES,
    RowArray,
    TableInfo,
    initial_rows,
    is_mark,
    sealed,
    unsealed,
    zarr_spec,
)
from jaxmem.checkpoints.table_versions import FILES, MANIFEST, Versions, reason
from jaxmem.layers.host_rows import row_numbers
from jaxmem.typing import Array, Int, Shaped

if TYPE_CHECKING:  # `import jaxmem` stays light
    import tensorstore as ts

_ABOUT = "table.json"
_CHUNK = re.compile(r'Error reading "(\w+)/c/(\d+)/0"')


def _in_use(directory: Path) -> bool:
    """Whether there is more than a `create` leaves that was killed, or had no room."""
    return any(path.name not in (FILES, f"{MANIFEST}.__lock") for path in directory.iterdir())


class TableStore:
    """An existing table; several may read it, one program writes.

    Raises: ValueError for a directory that is no table; CheckpointError for a damaged one.

    >>> import tempfile
    >>> store = TableStore.create(tempfile.mkdtemp() + "/t", 10**9, {"values": RowArray(64), "mu": RowArray(64)})
    >>> store.write([7, 10**8], {"values": np.ones((2, 64), np.float32)})
    >>> store.read("values", [7, 10**8, 9])[:, 0].tolist(), store.info().n_chunks
    ([1.0, 1.0, 0.0], 2)
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).expanduser().resolve()
        if not (self.directory / MANIFEST).is_file():
            missing = f"one without {MANIFEST}" if self.directory.is_dir() else "no directory"
            raise self._wrong(
                f"needs a directory made by TableStore.create or `jaxmem table create`, got {missing}; "
                "make it, or name another"
            )
        self._versions = Versions(self.directory)
        self._forget()

    @classmethod
    def create(
        cls, directory: str | os.PathLike, n_rows: int, arrays: Mapping[str, RowArray], label: str = ""
    ) -> "TableStore":
        """Of n_rows rows, none of them written; a few KB. A label says whose rows they are, wherever the directory goes.

        Raises: ValueError without rows or arrays, for names that are no identifiers, and if something is there.
        """
        directory = Path(directory).expanduser().resolve()
        if n_rows < 1 or not arrays or not all(name.isidentifier() for name in arrays):
            raise ValueError(
                f"table {directory}: needs rows, and arrays with names like Python's, got n_rows={n_rows}, "
                f"arrays={list(arrays)}; change them"
            )
        if directory.exists() and (not directory.is_dir() or (directory / MANIFEST).exists() or _in_use(directory)):
            raise ValueError(f"table {directory}: needs a new or empty directory, got one in use; name another")
        about = {
            "label": label,
            "n_rows": n_rows,
            "arrays": {name: dataclasses.asdict(array) for name, array in arrays.items()},
            "steps": {},
        }

        def write(store: "ts.KvStore") -> None:
            import tensorstore as ts

            for name, array in arrays.items():
                kvstore = store / f"{name}/"
                ts.open(zarr_spec(array, n_rows), kvstore=kvstore, create=True, transaction=store.transaction).result()
            store.write(_ABOUT, sealed(about)).result()

        versions = Versions(directory)
        try:
            versions.commit(write, after=None)
        except CheckpointError:
            (directory / MANIFEST).unlink(missing_ok=True)  # of the empty version before it
            raise
        versions.keep(())  # nor the empty one
        return cls(directory)

    @property
    def n_rows(self) -> int:
        """Of the newest state."""
        return self._about["n_rows"]

    @property
    def label(self) -> str:
        """As created; "" without."""
        return self._about.get("label", "")

    def rows_at(self, step: int | None) -> int:
        """How many rows there were at the end of a step; None: now."""
        version = self._version_of(step)
        return self.n_rows if version is None else self._read_about(version)["n_rows"]

    @property
    def arrays(self) -> dict[str, RowArray]:
        """By name."""
        return {name: RowArray(**fields) for name, fields in self._about["arrays"].items()}

    def steps(self) -> list[int]:
        """That can be read, oldest first."""
        numbers = set(self._versions.numbers())
        return [int(step) for step, number in self._about["steps"].items() if number in numbers]

    def info(self) -> TableInfo:
        """Without reading a row."""
        space, arrays = self._versions.space(), self.arrays
        n_chunks = space.n_keys - len(arrays) - 1
        numbers = self._versions.numbers()
        return TableInfo(self.n_rows, arrays, n_chunks, space.live_bytes, space.disk_bytes, self.steps(), len(numbers))

    def expect(self, arrays: Mapping[str, Any], n_rows: int | None = None) -> None:
        """Compares the widths and dtypes, and rows unless n_rows is None, with those of arrays, or shapes of arrays.

        Raises: ValueError that names the first that differs.
        """
        for name, array in arrays.items():
            stored = self._array_named(name)
            if array.ndim != 2 or (array.shape[1], str(array.dtype)) != (stored.width, stored.dtype):
                raise self._wrong(
                    f"needs {name} as stored, {stored.dtype}[rows, {stored.width}], "
                    f"got {name}={array.dtype}{list(array.shape)}; change it, or make another table"
                )
        if n_rows is not None and n_rows != self.n_rows:
            raise self._wrong(f"needs as many rows as stored, {self.n_rows}, got n_rows={n_rows}; grow the smaller")

    def read(
        self,
        name: str,
        rows: Int[np.ndarray, "n"] | Iterable[int] | slice,
        columns: slice = slice(None),
        step: int | None = None,
    ) -> Shaped[np.ndarray, "n width"]:
        """Rows of an array, or some columns of them: the chunks that hold them are read.

        Args:
          rows: numbers in any order, or a slice with step 1.
          step: as of the end of that step; None: with all writes.

        Raises: ValueError for a name, row or step that is not there; CheckpointError that names the rows of a damaged chunk.
        """
        array, version, n_rows = self._array_named(name), self._version_of(step), self.rows_at(step)
        rows = self._numbers(rows, n_rows)
        if not rows.size:
            return initial_rows(array, rows)[:, columns]
        whole = rows[-1] - rows[0] + 1 == rows.size and bool(np.all(np.diff(rows) == 1))
        chosen = slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows
        try:
            found = np.require(self._open(name, version, n_rows)[chosen, columns].read().result(), requirements="W")
        except Exception as error:
            if (
                step is None and self._versions.numbers()[-1] != self._number
            ):  # a writer has dropped what was being read
                self._versions.refresh()
                self._forget()
                return self.read(name, rows, columns)
            raise self._damaged(error) from error
        if array.stddev is not None:
            unwritten = np.flatnonzero(np.all(is_mark(found), axis=1))
            found[unwritten] = initial_rows(array, rows[unwritten])[:, columns]
        return found

    def write(
        self,
        rows: Int[np.ndarray, "n"] | Iterable[int] | slice,
        arrays: Mapping[str, Shaped[Array, "n width"]],
        step: int | None = None,
    ) -> None:
        """Rows of any of the arrays, in one commit; they are in host memory until it is done.

        Args:
          rows: each once.
          step: that ends with this commit; later than all before.

        Raises: ValueError for rows, arrays or a step that do not fit; CheckpointError if they cannot be written: nothing is.
        """
        rows, arrays = self._numbers(rows, self.n_rows), {name: np.asarray(array) for name, array in arrays.items()}
        self.expect(arrays)
        for name, array in arrays.items():
            if len(array) != len(rows):
                raise self._wrong(f"needs {len(rows)} rows of {name}, got {len(array)}; pass as many")
            if self.arrays[name].stddev is not None and np.any(is_mark(array)):
                raise self._wrong(f"needs {name} without the NaN of rows never written, got some; change them")
        if len(np.unique(rows)) < len(rows):
            raise self._wrong("needs each row once, got some twice; add up what they get")
        if step is not None and (isinstance(step, bool | np.bool) or not hasattr(step, "__index__")):
            raise self._wrong(f"needs a step that is an integer, got step={step!r}; convert it")
        step = None if step is None else operator.index(step)
        last = max(map(int, self._about["steps"]), default=-1)
        if step is not None and step <= last:
            raise self._wrong(f"needs a step after {last}, the last saved, got step={step}; rewind first")

        def write(store: "ts.KvStore") -> None:
            import tensorstore as ts

            opened = [ts.open(self._spec(name), kvstore=store / f"{name}/").result() for name in arrays]
            if len(rows):
                for future in [a[rows].write(array) for a, array in zip(opened, arrays.values())]:
                    future.result()

        self._commit(write, step)

    def grow(self, n_rows: int) -> None:
        """To more rows, without writing any of them.

        Raises: ValueError for fewer than there are.
        """
        if n_rows < self.n_rows:
            raise self._wrong(f"needs at least its {self.n_rows} rows, got n_rows={n_rows}; rows are never dropped")

        def write(store: "ts.KvStore") -> None:
            import tensorstore as ts

            for name in self._about["arrays"]:
                array = ts.open(self._spec(name), kvstore=store / f"{name}/").result()
                array.resize(exclusive_max=[n_rows, None]).result()

        self._commit(write, None, n_rows=n_rows)

    def keep(self, steps: Iterable[int]) -> None:
        """Drops the other steps and all writes between steps, but not the newest state; frees space if half or more is dead.

        Cost: rarely, moving as many bytes as it frees; else that of replacing a file of a few KB.
        """
        numbers = {number for step, number in self._about["steps"].items() if int(step) in set(steps)}
        self._versions.keep(numbers)
        self._forget()
        space = self._versions.space()
        if space.disk_bytes > 2 * space.live_bytes + CHUNK_BYTES * 16:
            self.compact()

    def keep_or_warn(self, steps: Iterable[int]) -> None:
        """`keep` behind a step that is saved: where it fails, as on a full disk, a warning; the next drops them."""
        try:
            self.keep(steps)
        except CheckpointError as error:
            warnings.warn(f"older steps are still there: {error}", stacklevel=2)
            self._forget()

    def compact(self) -> None:
        """Deletes files that nothing kept needs, and moves values out of files of which less than half is in use.

        Cost: reads the index of each kept version, about 30 bytes per chunk.
        """
        self._versions.sweep()
        kept = self.steps()
        while keys := self._versions.sparse_values():
            source = self._versions.store()

            def write(store: "ts.KvStore", keys=keys, source=source) -> None:
                for key in keys:
                    store.write(key, source.read(key).result().value).result()

            newest = self._versions.numbers()[-1]
            self._commit(write, next((step for step in kept if self._about["steps"][str(step)] == newest), None))
            self._versions.keep({self._about["steps"][str(step)] for step in kept})
            self._versions.sweep()
        self._forget()

    def rewind(self, step: int) -> None:
        """Makes a step the newest state; what was written after it is dropped.

        Raises: ValueError for a step that is not kept.
        """
        self._versions.rewind(self._version_of(step))
        self._forget()

    def _commit(self, write, step: int | None, **changes: Any) -> None:
        """What one commit reads and writes does not grow with those before it, but for the names of the steps."""
        self._expect_no_other()
        steps = self._about["steps"] | ({} if step is None else {str(step): self._number + 1})
        about = {**self._about, **changes, "steps": steps, "version": self._number + 1, "mark": os.urandom(8).hex()}

        def write_all(store: "ts.KvStore") -> None:
            write(store)
            store.write(_ABOUT, sealed(about)).result()

        try:
            number = self._versions.commit(write_all, after=self._number)
        except CheckpointError as error:  # a chunk of which some rows are written is read before
            self._forget()
            if _CHUNK.search(str(error.__cause__)):
                raise self._damaged(error.__cause__) from error
            raise
        if self._read_about(number) != about:
            self._forget()
            raise self._another_writer()
        self._opened, self._number, self._about, self._as_written = {}, number, about, about

    def _expect_no_other(self) -> None:
        """Raises CheckpointError if another program has written since this read what is there."""
        if self._read_about(None) != self._as_written:
            self._forget()
            raise self._another_writer()

    def _another_writer(self) -> CheckpointError:
        return CheckpointError(
            f"table {self.directory}: needs one writer at a time, got another's version {self._number}; "
            "open it again, or stop the other"
        )

    def _forget(self) -> None:
        """What was read of the newest version."""
        self._opened: dict[tuple[str, int | None], ts.TensorStore] = {}
        numbers = self._versions.numbers()
        self._number, self._about = numbers[-1], self._read_about(None)
        steps = {step: number for step, number in self._about["steps"].items() if number in set(numbers)}
        self._as_written, self._about = self._about, {**self._about, "steps": steps}

    def _read_about(self, version: int | None) -> dict[str, Any]:
        try:
            text = self._versions.store(version).read(_ABOUT).result().value
        except Exception as error:
            raise self._damaged(error) from error
        if not text:
            raise self._wrong(
                "needs a directory made by TableStore.create or `jaxmem table create`, got other data; name it"
            )
        if (about := unsealed(text)) is None:
            raise self._damaged(ValueError(f"{_ABOUT} with another checksum"))
        return about

    def _open(self, name: str, version: int | None, n_rows: int) -> "ts.TensorStore":
        import tensorstore as ts

        opened, key = self._opened, (name, version)
        if key not in opened:
            kvstore = self._versions.store(version) / f"{name}/"
            opened[key] = ts.open(self._spec(name, n_rows), kvstore=kvstore, context=self._versions.context).result()
        return opened[key]

    def _spec(self, name: str, n_rows: int | None = None) -> dict[str, Any]:
        """With all that zarr.json must say: it has no checksum."""
        return zarr_spec(self._array_named(name), n_rows or self.n_rows)

    def _array_named(self, name: str) -> RowArray:
        if name not in self._about["arrays"]:
            raise self._wrong(f"needs one of the arrays {', '.join(self._about['arrays'])}, got {name!r}; change it")
        return RowArray(**self._about["arrays"][name])

    def _version_of(self, step: int | None) -> int | None:
        if step is not None and step not in (steps := self.steps()):
            raise self._wrong(f"needs one of the steps {steps}, got step={step}; choose another")
        return None if step is None else self._about["steps"][str(step)]

    def _numbers(self, rows: Any, n_rows: int) -> Int[np.ndarray, "n"]:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(n_rows))
        numbers = row_numbers(rows, n_rows, f"table {self.directory}")
        if numbers.ndim != 1:
            raise self._wrong(f"needs the numbers of rows in one dimension, got {list(numbers.shape)}; flatten them")
        return numbers

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"table {self.directory}: {what}")

    def _damaged(self, error: Exception) -> CheckpointError:
        what = "some files"
        if at := _CHUNK.search(str(error)):
            name, chunk = at[1], int(at[2])
            size = self._array_named(name).chunk_rows
            what = f"{name} of rows {chunk * size}..{min(chunk * size + size, self.n_rows) - 1}"
        return CheckpointError(
            f"table {self.directory} is damaged: needs {what} as written, got {reason(error)}; "
            "rewind to an earlier step, or copy the directory back from elsewhere"
        )

"""Checkpoints of tables in a `TableStore`: only the rows touched since the last, as one commit; back onto any mesh.

    touched = none_touched(M)
    touched = touch(touched, gradient.rows)                              in every step, under jit
    save_touched(store, step, {"values": ..., "mu": ..., "nu": ...}, touched, keep_last=3)
    store.rewind(step); tables = load_table(store, step, like)           to go on from a step

Cost of saving: the rows touched, once to the host and once to disk in chunks of about 4 KiB, whatever M.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.checkpoints.table_store import TableStore
from jaxmem.typing import Array, Bool, Int, Shaped


def none_touched(n_rows: int) -> Bool[Array, "M"]:
    """One byte per row, on the device."""
    return jnp.zeros(n_rows, bool)


def touch(touched: Bool[Array, "M"], rows: Int[Array, "*n"]) -> Bool[Array, "M"]:
    """With these rows too, those of a `RowGradient` for example; numbers outside 0..M - 1 count for nothing.

    >>> touch(none_touched(4), jnp.array([2, 0, 4])).tolist()
    [True, False, True, False]
    """
    n_rows = touched.shape[0]
    if not jnp.issubdtype(jnp.asarray(rows).dtype, jnp.integer) and jnp.size(rows):
        raise ValueError(
            f"table: needs the numbers of touched rows as integers, got {jnp.asarray(rows).dtype}; for a mask, touched | mask"
        )
    return touched.at[jnp.where(rows < 0, n_rows, rows)].set(True, mode="drop")


def save_touched(
    store: TableStore,
    step: int,
    tables: Mapping[str, Shaped[Array, "M width"]],
    touched: Bool[Array, "M"],
    keep_last: int | None = None,
) -> int:
    """Writes the rows touched since the last save as the state at the end of `step`; returns how many.

    Args:
      tables: by their names in the store; on any mesh of this process.
      touched: since the last save, and since the store was made before the first.
      keep_last: so many steps; None: all.

    Raises: ValueError for other widths, dtypes or rows than stored, a step not after the last, or arrays of several
      processes; CheckpointError if it cannot be written, and then the step before is intact
      and the same may be saved again. A step that is written while no other can be dropped is a warning.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"table {store.directory}: needs keep_last of at least 1, got keep_last={keep_last}; raise it")
    for name, table in tables.items():
        if not getattr(table, "is_fully_addressable", True):
            raise ValueError(
                f"table {store.directory}: needs arrays of one process, got {name} of several; gather the touched rows first"
            )
        store.expect({name: table}, table.shape[0])
    if touched.shape != (store.n_rows,):
        raise ValueError(
            f"table {store.directory}: needs touched for its {store.n_rows} rows, got {touched.shape}; use none_touched"
        )
    if touched.dtype != bool:
        raise ValueError(f"table {store.directory}: needs touched as a mask, got {touched.dtype}; use none_touched")
    rows = np.flatnonzero(np.asarray(touched))
    store.write(rows, {name: rows_on_host(table, rows) for name, table in tables.items()}, step)
    if keep_last is not None:
        store.keep_or_warn(store.steps()[-keep_last:])
    return len(rows)


def load_table(store: TableStore, step: int | None, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Whole arrays as of a step, each device's part read for it alone.

    Args:
      step: None is the newest state.
      like: shapes, dtypes and shardings by name; no sharding means the first device.

    Raises: ValueError for other widths, dtypes or rows than stored, or a step that is not kept; CheckpointError for damage.
    """
    for name, array in like.items():
        store.expect({name: array})
        if array.shape[0] != (n_rows := store.rows_at(step)):
            raise ValueError(
                f"table {store.directory}: needs the {n_rows} rows that it has at that step, got {array.shape[0]} of {name}; "
                "change them, or grow it"
            )
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {name: _load(store, name, step, array, array.sharding or first) for name, array in like.items()}


def _load(store: TableStore, name: str, step: int | None, like: jax.ShapeDtypeStruct, sharding) -> jax.Array:
    @functools.cache  # replicas share what is read
    def read(start: int, stop: int, first: int, last: int) -> np.ndarray:
        return store.read(name, slice(start, stop), slice(first, last), step)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [at.indices(size)[:2] for at, size in zip(index, like.shape)]
        return read(*bounds[0], *bounds[1])

    return jax.make_array_from_callback(like.shape, sharding, part)


def rows_on_host(
    table: Shaped[Array, "*L M width"], rows: Int[np.ndarray, "n"], layer: tuple[int, ...] = ()
) -> Shaped[np.ndarray, "n width"]:
    """Ascending rows of an array on any mesh, without moving others; of stacked arrays those of one layer."""
    if isinstance(table, np.ndarray):
        return table[*layer, rows]
    found = np.empty((len(rows), table.shape[-1]), table.dtype)
    for shard in table.addressable_shards:
        (start, stop, _), columns = shard.index[-2].indices(table.shape[-2]), shard.index[-1]
        first, last = np.searchsorted(rows, (start, stop))
        if shard.replica_id == 0 and last > first:
            local = np.pad(rows[first:last] - start, (0, _padding(last - first)), mode="edge")
            alone = jax.sharding.Mesh(np.array([shard.device]), ("alone",))  # whatever mesh is in force
            with jax.set_mesh(alone):
                found[first:last, columns] = np.asarray(shard.data[*layer, local])[: last - first]
    return found


def _padding(n: int) -> int:
    """To a power of two, so that few sizes are compiled."""
    return (1 << int(n - 1).bit_length()) - int(n)

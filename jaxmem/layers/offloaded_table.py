"""Tables that are not on the device: rows in host memory or on disk, and a cache of the hot ones on the device.

    cache, slots = table.place(cache, ids)                      rows that are missing replace those not read for longest
    y = bag(cache.arrays["values"], slots, weights)             = bag(the whole table, ids, weights)

What works on a table works on the cache, with slots for ids: `bag`, `dots`, `row_gradient`, and lazy Adam, whose moments are
further arrays of the same rows. A slot of the batch in hand is never given away. Rows that a step changed go back to their
place when their slot is needed, and all of them in `flush`.

Ids known before the forward pass (of tokens, say) are placed, those of the next batch read meanwhile by a thread:

    pending = table.prefetch(cache, next_ids)                   while the step of this batch runs
    cache, slots = table.place(cache, next_ids, pending)

Ids known only inside of it are looked up under jit by `table.bag_through`, misses by a callback to the host.

Cost: C width numbers per array on the device; per batch, its misses from their place to the device, and on the host O(C).
"""

import concurrent.futures
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.layers.host_rows import Rows
from jaxmem.pallas_kernels.memory_lookup import RowGradient, bag
from jaxmem.typing import Array, Bool, Float, Int, Shaped

Ids = Int[np.ndarray | Array, "..."] | list[int]


class Counts(NamedTuple):
    """Since the cache was empty: rows found and not found in it, each once per batch, and bytes moved."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class RowCache(NamedTuple):
    """Arrays on the device, which may go into jit, and on the host what is in them, which may not."""

    arrays: dict[str, Shaped[Array, "C _"]]
    rows: Int[np.ndarray, "n"]
    """In the cache, ascending."""
    slots: Int[np.ndarray, "n"]
    """Where each is."""
    read_in: Int[np.ndarray, "C"]
    """The last batch that read a slot."""
    changed: Bool[np.ndarray, "C"]
    """Differ from the rows in their place."""
    batch: int
    """How many were placed."""
    counts: Counts


class Pending(NamedTuple):
    """Rows on their way."""

    batch: int
    rows: Int[np.ndarray, "n"]
    arrays: concurrent.futures.Future


class View(NamedTuple):
    """A cache as `bag_through` needs it, all on the device."""

    arrays: dict[str, Shaped[Array, "C _"]]
    rows: Int[Array, "C"]
    """In the cache, ascending, and M for each slot that is free."""
    slots: Int[Array, "C"]


class OffloadedTable:
    """Rows elsewhere, of which a `RowCache` of C slots is on the device; it has a thread, and no state but the rows.

    >>> from jaxmem.layers.host_rows import HostRows
    >>> values = np.arange(20, dtype=np.float32).reshape(10, 2)
    >>> table = OffloadedTable(HostRows({"values": values}), n_slots=4)
    >>> cache, slots = table.place(table.empty(), np.array([[7, 2, 7]]))
    >>> bag(cache.arrays["values"], slots, jnp.array([[1.0, 1.0, 10.0]])).tolist(), cache.counts
    ([[158.0, 170.0]], Counts(hits=0, misses=2, bytes_read=16, bytes_written=0))
    """

    def __init__(self, rows: Rows, n_slots: int, sharding: jax.sharding.Sharding | None = None):
        """Args:
          rows: `HostRows`, or `DiskRows` of `jaxmem.checkpoints`.
          n_slots: C, at least as many as the different rows of a batch.
          sharding: of the arrays of the cache, along their width; None: on the first device.

        Raises: ValueError without slots.
        """
        if n_slots < 1:
            raise ValueError(f"offloaded table: needs n_slots of at least 1, got n_slots={n_slots}; raise it")
        self.rows, self.n_slots, self._sharding = rows, n_slots, sharding
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxmem-rows")
        self._bag_through = jax.jit(self._look_up, static_argnames=("n_misses", "name"))

    def empty(self) -> RowCache:
        make = lambda like: jnp.zeros((self.n_slots, *like.shape), like.dtype, device=self._sharding)
        none = np.zeros(0, np.int64)
        read_in, changed = np.zeros(self.n_slots, np.int64), np.zeros(self.n_slots, bool)
        arrays = {name: make(like) for name, like in self.rows.like().items()}
        return RowCache(arrays, none, none, read_in, changed, 0, Counts())

    def prefetch(self, cache: RowCache, ids: Ids) -> Pending:
        """Starts to read the rows of the next batch that the cache has not, in a thread.

        Args:
          cache: as `place` of the batch before left it, so that what it put back is read.

        Raises: ValueError as `place`.
        """
        missing = self._find(cache, self._known(ids)).missing
        return Pending(cache.batch, missing, self._thread.submit(self.rows.read, missing))

    def place(self, cache: RowCache, ids: Ids, pending: Pending | None = None) -> tuple[RowCache, Int[Array, "..."]]:
        """A cache with all rows of a batch, and the slot of each of its ids.

        Args:
          cache: its arrays are donated; use those that are returned.
          ids: rows of the table.
          pending: what `prefetch` returned for these ids; rows that it lacks are read now.

        Raises: ValueError for ids that are no row's, more different ones than slots, or a `pending` of another batch.
        """
        ids = np.asarray(ids)
        if pending is not None and pending.batch != cache.batch:
            raise ValueError(
                f"offloaded table: needs a pending read of batch {cache.batch}, got one of batch {pending.batch}; "
                "prefetch behind the place of the batch before"
            )
        different = self._known(ids)
        found = self._find(cache, different)
        missing, batch = found.missing, cache.batch + 1
        read_in = cache.read_in.copy()
        read_in[found.hit_slots] = batch
        given = np.argpartition(read_in, len(missing) - 1)[: len(missing)] if len(missing) else missing
        cache = self._put_back(cache, given[cache.changed[given]])
        read, n_read = self._read(missing, pending)
        arrays = _put(cache.arrays, *_padded(given, read, self.n_slots)) if len(missing) else cache.arrays
        read_in[given] = batch
        replaced = np.zeros(self.n_slots, bool)
        replaced[given] = True
        stay = ~replaced[cache.slots]
        at = np.searchsorted(cache.rows[stay], missing)
        rows, slots = (np.insert(old[stay], at, new) for old, new in ((cache.rows, missing), (cache.slots, given)))
        counts = cache.counts._replace(
            hits=cache.counts.hits + len(found.hit_slots),
            misses=cache.counts.misses + len(missing),
            bytes_read=cache.counts.bytes_read + n_read,
        )
        cache = RowCache(arrays, rows, slots, read_in, cache.changed, batch, counts)
        return cache, jnp.asarray(slots[np.searchsorted(rows, ids)], jnp.int32)

    def place_gradient(self, cache: RowCache, gradient: RowGradient) -> tuple[RowCache, RowGradient]:
        """`place` of the rows of a gradient, and the same gradient of the cache: for ids known in the forward pass only."""
        rows = np.asarray(gradient.rows)
        real = rows < self.rows.n_rows
        cache, slots = self.place(cache, rows[real])
        found = np.full(len(rows), self.n_slots, np.int32)
        found[real] = slots
        order = np.argsort(found, kind="stable")
        return cache, RowGradient(jnp.asarray(found[order]), gradient.sums[order], gradient.counts[order])

    def changed(self, cache: RowCache, arrays: dict[str, Shaped[Array, "C _"]]) -> RowCache:
        """The cache with arrays in which a step has changed rows of the batch placed last, and no others."""
        changed = cache.changed | (cache.read_in == cache.batch) if cache.batch else cache.changed
        return cache._replace(arrays=cache.arrays | arrays, changed=changed)

    def flush(self, cache: RowCache) -> RowCache:
        """All changed rows are in their place."""
        return self._put_back(cache, np.flatnonzero(cache.changed))

    def view(self, cache: RowCache) -> View:
        """For `bag_through`.

        Raises: ValueError for a table of 2**31 rows or more, whose ids JAX has no integers for.
        """
        if self.rows.n_rows >= 2**31:
            raise ValueError(
                f"offloaded table: needs fewer than 2**31 rows for ids under jit, got {self.rows.n_rows}; place them instead"
            )
        free = (0, self.n_slots - len(cache.rows))
        rows = np.pad(cache.rows, free, constant_values=self.rows.n_rows)
        return View(cache.arrays, jnp.asarray(rows, jnp.int32), jnp.asarray(np.pad(cache.slots, free), jnp.int32))

    def bag_through(
        self,
        view: View,
        ids: Int[Array, "*batch k"],
        weights: Float[Array, "*batch k"],
        *,
        n_misses: int,
        name: str = "values",
    ) -> Float[Array, "*batch V"]:
        """bag(the whole table, ids, weights) under jit, for ids that nobody knows before.

        It has gradients in the arrays of the view and in weights. That of the whole table is `row_gradient` of the gradient
        of what is returned: add zeros to it, and take theirs.

        Args:
          view: of the cache as it is.
          n_misses: most different rows that are not in the cache; if they are more, all of the result is NaN.
          name: of the array.

        Raises: ValueError for n_misses < 1, and for ids that are no integers; as `bag`.
        """
        _expect_integers(ids.dtype, ids.size)
        if n_misses < 1:
            raise ValueError(f"offloaded table: needs n_misses of at least 1, got n_misses={n_misses}; raise it")
        return self._bag_through(view, ids, weights, n_misses=n_misses, name=name)

    def _look_up(self, view: View, ids, weights, *, n_misses: int, name: str):
        (values, rows, slots), n_rows, like = (view.arrays[name], *view[1:]), self.rows.n_rows, self.rows.like()[name]
        ids = jnp.where((ids < 0) | (ids >= n_rows), n_rows, ids).astype(jnp.int32)
        at = jnp.minimum(jnp.searchsorted(rows, ids), self.n_slots - 1)
        hit = (rows[at] == ids) | (ids == n_rows)
        missing = jnp.unique(jnp.where(hit, n_rows, ids), size=n_misses + 1, fill_value=n_rows)[:n_misses]
        shape = jax.ShapeDtypeStruct((n_misses, *like.shape), like.dtype)
        fetched = jax.pure_callback(functools.partial(self._fetch, name), shape, missing, vmap_method="expand_dims")
        place = jnp.minimum(jnp.searchsorted(missing, ids), n_misses - 1)
        all_found = jnp.all(hit | (missing[place] == ids))
        of_cache = bag(values, jnp.where(hit & (ids < n_rows), slots[at], self.n_slots), weights)
        of_rest = bag(fetched, jnp.where(hit, n_misses, place), weights)
        return jnp.where(all_found, of_cache + of_rest, jnp.nan)

    def _fetch(self, name: str, rows: Int[np.ndarray | Array, "*n"]) -> np.ndarray:
        rows, like = np.asarray(rows), self.rows.like()[name]
        real = rows < self.rows.n_rows
        found = np.zeros((*rows.shape, *like.shape), like.dtype)
        if real.any():
            found[real] = self.rows.read(rows[real].astype(np.int64))[name]
        return found

    def _known(self, ids: Ids) -> Int[np.ndarray, "n"]:
        """Different ids, ascending."""
        ids = np.asarray(ids)
        _expect_integers(ids.dtype, ids.size)
        different = np.unique(ids).astype(np.int64)
        if different.size and (different[0] < 0 or different[-1] >= self.rows.n_rows):
            raise ValueError(
                f"offloaded table: needs ids in 0..{self.rows.n_rows - 1}, the rows of the table, "
                f"got {different[0]}..{different[-1]}; change them"
            )
        if len(different) > self.n_slots:
            raise ValueError(
                f"offloaded table: needs as many slots as a batch has different rows, {len(different)}, "
                f"got n_slots={self.n_slots}; raise it, or make batches smaller"
            )
        return different

    def _find(self, cache: RowCache, rows: Int[np.ndarray, "n"]) -> "_Found":
        if not len(cache.rows):
            return _Found(cache.slots, rows)
        at = np.minimum(np.searchsorted(cache.rows, rows), len(cache.rows) - 1)
        hit = cache.rows[at] == rows
        return _Found(cache.slots[at[hit]], rows[~hit])

    def _read(self, rows: Int[np.ndarray, "n"], pending: Pending | None) -> tuple[dict[str, np.ndarray], int]:
        """Rows, from the pending read if it has them, and how many bytes were read."""
        if pending is None:
            read = self.rows.read(rows) if len(rows) else {}
            return read, _n_bytes(read)
        early = pending.arrays.result()
        at = np.searchsorted(pending.rows, rows)
        has = np.isin(rows, pending.rows)
        late = self.rows.read(rows[~has]) if not has.all() else {}
        read = {}
        for name, array in early.items():
            read[name] = np.empty((len(rows), *array.shape[1:]), array.dtype)
            read[name][has] = array[at[has]]
            if late:
                read[name][~has] = late[name]
        return read, (_n_bytes(early) if len(pending.rows) else 0) + _n_bytes(late)

    def _put_back(self, cache: RowCache, slots: Int[np.ndarray, "n"]) -> RowCache:
        """The rows in these slots, to their place."""
        if not len(slots):
            return cache
        row_of = np.empty(self.n_slots, np.int64)
        row_of[cache.slots] = cache.rows
        indices = np.pad(slots, (0, _padding(len(slots))), mode="edge")
        arrays = {name: np.asarray(array)[: len(slots)] for name, array in _take(cache.arrays, indices).items()}
        order = np.argsort(row_of[slots])
        self.rows.write(row_of[slots][order], {name: array[order] for name, array in arrays.items()})
        changed = cache.changed.copy()
        changed[slots] = False
        counts = cache.counts._replace(bytes_written=cache.counts.bytes_written + _n_bytes(arrays))
        return cache._replace(changed=changed, counts=counts)


def _expect_integers(dtype: np.dtype, size: int) -> None:
    if size and not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"offloaded table: needs ids that are integers, got {dtype}; convert them, a mask by np.flatnonzero(mask)"
        )


class _Found(NamedTuple):
    hit_slots: Int[np.ndarray, "n"]
    missing: Int[np.ndarray, "m"]


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays, slots, rows):
    return {name: array.at[slots].set(rows[name], mode="drop") for name, array in arrays.items()}


@jax.jit
def _take(arrays, slots):
    return {name: array[slots] for name, array in arrays.items()}


def _padded(slots: np.ndarray, rows: dict[str, np.ndarray], nowhere: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    more = (0, _padding(len(slots)))
    padded = {name: np.pad(array, (more, *[(0, 0)] * (array.ndim - 1))) for name, array in rows.items()}
    return np.pad(slots, more, constant_values=nowhere), padded


def _padding(n: int) -> int:
    """To a power of two, so that few sizes are compiled."""
    return (1 << (n - 1).bit_length()) - n


def _n_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())

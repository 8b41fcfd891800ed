"""Rows on disk behind a cache on the device: trained as the whole table is, saved as steps, and nothing between steps."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.checkpoints.disk_rows import DiskRows
from jaxmem.checkpoints.reading import CheckpointError
from jaxmem.checkpoints.table_rows import RowArray
from jaxmem.checkpoints.table_store import TableStore
from jaxmem.layers.offloaded_table import OffloadedTable
from jaxmem.pallas_kernels.memory_lookup import bag, row_gradient
from jaxmem.training.lazy_adam import LazyAdamState, apply_rows, lazy_adam

M, V, T, K = 10**7, 16, 4, 4
OPTIMIZER = lazy_adam(0.1)


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Writes beyond this size fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def new(directory) -> TableStore:
    return TableStore.create(directory, M, {"values": RowArray(V, stddev=0.25), "mu": RowArray(V), "nu": RowArray(V)})


def batch(step: int):
    """Half of the rows from twelve, half from all."""
    chance = np.random.default_rng(step)
    ids = np.where(chance.random((T, K)) < 0.5, chance.integers(0, 12, (T, K)), chance.integers(0, M, (T, K)))
    return ids, jnp.asarray(chance.normal(size=(T, K)), jnp.float32)


@jax.jit
def step_of(arrays, count, ids, weights):
    y = bag(arrays["values"], ids, weights)
    gradient = row_gradient(ids, weights, jnp.cos(y), arrays["values"].shape[0], T * K)
    updates, state = OPTIMIZER.update(gradient, LazyAdamState(count, arrays["mu"], arrays["nu"]))
    return {"values": apply_rows(arrays["values"], updates), "mu": state.mu, "nu": state.nu}


def trained(disk: DiskRows, first: int, last: int, every: int = 5):
    """Steps first + 1 .. last through a cache of 24 slots, with the next batch read meanwhile."""
    table = OffloadedTable(disk, n_slots=24)
    cache, pending = table.empty(), None
    for step in range(first + 1, last + 1):
        ids, weights = batch(step)
        cache, slots = table.place(cache, ids, pending)
        pending = table.prefetch(cache, batch(step + 1)[0])
        cache = table.changed(cache, step_of(cache.arrays, jnp.int32(step - 1), slots, weights))
        if step % every == 0:
            cache = table.flush(cache)
            disk.save(step, keep_last=3)
    return cache


def rows_read(last: int) -> np.ndarray:
    return np.unique([batch(step)[0] for step in range(1, last + 1)])


def expected(rows: np.ndarray, store: TableStore, last: int):
    """The same steps on a table of these rows alone, all on the device."""
    arrays = {name: jnp.asarray(store.read(name, rows)) for name in ("values", "mu", "nu")}
    for step in range(1, last + 1):
        ids, weights = batch(step)
        arrays = step_of(arrays, jnp.int32(step - 1), jnp.asarray(np.searchsorted(rows, ids)), weights)
    return arrays


def test_training_on_disk_is_training_on_the_device_and_resumes(tmp_path):
    store, rows = new(tmp_path / "table"), rows_read(20)
    want = {last: expected(rows, store, last) for last in (10, 15, 20)}
    cache = trained(DiskRows(store), 0, 20)
    assert cache.counts.hits > 50 and cache.counts.misses > 100
    store = TableStore(tmp_path / "table")
    assert store.steps() == [10, 15, 20]
    for last, arrays in want.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(store.read(name, rows, step=last), array)
    assert store.info().disk_bytes < 3 * 3 * len(rows) * 4200, "of a table of 2 GB"
    store.rewind(10)
    trained(DiskRows(store), 10, 20)
    for name, array in want[20].items():
        np.testing.assert_array_equal(store.read(name, rows, step=20), array)


def test_nothing_is_written_between_steps(tmp_path):
    store = new(tmp_path / "table")
    disk = DiskRows(store)
    before = store.info()
    trained(disk, 0, 4)  # rows were replaced in the cache, and no step was saved
    assert store.info() == before
    assert disk.read(rows_read(4))["mu"].any() and not DiskRows(store.directory).read(rows_read(4))["mu"].any()


def test_rows_written_and_not_saved_are_read(tmp_path):
    disk = DiskRows(str(new(tmp_path / "table").directory))
    one = lambda x, n: {
        "values": np.full((n, V), x, np.float32),
        "mu": np.zeros((n, V), np.float32),
        "nu": np.ones((n, V), np.float32),
    }
    disk.write(np.array([5, 7]), one(1, 2))
    disk.write(np.array([7, 9, M - 1]), one(2, 3))
    for _ in range(2):
        read = disk.read(np.array([9, 5, 8, 7]))
        assert read["values"][[0, 1, 3], 0].tolist() == [2, 1, 2] and abs(read["values"][2, 0]) not in (0, 1, 2)
        assert read["nu"][:, 0].tolist() == [1, 1, 0, 1]
        assert disk.save(len(disk.store.steps())) in (4, 0)
    assert disk.read(np.zeros(0, np.int64))["values"].shape == (0, V)


def test_refused_writes_leave_nothing_and_saves_may_be_repeated(tmp_path):
    disk = DiskRows(new(tmp_path / "table"))
    row = {name: np.ones((1, V), np.float32) for name in ("values", "mu", "nu")}
    before = disk.read(np.array([3, 4]))
    for rows, arrays, message in (
        ([3], {"mu": row["mu"]}, "needs each row once, and 1 rows of all arrays, got .*'mu': 1, 'nu': 0"),
        ([3], row | {"nu": np.ones((1, V + 1), np.float32)}, "needs nu as stored"),
        ([3, 3], {name: np.ones((2, V), np.float32) for name in row}, "needs each row once"),
        ([M], row, f"needs rows in 0..{M - 1}, got {M}..{M}"),
        (np.array([True]), row, "needs the numbers of rows as integers, got bool"),
    ):
        with pytest.raises(ValueError, match=message):
            disk.write(np.array(rows), arrays)
    for name, array in disk.read(np.array([3, 4])).items():
        np.testing.assert_array_equal(array, before[name])
    assert disk.save(1) == 0
    disk.write(np.array([3]), row)
    with largest_file(100), pytest.raises(CheckpointError, match="make room there, and save again"):
        disk.save(2, keep_last=1)
    assert disk.save(2, keep_last=1) == 1 and disk.store.steps() == [2]
    np.testing.assert_array_equal(disk.read(np.array([3]))["mu"], row["mu"])


def test_damage_is_told_by_the_place_that_needs_it(tmp_path):
    store = new(tmp_path / "table")
    trained(DiskRows(store), 0, 5)
    file = max((store.directory / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    file.write_bytes(content)
    table = OffloadedTable(DiskRows(store.directory), n_slots=100)
    cache = table.empty()
    with pytest.raises(CheckpointError, match=r"is damaged: needs \w+ of rows \d+\.\.\d+ as written"):
        table.place(cache, rows_read(5), table.prefetch(cache, rows_read(5)))

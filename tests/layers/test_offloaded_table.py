"""A table of which the device holds hot rows only: values, gradients and training are those of the whole table."""

import threading
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.layers.host_rows import HostRows
from jaxmem.layers.offloaded_table import Counts, OffloadedTable
from jaxmem.pallas_kernels.memory_lookup import bag, row_gradient
from jaxmem.training.lazy_adam import LazyAdamState, apply_rows, lazy_adam

M, V, T, K = 200, 8, 6, 3
ROW_BYTES = V * 4
OPTIMIZER = lazy_adam(0.1, weight_decay=0.01)


def whole_table(seed: int = 0) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    return {name: np.abs(chance.normal(size=(M, V))).astype(np.float32) for name in ("values", "mu", "nu")}


def batch(seed: int, n_rows: int = M) -> tuple[np.ndarray, jax.Array, jax.Array]:
    chance = np.random.default_rng(seed)
    ids = chance.integers(0, n_rows, (T, K))
    return (
        ids,
        jnp.asarray(chance.normal(size=(T, K)), jnp.float32),
        jnp.asarray(chance.normal(size=(T, V)), jnp.float32),
    )


@jax.jit
def train_step(arrays, count, ids, weights, dy):
    """Of lazy Adam for a loss <bag, dy>, in all rows or in the slots of a cache."""
    n_rows = arrays["values"].shape[0]
    y = bag(arrays["values"], ids, weights)
    gradient = row_gradient(ids, weights, dy * jnp.sin(y), n_rows, ids.size)
    state = LazyAdamState(count, arrays["mu"], arrays["nu"])
    updates, state = OPTIMIZER.update(gradient, state, arrays["values"])
    return {"values": apply_rows(arrays["values"], updates), "mu": state.mu, "nu": state.nu}, state.count


def trained_whole(n_batches: int) -> dict[str, jax.Array]:
    arrays, count = {name: jnp.asarray(array) for name, array in whole_table().items()}, jnp.int32(0)
    for seed in range(n_batches):
        arrays, count = train_step(arrays, count, *batch(seed))
    return arrays


def test_bag_and_its_gradients_are_those_of_the_whole_table():
    arrays = whole_table()
    table = OffloadedTable(HostRows(arrays), n_slots=40)
    cache = table.empty()
    loss = lambda values, ids, weights, dy: jnp.sum(dy * jnp.tanh(bag(values, ids, weights)))
    of_values_and_weights = jax.jit(jax.value_and_grad(loss, (0, 2)))
    for seed in range(8):
        ids, weights, dy = batch(seed)
        cache, slots = table.place(cache, ids)
        assert slots.shape == ids.shape
        got = of_values_and_weights(cache.arrays["values"], slots, weights, dy)
        want = of_values_and_weights(jnp.asarray(arrays["values"]), jnp.asarray(ids), weights, dy)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1][1], want[1][1])
        expected = np.zeros_like(got[1][0])
        expected[cache.slots] = want[1][0][cache.rows]
        np.testing.assert_allclose(got[1][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefetched", [False, True])
def test_training_through_a_small_cache_is_training_of_the_whole_table(prefetched):
    n_batches, rows = 25, HostRows(whole_table())
    table = OffloadedTable(rows, n_slots=T * K + 4)
    cache, count, pending = table.empty(), jnp.int32(0), None
    for seed in range(n_batches):
        ids, weights, dy = batch(seed)
        cache, slots = table.place(cache, ids, pending)
        arrays, count = train_step(cache.arrays, count, slots, weights, dy)
        cache = table.changed(cache, arrays)
        pending = table.prefetch(cache, batch(seed + 1)[0]) if prefetched else None
    cache = table.flush(cache)
    for name, array in trained_whole(n_batches).items():
        np.testing.assert_array_equal(rows.arrays[name], array)
    assert not cache.changed.any()
    counts = cache.counts
    assert counts.hits + counts.misses == sum(len(np.unique(batch(seed)[0])) for seed in range(n_batches))
    assert counts.misses > 250 and counts.hits > 10
    assert counts.bytes_read == counts.misses * 3 * ROW_BYTES == counts.bytes_written


def test_what_is_moved_is_counted():
    table = OffloadedTable(HostRows({"values": whole_table()["values"]}), n_slots=4)
    cache, _ = table.place(table.empty(), np.array([[5, 9], [5, 100]]))
    assert cache.counts == Counts(0, 3, 3 * ROW_BYTES, 0)
    cache, _ = table.place(cache, np.array([[100, 9], [5, 5]]))
    assert cache.counts == Counts(3, 3, 3 * ROW_BYTES, 0), "the same rows again read nothing"
    cache = table.changed(cache, {"values": cache.arrays["values"] + 1})
    cache, _ = table.place(cache, np.array([[1, 2, 5]]))
    assert cache.counts == Counts(4, 5, 5 * ROW_BYTES, ROW_BYTES), (
        "one changed row made way, a free slot was taken first"
    )
    cache = table.flush(cache)
    assert cache.counts.bytes_written == 3 * ROW_BYTES
    assert table.flush(cache).counts == cache.counts, "what is in its place is not written again"
    np.testing.assert_array_equal(table.rows.arrays["values"][[5, 9, 100]], whole_table()["values"][[5, 9, 100]] + 1)
    np.testing.assert_array_equal(table.rows.arrays["values"][[1, 2]], whole_table()["values"][[1, 2]])


def test_rows_not_read_for_longest_make_way():
    table, order = OffloadedTable(HostRows({"values": whole_table()["values"]}), n_slots=10), OrderedDict()
    cache, hits = table.empty(), 0
    for row in np.random.default_rng(0).zipf(1.3, 400) % M:
        cache, _ = table.place(cache, np.array([row]))
        hits += row in order
        order[row] = None
        order.move_to_end(row)
        if len(order) > 10:
            order.popitem(last=False)
        assert cache.rows.tolist() == sorted(order)
    assert cache.counts.hits == hits > 100


def test_rows_of_the_next_batch_are_read_while_this_one_computes():
    class Slow(HostRows):
        """Reads in a thread of its own, and not before it may."""

        may, threads = threading.Event(), []

        def read(self, rows):
            self.threads.append(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                assert self.may.wait(30)
            return super().read(rows)

    table = OffloadedTable(Slow({"values": whole_table()["values"]}), n_slots=40)
    cache, _ = table.place(table.empty(), batch(0)[0])
    pending = table.prefetch(cache, batch(1)[0])
    assert float(jnp.sum(cache.arrays["values"])) > 0, "computes while the read waits"
    assert not pending.arrays.done()
    Slow.may.set()
    n_misses = cache.counts.misses
    cache, slots = table.place(cache, batch(1)[0], pending)
    np.testing.assert_array_equal(cache.arrays["values"][slots], whole_table()["values"][batch(1)[0]])
    assert len(Slow.threads) == 2 and Slow.threads[1].startswith("jaxmem-rows")
    assert cache.counts.bytes_read == cache.counts.misses * ROW_BYTES and cache.counts.misses > n_misses


def test_a_prefetch_of_other_rows_costs_bytes_and_nothing_else():
    table = OffloadedTable(HostRows(whole_table()), n_slots=40)
    cache = table.empty()
    cache, slots = table.place(cache, [7, 8, 9], table.prefetch(cache, [8, 50, 60]))
    np.testing.assert_array_equal(cache.arrays["mu"][slots], whole_table()["mu"][[7, 8, 9]])
    assert cache.counts == Counts(0, 3, 5 * 3 * ROW_BYTES, 0)
    cache, slots = table.place(cache, [7, 8, 9], table.prefetch(cache, [7]))
    assert cache.counts == Counts(3, 3, 5 * 3 * ROW_BYTES, 0)


# Ids that only the forward pass knows


def looked_up(table, cache, ids, weights, n_misses=T * K):
    return table.bag_through(table.view(cache), ids, weights, n_misses=n_misses)


@pytest.mark.parametrize("cached", ["none", "some", "all"])
def test_ids_known_in_the_forward_pass_are_looked_up(cached):
    arrays = whole_table()
    table = OffloadedTable(HostRows(arrays), n_slots=40)
    ids, weights, dy = batch(0)
    kept = {"none": ids[:0, 0], "some": ids[:3], "all": ids}[cached]
    cache, _ = table.place(table.empty(), kept)
    view = table.view(cache)

    def loss(values, weights, tap):
        read = table.bag_through(view._replace(arrays={"values": values}), jnp.asarray(ids), weights, n_misses=T * K)
        return jnp.sum(dy * jnp.tanh(read + tap)), read

    (_, y), got = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        cache.arrays["values"], weights, jnp.zeros((T, V))
    )
    want_y = bag(jnp.asarray(arrays["values"]), jnp.asarray(ids), weights)
    of_whole = lambda values, weights: jnp.sum(dy * jnp.tanh(bag(values, jnp.asarray(ids), weights)))
    want = jax.grad(of_whole, (0, 1))(jnp.asarray(arrays["values"]), weights)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0][cache.slots], want[0][cache.rows], rtol=1e-5, atol=1e-5)
    rows = row_gradient(jnp.asarray(ids), weights, got[2], M, T * K)
    real = np.asarray(rows.rows) < M
    np.testing.assert_allclose(rows.sums[real], want[0][rows.rows[real]], rtol=1e-5, atol=1e-5)


def test_training_with_ids_of_the_forward_pass_is_training_of_the_whole_table():
    rows = HostRows(whole_table())
    table = OffloadedTable(rows, n_slots=T * K + 4)
    cache, count = table.empty(), jnp.int32(0)

    @jax.jit
    def forward_and_back(view, seed_ids, weights, dy):
        ids = (seed_ids + 0) % M  # as a router would find them
        y, back = jax.vjp(lambda tap: tap + table.bag_through(view, ids, weights, n_misses=T * K), jnp.zeros((T, V)))
        return row_gradient(ids, weights, back(dy * jnp.sin(y))[0], M, T * K)

    @jax.jit
    def update(arrays, count, gradient):
        updates, state = OPTIMIZER.update(gradient, LazyAdamState(count, arrays["mu"], arrays["nu"]), arrays["values"])
        return {"values": apply_rows(arrays["values"], updates), "mu": state.mu, "nu": state.nu}, state.count

    for seed in range(12):
        gradient = forward_and_back(table.view(cache), *map(jnp.asarray, batch(seed)))
        cache, in_slots = table.place_gradient(cache, gradient)
        arrays, count = update(cache.arrays, count, in_slots)
        cache = table.changed(cache, arrays)
    table.flush(cache)
    for name, array in trained_whole(12).items():
        np.testing.assert_allclose(rows.arrays[name], array, rtol=1e-5, atol=1e-6)


def test_more_misses_than_allowed_are_nan_and_ids_of_no_row_read_nothing():
    table = OffloadedTable(HostRows(whole_table()), n_slots=8)
    cache, _ = table.place(table.empty(), [3])
    ids, weights = jnp.array([[3, 10], [11, 10]]), jnp.ones((2, 2))
    assert not np.isnan(looked_up(table, cache, ids, weights, n_misses=2)).any()
    assert np.isnan(looked_up(table, cache, ids, weights, n_misses=1)).all()
    found = looked_up(table, cache, jnp.array([[3, -1, M]]), jnp.ones((1, 3)), n_misses=1)
    np.testing.assert_array_equal(found[0], whole_table()["values"][3])


def test_look_ups_of_a_batch_axis():
    table = OffloadedTable(HostRows(whole_table()), n_slots=8)
    cache, _ = table.place(table.empty(), [3, 100])
    ids, weights, _ = map(jnp.asarray, batch(0))
    view = table.view(cache)
    one = lambda ids, weights: table.bag_through(view, ids, weights, n_misses=K)
    found = jax.vmap(one)(ids[:, None], weights[:, None])[:, 0]
    np.testing.assert_allclose(found, bag(jnp.asarray(whole_table()["values"]), ids, weights), rtol=1e-5, atol=1e-5)


def test_a_large_look_up_does_not_wait_for_itself():
    values = np.ones((5000, 512), np.float32)
    table = OffloadedTable(HostRows({"values": values}), n_slots=8)
    ids = jnp.arange(4096).reshape(512, 8)
    y = jax.jit(lambda view: table.bag_through(view, ids, jnp.ones((512, 8)), n_misses=4096))(table.view(table.empty()))
    assert np.all(np.asarray(y) == 8)


# Placement and mistakes


class Endless(HostRows):
    """Too many rows for an int32."""

    def __init__(self):
        super().__init__(whole_table())
        self.n_rows = 2**31


def test_the_cache_is_spread_along_its_width():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    rows = HostRows(whole_table())
    table = OffloadedTable(rows, n_slots=20, sharding=sharding)
    cache, count = table.empty(), jnp.int32(0)
    for seed in range(4):
        ids, weights, dy = batch(seed)
        cache, slots = table.place(cache, ids)
        assert all(array.sharding.is_equivalent_to(sharding, 2) for array in cache.arrays.values())
        arrays, count = train_step(cache.arrays, count, slots, weights, dy)
        cache = table.changed(cache, arrays)
    table.flush(cache)
    for name, array in trained_whole(4).items():
        np.testing.assert_allclose(rows.arrays[name], array, rtol=1e-6, atol=1e-7)


def test_several_dtypes_and_widths():
    arrays = {"values": np.ones((9, 4), jnp.bfloat16), "codes": np.full((9, 3), 7, np.int8)}
    table = OffloadedTable(HostRows(arrays), n_slots=2)
    cache, slots = table.place(table.empty(), [8, 1])
    assert {name: (a.dtype, a.shape) for name, a in cache.arrays.items()} == {
        "values": (jnp.bfloat16, (2, 4)),
        "codes": (jnp.int8, (2, 3)),
    }
    assert np.all(cache.arrays["codes"][slots] == 7)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda t, c: t.place(c, np.arange(5)),
            "needs as many slots as a batch has different rows, 5, got n_slots=4; raise it, or make batches smaller",
        ),
        (lambda t, c: t.prefetch(c, np.arange(5)), "as many slots as a batch has different rows, 5, got n_slots=4"),
        (lambda t, c: t.place(c, [M]), "needs ids in 0..199, the rows of the table, got 200..200; change them"),
        (lambda t, c: t.place(c, [3, -1]), r"needs ids in 0..199, the rows of the table, got -1..3"),
        (
            lambda t, c: t.place(t.place(c, [1])[0], [2], t.prefetch(c, [2])),
            "needs a pending read of batch 1, got one of batch 0; prefetch behind the place of the batch before",
        ),
        (
            lambda t, c: looked_up(t, c, jnp.zeros((1, 1), int), jnp.ones((1, 1)), 0),
            "needs n_misses of at least 1, got n_m",
        ),
        (lambda t, c: looked_up(t, c, jnp.zeros((1, 2), int), jnp.ones((1, 1))), "needs as many ids as weights"),
        (
            lambda t, c: OffloadedTable(Endless(), 4).view(c),
            r"needs fewer than 2\*\*31 rows for ids under jit, got 2147",
        ),
        (lambda t, c: OffloadedTable(t.rows, 0), "needs n_slots of at least 1, got n_slots=0; raise it"),
        (
            lambda t, c: HostRows({"a": np.ones((2, 1)), "b": np.ones((3, 1))}),
            "needs arrays of as many rows, got {'a': 2",
        ),
    ],
)
def test_mistakes_are_one_sentence(call, message, unchecked):
    table = OffloadedTable(HostRows(whole_table()), n_slots=4)
    with pytest.raises(ValueError, match=message):
        call(table, table.empty())

"""Packing by memory against python lists: where everything goes, back again, and the gradients of both ways."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmem.layers.packing import Packing, pack, pack_by_memory, unpack

B, ITEMS, MEMORIES, HISTORY, CHUNK = 2, 13, 3, 2, 4
routings = hnp.arrays(np.int32, (B, ITEMS), elements=st.integers(0, MEMORIES))  # MEMORIES: nowhere
examples = settings(max_examples=60, deadline=None, derandomize=True)


def routed(memory) -> Packing:
    return pack_by_memory(memory, MEMORIES, HISTORY, CHUNK)


plan = jax.jit(routed)


def by_hand(memory):
    """The regions of one row: lists of things (history first, then items), None where there is nothing."""
    regions = []
    for m in range(MEMORIES):
        region = [m * HISTORY + i for i in range(HISTORY)]
        region += [MEMORIES * HISTORY + i for i in range(ITEMS) if memory[i] == m]
        regions.append(region + [None] * (-len(region) % CHUNK))
    return regions


@examples
@given(routings)
def test_plan_against_lists(memory):
    packing = plan(memory)
    for row in range(B):
        regions = by_hand(memory[row])
        buffer = [thing for region in regions for thing in region]
        n_things, n_places = packing.place.shape[1], packing.thing.shape[1]
        assert len(buffer) <= n_places
        buffer += [None] * (n_places - len(buffer))
        assert [thing if thing < n_things else None for thing in packing.thing[row].tolist()] == buffer
        assert packing.holds_item[row].tolist() == [t is not None and t >= MEMORIES * HISTORY for t in buffer]
        for thing, place in enumerate(packing.place[row].tolist()):
            assert (buffer.index(thing) if thing in buffer else n_places) == place

        chunk_memory = [m for m, region in enumerate(regions) for _ in range(len(region) // CHUNK)]
        assert packing.chunk_memory[row].tolist()[: len(chunk_memory)] == chunk_memory
        starts = np.cumsum([0] + [len(region) for region in regions[:-1]])
        counts = [sum(thing is not None for thing in region) for region in regions]
        assert packing.end[row].tolist() == (starts + counts).tolist()


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(move, memory, x, weight):
    y, pull = jax.vjp(lambda x: move(routed(memory), x), x)
    return y, pull(weight)[0]


@jax.jit
def there_and_back(memory, things):
    packing = routed(memory)
    return unpack(packing, pack(packing, things))


@examples
@given(routings, st.integers(0, 2**16))
def test_both_ways_are_matrices_of_zeros_and_ones(memory, seed):
    """y = M x with M from the lists; so the gradient is its transpose, and unpack is the inverse on items."""
    packing = plan(memory)
    n_things, n_places = packing.place.shape[1], packing.thing.shape[1]
    to_places = np.zeros((B, n_places, n_things), np.float32)
    for row in range(B):
        for place, thing in enumerate(thing for region in by_hand(memory[row]) for thing in region):
            if thing is not None:
                to_places[row, place, thing] = 1
    to_items = to_places.mT[:, MEMORIES * HISTORY :]

    rng = np.random.default_rng(seed)
    things, buffer = (rng.normal(size=(B, n, 2, 3)).astype(np.float32) for n in (n_things, n_places))
    apply = lambda matrix, x: np.einsum("bij,bj...->bi...", matrix, x)
    for move, matrix, x, w in (
        (pack, to_places, things, buffer),
        (unpack, to_items, buffer, things[:, MEMORIES * HISTORY :]),
    ):
        y, d_x = value_and_gradient(move, memory, x, w)
        np.testing.assert_array_equal(y, apply(matrix, x))
        np.testing.assert_array_equal(d_x, apply(matrix.mT, w))
    there = (memory < MEMORIES)[..., None, None]
    np.testing.assert_array_equal(there_and_back(memory, things), np.where(there, things[:, MEMORIES * HISTORY :], 0))


@pytest.mark.parametrize("everything_to", range(MEMORIES + 1))
def test_any_routing_fits_without_room_to_spare(everything_to):
    """The buffer is static, and has at most one chunk less room than the worst routing could use."""
    packing = plan(jnp.full((B, ITEMS), everything_to, jnp.int32))
    assert int(packing.end.max()) <= packing.thing.shape[1]
    worst = max(
        sum(-(-(HISTORY + n) // CHUNK) for n in (a, b, ITEMS - a - b)) for a in range(ITEMS) for b in range(ITEMS - a)
    )
    assert packing.thing.shape[1] == worst * CHUNK


def test_integers_move_too():
    things = jnp.arange(1, 1 + B * (MEMORIES * HISTORY + ITEMS)).reshape(B, -1)
    back = there_and_back(jnp.zeros((B, ITEMS), jnp.int32), things)
    np.testing.assert_array_equal(back, things[:, MEMORIES * HISTORY :])


def test_one_program_serves_all_routings():
    """No value of a routing decides a shape: one trace, and nothing goes back to the host."""
    there_and_back.clear_cache()
    rng = np.random.default_rng(0)
    memories = [jnp.asarray(rng.integers(0, MEMORIES, (B, ITEMS)), jnp.int32) for _ in range(3)]
    x = jnp.ones((B, MEMORIES * HISTORY + ITEMS))
    with jax.transfer_guard("disallow"):
        ys = [there_and_back(memory, x) for memory in memories]
    assert all(bool(jnp.all(y == 1)) for y in ys) and there_and_back._cache_size() == 1

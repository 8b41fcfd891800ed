"""What a call knows of its tokens: documents, positions, and where the state stands, against counting by hand."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmem.layers.mixer import Cursor, advance, init_cursor, place_state
from jaxmem.sharding import MeshConfig, make_mesh, named_sharding, use_mesh

T = 7
read = jax.jit(functools.partial(advance, n_tokens=T))


def by_hand(segment, position, ids):
    """(position, start) of every token, padding left out, and the cursor behind them."""
    seen = []
    for now in ids:
        if now == 0:
            continue
        start = now != segment
        segment, position = now, 0 if start else position
        seen.append((position, start))
        position += 1
    return seen, (segment, position)


@st.composite
def rows(draw):
    segment, position = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    steps = draw(st.lists(st.sampled_from([0, 0, 1, 2]), max_size=T))
    ids = (segment + np.cumsum(steps, dtype=int)).tolist()
    return segment, position, ids + [0] * (T - len(ids))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(rows(), min_size=3, max_size=3))
def test_advance_against_counting(batch):
    segment, position, ids = (jnp.array(column, jnp.int32) for column in zip(*batch, strict=True))
    tokens, cursor = read(Cursor(segment, position), ids)
    for row, case in enumerate(batch):
        seen, end = by_hand(*case)
        real = np.asarray(tokens.real[row])
        assert list(zip(tokens.position[row][real].tolist(), tokens.starts[row][real].tolist(), strict=True)) == seen
        assert not np.any(tokens.starts[row][~real])
        assert (cursor.segment[row], cursor.position[row]) == end
    np.testing.assert_array_equal(tokens.segment, ids)
    np.testing.assert_array_equal(tokens.real, ids != 0)


def test_without_segment_ids_the_document_continues():
    cursor = Cursor(jnp.array([1, 4]), jnp.array([0, 9]))
    tokens, after = read(cursor, None)
    np.testing.assert_array_equal(tokens.segment, [[1] * T, [4] * T])
    np.testing.assert_array_equal(tokens.position, [np.arange(T), 9 + np.arange(T)])
    assert not np.any(tokens.starts)
    assert (after.segment.tolist(), after.position.tolist()) == ([1, 4], [T, 9 + T])


def test_the_first_document_may_have_any_id():
    tokens, _ = read(init_cursor(2), jnp.array([[1] * T, [5] * T]))
    np.testing.assert_array_equal(tokens.position, [np.arange(T)] * 2)
    assert tokens.starts.sum(axis=1).tolist() == [0, 1]  # an empty state has nothing to forget


def test_one_id_per_token():
    with pytest.raises(
        ValueError, match=r"segment_ids: needs one id per token, got 3 ids for 4 tokens; .* shape \[B, T\]"
    ):
        advance(init_cursor(1), jnp.ones((1, 3), jnp.int32), 4)


def test_on_a_mesh():
    cursor, ids = Cursor(jnp.ones(8, jnp.int32), jnp.arange(8)), jnp.array([[1, 1, 2, 2, 2, 0, 0]] * 8)
    want = read(cursor, ids)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with use_mesh(mesh):
        got = read(
            place_state(cursor, Cursor(("batch",), ("batch",))),
            jax.device_put(ids, named_sharding(mesh, "batch", "time")),
        )
        empty = init_cursor(8)
    rows = named_sharding(mesh, "batch")
    assert all(a.sharding.is_equivalent_to(rows, a.ndim) for a in jax.tree.leaves((got, empty)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))

"""What a call knows of its tokens: documents, positions, and where the state stands, against counting by hand."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmem.layers.mixer import BROKEN, Cursor, Tokens, advance, init_cursor, place_state
from jaxmem.sharding import MeshConfig, make_mesh, named_sharding, use_mesh
from jaxmem.sharding.layouts import lay_out, restore
from jaxmem.sharding.rules import Rules

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
    steps = draw(st.lists(st.sampled_from([0, 0, 1, -1, 2**24]), max_size=T))  # up, down, and where fp32 has gaps
    ids = (1 + (segment - 1 + np.cumsum(steps, dtype=int)) % 2**27).tolist()
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
        numbers = 1 + np.cumsum([start for _, start in seen], dtype=int)
        assert tokens.document[row].tolist() == [*numbers, *[0] * (T - len(seen))]
    np.testing.assert_array_equal(tokens.real, ids != 0)


def test_without_segment_ids_the_document_continues():
    cursor = Cursor(jnp.array([1, 4]), jnp.array([0, 9]))
    tokens, after = read(cursor, None)
    np.testing.assert_array_equal(tokens.document, np.ones((2, T)))
    np.testing.assert_array_equal(tokens.position, [np.arange(T), 9 + np.arange(T)])
    assert not np.any(tokens.starts)
    assert (after.segment.tolist(), after.position.tolist()) == ([1, 4], [T, 9 + T])


def test_the_first_document_may_have_any_id():
    tokens, _ = read(init_cursor(2), jnp.array([[1] * T, [5] * T]))
    np.testing.assert_array_equal(tokens.position, [np.arange(T)] * 2)
    assert tokens.starts.sum(axis=1).tolist() == [0, 1]  # an empty state has nothing to forget


def test_one_id_per_token():
    with pytest.raises(
        ValueError, match=r"mixer: needs segment_ids \[B T\] of integers and shape \(1, 4\), .* got .* shape \(1, 3\)"
    ):
        advance(init_cursor(1), jnp.ones((1, 3), jnp.int32), 4)


@pytest.mark.usefixtures("unchecked")
def test_ids_that_int32_does_not_hold_are_told():
    """Not taken for others: 2**32 + 1 and 2**33 + 1 would be one document, 2**32 padding."""
    for ids in ([[2**32 + 1, 2**33 + 1, 0]], [[1, 1, 2**32]], [[2**31, 2**31, 1]]):
        told = f"mixer: needs segment_ids of at most 2147483647, .* got {np.max(ids)}; number"
        with pytest.raises(ValueError, match=told):
            advance(init_cursor(1), np.array(ids, np.int64), 3)
    with pytest.raises(ValueError, match="at most 2147483647"):
        advance(init_cursor(1), np.array([[2**31 + 5]], np.uint32), 1)
    with pytest.raises(ValueError, match="needs segment_ids above 0"):
        advance(init_cursor(1), np.array([[-(2**32), 1]], np.int64), 2)
    tokens, _ = advance(init_cursor(1), np.array([[2**31 - 1, 2, 0]], np.int64), 3)
    assert tokens.document.tolist() == [[2, 3, 0]]
    with jax.enable_x64(True):
        _, end = jax.jit(functools.partial(advance, n_tokens=2))(init_cursor(1), jnp.array([[2**32 + 1, 2**32 + 1]]))
    assert end.segment.tolist() == [BROKEN]


BAD = jnp.array([[0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 2, 0, 0, 0], [1, 1, 1, -1, 0, 0, 0], [3, 3, 1, 1, 0, 0, 0]])


def test_padding_in_front_of_tokens_breaks_a_row_for_good():
    _, after = read(init_cursor(4), BAD)
    assert after.segment.tolist() == [BROKEN, BROKEN, BROKEN, 1]
    for ids in (None, jnp.full((4, T), 9)):
        assert read(after, ids)[1].segment.tolist() == [BROKEN, BROKEN, BROKEN, 1 if ids is None else 9]


def test_padding_in_front_of_tokens_raises_where_values_are_known():
    for row, ids in enumerate(BAD[:3]):
        shown = re.escape(str(ids.tolist()))
        with pytest.raises(
            ValueError, match=f"mixer: needs segment_ids above 0 .* got segment_ids={shown} in row 1; move"
        ):
            advance(init_cursor(2), jnp.stack([BAD[3], BAD[row]]), T)
    broken = Cursor(jnp.array([1, BROKEN]), jnp.array([0, 4]))
    with pytest.raises(
        ValueError, match="needs a state whose calls had padding behind .* in row 1; start that row again"
    ):
        advance(broken, None, T)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_on_a_mesh_that_splits_the_sequence(layout):
    """Also where padding in front of a token stands on another device."""
    rng = np.random.default_rng(0)
    ids = np.array([*rng.integers(1, 3, (6, 16)), [1] * 7 + [0] * 2 + [1] * 7, [2] * 15 + [-7]], np.int32)
    ids[np.arange(16) >= np.array([16, 3, 8, 0, 13, 12, 16, 16])[:, None]] = 0
    cursor = Cursor(jnp.array([1, 2] * 4), jnp.arange(8, dtype=jnp.int32))
    whole = jax.jit(functools.partial(advance, n_tokens=16))
    want = whole(cursor, ids)
    mesh = make_mesh(MeshConfig(data=2, seq=4))
    with use_mesh(mesh, Rules(layout=layout)):

        def laid_out(cursor, ids):
            tokens, end = advance(cursor, lay_out(ids, layout, "batch", "time"), 16)
            return Tokens(*(restore(a, layout, "batch", "time") for a in tokens)), end

        got = jax.jit(laid_out)(place_state(cursor, Cursor(("batch",), ("batch",))), jnp.asarray(ids))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))
    assert want[1].segment.tolist()[6:] == [BROKEN] * 2 and BROKEN not in want[1].segment.tolist()[:6]


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

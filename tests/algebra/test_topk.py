"""What is particular to the top-k monoid: one total order, so that ties break alike however rows are grouped."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.algebra import topk
from jaxmem.algebra.topk import TopK

S, BEST = 12, 4
top_k = jax.jit(topk.top_k, static_argnames="k")
combine = jax.jit(topk.combine)


def best_by_sorting(scores, ids, k):
    """(scores, ids) of the best k by sorting python pairs."""
    rows = sorted(((-score, i) for score, i in zip(scores, ids, strict=True) if score != -math.inf))[:k]
    rows += [(math.inf, -1)] * (k - len(rows))
    return [-score for score, _ in rows], [i for _, i in rows]


def assert_is(element, scores, ids):
    assert element.scores.tolist() == scores
    assert element.ids.tolist() == ids


tied_scores = st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1.0]), min_size=S, max_size=S)
examples = settings(max_examples=25, deadline=None, derandomize=True)


@examples
@given(scores=tied_scores, ids=st.permutations(range(S)))
def test_ties_go_to_the_lower_id_on_both_paths(scores, ids):
    assert_is(top_k(jnp.array(scores), jnp.array(ids), k=BEST), *best_by_sorting(scores, ids, BEST))
    assert_is(top_k(jnp.array(scores), None, k=BEST), *best_by_sorting(scores, range(S), BEST))


@examples
@given(scores=tied_scores, ids=st.permutations(range(S)), order=st.permutations(range(4)))
def test_any_order_of_the_pieces_gives_the_same(scores, ids, order):
    pieces = top_k(jnp.array(scores).reshape(4, 3), jnp.array(ids).reshape(4, 3), k=BEST)
    merged = functools.reduce(combine, [TopK(pieces.scores[n], pieces.ids[n]) for n in order])
    assert_is(merged, *best_by_sorting(scores, ids, BEST))


@pytest.mark.parametrize("ids", [None, jnp.array([9, 4, 6])], ids=["numbered", "given"])
def test_k_above_the_number_of_rows_fills_with_no_row(ids):
    element = topk.top_k(jnp.array([1.0, -jnp.inf, 2.0]), ids, 5)
    assert_is(element, [2.0, 1.0] + [-math.inf] * 3, ([2, 0] if ids is None else [6, 9]) + [-1] * 3)


@pytest.mark.parametrize("ids", [None, jnp.arange(3)], ids=["numbered", "given"])
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_rows_give_the_identity_without_gradients(ids, n_rows):
    scores = jnp.full(n_rows, -jnp.inf)
    ids = None if ids is None else ids[:n_rows]

    def loss(scores):
        element = topk.top_k(scores, ids, 2)
        return jnp.sum(element.scores), element

    gradient, element = jax.jit(jax.grad(loss, has_aux=True))(scores)
    jax.tree.map(np.testing.assert_array_equal, element, topk.identity((2,)))
    np.testing.assert_array_equal(gradient, 0)
    both = combine(element, element)
    jax.tree.map(np.testing.assert_array_equal, both, topk.identity((2,)))


@pytest.mark.parametrize("ids", [None, jnp.array([3, 2, 1, 0])], ids=["numbered", "given"])
def test_gradients_reach_the_winners_and_only_them(ids):
    scores = jnp.array([1.0, 5.0, -jnp.inf, 3.0])

    def loss(scores):
        half = [topk.top_k(scores[i : i + 2], None if ids is None else ids[i : i + 2], 2) for i in (0, 2)]
        half[1] = half[1] if ids is not None else TopK(half[1].scores, jnp.where(half[1].ids < 0, -1, half[1].ids + 2))
        return jnp.dot(topk.combine(*half).scores, jnp.array([10.0, 20.0]))

    assert jax.jit(jax.grad(loss))(scores).tolist() == [0.0, 10.0, 0.0, 20.0]


@pytest.mark.parametrize("ids", [None, jnp.arange(3)], ids=["numbered", "given"])
def test_nan_is_seen_and_not_dropped(ids):
    assert np.isnan(topk.top_k(jnp.array([1.0, jnp.nan, 2.0]), ids, 2).scores[0])


def test_errors_name_what_to_do():
    with pytest.raises(ValueError, match="topk.top_k: needs k >= 1, got k=0; keep at least one row"):
        topk.top_k(jnp.ones(3), None, 0)
    with pytest.raises(ValueError, match="topk.combine: needs elements with one k, got k=2 and k=3; make both with"):
        topk.combine(topk.identity((2,)), topk.identity((3,)))

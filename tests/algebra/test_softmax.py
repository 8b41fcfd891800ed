"""What is particular to the softmax monoid: rows without keys, gradients of both outputs, ranges and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxmem.algebra import softmax
from jaxmem.algebra.softmax import Partial


def some_partial(seed):
    rng = np.random.default_rng(seed)
    return Partial(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 4), (3,)]))


def fold_of_two(a, b):
    return softmax.fold(jax.tree.map(lambda *pair: jnp.stack(pair), a, b))


@pytest.mark.parametrize("mask", ["none attend", "scores are -inf", "no keys at all"])
def test_no_key_gives_the_identity_and_zero_gradients(mask):
    scores, values = jnp.ones((2, 5)), jnp.ones((2, 5, 4))
    attend = jnp.zeros((2, 5), bool) if mask == "none attend" else None
    if mask == "scores are -inf":
        scores = jnp.full((2, 5), -jnp.inf)
    if mask == "no keys at all":
        scores, values = scores[:, :0], values[:, :0]

    def loss(scores, values):
        a = softmax.partial(scores, values, attend)
        return jnp.sum(a.o) + jnp.sum(a.lse), a

    gradients, a = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(scores, values)
    np.testing.assert_array_equal(a.o, 0)
    np.testing.assert_array_equal(a.lse, -np.inf)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("merge", [softmax.combine, fold_of_two])
@pytest.mark.parametrize("empty_sides", ["left", "right", "both"])
def test_empty_sides_leave_values_exact_and_gradients_finite(merge, empty_sides):
    full, empty = some_partial(0), softmax.identity((3, 4))
    a = full if empty_sides == "right" else empty
    b = full if empty_sides == "left" else empty

    def loss(a, b):
        merged = merge(a, b)
        return jnp.sum(merged.o) + jnp.sum(merged.lse), merged

    gradients, merged = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(a, b)
    expected = empty if empty_sides == "both" else full
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    ones, zeros = Partial(np.ones((3, 4)), np.ones(3)), Partial(np.zeros((3, 4)), np.zeros(3))
    for gradient, side in zip(gradients, (a, b), strict=True):
        jax.tree.map(np.testing.assert_array_equal, gradient, ones if side is full else zeros)


def test_o_of_an_empty_side_is_not_looked_at():
    full, rubbish = some_partial(0), Partial(jnp.full((3, 4), jnp.nan), jnp.full(3, -jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, softmax.combine(full, rubbish), full)
    gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(softmax.combine(a, b).o), argnums=(0, 1)))(full, rubbish)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_gradients_reach_o_and_lse_of_both_sides():
    a, b = some_partial(0), some_partial(1)
    with jax.enable_x64(True):
        a, b = jax.tree.map(lambda x: x.astype(jnp.float64), (a, b))
        check_grads(jax.jit(softmax.combine), (a, b), order=1, modes=["fwd", "rev"])
        gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(softmax.combine(a, b).o ** 2), argnums=(0, 1)))(a, b)
    assert all((np.asarray(x) != 0).all() for x in jax.tree.leaves(gradients))


def test_gradient_of_lse_is_the_softmax():
    scores = jnp.array([0.3, -1.0, 2.0, -jnp.inf])
    gradient = jax.grad(lambda scores: softmax.partial(scores, jnp.ones((4, 1))).lse)(scores)
    np.testing.assert_allclose(gradient, jax.nn.softmax(scores), rtol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_far_from_zero_neither_overflow_nor_vanish(shift):
    scores, values = jnp.array([shift, shift + 1.0]), jnp.array([[0.0], [1.0]])
    a, b = (softmax.partial(scores[i : i + 1], values[i : i + 1]) for i in (0, 1))
    merged = softmax.combine(a, b)
    np.testing.assert_allclose(merged.o[0], 1 / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(merged.lse, shift + np.log1p(np.e), rtol=1e-6)


def test_queries_share_keys_by_broadcasting_and_half_precision_is_lifted():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(2, 7, 5)), jnp.bfloat16)
    values = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.bfloat16)
    a = softmax.partial(scores, values[:, None], jnp.ones(5, bool))
    expected = jax.nn.softmax(scores.astype(jnp.float32)) @ values.astype(jnp.float32)
    assert a.o.dtype == a.lse.dtype == jnp.float32
    np.testing.assert_allclose(a.o, expected, rtol=1e-5, atol=1e-6)

"""What is particular to the affine monoid: all states from one scan, resets, and the three kinds of M."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmem.algebra import affine
from jaxmem.algebra.affine import Matrix, Scalar, Segment, Vector

T, K, V = 6, 3, 4
scan, fold, apply = jax.jit(affine.scan, static_argnames="axis"), jax.jit(affine.fold), jax.jit(affine.apply)


def tokens(seed=0, resets=()):
    """(g [T], B [T K V], state [K V]) with a full reset at the given tokens."""
    rng = np.random.default_rng(seed)
    g = -rng.exponential(size=T)
    g[list(resets)] = -np.inf
    return (jnp.asarray(x, jnp.float32) for x in (g, rng.normal(size=(T, K, V)), rng.normal(size=(K, V))))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), resets=st.sets(st.integers(0, T - 1)))
def test_scan_gives_the_state_after_every_token(seed, resets):
    g, B, state = tokens(seed, resets)
    states = apply(scan(Segment(Scalar(g), B)), state)
    expected = np.asarray(state, np.float64)
    for t in range(T):
        expected = np.exp(np.float64(g[t])) * expected + np.asarray(B[t], np.float64)
        assert np.linalg.norm(states[t] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_three_kinds_agree_where_they_mean_the_same():
    g, B, _ = tokens(resets=[2])
    scalar = Segment(Scalar(g), B)
    vector = Segment(Vector(jnp.repeat(g[:, None], K, axis=1)), B)
    matrix = Segment(Matrix(jnp.exp(g)[:, None, None] * jnp.eye(K)), B)
    for other in (vector, matrix):
        np.testing.assert_allclose(fold(other).B, fold(scalar).B, rtol=1e-6)
        np.testing.assert_allclose(scan(other).B, scan(scalar).B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Scalar, Vector])
@pytest.mark.parametrize("run", [fold, lambda segments: jax.tree.map(lambda x: x[-1], scan(segments))])
def test_a_reset_forgets_exactly_and_its_gradient_is_zero(kind, run):
    g, B, state = tokens(resets=[3])
    if kind is Vector:
        g = jnp.repeat(g[:, None], K, axis=1)

    def final(g, B, state):
        return apply(run(Segment(kind(g), B)), state)

    gradients = jax.jit(jax.grad(lambda *args: jnp.sum(final(*args) ** 2), argnums=(0, 1, 2)))(g, B, state)
    assert all(np.isfinite(x).all() for x in gradients)
    for past in (gradients[0][:4], gradients[1][:3], gradients[2]):
        np.testing.assert_array_equal(past, 0)
    for rest in (gradients[0][4:], gradients[1][3:]):
        assert (np.asarray(rest) != 0).all()
    np.testing.assert_array_equal(final(g, B, state), final(g, B.at[:3].set(100.0), -state))


def test_everything_reset_leaves_only_the_last_write():
    g, B, state = tokens(resets=range(T))
    np.testing.assert_array_equal(apply(fold(Segment(Scalar(g), B)), state), B[-1])


def test_decays_far_below_underflow_stay_ordinary_numbers():
    g = jnp.full(T, -1e30)
    folded, gradient = jax.value_and_grad(lambda g: jnp.sum(fold(Segment(Scalar(g), jnp.ones((T, K, V)))).B))(g)
    assert folded == K * V
    np.testing.assert_array_equal(gradient, 0)


def test_one_segment_is_its_own_fold_and_scan():
    g, B, _ = tokens()
    one = Segment(Scalar(g[:1]), B[:1])
    jax.tree.map(np.testing.assert_array_equal, scan(one), one)
    jax.tree.map(np.testing.assert_array_equal, fold(one), Segment(Scalar(g[0]), B[0]))


def test_axes_count_leading_dimensions_only():
    g, B, _ = tokens()
    segments = Segment(Vector(jnp.zeros((2, T, K))), jnp.stack([B, B]))
    assert scan(segments, axis=-1).B.shape == (2, T, K, V)
    with pytest.raises(ValueError, match="axis 2 is out of bounds for array of dimension 2"):
        scan(segments, axis=2)


def test_kinds_do_not_mix():
    message = "affine.combine: needs two segments of one kind, got first.M=Scalar and then.M=Vector; write both as"
    with pytest.raises(ValueError, match=message):
        affine.combine(affine.identity(Scalar, (K, V)), affine.identity(Vector, (K, V)))

"""Rotary embedding against the formula in fp64, at ordinary and at very far positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.layers.rotary import rotary


def formula(x, positions, theta):
    """Pair i = (x_i, x_{i + K/2}) as a complex number times e^{i angle}, in fp64."""
    x = np.asarray(x, np.float64)
    width = x.shape[-1]
    angle = np.asarray(positions, np.float64)[:, :, None, None] * theta ** (-np.arange(0, width, 2) / width)
    turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 5e5])
@pytest.mark.parametrize(("start", "tolerance"), [(0, 1e-6), (4_096, 5e-6), (1_000_000, 1e-3)])
def test_matches_the_formula(theta, start, tolerance):
    x = jax.random.normal(jax.random.key(0), (2, 16, 3, 32))
    positions = jnp.broadcast_to(start + jnp.arange(16), (2, 16))
    np.testing.assert_allclose(rotary(x, positions, theta=theta), formula(x, positions, theta), atol=4 * tolerance)


def test_scores_depend_on_distance_only_even_far_out():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 64))

    @jax.jit
    def score(q_position, k_position):
        return jnp.sum(rotary(q, q_position[None, None]) * rotary(k, k_position[None, None]))

    near = score(jnp.array(37), jnp.array(5))
    far = score(jnp.array(50_000_037), jnp.array(50_000_005))
    np.testing.assert_allclose(far, near, atol=2e-5)


def test_computes_in_fp32_and_keeps_the_dtype():
    x = jax.random.normal(jax.random.key(2), (1, 8, 2, 16), jnp.bfloat16)
    positions = 1_000 + jnp.arange(8)[None]
    y = rotary(x, positions)
    assert y.dtype == jnp.bfloat16
    exact = rotary(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y.astype(jnp.float32), exact.astype(jnp.float32))


def test_gradient_is_the_inverse_turn():
    x, dy = jax.random.normal(jax.random.key(3), (2, 1, 8, 2, 16))
    positions = 1_000 + jnp.arange(8)[None]
    (dx,) = jax.vjp(lambda x: rotary(x, positions), x)[1](dy)
    np.testing.assert_allclose(dx, rotary(dy, -positions), atol=1e-5)


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"rotary: needs an even head width, got K=3; change head_dim"):
        rotary(jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1), jnp.int32))

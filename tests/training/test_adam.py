"""Adam, dense and of rows, against its equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.pallas_kernels.memory_lookup import RowGradient
from jaxmem.training.adam import bias, scale_by_adam
from jaxmem.training.lazy_adam import lazy_adam

B1, EPS, STEPS, SHAPE = 0.9, 1e-8, 100, (4, 3)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.9999, 0.99999])
def test_the_part_of_a_moment_that_is_filled(decay):
    counts = np.array([1, 2, 17, 1000, 100_000, 2**24], np.int32)
    got = jax.jit(jax.vmap(lambda count: bias(decay, count)))(counts)
    np.testing.assert_allclose(got, 1 - decay ** counts.astype(np.float64), rtol=3e-7)


def directions(b2, gradients):
    """The equations in float64: what is subtracted in every step, at a rate of 1."""
    m = v = np.zeros(SHAPE)
    for t, g in enumerate(gradients.astype(np.float64), 1):
        m, v = B1 * m + (1 - B1) * g, b2 * v + (1 - b2) * g**2
        yield m / (1 - B1**t) / (np.sqrt(v / (1 - b2**t)) + EPS)


def dense(b2):
    optimizer = scale_by_adam(B1, b2, EPS)
    return optimizer.init(jnp.zeros(SHAPE)), optimizer.update


def lazy(b2):
    optimizer = lazy_adam(1.0, B1, b2, EPS)

    def update(g, state):
        rows = jnp.arange(SHAPE[0])
        updates, state = optimizer.update(RowGradient(rows, g, jnp.ones_like(rows)), state)
        return -updates.sums, state

    return optimizer.init(jnp.zeros(SHAPE)), update


@pytest.mark.parametrize("adam", [dense, lazy])
@pytest.mark.parametrize("b2", [0.999, 0.9999, 0.99999])
def test_directions_are_those_of_float64(adam, b2):
    """Bias formed in fp32 is off by 1.4e-5, 1.3e-4 and 1e-3."""
    gradients = np.random.default_rng(0).normal(size=(STEPS, *SHAPE)).astype(np.float32)
    state, update = adam(b2)
    _, got = jax.jit(lambda gradients: jax.lax.scan(lambda s, g: update(g, s)[::-1], state, gradients))(gradients)
    want = np.stack(list(directions(b2, gradients)))
    error = np.sqrt(np.mean((got - want) ** 2, axis=(1, 2)) / np.mean(want**2, axis=(1, 2)))
    assert np.max(error) < 1e-6

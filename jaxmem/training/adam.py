"""Adam's moments and the correction of their bias, as exact as fp32 allows.

    m += (1 - b1) (g - m)      v += (1 - b2) (g^2 - v)      direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

In fp32, b2 = 0.9999 is 0.999899983, and 1 - b2^t formed of it is off by 1.7e-4 at t = 1, as in optax 0.2: here it is
-expm1(t log b2) with the logarithm of the number that was given. Moments move by 1 - b instead of being multiplied by b,
whose rounding would be as large a part of 1 - b.

Reference: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
"""

import math

import jax
import jax.numpy as jnp
import optax

from jaxmem.typing import Array, DTypeLike, Float, Int, PyTree


def bias(decay: float, count: Int[Array, ""], dtype: DTypeLike = jnp.float32) -> Float[Array, ""]:
    """1 - decay^count, the part of a moment that `count` steps have filled.

    >>> [f"{bias(0.9999, jnp.int32(t)):.5g}" for t in (1, 2, 10_000)]
    ['0.0001', '0.00019999', '0.63214']
    """
    log = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(log, dtype))


def moved(moment: Array, towards: Array, decay: float) -> Array:
    """decay * moment + (1 - decay) * towards."""
    return moment + (1 - decay) * (towards - moment)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with its state, of numbers b1 and b2."""

    def update(updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None):
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: moved(m, g, b1), updates, state.mu)
        nu = jax.tree.map(lambda g, v: moved(v, g**2, b2), updates, state.nu)

        def direction(m: Array, v: Array) -> Array:
            return m / bias(b1, count, m.dtype) / (jnp.sqrt(v / bias(b2, count, v.dtype)) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)

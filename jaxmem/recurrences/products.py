"""Products of the recurrences: matrices in full fp32, and sums as products."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxmem.typing import Array


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum without rounding its fp32 factors, on any device."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def add_up(x: Array, axis: int) -> Array:
    """The sum over an axis, as a product with ones: XLA's CPU compiler (jaxlib 0.10) fuses whatever makes x into a sum, and
    the loop that comes out can take many times as long."""
    ones = jnp.ones(x.shape[axis], x.dtype)
    if axis == 0:
        return dot("k,k...->...", ones, x)
    return dot("...k,k->...", jnp.moveaxis(x, axis, -1), ones)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def widen(x: Array, size: int, axis: int = -1) -> Array:
    """x, the same along one more axis; its gradient is formed by `add_up`."""
    x = jnp.expand_dims(x, axis)
    axis %= x.ndim
    return jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))


widen.defvjp(lambda x, size, axis: (widen(x, size, axis), None), lambda size, axis, _, d_wide: (add_up(d_wide, axis),))


def for_tokens(x: Array, tokens: tuple[int, ...]) -> Array:
    """x [...] for every token, [*tokens ...]; its gradient is formed by `add_up`."""
    return widen(x, math.prod(tokens), 0).reshape(*tokens, *x.shape)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the dimensions along which an array of this shape, of the same rank, is broadcast to x."""
    for axis, (size, wanted) in enumerate(zip(x.shape, shape, strict=True)):
        if size != wanted:
            x = jnp.expand_dims(add_up(x, axis), axis)
    return x

"""Products of the recurrences: matrices in full fp32, the inverse of a unit triangle, and a linear scan."""

import jax
import jax.numpy as jnp

from jaxmem.typing import Array


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum without rounding its fp32 factors, on any device."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def linear_scan(g: Array, x: Array) -> Array:
    """h_t = exp(g_t) h_{t-1} + x_t along the first axis, from h_{-1} = 0; g broadcasts to x, both real or complex.

    Its backward pass keeps h alone and is the same scan from the end.
    """
    _, h = jax.lax.scan(lambda h, t: (jnp.exp(t[0]) * h + t[1],) * 2, jnp.zeros_like(x[0]), (g, x))
    return h


def _scan_forward(g: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    h = linear_scan(g, x)
    return h, (g, h)


def _scan_backward(saved: tuple[Array, Array], d_h: Array) -> tuple[Array, Array]:
    g, h = saved
    first = jnp.zeros_like(g[:1])
    later = jnp.flip(jnp.concatenate([g[1:], first]), 0)
    d_x = jnp.flip(linear_scan(later, jnp.flip(d_h, 0)), 0)
    earlier = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    return sum_to(d_x * jnp.exp(g) * earlier, g.shape), d_x


linear_scan.defvjp(_scan_forward, _scan_backward)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over the dimensions along which an array of this shape, of the same rank, is broadcast to x."""
    return jnp.sum(x, axis=[i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b], keepdims=True)

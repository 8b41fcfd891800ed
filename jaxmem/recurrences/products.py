"""Products of the recurrences: matrices in full fp32, and sums as products."""

import functools
import math
import string

import jax
import jax.numpy as jnp

from jaxmem.sharding.folds import spread_like
from jaxmem.typing import Array


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """einsum of two, no letter in one of them alone, without rounding its fp32 factors, on any device.

    Its gradients are einsums with factors in the order of their result: XLA's CPU compiler would turn and copy autodiff's.
    """
    inputs, product = subscripts.split("->")
    names = [
        name.replace("...", string.ascii_uppercase[26 - x.ndim + len(name.replace("...", "")) :])
        for name, x in zip(inputs.split(","), (a, b), strict=True)
    ]
    leading = max(("".join(filter(str.isupper, name)) for name in names), key=len)
    return _product(*names, product.replace("...", leading), *spread_like((a, b), (a, b)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(of_a: str, of_b: str, of_product: str, a: Array, b: Array) -> Array:
    return jnp.einsum(f"{of_a},{of_b}->{of_product}", a, b, precision=jax.lax.Precision.HIGHEST)


def _product_backward(of_a, of_b, of_product, factors, d):
    def gradient(name: str, x: Array, of_other: str, other: Array) -> Array:
        own = [letter for letter in name if (letter in of_other) != (letter in of_product)]
        first, second = (of_product, d), (of_other, other)
        if own and own[0] in of_other:
            first, second = second, first
        d_x = sum_to(_product(first[0], second[0], name, first[1], second[1]), x.shape)
        return d_x.astype(x.dtype) if jnp.iscomplexobj(x) else jnp.real(d_x).astype(x.dtype)

    a, b = factors
    return gradient(of_a, a, of_b, b), gradient(of_b, b, of_a, a)


_product.defvjp(lambda *args: (_product(*args), args[3:]), _product_backward)


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

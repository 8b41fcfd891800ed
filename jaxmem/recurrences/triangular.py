"""Unit lower triangles of [C, C] blocks: put together from halves, and inverted by halves."""

import functools

import jax
import jax.numpy as jnp

from jaxmem.recurrences.products import dot
from jaxmem.typing import Array, Float


def join_halves(
    blocks: Float[Array, "*N blocks s s"], corner: Float[Array, "*N n s s"]
) -> Float[Array, "*N n 2*s 2*s"]:
    """Lower block triangles [[X, 0], [corner, Z]] of neighbours X and Z among the blocks."""
    upper, lower = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """(I + a)^-1 for a strictly lower triangular a; C is a power of two.

    By halves, [[X, 0], [Y, Z]]^-1 = [[X^-1, 0], [-Z^-1 Y X^-1, Z^-1]], from the diagonal outwards: a dozen batched products
    that suit a matrix unit and, unlike powers of a, never grow large and cancel. (LAPACK's batched triangular solve would
    do on a CPU, but two of them in one program can wait for each other's threads forever: jaxlib 0.10.2 on two cores.)
    """
    size, block = a.shape[-1], min(16, a.shape[-1])
    inverse = _invert_in_place(_diagonal_blocks(a, block))
    while block < size:
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _diagonal_blocks(a, 2 * block)[..., block:, :block]
        corner = -dot("...ij,...jk->...ik", lower, dot("...ij,...jk->...ik", corner, upper))
        inverse = join_halves(inverse, corner)
        block *= 2
    return inverse[..., 0, :, :]


def _inverse_forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    product = dot("...ji,...jk->...ik", inverse, dot("...ij,...kj->...ik", cotangent, inverse))
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@jax.custom_vjp
def unit_lower_solve(a: Float[Array, "*N C C"], b: Float[Array, "*N C W"]) -> Float[Array, "*N C W"]:
    """(I + a)^-1 b for a strictly lower triangular a; C is a power of two.

    The inverse alone loses C times what fp32 resolves where keys are nearly parallel and are written with strengths near 2
    (its entries then are 2, -2, 2, ...); one step of refinement, x + (I + a)^-1 (b - x - a x), gives most of it back. The
    gradient is solved for likewise, and that of a needs no product of [C, C] matrices: -tril(d_b x^T).
    """
    return _solve_forward(a, b)[0]


def _solve_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    inverse = unit_lower_inverse(a)
    times = functools.partial(dot, "...ij,...jw->...iw")
    x = times(inverse, b)
    x += times(inverse, b - x - times(a, x))
    return x, (a, inverse, x)


def _solve_backward(saved: tuple[Array, Array, Array], d_x: Array) -> tuple[Array, Array]:
    a, inverse, x = saved
    times = functools.partial(dot, "...ji,...jw->...iw")
    d_b = times(inverse, d_x)
    d_b += times(inverse, d_x - d_b - times(a, d_b))
    return -jnp.tril(dot("...iw,...jw->...ij", d_b, x), -1), d_b


unit_lower_solve.defvjp(_solve_forward, _solve_backward)


def _diagonal_blocks(a: Float[Array, "*N C C"], block: int) -> Float[Array, "*N blocks block block"]:
    starts = range(0, a.shape[-1], block)
    return jnp.stack([a[..., i : i + block, i : i + block] for i in starts], axis=-3)


def _invert_in_place(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """The same inverse by whole [C, C] products, one per doubling: best for small C.

    Corners are put in place, not subtracted: fused into the product, that crashes libtpu 0.0.51's compiler for tpu7x.
    """
    index = jnp.arange(a.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    block = 1
    while block < a.shape[-1]:
        half = index // block
        corner = (half[:, None] == half + 1) & (half % 2 == 0)
        product = dot("...ij,...jk->...ik", inverse, dot("...ij,...jk->...ik", a * corner, inverse))
        inverse = jnp.where(corner, -product, inverse)
        block *= 2
    return inverse

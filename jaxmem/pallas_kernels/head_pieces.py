"""Heads in pieces that Triton multiplies, powers of two: products of pieces are summed, or stand side by side."""

import functools

import jax.numpy as jnp

from jaxmem.pallas_kernels.attention_scores import product
from jaxmem.typing import Array, Float

SMALLEST = 16
"""Of what Triton multiplies: tokens of a block, and width of a piece."""
LARGEST_FP32 = 32
"""Width of a piece in fp32, which tensor cores do not multiply exactly: threads do, with their factors in registers."""


def pieces(width: int, dtype) -> list[slice]:
    """What a head is cut into.

    >>> pieces(192, jnp.bfloat16)
    [slice(0, 128, None), slice(128, 192, None)]
    """
    found, start = [], 0
    widest = LARGEST_FP32 if dtype == jnp.float32 else width
    while start < width:
        size = min(widest, 1 << (width - start).bit_length() - 1)
        found.append(slice(start, start + size))
        start += size
    return found


def load(ref, *where) -> list[Float[Array, "C K"]]:
    """The pieces of some heads' tokens."""
    return [ref[*where, piece] for piece in pieces(ref.shape[-1], ref.dtype)]


def store(ref, parts) -> None:
    start = 0
    for piece in parts:
        ref[:, start : start + piece.shape[1]] = piece
        start += piece.shape[1]


def products(rows, columns) -> Float[Array, "C D"]:
    """rows columns^T, of pieces."""
    return functools.reduce(jnp.add, (product("ik,jk->ij", x, y) for x, y in zip(rows, columns, strict=True)))


def zeros(n_tokens: int, like) -> list[Float[Array, "C K"]]:
    """Sums of products, in the pieces of a head."""
    return [
        jnp.zeros((n_tokens, piece.stop - piece.start), jnp.float32) for piece in pieces(like.shape[-1], like.dtype)
    ]

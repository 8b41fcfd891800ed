"""The softmax monoid: attention over some of the keys, mergeable with attention over the others.

For keys s in a set A with scores x_s and values v_s, the element is

    lse_A = log sum_{s in A} exp(x_s)        o_A = sum_{s in A} exp(x_s - lse_A) v_s

and for disjoint A and B

    lse_AB = log(exp(lse_A) + exp(lse_B))    o_AB = exp(lse_A - lse_AB) o_A + exp(lse_B - lse_AB) o_B.

A single key is the element (v_s, x_s), so attention is the fold of its keys. The element of no key is o = 0,
lse = -inf, and everything here is exact and differentiable there: weights are computed against a finite maximum and
divided by a nonzero total, so no branch that is not taken puts a NaN into a gradient. Gradients flow to o and to lse.

Reference: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867, section 3.1;
Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float
from numpy.lib.array_utils import normalize_axis_index


class Partial(NamedTuple):
    """Attention over some of the keys."""

    o: Float[Array, "*batch V"]
    """Softmax-weighted mean of their values, fp32; 0 if there is no key."""
    lse: Float[Array, "*batch"]
    """Natural log of the sum of their exponentiated scores, fp32; -inf if there is no key."""


def identity(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Partial:
    """Attention over no key: o = 0 of the given shape [..., V], lse = -inf.

    >>> identity((2, 4)).lse.tolist()
    [-inf, -inf]
    """
    return Partial(jnp.zeros(shape, dtype), jnp.full(shape[:-1], -jnp.inf, dtype))


def partial(
    scores: Float[Array, "*#batch S"],
    values: Float[Array, "*#batch S V"],
    mask: Bool[Array, "*#batch S"] | None = None,
) -> Partial:
    """Attention over S keys, o = sum_s softmax(scores)_s values_s, as an element to be combined with others.

    Args:
      scores: logits, already scaled; -inf leaves a key out.
      values: broadcast against scores, so that queries which share keys pass `values[..., None, :, :]`. Finite, also
        where masked.
      mask: True = attend; None attends to every key. A row without any key gives the identity.

    Returns: the element, in fp32 (fp64 for fp64 scores).
    Cost: 2 S V FLOPs per row, and one weight per score.

    >>> scores, values = jnp.array([0.0, jnp.log(3.0), 5.0]), jnp.array([[4.0], [8.0], [99.0]])
    >>> a = partial(scores, values, jnp.array([True, True, False]))
    >>> a.o.round(4).tolist(), a.lse.round(4).item() == jnp.log(4.0).round(4).item()
    ([7.0], True)
    """
    dtype = jnp.promote_types(scores.dtype, jnp.float32)
    scores = scores.astype(dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights, lse = _softmax(scores, axis=-1)
    o = jnp.einsum("...s,...sv->...v", weights, values.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return Partial(o, lse)


def combine(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of a and the keys of b, which must be disjoint; commutes.

    Where one side is empty the result is exactly the other, where both are it is the identity; the o of an empty side
    is not looked at (kernels leave what they like there).

    >>> one = Partial(jnp.array([2.0]), jnp.array(0.0))
    >>> both = combine(one, Partial(jnp.array([4.0]), jnp.array(0.0)))
    >>> both.o.item(), combine(one, identity((1,))).o.item()
    (3.0, 2.0)
    """
    (weight_a, weight_b), lse = _softmax(jnp.stack([a.lse, b.lse]), axis=0)
    return Partial(weight_a[..., None] * _known(a) + weight_b[..., None] * _known(b), lse)


def fold(partials: Partial, axis: int = 0) -> Partial:
    """Combines all elements along an axis of lse at once, in one pass over o; the fold of none is the identity.

    Args:
      partials: stacked elements, o [..., N, ..., V] and lse [..., N, ...].
      axis: which dimension of lse is N; negative counts from the last of lse.

    Raises: ValueError (numpy's AxisError) if lse has no such axis.

    >>> fold(Partial(jnp.array([[2.0], [4.0], [6.0]]), jnp.zeros(3))).o.round(4).item()
    4.0
    """
    axis = normalize_axis_index(axis, partials.lse.ndim)
    weights, lse = _softmax(partials.lse, axis)
    return Partial(jnp.sum(weights[..., None] * _known(partials), axis), lse)


def _softmax(scores: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(softmax, logsumexp) along axis; (zeros, -inf) where no score is above -inf."""
    top = jax.lax.stop_gradient(jnp.max(scores, axis, keepdims=True, initial=-jnp.inf))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    unnormalised = jnp.exp(scores - top)
    total = jnp.where(empty, 1, jnp.sum(unnormalised, axis, keepdims=True))
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return unnormalised / total, jnp.squeeze(lse, axis)


def _known(a: Partial) -> Float[Array, "*batch V"]:
    """o, and 0 where there is no key."""
    return jnp.where(a.lse[..., None] == -jnp.inf, 0, a.o)

"""The suffix monoid: the last W items of a sequence.

An element holds the last W items [W, D] right-aligned, the newest in slot W-1, with how many of them are real. Putting
b behind a keeps all of b and as many of the newest items of a as there is room for:

    (a ++ b)[-W:],    count = min(count_a + count_b, W).

Rows of a batch may hold different counts (padded, packed or routed sequences), so items move by a gather with an offset
per row. Slots that are not real are 0, which is what a causal convolution wants to its left. Gradients flow to the
items that survive, and to nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from numpy.lib.array_utils import normalize_axis_index


class Suffix(NamedTuple):
    """The last W items of a sequence."""

    items: Float[Array, "*batch W D"]
    """Oldest first, right-aligned; 0 in the W - count slots before the first real item."""
    count: Int[Array, "*batch"]
    """How many items are real, 0..W."""


def identity(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Suffix:
    """The suffix of an empty sequence, with items of the given shape [..., W, D].

    >>> identity((2, 4, 8)).count.tolist()
    [0, 0]
    """
    return Suffix(jnp.zeros(shape, dtype), jnp.zeros(shape[:-2], jnp.int32))


def suffix_of(sequence: Float[Array, "*batch T D"], width: int, length: Int[Array, "*#batch"] | None = None) -> Suffix:
    """The last `width` items of a sequence; of all T of them where it is shorter.

    Args:
      sequence: items, oldest first.
      width: W >= 1, items to keep.
      length: 0..T, how many items of each row are real, the others being padding on its right; None: all T.

    Raises: ValueError if width < 1.
    Cost: reads W items per row, not T.

    >>> tokens = jnp.array([[[1.0], [2.0], [3.0]], [[4.0], [0.0], [0.0]]])
    >>> suffix_of(tokens, 2, jnp.array([3, 1])).items[..., 0].tolist()
    [[2.0, 3.0], [0.0, 4.0]]
    """
    if width < 1:
        raise ValueError(f"suffix.suffix_of: needs width >= 1, got width={width}; keep at least one item")
    *batch, n_tokens, _ = sequence.shape
    missing = max(width - n_tokens, 0)
    sequence = jnp.pad(sequence, [(0, 0)] * len(batch) + [(missing, 0), (0, 0)])
    if length is None:
        return Suffix(sequence[..., -width:, :], jnp.full(batch, n_tokens - max(n_tokens - width, 0), jnp.int32))
    length = jnp.broadcast_to(length, batch)
    slots = missing + length[..., None] + jnp.arange(-width, 0)
    return _zeroed(_take(sequence, jnp.maximum(slots, 0)), jnp.minimum(length, width))


def combine(a: Suffix, b: Suffix) -> Suffix:
    """The suffix of the sequence of a followed by that of b; does not commute.

    Raises: ValueError if a and b do not hold the same shape of items.

    >>> a, b = suffix_of(jnp.array([[1.0], [2.0], [3.0]]), 3), suffix_of(jnp.array([[4.0]]), 3)
    >>> combine(a, b).items[:, 0].tolist(), combine(b, a).items[:, 0].tolist()
    ([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    """
    if a.items.shape != b.items.shape:
        raise ValueError(
            f"suffix.combine: needs items of one shape [..., W, D], got a.items={a.items.shape} and "
            f"b.items={b.items.shape}; make both with the same width"
        )
    return fold(jax.tree.map(lambda *pair: jnp.stack(pair), a, b))


def fold(suffixes: Suffix, axis: int = 0) -> Suffix:
    """Combines all elements along an axis of count, earliest first, in one gather; the fold of none is the identity.

    Args:
      suffixes: stacked elements, items [..., N, ..., W, D] and count [..., N, ...].
      axis: which dimension of count is N; negative counts from the last of count.

    Raises: ValueError (numpy's AxisError) if count has no such axis.
    Cost: reads W of the N W items, and compares N W counts to find them.

    >>> fold(suffix_of(jnp.array([[[1.0], [2.0]], [[3.0], [0.0]]]), 2, jnp.array([2, 1]))).items[:, 0].tolist()
    [2.0, 3.0]
    """
    axis = normalize_axis_index(axis, suffixes.count.ndim)
    items = jnp.moveaxis(suffixes.items, axis, -3)  # [..., N, W, D]
    count = jnp.moveaxis(suffixes.count, axis, -1)  # [..., N]
    *batch, n, width, d = items.shape
    if n == 0:
        return identity((*batch, width, d), items.dtype)

    age = jnp.arange(width)[::-1]  # [W], items behind the one in each slot of the result
    later = jax.lax.cumsum(count, axis=count.ndim - 1, reverse=True) - count  # [..., N], real items behind each element
    element = jnp.sum(later[..., None] > age, axis=-2)  # [..., W], the element that holds the item of that age
    slot = width - 1 - age + jnp.take_along_axis(later, element, axis=-1)  # [..., W], and where in it
    kept = _take(items.reshape(*batch, n * width, d), element * width + slot)
    return _zeroed(kept, jnp.minimum(jnp.sum(count, axis=-1), width))


def _take(items: Float[Array, "*batch S D"], slots: Int[Array, "*batch W"]) -> Float[Array, "*batch W D"]:
    return jnp.take_along_axis(items, slots[..., None], axis=-2)


def _zeroed(items: Float[Array, "*batch W D"], count: Int[Array, "*batch"]) -> Suffix:
    """The element of `count` items, with 0 in the slots that are not real and without any gradient there."""
    width = items.shape[-2]
    real = jnp.arange(width) >= width - count[..., None]
    return Suffix(jnp.where(real[..., None], items, 0), count)

"""What kernels are told of their blocks: which blocks of the other side to visit, and which of these need no mask.

A kernel reads a few numbers per block, O(T) of them, and never a table of pairs of blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.pallas_kernels.masks import Extent, Mask, Place, extent, may_see
from jaxmem.typing import Array, Bool, Int


class Span(NamedTuple):
    """What a block of tokens spans; the segments with padding's own, so that a block with padding is never uniform."""

    index_low: Int[Array, "..."]
    index_high: Int[Array, "..."]
    segment_low: Int[Array, "..."]
    segment_high: Int[Array, "..."]
    first: Int[Array, "..."]
    """Block of the other side that may be seen, and one past the last."""
    end: Int[Array, "..."]


def one_segment(q: Span, k: Span) -> Bool[Array, ""]:
    """Whether all tokens of two blocks are of one document."""
    return (q.segment_low == q.segment_high) & (k.segment_low == k.segment_high) & (q.segment_low == k.segment_low)


def sees_all(mask: Mask, q: Span, k: Span) -> Bool[Array, ""]:
    """True only if every query of a block sees every key of the other."""
    seen = one_segment(q, k)
    if mask.causal:
        seen &= k.index_high <= q.index_low
    if mask.window is not None:
        seen &= (q.index_high - k.index_low < mask.window) & (k.index_high - q.index_low < mask.window)
    if mask.chunk is not None:
        seen &= _chunk(mask, q.index_low) == _chunk(mask, k.index_high)
        seen &= _chunk(mask, q.index_high) == _chunk(mask, k.index_low)
    return seen


def visible(mask: Mask, q: Place, k: Place) -> Bool[Array, "..."]:
    """Which key each query sees, of arrays that broadcast; padding of queries is segment -1, of keys 0."""
    return (q.segment == k.segment) & visible_in_segment(mask, q, k)


def visible_in_segment(mask: Mask, q: Place, k: Place) -> Bool[Array, "..."] | bool:
    """The same of tokens of one document."""
    seen = True
    if mask.causal:
        past = k.index <= q.index
        seen &= past if k.prefix is None else past | (k.prefix != 0)
    if mask.window is not None:
        seen &= (q.index - k.index < mask.window) & (k.index - q.index < mask.window)
    if mask.chunk is not None:
        seen &= _chunk(mask, q.index) == _chunk(mask, k.index)
    return seen


def _chunk(mask: Mask, index: Int[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.div(index, jnp.full_like(index, mask.chunk))


def spans(mask: Mask, q: Place, k: Place) -> tuple[Span, Span]:
    """Of blocks of queries [B N C] and of keys [B M C].

    first and end are minima and maxima over pairs of blocks, which XLA computes without an array of them.
    """
    q_extent, k_extent = extent(q._replace(segment=jnp.maximum(q.segment, 0))), extent(k)
    each = lambda x, axis: jax.tree.map(lambda a: jnp.expand_dims(a, axis), x)
    pairs = may_see(mask, each(q_extent, 2), each(k_extent, 1))  # [B N M]

    def of(place: Place, reach: Extent, pairs: Bool[Array, "B N M"]) -> Span:
        n_others = pairs.shape[-1]
        first = jnp.min(jnp.where(pairs, jnp.arange(n_others), n_others), axis=-1).astype(jnp.int32)
        last = jnp.max(jnp.where(pairs, jnp.arange(n_others), -1), axis=-1).astype(jnp.int32)
        segments = jnp.min(place.segment, axis=-1), jnp.max(place.segment, axis=-1)
        return Span(reach.index_low, reach.index_high, *segments, first, jnp.maximum(first, last + 1))

    return of(q, q_extent, pairs), of(k, k_extent, pairs.swapaxes(1, 2))


class Visits(NamedTuple):
    """Which blocks of the other side a block visits, and which run of these needs no mask; four numbers per block."""

    first: Int[Array, "..."]
    whole: Int[Array, "..."]
    """First of the run of blocks of which every token sees, or is seen by, every one of this block's."""
    end_whole: Int[Array, "..."]
    end: Int[Array, "..."]


def visits(mask: Mask, q: Place, k: Place) -> tuple[Visits, Visits]:
    """Of blocks of queries [B N C] and of keys [B M C]."""
    q_spans, k_spans = spans(mask, q, k)
    each = lambda x, axis: jax.tree.map(lambda a: jnp.expand_dims(a, axis), x)
    whole = sees_all(mask, each(q_spans, 2), each(k_spans, 1))  # [B N M]

    def of(span: Span, whole: Bool[Array, "B N M"]) -> Visits:
        n_others = whole.shape[-1]
        block = jnp.arange(n_others)
        start = jnp.min(jnp.where(whole, block, n_others), axis=-1)
        stop = jnp.min(jnp.where(~whole & (block > start[..., None]), block, n_others), axis=-1)
        start = jnp.minimum(start, span.end).astype(jnp.int32)
        return Visits(span.first, start, jnp.clip(stop, start, span.end).astype(jnp.int32), span.end)

    return of(q_spans, whole), of(k_spans, whole.swapaxes(1, 2))

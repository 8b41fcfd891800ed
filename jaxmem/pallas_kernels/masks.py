"""Which keys a query sees: a rule on the places of two tokens, never an array of query time by key time.

A query sees a key of its own segment (not 0) if the rule allows their indices. Indices order the tokens of a row and need
not be where they stand in an array: keys may be a cache, or another device's, in any order.

| mask | rule |
|---|---|
| full | `Mask(causal=False)` |
| causal | `Mask()` |
| sliding window | `Mask(window=W)` |
| chunked-local | `Mask(chunk=C)` (Llama 4) |
| prefix-LM | `Mask()` with `Place.prefix` for the keys (Raffel et al. 2020, arXiv 1910.10683, figure 4) |
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxmem.fields import Count, checked
from jaxmem.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
@checked
class Mask:
    """The rule, of indices alone."""

    causal: bool = True
    """No key of the future, but for those of a prefix."""
    window: Count | None = None
    """Only keys less than so many tokens away, its own included; None: any."""
    chunk: Count | None = None
    """Only keys of the same chunk of so many indices; None: any."""


class Place(NamedTuple):
    """Where tokens stand."""

    index: Int[Array, "*rows T"]
    """Order in their row, >= 0."""
    segment: Int[Array, "*rows T"]
    """Their document; 0, padding or an empty slot of a cache, neither sees nor is seen."""
    prefix: Bool[Array, "*rows T"] | None = None
    """Of keys: those that all of their document may see, whatever is causal; None: none."""


def sees(mask: Mask, q: Place, k: Place) -> Bool[Array, "*rows T S"]:
    """True where query t attends to key s."""
    pair = lambda of_q, of_k: (of_q[..., :, None], of_k[..., None, :])
    q_segment, k_segment = pair(q.segment, k.segment)
    q_index, k_index = pair(q.index, k.index)
    seen = (q_segment == k_segment) & (q_segment != 0)
    if mask.causal:
        past = k_index <= q_index
        seen &= past if k.prefix is None else past | k.prefix[..., None, :]
    if mask.window is not None:
        seen &= jnp.abs(q_index - k_index) < mask.window
    if mask.chunk is not None:
        seen &= q_index // mask.chunk == k_index // mask.chunk
    return seen


class Extent(NamedTuple):
    """What a block of tokens spans in each row; low > high in a row of nothing but padding."""

    index_low: Int[Array, "*rows"]
    index_high: Int[Array, "*rows"]
    segment_low: Int[Array, "*rows"]
    segment_high: Int[Array, "*rows"]
    prefix: Bool[Array, "*rows"]
    """Whether any of its keys belongs to a prefix."""


def extent(place: Place) -> Extent:
    """Of blocks of tokens [*rows C]."""
    int32, real = jnp.iinfo(jnp.int32), place.segment != 0
    low = lambda x: jnp.min(jnp.where(real, x, int32.max), axis=-1)
    high = lambda x: jnp.max(jnp.where(real, x, int32.min), axis=-1)
    prefix = jnp.zeros_like(real[..., 0]) if place.prefix is None else jnp.any(place.prefix & real, axis=-1)
    return Extent(low(place.index), high(place.index), low(place.segment), high(place.segment), prefix)


def may_see(mask: Mask, q: Extent, k: Extent) -> Bool[Array, "*rows"]:
    """False where no query of a block sees any key of another, whichever they are."""
    some = (q.index_low <= q.index_high) & (k.index_low <= k.index_high)
    seen = some & (k.segment_low <= q.segment_high) & (q.segment_low <= k.segment_high)
    if mask.causal:
        seen &= (k.index_low <= q.index_high) | k.prefix
    if mask.window is not None:  # compared without sums that padding's extremes would overflow
        reach = mask.window - 1
        seen &= jnp.where(some, q.index_low - reach, 0) <= jnp.where(some, k.index_high, 0)
        seen &= jnp.where(some, k.index_low - reach, 0) <= jnp.where(some, q.index_high, 0)
    if mask.chunk is not None:
        seen &= k.index_low // mask.chunk <= q.index_high // mask.chunk
        seen &= q.index_low // mask.chunk <= k.index_high // mask.chunk
    return seen

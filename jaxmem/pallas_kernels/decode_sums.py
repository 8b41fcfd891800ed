"""Attention as sums that just add, its weights being exp(l_ts - m_t) of a maximum m_t that is known before:

    weights_t = sum_s exp(l_ts - m_t)      values_t = sum_s exp(l_ts - m_t) v_s      top_t = max_s l_ts

over the keys s that query t sees. Pieces of the keys, by whichever program, are summed in any order and never rescaled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.attention_scores import Static, filled, product
from jaxmem.pallas_kernels.block_spans import sees_all, spans
from jaxmem.pallas_kernels.masks import Mask, Place, sees
from jaxmem.typing import Array, Float, Int

LARGEST = 80.0
"""Of logit - m in XLA: exp of it, and of it plus its gradient's factors, is a number, whether it is used or not."""
WHOLE, CUT, UNSEEN = range(3)
"""Blocks of keys: all queries see all of it; some see some of it; no query sees any of it."""


class Sums(NamedTuple):
    """In fp32, of the heads of q."""

    weights: Float[Array, "B T H"]
    values: Float[Array, "B T H V"]
    top: Float[Array, "B T H"]
    """Largest logit, -inf for a row that sees nothing."""


def finish(sums: Sums, maximum: Float[Array, "B T H"]) -> Partial:
    """The attention that they are of."""
    empty = sums.top == -jnp.inf
    divisor = jnp.where(empty, 1.0, sums.weights)
    lse = jnp.where(empty, -jnp.inf, maximum + jnp.log(divisor))
    return Partial(jnp.where(empty[..., None], 0.0, sums.values / divisor[..., None]), lse)


def sums(q, k, v, q_place: Place, k_place: Place, maximum: Float[Array, "B T H"], static: Static) -> Sums:
    """In XLA, by arrays [B, H, T, S]; differentiable."""
    batch, n_tokens, heads, width = q.shape
    of_group = lambda x: x.reshape(batch, n_tokens, k.shape[2], -1, *x.shape[3:])
    logits = static.scale * product("btgrk,bsgk->bgrts", of_group(q), k)
    logits = jnp.where(sees(static.mask, q_place, k_place)[:, None, None], logits, -jnp.inf)
    beyond = logits - jnp.einsum("btgr->bgrt", of_group(maximum))[..., None]
    weights = jnp.exp(jnp.minimum(beyond, LARGEST))
    by_token = lambda x: jnp.einsum("bgrt...->btgr...", x).reshape(batch, n_tokens, heads, *x.shape[4:])
    return Sums(
        by_token(jnp.sum(weights, axis=-1)),
        by_token(product("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v)),
        by_token(jnp.max(logits, axis=-1)),
    )


def block_kinds(mask: Mask, q: Place, k: Place, size: int) -> Int[Array, "B M"]:
    """Of blocks of so many keys each, the last one filled up: WHOLE, CUT or UNSEEN, for all queries [B T] together."""
    k = jax.tree.map(lambda x: filled(x, size, axis=1), k)
    if k.prefix is not None and mask.window is None and mask.chunk is None:  # in front of every query
        k = Place(jnp.where(k.prefix, -1, k.index), k.segment)
    q = Place(q.index, jnp.where(q.segment == 0, -1, q.segment))
    blocks = lambda place, size: jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), place)
    of_q, of_k = spans(mask, blocks(q, q.index.shape[1]), blocks(k, size))
    return jnp.where(of_k.end > of_k.first, jnp.where(sees_all(mask, of_q, of_k), WHOLE, CUT), UNSEEN)

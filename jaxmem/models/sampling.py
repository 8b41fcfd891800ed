"""Logits to a token: temperature, then top-k, then top-p, then one draw.

    p = softmax(logits / temperature);   keep the k likeliest;   of those, the fewest whose share of p reaches top_p

Tokens are ranked by (logit, id): the higher logit first, the lower id first where logits are equal. Each filter keeps the
head of this ranking, so ties at its edge are cut there and exactly k tokens survive top-k. A logit of -inf is never drawn.

Reference: Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751, section 3.1 (top-p).
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxmem.algebra.topk import top_k
from jaxmem.fields import Bounds, Count, NonNegative, checked
from jaxmem.typing import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
@checked
class SamplingConfig:
    """How a token is drawn. Hashable: pass it to jit as a static argument."""

    temperature: NonNegative = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: Count | None = None
    """Draw from so many likeliest tokens; None, or more than there are, is all."""
    top_p: Annotated[float, Bounds("(0, 1]")] | None = None
    """Draw from the fewest likeliest tokens whose probability together reaches this, at least one; None is all."""


def sample(logits: Float[Array, "B Vocab"], key: PRNGKeyArray, config: SamplingConfig) -> Int[Array, "B"]:
    """One token per row, drawn as `config` says; equal keys draw equal tokens.

    Args:
      logits: fp32, not NaN; -inf forbids a token, at least one per row is allowed.
      key: of this draw alone; rows draw independently.
      config: static under jit.

    Cost: O(Vocab) per row; top_k selects k and top_p without top_k sorts the row.

    >>> sample(jnp.array([[1.0, 3.0, 3.0]]), jax.random.key(0), SamplingConfig(temperature=0.0)).tolist()
    [1]
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, truncate(logits, config), axis=-1).astype(jnp.int32)


def truncate(logits: Float[Array, "B Vocab"], config: SamplingConfig) -> Float[Array, "B Vocab"]:
    """Log-weights of the tokens that may be drawn, the greatest of them 0; -inf for the others. Needs temperature > 0.

    >>> truncate(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), SamplingConfig(temperature=1.0, top_p=0.6))[0, 0].tolist()
    -inf
    """
    # Relative to the greatest, so that a tiny temperature sends the others to -inf and nothing to inf - inf.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    vocab = logits.shape[-1]
    n_candidates = min(config.top_k or vocab, vocab)
    top_p = 1.0 if config.top_p is None else config.top_p
    if n_candidates == vocab and top_p == 1:  # also because a rounded sum may reach 1 before the last token
        return scaled

    best = top_k(scaled, None, n_candidates)
    if top_p == 1:
        n_kept = jnp.full(logits.shape[:1], n_candidates)
    else:
        probability = jax.nn.softmax(best.scores, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        n_kept = jnp.maximum(1, jnp.sum(before < top_p, axis=-1))
    last = n_kept[:, None] - 1
    edge, edge_id = (jnp.take_along_axis(x, last, axis=-1) for x in best)
    kept = (scaled > edge) | ((scaled == edge) & (jnp.arange(vocab) <= edge_id))
    return jnp.where(kept, scaled, -jnp.inf)

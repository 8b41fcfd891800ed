"""How evenly a decoder's memories were read in an evaluation, in a few numbers per layer."""

import dataclasses
import functools
import math

import jax
import numpy as np

from jaxmem.layers.memory_usage import divergence_from_uniform, share_used, weights_by_rank
from jaxmem.models.decoder import DecoderConfig
from jaxmem.typing import Array, Float

RANKS = 48
"""Most points of the curve of weights by rank."""


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Entry i of every list is of one memory layer, in the order of depth, or of a table that layers share, which is last."""

    layers: list[str] = dataclasses.field(default_factory=list)
    """Number of the layer, or "shared": what all layers read of the shared table."""
    n_slots: list[int] = dataclasses.field(default_factory=list)
    """Slots, or word experts."""
    share_used: list[float] = dataclasses.field(default_factory=list)
    """Share of slots that were read with a weight that is not 0."""
    share_within_reach: list[float] = dataclasses.field(default_factory=list)
    """What that share would be if no two reads were of one slot."""
    kl_from_uniform: list[float] = dataclasses.field(default_factory=list)
    """Nats: 0 is even use, log(n_slots) a single slot; NaN without any use."""
    ranks: list[list[int]] = dataclasses.field(default_factory=list)
    weight_at_rank: list[list[float]] = dataclasses.field(default_factory=list)
    """Weight of the slots of these ranks, 1 the most used, in units of the mean over slots."""


def memory_use(weights: tuple[Float[Array, "repeats M"], ...], config: DecoderConfig, n_tokens: int) -> MemoryUse:
    """The numbers of an evaluation.

    Args:
      weights: of every slot, per memory in the pattern, from `Decoder.with_memory_use` and added up over batches.
      n_tokens: that were read, padding left out.

    Cost: a sort of every layer's slots, where these are.
    """
    places = [place for place, memory in enumerate(config.memories) if memory is not None]
    rows = {}  # number of the layer: (its memory, weights of the slots, layers)
    for place, of_place in zip(places, weights, strict=True):
        for repeat in range(config.repeats):
            rows[repeat * len(config.pattern) + place] = (config.memories[place], of_place[repeat], 1)
    rows = {str(layer): rows[layer] for layer in sorted(rows)}
    shared = [z for memory, z, _ in rows.values() if memory.shared_table]
    if len(shared) > 1:
        rows["shared"] = (config.shared_memories[0], sum(shared), len(shared))
    use = MemoryUse()
    for name, (memory, z, n_layers) in rows.items():
        n_slots = z.shape[-1]
        ranks = sorted({round(rank) for rank in np.geomspace(1, n_slots, RANKS)})
        share, kl, at_rank = jax.device_get(_numbers(z, tuple(ranks)))
        reads = n_tokens * n_layers * math.prod(memory.choices)
        use.layers.append(name)
        use.n_slots.append(n_slots)
        use.share_used.append(float(share))
        use.share_within_reach.append(min(1.0, reads / memory.table_shape(config.d_model)[0]))
        use.kl_from_uniform.append(float(kl))
        use.ranks.append(ranks)
        use.weight_at_rank.append([float(f"{weight:.4g}") for weight in at_rank])
    return use


@functools.partial(jax.jit, static_argnums=1)
def _numbers(z: Float[Array, "M"], ranks: tuple[int, ...]) -> tuple[Array, Array, Array]:
    return share_used(z), divergence_from_uniform(z), weights_by_rank(z, ranks)

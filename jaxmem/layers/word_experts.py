"""Mixture of word experts: a feed-forward whose expert is chosen by the token's id, by a fixed table and by nothing learned.

    e_t = routing[id_t]   or   id_t mod E               y_t = W2[e_t] act(W1[e_t] x_t),   experts of F neurons

An expert is F rows of a `MemoryTable` of E F slots, each a neuron with an input vector and an output vector, so that

    ids_tj = e_t F + j, j < F        y_t = bag(values, ids_t, act(dots(inputs, ids_t, x_t)))

as an expert of PEER is one. What a sequence will read is known from its ids before any layer runs: `experts` says it to
whoever fetches rows ahead. A token reads by itself, so that documents and padding need no care.

Cost per token: 4 F D FLOPs, 2 F rows of D numbers read. Parameters: 2 E F D, of which a token reads 2 F D.

Reference: dos Santos et al. 2023, Memory Augmented Language Models through Mixture of Word Experts, arXiv 2311.10768: tens of
thousands of experts, to which tokens go by their id in a routing vocabulary of many words that is not the model's own.
Where this differs: ids are the model's tokens unless the caller passes others; experts stand in no blocks or buckets by
frequency and have no capacity, which the paper needs to place them on devices, so no token is dropped; sizes are ours.
"""

import dataclasses
import heapq
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.fields import Count, Natural, checked
from jaxmem.layers.memory_table import Activation, MemoryTable, table_to_read
from jaxmem.layers.memory_usage import slot_weights
from jaxmem.recurrences.documents import ids_in_int32
from jaxmem.sharding import local
from jaxmem.showing import Module
from jaxmem.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
@checked
class WordExpertsConfig:
    """A mixture of word experts, in a decoder's `memories`; `mowe` is the published kind."""

    n_experts: Count = 32_768
    """E."""
    d_expert: Count = 64
    """F: neurons of an expert."""
    expert: Activation = "relu"
    routing: tuple[Natural, ...] | None = None
    """Expert of each id of the routing vocabulary, 0 .. E - 1; None: id mod E."""
    shared_table: bool = False
    """The experts are an argument of the call, as in `MemoryConfig`: one set for all layers."""
    placement: Literal["replace", "beside"] = "replace"
    """In a decoder's block: instead of the feed-forward, or added to it."""

    def __post_init__(self):
        if self.n_slots >= 2**31:
            raise ValueError(
                "word experts: needs n_experts * d_expert below 2^31, "
                f"got n_experts={self.n_experts}, d_expert={self.d_expert}; change one of them"
            )
        if self.routing is not None and not (
            self.routing and 0 <= min(self.routing) <= max(self.routing) < self.n_experts
        ):
            got = (min(self.routing), max(self.routing)) if self.routing else "no entry"
            raise ValueError(
                f"word experts: needs routing to name experts 0..{self.n_experts - 1}, got routing={got} as its least and "
                "greatest; leave it out for id mod n_experts"
            )

    @property
    def n_slots(self) -> int:
        """Rows of the table: neurons of all experts."""
        return self.n_experts * self.d_expert

    def table_shape(self, d_model: int) -> tuple[int, int, int]:
        """Slots, width of a value, width of an input vector."""
        return self.n_slots, d_model, d_model

    choice_axes = ("batch", "time", None, None)

    @property
    def use_size(self) -> int:
        """Numbers that `use` gives: experts."""
        return self.n_experts

    @property
    def choices(self) -> tuple[int, int]:
        """One head, and the rows that it reads per token."""
        return 1, self.d_expert

    def numbers_read(self, d_model: int) -> int:
        """Numbers in the rows that a token reads."""
        return 2 * self.d_expert * d_model

    def lookup_flops(self, d_model: int) -> int:
        """Forward FLOPs per token that are not 2 x parameters: all.

        >>> WordExpertsConfig(n_experts=10, d_expert=3).lookup_flops(8)
        96
        """
        return 2 * self.numbers_read(d_model)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "WordExperts":
        return WordExperts(self, d_model, rngs=rngs)

    def make_table(self, d_model: int, *, rngs: nnx.Rngs) -> MemoryTable:
        """Experts that fit this layer, to be shared."""
        return MemoryTable(*self.table_shape(d_model), rngs=rngs)


def mowe(n_experts: int = 32_768, d_expert: int = 64) -> WordExpertsConfig:
    """MoWE: one expert per word of the routing vocabulary, in the place of a feed-forward; sizes are ours."""
    return WordExpertsConfig(n_experts, d_expert)


def balanced_routing(counts: tuple[int, ...] | np.ndarray, n_experts: int) -> tuple[int, ...]:
    """A routing that gives experts nearly equal work: ids, most frequent first, each to the expert with the least so far.

    Args:
      counts: how often each id of the routing vocabulary occurs.
      n_experts: E.

    Of equally busy experts the lower comes first. Cost: a sort and a heap on the host.

    >>> balanced_routing((9, 1, 5, 4), 2)
    (0, 0, 1, 1)
    """
    load = [(0, expert) for expert in range(n_experts)]
    routing = np.zeros(len(counts), np.int64)
    for word in np.argsort(-np.asarray(counts, np.int64), kind="stable"):
        busy, expert = load[0]
        routing[word] = expert
        heapq.heapreplace(load, (busy + int(counts[word]), expert))
    return tuple(routing.tolist())


class WordExperts(Module):
    """The layer of the module docstring, in the dtype of x.

    >>> layer = WordExpertsConfig(n_experts=4, d_expert=3).make(8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 2, 8)), jnp.array([[7, 3]])).shape, layer.experts(jnp.array([[7, 3, 4]])).tolist()
    ((1, 2, 8), [[3, 3, 0]])
    """

    def __init__(self, config: WordExpertsConfig, d_model: int, *, rngs: nnx.Rngs):
        """Entries of both tables have variance 1 / D."""
        self.config, self.d_model = config, d_model
        self.table = None if config.shared_table else config.make_table(d_model, rngs=rngs)
        self.reads = nnx.data(None)

    def experts(self, words: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The expert of each id; -1, which reads nothing, for an id that the routing does not have."""
        words = ids_in_int32(words)
        if self.config.routing is None:
            return jnp.where(words < 0, -1, words % self.config.n_experts)
        routing = jnp.asarray(self.config.routing, jnp.int32)
        return jnp.where(words < 0, -1, routing.at[words].get(mode="fill", fill_value=-1))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        words: Int[Array, "B T"],
        table: MemoryTable | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the tokens' experts make of them.

        Args:
          x: tokens.
          words: their ids in the routing vocabulary.
          table: with `shared_table` the experts, else None.
          layer: as of `Memory`.

        Raises: ValueError for a table that is missing, not asked for, or of other shapes; outside jit for an id that the
          routing does not have.
        """
        table = table_to_read("word experts", self, table)
        axes = self.config.choice_axes
        ids = local(self._slots, in_axes=(axes[:2],), out_axes=axes)(words)
        layer = None if self.config.shared_table else layer
        return table.read(x, ids, None, self.config.expert, self.reads, layer, axes).astype(x.dtype)

    def use(
        self, x: Float[Array, "B T D"], words: Int[Array, "B T"], real: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "E"]:
        """How many of the real tokens each expert reads; an expert counts as one slot, since its neurons go together."""
        axes = self.config.choice_axes
        ids = local(lambda words: self.experts(words)[..., None, None], in_axes=(axes[:2],), out_axes=axes)(words)
        weights = jnp.ones_like(ids, jnp.float32)
        return slot_weights(ids, weights, self.config.n_experts, real, axes)

    def _slots(self, words: Int[Array, "B T"]) -> Int[Array, "B T 1 F"]:
        width, experts = self.config.d_expert, self.experts(words)[..., None, None]
        return jnp.where(experts < 0, -1, experts * width + jnp.arange(width, dtype=experts.dtype))

"""Held-out evaluation: bits per byte, also by position in the document, and how routers and memories are used."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.layers.cross_entropy import token_nats
from jaxmem.layers.mixture_of_memories import RouterUse, load_balancing_loss
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import constrain
from jaxmem.training.data import Batch
from jaxmem.training.memory_use import MemoryUse, memory_use
from jaxmem.training.step import Shifted, merge, router_use, shifted
from jaxmem.typing import Array, Float, Int, PyTree


class EvalStep(NamedTuple):
    """What the model makes of one batch, on every process whole."""

    nats: Float[Array, "B T"]
    """Of every next token, whether it counts or not."""
    batch: Shifted
    router_use: list[Float[Array, "repeats M"]]
    """Choices per mixture in the pattern."""
    memory_use: tuple[Float[Array, "repeats M"], ...] = ()
    """Weight that was read of every slot, per memory in the pattern."""
    router_probability: list[Float[Array, "repeats M"]] | tuple[()] = ()
    """Summed over tokens, as choices are; without them no load-balancing losses are told."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out quality of a model; the fields are those of an "eval" line in metrics.jsonl."""

    bits_per_byte: float
    loss: float
    """Nats per token."""
    n_bytes: int
    n_tokens: int
    bits_per_byte_by_position: list[float]
    position_edges: list[int]
    """Entry i above is over positions edges[i] <= p < edges[i+1] in a document's piece."""
    router_use: list[list[float]]
    """Per mixture-of-memories layer, the share of choices that went to each memory."""
    router_layers: list[int]
    memory_use: MemoryUse = MemoryUse()
    router_top_k: list[int] = dataclasses.field(default_factory=list)
    """Per mixture-of-memories layer, the memories that a token goes to."""
    router_balance: list[float] = dataclasses.field(default_factory=list)
    """Per mixture-of-memories layer, its own load-balancing loss: top_k when even, the number of memories when collapsed."""


def make_eval_step(config: DecoderConfig) -> Callable[[nnx.State, Shifted], EvalStep]:
    """The function of a batch that `evaluate` calls, to be jitted."""

    def step(params, batch: Shifted):
        model = merge(config, params)
        batch = jax.tree.map(lambda x: constrain(x, "batch", "time"), batch)
        hidden, state, uses = model.with_memory_use(batch.tokens, segment_ids=batch.segment_ids)
        nats = token_nats(hidden, model.head, batch.targets, vocab_size=config.vocab_size)
        whole = jax.tree.map(lambda x: constrain(x, None, None), (nats, batch))
        memory_use = tuple(use for use in uses if use is not None)
        routers = [jax.tree.map(lambda x: x.sum(axis=1), use) for _, use in router_use(state)]
        return EvalStep(
            *whole,
            [use.chosen for use in routers],
            memory_use=memory_use,
            router_probability=[use.probability for use in routers],
        )

    return step


def evaluate(
    step: Callable[[Shifted], EvalStep],
    batches: Iterable[Batch],
    config: DecoderConfig,
    place: Callable[[np.ndarray], Array],
) -> Evaluation:
    """Runs `step(batch)` over all batches and sums up on the host, in fp64; the use of memories where it is, in fp32.

    Bits per byte are over the bytes of the text that the batches were made of, each counted once.

    Args:
      place: puts a host array where the step wants it.
    """
    nats, text, tokens, read, use, sure, slots = None, None, 0, 0, None, None, None
    for batch in batches:
        found = step(jax.tree.map(place, shifted(batch)))
        slots = found.memory_use if slots is None else _add(slots, found.memory_use)
        found = jax.device_get(found._replace(memory_use=()))
        counts = found.batch.counts
        position = _positions(found.batch.segment_ids)
        if nats is None:
            nats, text = np.zeros(counts.shape[1]), np.zeros(counts.shape[1], np.int64)
        np.add.at(nats, position[counts], found.nats.astype(np.float64)[counts])
        np.add.at(text, np.where(counts, position, 0), found.batch.target_bytes)  # of pieces without a token: at 0
        tokens, read = tokens + int(counts.sum()), read + int((found.batch.segment_ids != 0).sum())
        use, sure = _add_up(use, found.router_use), _add_up(sure, found.router_probability)
    if nats is None or not text.sum() or not tokens:
        raise ValueError("evaluation: needs held-out text, got none; name heldout files that have text")

    edges = [0] + [2**i for i in range(math.ceil(math.log2(len(nats))))] + [len(nats)]
    bits = nats / math.log(2)
    layers, shares, top_k, balance = _router_numbers(use, sure, config)
    return Evaluation(
        bits_per_byte=float(bits.sum() / text.sum()),
        loss=float(nats.sum() / tokens),
        n_bytes=int(text.sum()),
        n_tokens=tokens,
        bits_per_byte_by_position=[
            float(bits[a:b].sum() / max(text[a:b].sum(), 1)) for a, b in zip(edges, edges[1:], strict=False)
        ],
        position_edges=edges,
        router_use=shares,
        router_layers=layers,
        memory_use=memory_use(slots, config, read),
        router_top_k=top_k,
        router_balance=balance,
    )


@functools.partial(jax.jit, donate_argnums=0)
def _add(slots: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, slots, more)


def _positions(segments: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """How many tokens of its segment stand before each token."""
    index = np.arange(segments.shape[1])
    new = np.diff(segments, axis=1, prepend=-1) != 0
    return index - np.maximum.accumulate(np.where(new, index, 0), axis=1)


def _add_up(sums: list[np.ndarray] | None, more: Iterable[np.ndarray]) -> list[np.ndarray]:
    """In fp64."""
    more = [np.asarray(x, np.float64) for x in more]
    return more if sums is None else [a + b for a, b in zip(sums, more, strict=True)]


def _router_numbers(
    use: list[np.ndarray], sure: list[np.ndarray], config: DecoderConfig
) -> tuple[list[int], list[list[float]], list[int], list[float]]:
    """Numbers of layers, shares, top_k and load-balancing losses, in the order of depth, of choices and probabilities
    [repeats, M] per mixture in the pattern."""
    places = [i for i, mixer in enumerate(config.pattern) if hasattr(mixer, "n_memories")]
    of_layer = {}
    for index, (place, counts) in enumerate(zip(places, use, strict=True)):
        top_k = config.pattern[place].top_k
        losses = load_balancing_loss(RouterUse(counts[:, None], sure[index][:, None]), top_k) if sure else None
        for repeat, chosen in enumerate(counts):
            shares = (chosen / max(chosen.sum(), 1)).tolist()
            balance = [] if losses is None else [float(losses[repeat])]
            of_layer[repeat * len(config.pattern) + place] = shares, top_k, balance
    layers = sorted(of_layer)
    shares, top_k, balance = ([of_layer[layer][i] for layer in layers] for i in range(3))
    return layers, shares, top_k, [loss for found in balance for loss in found]

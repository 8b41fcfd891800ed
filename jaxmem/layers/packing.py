"""Packing: sort what is routed to several memories into one buffer of static size, memory after memory, and back.

Every memory gets a region of whole chunks: first its history (the last W-1 things it saw before), then its new items in
order, then nothing up to the next chunk. So a short convolution finds its predecessors in place, a chunk never holds items
of two memories, and what comes later in time never moves what came before it within its chunk.

A stable counting sort with static shapes: no host sync, no scatter of values. Moving values either way is a gather, and
so is its gradient, because a place and its item know each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.typing import Array, Bool, Int, Shaped


class Packing(NamedTuple):
    """Where things, first the history of every memory, then I items in the order they came, go in a buffer of P = N C
    places; a number past the end means nowhere."""

    history: Int[Array, "B past"]
    """The place of each thing of the past, M (W-1) of them."""
    items: Int[Array, "B I"]
    """The place of each item."""
    thing: Int[Array, "B P"]
    """The thing at each place."""
    chunk_memory: Int[Array, "B N"]
    """The memory each chunk belongs to."""
    end: Int[Array, "B M"]
    """The place behind each memory's last item (or behind its history, if it has none)."""

    @property
    def place(self) -> Int[Array, "B things"]:
        """The place of each thing."""
        return jnp.concatenate([self.history, self.items], axis=1)

    @property
    def holds_item(self) -> Bool[Array, "B P"]:
        """True at places that hold a new item, not history and not nothing."""
        n_history = self.history.shape[1]
        return (self.thing >= n_history) & (self.thing < n_history + self.items.shape[1])


def pack_by_memory(memory: Int[Array, "B I"], n_memories: int, n_history: int, chunk_tokens: int) -> Packing:
    """Plans the packing of items that go to `memory` (n_memories or more: nowhere), behind n_history things per memory.

    >>> packing = pack_by_memory(jnp.array([[1, 0, 1]]), n_memories=2, n_history=1, chunk_tokens=2)
    >>> packing.place.tolist(), packing.chunk_memory.tolist()  # regions: [h0 i1] [h1 i0 | i2 -]
    ([[0, 2, 3, 1, 4]], [[0, 1, 1]])
    """
    n_chunks = (memory.shape[1] + n_memories * (n_history + chunk_tokens - 1)) // chunk_tokens
    n_places = n_chunks * chunk_tokens

    def of_row(memory):
        chosen = memory[:, None] == jnp.arange(n_memories)
        order = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
        count = order[-1]
        chunks = -(-(n_history + count) // chunk_tokens)
        chunk_end = jnp.cumsum(chunks, dtype=jnp.int32)
        start = (chunk_end - chunks) * chunk_tokens

        history = (start[:, None] + jnp.arange(n_history, dtype=jnp.int32)).reshape(-1)
        items = jnp.sum(jnp.where(chosen, start + n_history + order - 1, 0), axis=1, dtype=jnp.int32)
        items = jnp.where(chosen.any(axis=1), items, n_places)
        place = jnp.concatenate([history, items])
        number = jnp.arange(place.size, dtype=jnp.int32)
        thing = jnp.full(n_places, place.size, jnp.int32).at[place].set(number, mode="drop")
        chunk_memory = jnp.sum(jnp.arange(n_chunks)[:, None] >= chunk_end, axis=1, dtype=jnp.int32)
        return Packing(history, items, thing, jnp.minimum(chunk_memory, n_memories - 1), start + n_history + count)

    return jax.vmap(of_row)(memory)


def pack(packing: Packing, things: Shaped[Array, "B things *x"]) -> Shaped[Array, "B P *x"]:
    """The things at their places; 0 where there is none."""
    return _move(things, packing.thing, packing.place)


def unpack(packing: Packing, buffer: Shaped[Array, "B P *x"]) -> Shaped[Array, "B I *x"]:
    """The new items back in the order they came; 0 for those that went nowhere."""
    return _move(buffer, packing.place, packing.thing)[:, packing.history.shape[1] :]


@jax.custom_vjp
def _move(x: Array, source: Array, target: Array) -> Array:
    """y[b, i] = x[b, source[b, i]], 0 if there is no such; x[b, j] goes to y[b, target[b, j]] and nowhere else."""
    return _gather(x, source)


def _gather(x: Array, index: Array) -> Array:
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)


_move.defvjp(
    lambda x, source, target: (_gather(x, source), target),
    lambda target, cotangent: (_gather(cotangent, target), None, None),
)

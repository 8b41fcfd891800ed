"""Chunks of a linear recurrence: what they do with the state that comes in, prepared in batches, and the handing on of it.

See `engine` for the algebra.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.chunk_decays import in_chunk
from jaxmem.recurrences.invariant import Invariant, Powers, Through, invariant_chunks
from jaxmem.recurrences.linear_scan import scan_tokens
from jaxmem.recurrences.products import dot, sum_to
from jaxmem.recurrences.streams import Documents, MakeStreams, Streams, make_streams, streams_shape
from jaxmem.recurrences.triangular import unit_lower_solve
from jaxmem.sharding.folds import spread_like
from jaxmem.typing import Array, Float, Int, PyTree, Shaped

Decay = affine.Scalar | affine.Vector | affine.Elementwise


class Chunk(NamedTuple):
    """What a chunk does with the state S that comes in: it writes U' = u - w S and leaves decay S + keys U' + extra."""

    decay: Shaped[Array, "*N #K #V"] | Through
    extra: Shaped[Array, "*N K V"] | None = None
    """What it writes whatever comes in."""
    u: Float[Array, "*N C V"] | None = None
    w: Float[Array, "*N C K"] | None = None
    keys: Float[Array, "*N K C"] | None = None
    """Decayed to the end of the chunk."""


class Prepared(NamedTuple):
    """N chunks of B rows and H heads."""

    go_on: Callable[[Array, Array], tuple[Array, Array]]
    """(memories [B M H K V], which of them each chunk visits [N B]) -> (outputs [N B H C V], the memories after them)."""
    product: Callable[[], Decay]
    """What the decays of all tokens come to, [N B H ...]; of an M that is a decay."""
    chunk: Chunk | None = None
    """Unless every entry decays on its own."""
    powers: Powers = ()
    """Of an M that is the same for all tokens."""


def prepared(chunk: Chunk, read: Callable, product: Callable[[], Decay], powers: Powers = ()) -> Prepared:
    """Args: read: the outputs, of the states that come in [N B H K V] and of U' [N B H C V]."""

    def go_on(memories, visited):
        starts, written, memories = hand_on(chunk, powers, memories, visited)
        return read(starts, written), memories

    return Prepared(go_on, product, chunk, powers)


def prepare(make: MakeStreams, inputs: PyTree, documents: Documents | None, n_steps: int) -> Prepared:
    """Args: inputs: [B N C ...]."""
    if isinstance(streams_shape(make, inputs).decay, affine.Elementwise):
        return _prepare_elementwise(make, inputs, documents)
    by_head = functools.partial(_by_head, n_steps=n_steps)
    x = jax.tree.map(by_head, make_streams(make, n_steps, inputs, documents))
    x = spread_like(x, x)
    return _prepare_invariant(x) if isinstance(x.decay, Invariant) else _prepare_products(x)


def _prepare_products(x: Streams) -> Prepared:
    """Decays that are factors of whole channels, with or without e: products of matrices."""
    product = lambda: type(x.decay)(x.decay.g.sum(axis=-1 if isinstance(x.decay, affine.Scalar) else -2))
    decays = in_chunk(x.decay)
    from_state = decays.from_start(x.q)
    if x.erase is None:
        ((inside,),) = decays.overlaps([x.q], [x.k])
        own = dot("...ij,...jv->...iv", inside, x.v)
        chunk = Chunk(decays.through, extra=dot("...kc,...cv->...kv", decays.to_end(x.k), x.v))
        return prepared(chunk, lambda starts, _: own + dot("...ck,...kv->...cv", from_state, starts), product)

    # An e that reads behind token i - 1 takes the place of that token's row; what it finds is then moved back a row.
    early, b = x.erase.undecayed, x.erase.at
    shifted = lambda rows, first: jnp.concatenate([first, rows[..., :-1, :]], axis=-2)
    if early is None:
        e = x.erase.decayed
        e_from_state = decays.from_start(e)
        overlaps = lambda blocks: jnp.tril(blocks, -1)
    else:
        e = jnp.concatenate([early[..., 1:, :], jnp.zeros_like(early[..., :1, :])], axis=-2)
        e_from_state = shifted(decays.from_start(e), early[..., :1, :])
        overlaps = lambda blocks: jnp.tril(shifted(blocks, jnp.zeros_like(blocks[..., :1, :])), -1)
    if b is None:
        (erased,), (inside,) = decays.overlaps([e, x.q], [x.k])
        keys, values, extra, own = x.k, x.v, None, 0
    else:
        (erased, read), (inside, own) = decays.overlaps([e, x.q], [b, x.k])
        keys, values = b, -dot("...ij,...jv->...iv", overlaps(read), x.v)
        extra = dot("...kc,...cv->...kv", decays.to_end(x.k), x.v)
        own = dot("...ij,...jv->...iv", own, x.v)
    solved = unit_lower_solve(overlaps(erased), jnp.concatenate([values, e_from_state], axis=-1))
    u, w = solved[..., : values.shape[-1]], solved[..., values.shape[-1] :]

    def read_outputs(starts, written):
        return own + dot("...ck,...kv->...cv", from_state, starts) + dot("...ij,...jv->...iv", inside, written)

    return prepared(Chunk(decays.through, extra, u, w, decays.to_end(keys)), read_outputs, product)


def _prepare_elementwise(make: MakeStreams, inputs: PyTree, documents: Documents | None) -> Prepared:
    """With a decay of its own for every entry, all states of one chunk after another are formed."""
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a[:, 0], 1, 0), (inputs, documents))  # [C B ...]
    x = make_streams(make, 1, *tokens)
    x = spread_like(x, x)
    decay = jnp.exp(jnp.moveaxis(x.decay.g, -3, -1))
    of_heads = lambda key: key[..., 0, :] if key.shape[-2] == 1 else key.mT
    q, k = of_heads(x.q), of_heads(x.k)

    def go_on(memories, visited):
        start = jnp.moveaxis(_visit(memories, visited[0]), -3, -1)
        o, end = scan_tokens(q, k, x.v.mT, decay, start)
        return jnp.moveaxis(o, (0, 2), (2, 3))[None], _leave(memories, visited[0], jnp.moveaxis(end, -1, -3))

    return Prepared(go_on, lambda: affine.Elementwise(x.decay.g.sum(axis=0)[None]))


def _prepare_invariant(x: Streams) -> Prepared:
    """M the same for all tokens: small convolutions."""
    decays = invariant_chunks(x.q, x.k, x.decay, x.v.shape[-2])
    own = dot("...ij,...jv->...iv", decays.inside, x.v)
    return prepared(
        Chunk(decays.through, extra=dot("...kc,...cv->...kv", decays.writes, x.v)),
        lambda starts, _: own + dot("...kc,...kv->...cv", decays.reads, starts),
        lambda: x.decay.product(x.v.shape[-2]),
        decays.powers,
    )


def _by_head(x: Array, n_steps: int) -> Array:
    """[B N C H ...] as [N B H C ...]; steps of tokens [C n] become one dimension, filled up to a power of two with steps
    that do nothing."""
    if n_steps > 1:
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        size = x.shape[2]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, (1 << (size - 1).bit_length()) - size)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)


def _through(decay: Array | Through, powers: Powers, state: Shaped[Array, "*N K V"]) -> Shaped[Array, "*N K V"]:
    return decay.times(powers, state) if isinstance(decay, Through) else decay * state


@jax.custom_vjp
def hand_on(
    chunk: Chunk, powers: Powers, memories: Shaped[Array, "B M H K V"], visited: Int[Array, "N B"]
) -> tuple[Shaped[Array, "N B H K V"], Float[Array, "N B H C V"] | None, Shaped[Array, "B M H K V"]]:
    """All that has to happen in order: per chunk the state that comes in and U'; and the memories in the end.

    Its backward pass goes through the chunks once more, with two products each; those of cotangents with states are formed
    for all chunks at once.
    """

    def body(memories, inputs):
        x, visited = inputs
        start = _visit(memories, visited)
        end, written = _through(x.decay, powers, start), None
        if x.extra is not None:
            end += x.extra
        if x.w is not None:
            written = x.u - dot("...ck,...kv->...cv", x.w, start)
            end += dot("...kc,...cv->...kv", x.keys, written)
        return _leave(memories, visited, end), (start, written)

    memories, (starts, written) = jax.lax.scan(body, memories, (chunk, visited))
    return starts, written, memories


def _hand_on_forward(chunk, powers, memories, visited):
    starts, written, memories = hand_on(chunk, powers, memories, visited)
    return (starts, written, memories), (chunk, powers, starts, written, visited)


def _hand_on_backward(saved, cotangents):
    chunk, powers, starts, written, visited = saved
    d_starts, d_written, d_memories = cotangents

    def body(d_memories, inputs):
        x, d_start, d_written, visited = inputs
        d_end = _visit(d_memories, visited)
        d_start += jax.vjp(functools.partial(_through, x.decay, powers), d_start)[1](d_end)[0]
        if x.w is not None:
            d_written += dot("...ck,...kv->...cv", x.keys, d_end)
            d_start -= dot("...kc,...cv->...kv", x.w, d_written)
        return _leave(d_memories, visited, d_start), (d_written, d_end)

    turned = chunk if chunk.w is None else chunk._replace(w=chunk.w.mT, keys=chunk.keys.mT)
    d_memories, (d_written, d_ends) = jax.lax.scan(
        body, d_memories, (turned, d_starts, d_written, visited), reverse=True
    )
    if powers:
        _, pull = jax.vjp(lambda decay, powers: _through(decay, powers, starts), chunk.decay, powers)
        d_decay, d_powers = pull(d_ends)
    else:
        d_decay, d_powers = sum_to(d_ends * starts, chunk.decay.shape), ()
    d_chunk = Chunk(d_decay, None if chunk.extra is None else d_ends)
    if chunk.w is not None:
        d_chunk = d_chunk._replace(
            u=d_written,
            w=-dot("...cv,...kv->...ck", d_written, starts),
            keys=dot("...kv,...cv->...kc", d_ends, written),
        )
    return d_chunk, d_powers, d_memories, None


hand_on.defvjp(_hand_on_forward, _hand_on_backward)


def _visit(memories: Shaped[Array, "B M H K V"], visited: Int[Array, "B"]) -> Shaped[Array, "B H K V"]:
    return memories[:, 0] if memories.shape[1] == 1 else memories[jnp.arange(memories.shape[0]), visited]


def _leave(memories: Array, visited: Array, state: Array) -> Array:
    return state[:, None] if memories.shape[1] == 1 else memories.at[jnp.arange(memories.shape[0]), visited].set(state)

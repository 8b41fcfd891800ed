"""The engine of all linear recurrences with a matrix state S [K, V]:

    S_t = (I - b_t e_t^T) D_t S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t

D decays all of S, each key channel, or each entry (`affine.Scalar`, `Vector`, `Elementwise`); -inf as a log-decay
forgets. What e reads of the decayed state is erased at b: without e only decay is left, and where b = k it is a delta
rule, S_t = D_t S_{t-1} + k_t (v_t - (D_t S_{t-1})^T e_t)^T. Some recurrences let e read S_{t-1} itself (`Erase`). A named
recurrence is a function that makes these streams of its own inputs, token by token (`Streams`), and hands them to
`recurrence`.

In chunks of C tokens, with D_ij as in `chunk_decays` and d_i = D from the start of the chunk to i, what is written,
U_i = v_i - (D_i S_{i-1})^T e_i, solves a unit lower-triangular system, so that a chunk costs a few products of [C, C] and
[C, K] matrices and only its end state is handed on (for b = k; else the same with -S^T e beside v):

    (I + A) [U | W] = [V | d E],   A_ij = e_i^T D_ij k_j for j < i
    U' = U - W S,   O = (d Q) S + (Q^T D K) U',   S <- d_C S + (D_C K)^T U'

Chunks are worked on in groups: only U' and S go from chunk to chunk, all else is one batch of products. The backward pass
keeps the inputs and a state per group, and makes streams and all the rest again group by group: little memory, most of it
in cache. Chunks may belong to different memories: each is folded into its own state.

Cost per token and head: see `recurrence_flops`; state K V floats.
References: Yang et al. 2023, arXiv 2312.06635, section 4 (decays, chunks in chunks); Yang et al. 2024, arXiv 2406.06484,
section 3 (UT transform); Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, equations 12-14.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.chunk_decays import in_chunk
from jaxmem.recurrences.invariant import Invariant, Through, invariant_chunks
from jaxmem.recurrences.products import dot, linear_scan
from jaxmem.recurrences.triangular import unit_lower_inverse
from jaxmem.sharding.folds import from_last, n_shards, prefix_fold, sequence_axis, spread, spread_like
from jaxmem.typing import Array, Bool, Float, Int, PyTree, Shaped

Implementation = Literal["reference", "xla"]

GROUP_CHUNKS = 16
"""Chunks worked on at once, and recomputed at once in the backward pass: as many as stay in a CPU's cache."""


class Erase(NamedTuple):
    """What is read from the state before a token, and erased: one of the two e, and b."""

    decayed: Float[Array, "*tokens H K"] | None = None
    """e that reads the state behind its decay, D_t S_{t-1}."""
    undecayed: Float[Array, "*tokens H K"] | None = None
    """e that reads S_{t-1}."""
    at: Float[Array, "*tokens H K"] | None = None
    """b, where it is erased; None: at k."""


class Streams(NamedTuple):
    """The recurrence's inputs, token by token, in fp32."""

    q: Shaped[Array, "*tokens H K"]
    k: Shaped[Array, "*tokens H K"]
    v: Shaped[Array, "*tokens H V"]
    decay: affine.Scalar | affine.Vector | affine.Elementwise | Invariant
    """Log-decays g <= 0: [*tokens H], [*tokens H K] or [*tokens H K V], with the last, q and k may be one for all heads; or
    one M for all tokens, and then q and k are one for all tokens, their dimensions of size 1."""
    erase: Erase | None = None


class Documents(NamedTuple):
    """Which tokens start a document, so that the state before them is forgotten, and which are tokens at all."""

    starts: Bool[Array, "B T"]
    real: Bool[Array, "B T"]


Powers = tuple[affine.Vector | affine.Matrix, ...]
MakeStreams = Callable[[PyTree], Streams]
"""Streams of a recurrence's own inputs; token by token, so that any leading dimensions will do. A recurrence of several
steps per token (n_steps > 1) makes streams [*tokens n H ...], of which only the last step's q is read."""


def recurrence(
    make: MakeStreams,
    inputs: PyTree,
    state: Shaped[Array, "B H K V"],
    *,
    n_steps: int = 1,
    documents: Documents | None = None,
    chunk_tokens: int = 64,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "B T H V"], Shaped[Array, "B H K V"]]:
    """o and the final state of the recurrence that `make(inputs)` describes.

    Args:
      inputs: arrays [B, T, ...]; what `make` computes of them is not kept for the backward pass.
      documents: where to forget, and what to pass over; None: one document, all tokens real. o at others is arbitrary.
      chunk_tokens: C, ignored by "reference".
      implementation: "reference" steps token by token; "xla" works in chunks; None picks: steps for T == 1, else chunks.
    """
    batch, n_tokens = jax.tree.leaves(inputs)[0].shape[:2]
    split = n_shards(sequence_axis()) > 1
    if implementation == "reference" or (implementation is None and n_tokens == 1 and not split):
        if split:
            raise NotImplementedError(
                "recurrence: needs whole sequences to step through, got time split over the mesh axis "
                f"{sequence_axis()!r}; use implementation='xla'"
            )
        return steps(make, inputs, state, n_steps, documents)
    if n_tokens % chunk_tokens:
        documents = documents or Documents(jnp.zeros((batch, n_tokens), bool), jnp.ones((batch, n_tokens), bool))
        inputs, documents = jax.tree.map(lambda x: _pad(x, -n_tokens % chunk_tokens), (inputs, documents))
    chunk_memory = jnp.zeros((batch, -(-n_tokens // chunk_tokens)), jnp.int32)
    o, memories = chunks(make, inputs, state[:, None], chunk_memory, n_steps, documents)
    return o[:, :n_tokens], memories[:, 0]


def step(x: Streams, state: Shaped[Array, "*B H K V"]) -> tuple[Shaped[Array, "*B H V"], Shaped[Array, "*B H K V"]]:
    """One token: the recurrence as it is written in the module docstring."""
    write = lambda key, value: key[..., None] * value[..., None, :]
    read = lambda query, state: dot("...k,...kv->...v", query, state)
    after = x.decay.times(state) + write(x.k, x.v)
    if x.erase is not None:
        e = x.erase.undecayed if x.erase.decayed is None else x.decay.times(x.erase.decayed[..., None])[..., 0]
        after -= write(x.k if x.erase.at is None else x.erase.at, read(e, state))
    return read(x.q, after), after


def steps(
    make: MakeStreams,
    inputs: PyTree,
    state: Shaped[Array, "B H K V"],
    n_steps: int = 1,
    documents: Documents | None = None,
) -> tuple[Shaped[Array, "B T H V"], Shaped[Array, "B H K V"]]:
    """The recurrence token by token: the oracle, and decoding."""

    def body(state, token):
        x = _streams(make, n_steps, *token)
        for i in range(n_steps):
            o, state = step(x if n_steps == 1 else jax.tree.map(lambda a, i=i: a[:, i], x), state)
        return state, o

    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (inputs, documents))
    axis = sequence_axis()
    state, o = jax.lax.scan(body, spread(state, axis), time_first)
    return jnp.moveaxis(o, 0, 1), from_last(state, axis)


def chunks(
    make: MakeStreams,
    inputs: PyTree,
    memories: Shaped[Array, "B M H K V"],
    chunk_memory: Int[Array, "B N"],
    n_steps: int = 1,
    documents: Documents | None = None,
) -> tuple[Shaped[Array, "B T H V"], Shaped[Array, "B M H K V"]]:
    """The recurrence in N chunks of T / N tokens, chunk n of row b continuing memory chunk_memory[b, n].

    A chunk never holds tokens of two memories. Inside `local` on a mesh that splits time, a device's tokens go on where
    those of the device before ended, and the memories are those of the whole sequence, on every device.
    """
    axis = sequence_axis()
    if n_shards(axis) > 1:
        segment = segment_map(make, inputs, memories.shape[1:], chunk_memory, n_steps, documents)
        nothing = affine.identity(type(segment.M), segment.B.shape, segment.B.dtype)
        memories = affine.apply(prefix_fold(affine.combine, nothing, segment, axis), memories)
    chunk_tokens = jax.tree.leaves(inputs)[0].shape[1] // chunk_memory.shape[1]

    def group(memories, x, visited):
        chunk, powers, read = _prepare(x)
        starts, written, memories = hand_on(chunk, powers, memories, visited)
        o = read(starts, written)[..., n_steps - 1 : chunk_tokens * n_steps : n_steps, :]
        return memories, jnp.moveaxis(jnp.moveaxis(o, 0, 1), 2, 3)

    memories, o = _over_groups(group, spread(memories, axis), make, inputs, chunk_memory, n_steps, documents)
    o = jnp.moveaxis(o, 0, 1)  # [groups, B, N, C, H, V] -> [B, groups, N, C, H, V]
    o = o.reshape(o.shape[0], -1, *o.shape[4:])[:, : jax.tree.leaves(inputs)[0].shape[1]]
    return o, from_last(memories, axis)


def segment_map(
    make: MakeStreams,
    inputs: PyTree,
    state_shape: tuple[int, int, int, int],
    chunk_memory: Int[Array, "B N"],
    n_steps: int = 1,
    documents: Documents | None = None,
) -> affine.Segment:
    """What these tokens do to each of the memories [M H K V], as one map S -> M S + B; the arguments are those of `chunks`.

    M is the product of all decays; but with e, or for one matrix that is the M of all tokens, it is what becomes of K more
    columns that begin as the unit matrix and are never written to.
    Cost: that of `chunks` without its outputs, and in the latter cases, of K more value columns in what is handed on.
    """
    n_memories, heads, key, value = state_shape
    batch = chunk_memory.shape[0]
    shapes = jax.eval_shape(lambda inputs: make(inputs), inputs)
    decay = shapes.decay.M if isinstance(shapes.decay, Invariant) else shapes.decay
    kind, mixes = type(decay), shapes.erase is not None or isinstance(decay, affine.Matrix)
    dtype = jnp.result_type(shapes.v.dtype, decay[0].dtype)
    unit = jnp.broadcast_to(jnp.eye(key, dtype=dtype), (batch, n_memories, heads, key, key))
    written = jnp.zeros((batch, n_memories, heads, key, value), dtype)
    nothing = affine.identity(kind, written.shape, dtype).M

    def group(carry, x, visited):
        memories, decay = carry
        chunk, powers, _ = _prepare(x)
        if mixes:
            wider = lambda a: None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, key)])
            chunk = chunk._replace(u=wider(chunk.u), extra=wider(chunk.extra))
        else:
            g = _product(x).g  # [N B H ...]
            mine = visited[..., None] == jnp.arange(n_memories)  # [N B M]
            mine = mine.reshape(*mine.shape, *[1] * (g.ndim - 2))
            decay = kind(decay.g + jnp.sum(jnp.where(mine, g[:, :, None], 0), axis=0))
        return (hand_on(chunk, powers, memories, visited)[-1], decay), None

    memories = jnp.concatenate([written, unit], axis=-1) if mixes else written
    carry = spread_like((memories, nothing), (inputs, chunk_memory))
    (memories, decay), _ = _over_groups(group, carry, make, inputs, chunk_memory, n_steps, documents)
    return affine.Segment(affine.Matrix(memories[..., value:]) if mixes else decay, memories[..., :value])


def _product(x: Streams) -> affine.Scalar | affine.Vector | affine.Elementwise:
    """What the decays of all tokens of chunks [*N C ...] come to."""
    if isinstance(x.decay, Invariant):
        return x.decay.product(x.v.shape[-2])
    kind = type(x.decay)
    return kind(x.decay.g.sum(axis={affine.Scalar: -1, affine.Vector: -2, affine.Elementwise: -3}[kind]))


def _over_groups(body, carry, make: MakeStreams, inputs: PyTree, chunk_memory: Array, n_steps: int, documents):
    """body(carry, streams [N B H C ...], memories visited [N B]) -> (carry, result) over groups of N chunks, in order."""
    n_tokens = jax.tree.leaves(inputs)[0].shape[1]
    n_chunks = chunk_memory.shape[1]
    per_group = min(n_chunks, min(range(GROUP_CHUNKS, GROUP_CHUNKS // 2, -1), key=lambda n: -n_chunks % n))
    idle = -n_chunks % per_group  # chunks without tokens, which leave the last memory as it is
    if idle and documents is None:
        documents = Documents(*(jnp.full((chunk_memory.shape[0], n_tokens), value) for value in (False, True)))

    def grouped(a: Array, **how: str) -> Array:  # [B, chunks, ...] -> [groups, B, N, ...]
        a = jnp.pad(a, [(0, 0), (0, idle)] + [(0, 0)] * (a.ndim - 2), **how)
        if a.shape[0] == 1:  # nothing to move, but XLA would copy
            return a.reshape(-1, 1, per_group, *a.shape[2:])
        return jnp.moveaxis(a.reshape(a.shape[0], -1, per_group, *a.shape[2:]), 1, 0)

    by_chunk = lambda a: grouped(a.reshape(a.shape[0], n_chunks, -1, *a.shape[2:]))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def group(carry, xs):
        inputs, documents, visited = xs
        x = jax.tree.map(functools.partial(_by_head, n_steps=n_steps), _streams(make, n_steps, inputs, documents))
        return body(carry, spread_like(x, x), visited.T)

    xs = *jax.tree.map(by_chunk, (inputs, documents)), grouped(chunk_memory, mode="edge")
    return jax.lax.scan(group, carry, xs)


def _by_head(x: Array, n_steps: int) -> Array:
    """[B N C H ...] as [N B H C ...]; steps of tokens [C n] become one dimension, filled up to a power of two with steps
    that do nothing."""
    if n_steps > 1:
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        size = x.shape[2]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, (1 << (size - 1).bit_length()) - size)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)


def _streams(make: MakeStreams, n_steps: int, inputs: PyTree, documents: Documents | None) -> Streams:
    x = make(inputs)
    if documents is None:
        return x
    if n_steps > 1:
        first = jnp.arange(n_steps) == 0
        real = jnp.broadcast_to(documents.real[..., None], (*documents.real.shape, n_steps))
        documents = Documents(documents.starts[..., None] & first, real)
    return forget(x, documents)


def forget(x: Streams, documents: Documents) -> Streams:
    """The streams as documents have it: a start reads and keeps nothing of before, what is not a token does nothing."""
    at = lambda flags, a: flags.reshape(*flags.shape, *[1] * (a.ndim - flags.ndim))
    real = lambda a: jnp.where(at(documents.real, a), a, 0)
    v = real(x.v)
    if isinstance(x.decay, Invariant):
        return x._replace(v=v, decay=Invariant(x.decay.M, *(flags[..., None] for flags in documents)))
    g = x.decay.g
    decay = type(x.decay)(jnp.where(at(documents.starts, g), -jnp.inf, real(g)))
    erase = jax.tree.map(real, x.erase)
    if erase is not None and erase.undecayed is not None:
        e = erase.undecayed
        erase = erase._replace(undecayed=jnp.where(at(documents.starts, e), 0, e))
    return Streams(x.q, real(x.k), v, decay, erase)


class Chunk(NamedTuple):
    """What a chunk does with the state S that comes in: it writes U' = u - w S and leaves decay S + keys U' + extra."""

    decay: Shaped[Array, "*N #K #V"] | Through
    extra: Shaped[Array, "*N K V"] | None = None
    """What it writes whatever comes in."""
    u: Float[Array, "*N C V"] | None = None
    w: Float[Array, "*N C K"] | None = None
    keys: Float[Array, "*N K C"] | None = None
    """Decayed to the end of the chunk."""


Read = Callable[[Array, Array | None], Array]
"""The outputs of chunks [*N C V], of the states that come in [*N K V] and of U' [*N C V]."""


def _prepare(x: Streams) -> tuple[Chunk, Powers, Read]:
    """What chunks [*N C ...] do with the state that comes in, by which powers, and how their outputs are read."""
    if isinstance(x.decay, affine.Elementwise):
        return _prepare_elementwise(x)
    if isinstance(x.decay, Invariant):
        return _prepare_invariant(x)
    decays = in_chunk(x.decay)
    from_state = decays.from_start(x.q)
    if x.erase is None:
        ((inside,),) = decays.overlaps([x.q], [x.k])
        own = dot("...ij,...jv->...iv", inside, x.v)
        chunk = Chunk(decays.through, extra=dot("...ck,...cv->...kv", decays.to_end(x.k), x.v))
        return chunk, (), lambda starts, _: own + dot("...ck,...kv->...cv", from_state, starts)

    e, b, early = x.erase.decayed, x.erase.at, x.erase.decayed is None
    if (
        early
    ):  # e of token i reads behind token i - 1: it takes the place of that token's row, and its overlaps move back
        e = jnp.concatenate([x.erase.undecayed[..., 1:, :], jnp.zeros_like(x.q[..., :1, :])], axis=-2)
    behind = lambda rows, first: jnp.concatenate([first, rows[..., :-1, :]], axis=-2) if early else rows
    e_from_state = behind(decays.from_start(e), x.erase.undecayed[..., :1, :] if early else None)
    overlaps = lambda blocks: jnp.tril(behind(blocks, jnp.zeros_like(blocks[..., :1, :])), -1)
    if b is None:
        (erased,), (inside,) = decays.overlaps([e, x.q], [x.k])
        keys, values, extra, own = x.k, x.v, None, 0
    else:
        (erased, read), (inside, own) = decays.overlaps([e, x.q], [b, x.k])
        keys, values = b, -dot("...ij,...jv->...iv", overlaps(read), x.v)
        extra = dot("...ck,...cv->...kv", decays.to_end(x.k), x.v)
        own = dot("...ij,...jv->...iv", own, x.v)
    solved = unit_lower_inverse(overlaps(erased))
    solved = dot("...ij,...jv->...iv", solved, jnp.concatenate([values, e_from_state], axis=-1))
    u, w = solved[..., : values.shape[-1]], solved[..., values.shape[-1] :]

    def read_outputs(starts, written):
        return own + dot("...ck,...kv->...cv", from_state, starts) + dot("...ij,...jv->...iv", inside, written)

    return Chunk(decays.through, extra, u, w, decays.to_end(keys).mT), (), read_outputs


def _prepare_elementwise(x: Streams) -> tuple[Chunk, Powers, Read]:
    """With a decay of its own for every entry, states are formed token by token: in all chunks at once, each from 0."""
    time_first = lambda a: jnp.moveaxis(a, -3, 0)
    g = time_first(x.decay.g)
    own = linear_scan(g, time_first(x.k[..., None] * x.v[..., None, :]))
    reached = jnp.exp(jnp.cumsum(g, axis=0))

    def read_outputs(starts, _):
        return jnp.sum(time_first(x.q[..., None]) * (own + reached * starts), axis=-2)

    return Chunk(reached[-1], own[-1]), (), lambda *args: jnp.moveaxis(read_outputs(*args), 0, -2)


def _prepare_invariant(x: Streams) -> tuple[Chunk, Powers, Read]:
    decays = invariant_chunks(x.q, x.k, x.decay, x.v.shape[-2])
    own = dot("...ij,...jv->...iv", decays.inside, x.v)
    chunk = Chunk(decays.through, extra=dot("...kc,...cv->...kv", decays.writes, x.v))
    return chunk, decays.powers, lambda starts, _: own + dot("...kc,...kv->...cv", decays.reads, starts)


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
        d_start += jax.linear_transpose(functools.partial(_through, x.decay, powers), d_start)(d_end)[0]
        if x.w is not None:
            d_written += dot("...ck,...kv->...cv", x.keys, d_end)
            d_start -= dot("...kc,...cv->...kv", x.w, d_written)
        return _leave(d_memories, visited, d_start), (d_written, d_end)

    turned = chunk if chunk.w is None else chunk._replace(w=chunk.w.mT, keys=chunk.keys.mT)
    d_memories, (d_written, d_ends) = jax.lax.scan(
        body, d_memories, (turned, d_starts, d_written, visited), reverse=True
    )
    _, pull = jax.vjp(lambda decay, powers: _through(decay, powers, starts), chunk.decay, powers)
    d_decay, d_powers = pull(d_ends)
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


def _pad(x: Array, n_tokens: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, n_tokens)] + [(0, 0)] * (x.ndim - 2))


def recurrence_flops(
    key_dim: int, value_dim: int, chunk_tokens: int, erases: Literal["nothing", "at k", "at b"] = "at k"
) -> int:
    """Forward FLOPs per step and head in chunks, the inverse of [C, C] counted as 2 C^2 per step."""
    c, key, value = chunk_tokens, key_dim, value_dim
    if erases == "nothing":
        return 2 * c * (key + value) + 4 * key * value
    delta_rule = 2 * c * (2 * key + (key + value) + value) + 2 * c * c + 6 * key * value
    return delta_rule + (2 * c * (2 * key + 2 * value) + 2 * key * value if erases == "at b" else 0)

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
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.chunk import Prepared, hand_on, prepare
from jaxmem.recurrences.invariant import Invariant
from jaxmem.recurrences.streams import Documents, MakeStreams, make_streams, step, streams_shape
from jaxmem.sharding.folds import from_last, n_shards, prefix_fold, sequence_axis, spread, spread_like
from jaxmem.typing import Array, Int, PyTree, Shaped

Implementation = Literal["reference", "xla"]

GROUP_CHUNKS = 8
"""Chunks worked on at once, and recomputed at once in the backward pass: as many as stay in a CPU's cache."""


def recurrence(
    make: MakeStreams,
    inputs: PyTree,
    state: Shaped[Array, "B H K V"],
    *,
    n_steps: int = 1,
    documents: Documents | None = None,
    chunk_tokens: int = 32,
    implementation: Implementation | None = None,
) -> tuple[Shaped[Array, "B T H V"], Shaped[Array, "B H K V"]]:
    """o and the final state of the recurrence that `make(inputs)` describes.

    Args:
      inputs: arrays [B, T, ...]; what `make` computes of them is not kept for the backward pass.
      documents: where to forget, and what to pass over; None: one document, all tokens real. o at others is arbitrary.
      chunk_tokens: C; "reference" has none, and where every channel has one number of its own, C is T.
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
    if _has_one_number(make, inputs):
        chunk_tokens = n_tokens
    if n_tokens % chunk_tokens:
        documents = documents or Documents(jnp.zeros((batch, n_tokens), bool), jnp.ones((batch, n_tokens), bool))
        inputs, documents = jax.tree.map(lambda x: _pad(x, -n_tokens % chunk_tokens), (inputs, documents))
    chunk_memory = jnp.zeros((batch, -(-n_tokens // chunk_tokens)), jnp.int32)
    o, memories = chunks(make, inputs, state[:, None], chunk_memory, n_steps, documents)
    return o[:, :n_tokens], memories[:, 0]


def steps(
    make: MakeStreams,
    inputs: PyTree,
    state: Shaped[Array, "B H K V"],
    n_steps: int = 1,
    documents: Documents | None = None,
) -> tuple[Shaped[Array, "B T H V"], Shaped[Array, "B H K V"]]:
    """The recurrence token by token: the oracle, and decoding."""

    def body(state, token):
        x = make_streams(make, n_steps, *token)
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

    def group(memories, x: Prepared, visited):
        o, memories = x.go_on(memories, visited)
        o = o[..., n_steps - 1 : chunk_tokens * n_steps : n_steps, :]
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
    shapes = streams_shape(make, inputs)
    decay = shapes.decay.M if isinstance(shapes.decay, Invariant) else shapes.decay
    kind, mixes = type(decay), shapes.erase is not None or isinstance(decay, affine.Matrix)
    dtype = jnp.result_type(shapes.v.dtype, decay[0].dtype)
    unit = jnp.broadcast_to(jnp.eye(key, dtype=dtype), (batch, n_memories, heads, key, key))
    written = jnp.zeros((batch, n_memories, heads, key, value), dtype)
    nothing = affine.identity(kind, written.shape, dtype).M

    def group(carry, x: Prepared, visited):
        memories, decay = carry
        if mixes:
            chunk = x.chunk
            wider = lambda a: None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, key)])
            chunk = chunk._replace(u=wider(chunk.u), extra=wider(chunk.extra))
            memories = hand_on(chunk, x.powers, memories, visited)[-1]
        else:
            g = x.product().g  # [N B H ...]
            mine = visited[..., None] == jnp.arange(n_memories)  # [N B M]
            mine = mine.reshape(*mine.shape, *[1] * (g.ndim - 2))
            decay = kind(decay.g + jnp.sum(jnp.where(mine, g[:, :, None], 0), axis=0))
            memories = x.go_on(memories, visited)[-1]
        return (memories, decay), None

    memories = jnp.concatenate([written, unit], axis=-1) if mixes else written
    carry = spread_like((memories, nothing), (inputs, chunk_memory))
    (memories, decay), _ = _over_groups(group, carry, make, inputs, chunk_memory, n_steps, documents)
    return affine.Segment(affine.Matrix(memories[..., value:]) if mixes else decay, memories[..., :value])


def _over_groups(body, carry, make: MakeStreams, inputs: PyTree, chunk_memory: Array, n_steps: int, documents):
    """body(carry, N prepared chunks, memories visited [N B]) -> (carry, result) over groups of chunks, in order."""
    n_tokens = jax.tree.leaves(inputs)[0].shape[1]
    n_chunks = chunk_memory.shape[1]
    kind = type(streams_shape(make, inputs).decay)
    sizes = [1] if kind is affine.Elementwise else range(GROUP_CHUNKS, GROUP_CHUNKS // 2, -1)
    per_group = min(n_chunks, min(sizes, key=lambda n: -n_chunks % n))
    idle = -n_chunks % per_group  # chunks without tokens, which leave the last memory as it is
    if idle and documents is None:
        documents = Documents(*(jnp.full((chunk_memory.shape[0], n_tokens), value) for value in (False, True)))

    def grouped(a: Array, **how: str) -> Array:  # [B, chunks, ...] -> [groups, B, N, ...]
        a = jnp.pad(a, [(0, 0), (0, idle)] + [(0, 0)] * (a.ndim - 2), **how)
        if a.shape[0] == 1:  # without a dimension of size 1, which XLA would copy everything to move
            return a.reshape(-1, per_group, *a.shape[2:])
        return jnp.moveaxis(a.reshape(a.shape[0], -1, per_group, *a.shape[2:]), 1, 0)

    by_chunk = lambda a: grouped(a.reshape(a.shape[0], n_chunks, -1, *a.shape[2:]))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def group(carry, xs):
        inputs, documents, visited = jax.tree.map(lambda a: a[None], xs) if chunk_memory.shape[0] == 1 else xs
        return body(carry, prepare(make, inputs, documents, n_steps), visited.T)

    xs = *jax.tree.map(by_chunk, (inputs, documents)), grouped(chunk_memory, mode="edge")
    return jax.lax.scan(group, carry, xs)


def _has_one_number(make: MakeStreams, inputs: PyTree) -> bool:
    """Whether every channel has one, so that all its states are no more than its outputs."""
    decay = streams_shape(make, inputs).decay
    return isinstance(decay, affine.Elementwise) and decay.g.shape[-2:] == (1, 1)


def _pad(x: Array, n_tokens: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, n_tokens)] + [(0, 0)] * (x.ndim - 2))


ELEMENTWISE_FLOPS = 7
"""Per number of the state and token, with a decay of its own for every entry; an exponential counted as one."""


def recurrence_flops(
    key_dim: int,
    value_dim: int,
    chunk_tokens: int,
    erases: Literal["nothing", "at k", "at b"] = "at k",
    per_channel: bool = False,
) -> int:
    """Forward FLOPs per step and head in chunks, the inverse of [C, C] counted as 2 C^2 per step; decays per channel leave
    out half of each triangle."""
    c, key, value = chunk_tokens, key_dim, value_dim
    overlap = (c + 2) * key if per_channel else 2 * c * key
    if erases == "nothing":
        return overlap + 2 * c * value + 4 * key * value
    solve = 3 * 2 * c * (key + value)  # with the inverse, and a step of refinement
    delta_rule = 2 * overlap + solve + 2 * c * value + 2 * c * c + 6 * key * value
    return delta_rule + (2 * overlap + 4 * c * value + 2 * key * value if erases == "at b" else 0)

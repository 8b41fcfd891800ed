"""The gated delta rule: a matrix memory that decays, and corrects what it holds for a key before writing.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - (e^{g_t} S_{t-1})^T k_t),   o_t = scale * S_t^T q_t

with S [K, V], log-decay g <= 0 (-inf forgets everything) and write strength beta, usually in (0, 1).

Inside a chunk of C tokens (D_ij = e^{g_{j+1} + ... + g_i} for j <= i, else 0; d_i = e^{g_1 + ... + g_i}) the u solve a unit
lower-triangular system, so a chunk costs a few [C, C] and [C, K] x [K, V] products and only its end state is handed on:

    (I + A) [U | W] = [beta V | beta d K],   A_ij = beta_i (k_i . k_j) D_ij for j < i
    U' = U - W S,   O = (d Q) S + (Q K^T * D) U',   S <- d_C S + (D_C: K)^T U'

Chunks are worked on in groups: only U' and S go from chunk to chunk, all else is one batch of products. The backward pass
keeps the inputs and a state per group, and recomputes the rest group by group: little memory, most of it in cache.

Sums of log-decays are formed directly, never as differences of running sums, so that strong decays and -inf lose nothing
in values or gradients. Chunks may belong to different memories (`chunk_memory`): each is folded into its own state.

Cost per token and head: see `rule_flops`; state K V floats.
Reference: Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, equations 10 and 12-14.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.typing import Array, Float, Int

Implementation = Literal["reference", "xla"]

GROUP_CHUNKS = 16
"""Chunks worked on at once, and recomputed at once in the backward pass: as many as stay in a CPU's cache."""

_EXACT = jax.lax.Precision.HIGHEST


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_tokens: int = 64,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """o and the final state of the recurrence above, in fp32 inside; o in v.dtype, state in fp32.

    Args:
      g: natural log-decay, <= 0, -inf legal. A token with g = 0, beta = 0 leaves the state as it is.
      state: initial state; None is zero.
      scale: of q; None is K^-0.5.
      chunk_tokens: C, ignored by "reference".
      implementation: "reference" steps token by token; "xla" works in chunks; None picks: steps for T == 1, else chunks.

    Raises: ValueError if shapes do not match or the implementation is unknown.

    >>> one = jnp.ones((1, 3, 1, 1))
    >>> o, state = gated_delta_rule(one, one, one, jnp.zeros((1, 3, 1)), jnp.full((1, 3, 1), 0.5))
    >>> o[0, :, 0, 0].tolist()
    [0.5, 0.75, 0.875]
    """
    require_power_of_two("gated_delta_rule", chunk_tokens)
    if implementation not in (None, "reference", "xla"):
        raise ValueError(
            "gated_delta_rule: needs implementation 'reference', 'xla' or None, "
            f"got implementation={implementation!r}; choose one of these"
        )
    state = _validate(q, k, v, g, beta, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = Inputs(*(x.astype(jnp.float32) for x in (q * scale, k, v, g, beta)))
    if implementation == "reference" or (implementation is None and q.shape[1] == 1):
        o, state = steps(inputs, state.astype(jnp.float32))
    else:
        memories = state.astype(jnp.float32)[:, None]
        padded = jax.tree.map(lambda x: _pad_time(x, chunk_tokens), inputs)
        n_chunks = padded.q.shape[1] // chunk_tokens
        o, memories = chunks(padded, memories, jnp.zeros((q.shape[0], n_chunks), jnp.int32))
        o, state = o[:, : q.shape[1]], memories[:, 0]
    return o.astype(v.dtype), state


class Inputs(NamedTuple):
    """The five streams of the recurrence in fp32, q already scaled."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    g: Float[Array, "B T H"]
    beta: Float[Array, "B T H"]


def step(x: Inputs, state: Float[Array, "*B H K V"]) -> tuple[Float[Array, "*B H V"], Float[Array, "*B H K V"]]:
    """One token: the recurrence as it is written in the module docstring. Inputs have no T dimension."""
    state = jnp.exp(x.g)[..., None, None] * state
    u = x.beta[..., None] * (x.v - _dot("...k,...kv->...v", x.k, state))
    state = state + x.k[..., None] * u[..., None, :]
    return _dot("...k,...kv->...v", x.q, state), state


def steps(x: Inputs, state: Float[Array, "B H K V"]) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence token by token: the oracle, and decoding."""
    time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), x)
    state, o = jax.lax.scan(lambda s, x_t: step(x_t, s)[::-1], state, time_first)
    return jnp.moveaxis(o, 0, 1), state


def chunks(
    x: Inputs, memories: Float[Array, "B M H K V"], chunk_memory: Int[Array, "B N"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B M H K V"]]:
    """The recurrence in N chunks of T / N tokens, chunk n of row b continuing memory chunk_memory[b, n].

    A chunk never holds tokens of two memories; tokens that are not there have q = k = v = g = beta = 0.
    """
    n_chunks = chunk_memory.shape[1]
    per_group = min(n_chunks, min(range(GROUP_CHUNKS, GROUP_CHUNKS // 2, -1), key=lambda n: -n_chunks % n))
    idle = -n_chunks % per_group  # chunks without tokens, which leave the last memory as it is

    def grouped(a: Array, **how: str) -> Array:  # [B, chunks, ...] -> [groups, B, N, ...]
        a = jnp.pad(a, [(0, 0), (0, idle)] + [(0, 0)] * (a.ndim - 2), **how)
        return jnp.moveaxis(a.reshape(a.shape[0], -1, per_group, *a.shape[2:]), 1, 0)

    inputs = jax.tree.map(lambda a: grouped(a.reshape(a.shape[0], n_chunks, -1, *a.shape[2:])), x)
    memories, o = jax.lax.scan(_group, memories, (inputs, grouped(chunk_memory, mode="edge")))
    o = jnp.moveaxis(o, 0, 1)  # [groups, B, N, C, H, V] -> [B, groups, N, C, H, V]
    return o.reshape(o.shape[0], -1, *o.shape[4:])[:, : x.q.shape[1]], memories


@functools.partial(jax.checkpoint, prevent_cse=False)
def _group(
    memories: Float[Array, "B M H K V"], inputs: tuple[Inputs, Int[Array, "B N"]]
) -> tuple[Float[Array, "B M H K V"], Float[Array, "B N C H V"]]:
    x, visited = inputs
    x = jax.tree.map(lambda a: jnp.moveaxis(jnp.moveaxis(a, 3, 2), 1, 0), x)  # [B, N, C, H, ...] -> [N, B, H, C, ...]
    chunk, q, inside = _prepare(x)
    starts, written, memories = hand_on(chunk, memories, visited.T)
    o = _dot("...ck,...kv->...cv", q, starts) + _dot("...ij,...jv->...iv", inside, written)
    return memories, jnp.moveaxis(jnp.moveaxis(o, 0, 1), 2, 3)


class Chunk(NamedTuple):
    """What a chunk does with the state S that comes in: it writes U' = U - W S and leaves decay S + keys^T U' behind."""

    decay: Float[Array, "*N"]
    w: Float[Array, "*N C K"]
    u: Float[Array, "*N C V"]
    keys: Float[Array, "*N C K"]
    """Decayed to the end of the chunk."""


def _prepare(x: Inputs) -> tuple[Chunk, Float[Array, "*N C K"], Float[Array, "*N C C"]]:
    """The chunk's map, what reads the state that comes in, and what reads the chunk's own writes.

    Two products with k, one inverse, one product with it: few and large, for a matrix unit.
    """
    size, value = x.k.shape[-2], x.v.shape[-1]
    lower, before, through, after = decays(x.g)
    beta = x.beta[..., None]
    overlap = _dot("...ik,...jk->...ij", jnp.concatenate([beta * x.k, x.q], axis=-2), x.k)
    solve = unit_lower_inverse(jnp.tril(overlap[..., :size, :] * lower, -1))
    uw = _dot("...ij,...jv->...iv", solve, beta * jnp.concatenate([x.v, before[..., None] * x.k], axis=-1))
    chunk = Chunk(through, uw[..., value:], uw[..., :value], after[..., None] * x.k)
    return chunk, before[..., None] * x.q, overlap[..., size:, :] * lower


@jax.custom_vjp
def hand_on(
    chunk: Chunk, memories: Float[Array, "B M H K V"], visited: Int[Array, "N B"]
) -> tuple[Float[Array, "N B H K V"], Float[Array, "N B H C V"], Float[Array, "B M H K V"]]:
    """All that has to happen in order: per chunk the state that comes in and U'; and the memories in the end.

    Its backward pass goes through the chunks once more, with two products each; those of cotangents with states are formed
    for all chunks at once.
    """

    def body(memories, inputs):
        x, visited = inputs
        start = _visit(memories, visited)
        written = x.u - _dot("...ck,...kv->...cv", x.w, start)
        end = x.decay[..., None, None] * start + _dot("...ck,...cv->...kv", x.keys, written)
        return _leave(memories, visited, end), (start, written)

    memories, (starts, written) = jax.lax.scan(body, memories, (chunk, visited))
    return starts, written, memories


def _hand_on_forward(chunk, memories, visited):
    starts, written, memories = hand_on(chunk, memories, visited)
    return (starts, written, memories), (chunk, starts, written, visited)


def _hand_on_backward(saved, cotangents):
    chunk, starts, written, visited = saved
    d_starts, d_written, d_memories = cotangents

    def body(d_memories, inputs):
        x, d_start, d_written, visited = inputs
        d_end = _visit(d_memories, visited)
        d_written = d_written + _dot("...ck,...kv->...cv", x.keys, d_end)
        d_start = d_start + x.decay[..., None, None] * d_end - _dot("...ck,...cv->...kv", x.w, d_written)
        return _leave(d_memories, visited, d_start), (d_written, d_end)

    d_memories, (d_written, d_ends) = jax.lax.scan(
        body, d_memories, (chunk, d_starts, d_written, visited), reverse=True
    )
    d_chunk = Chunk(
        decay=jnp.sum(d_ends * starts, axis=(-2, -1)),
        w=-_dot("...cv,...kv->...ck", d_written, starts),
        u=d_written,
        keys=_dot("...cv,...kv->...ck", written, d_ends),
    )
    return d_chunk, d_memories, None


hand_on.defvjp(_hand_on_forward, _hand_on_backward)


def _visit(memories: Float[Array, "B M H K V"], visited: Int[Array, "B"]) -> Float[Array, "B H K V"]:
    return memories[:, 0] if memories.shape[1] == 1 else memories[jnp.arange(memories.shape[0]), visited]


def _leave(memories: Array, visited: Array, state: Array) -> Array:
    return state[:, None] if memories.shape[1] == 1 else memories.at[jnp.arange(memories.shape[0]), visited].set(state)


def decays(g: Float[Array, "*N C"]) -> tuple[Array, Array, Array, Array]:
    """Decays inside a chunk of log-decays g: from j to i [C, C] (0 above the diagonal), from before the chunk to i [C],
    through the whole chunk [], and from i to its end [C]."""
    size = g.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    sums = jnp.cumsum(jnp.where(row > column, g[..., None], 0), axis=-2)
    lower = jnp.where(row >= column, jnp.exp(sums), 0)
    before = jnp.exp(jnp.cumsum(g, axis=-1))
    return lower, before, before[..., -1], lower[..., -1, :]


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """(I + a)^-1 for a strictly lower triangular a; C is a power of two.

    By halves, [[X, 0], [Y, Z]]^-1 = [[X^-1, 0], [-Z^-1 Y X^-1, Z^-1]], from the diagonal outwards: a dozen batched products
    that suit a matrix unit and, unlike powers of a, never grow large and cancel. (LAPACK's batched triangular solve would
    do on a CPU, but two of them in one program can wait for each other's threads forever: jaxlib 0.10.2 on two cores.)
    """
    size, block = a.shape[-1], min(16, a.shape[-1])
    inverse = _invert_in_place(_diagonal_blocks(a, block))
    while block < size:
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = _diagonal_blocks(a, 2 * block)[..., block:, :block]
        corner = -_dot("...ij,...jk->...ik", lower, _dot("...ij,...jk->...ik", corner, upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :, :]


def _inverse_forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    product = _dot("...ji,...jk->...ik", inverse, _dot("...ij,...kj->...ik", cotangent, inverse))
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _diagonal_blocks(a: Float[Array, "*N C C"], block: int) -> Float[Array, "*N blocks block block"]:
    starts = range(0, a.shape[-1], block)
    return jnp.stack([a[..., i : i + block, i : i + block] for i in starts], axis=-3)


def _invert_in_place(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """The same inverse by whole [C, C] products, one per doubling: best for small C."""
    index = jnp.arange(a.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(a.shape[-1]), a.shape)
    block = 1
    while block < a.shape[-1]:
        half = index // block
        corner = (half[:, None] == half + 1) & (half % 2 == 0)
        inverse = inverse - _dot("...ij,...jk->...ik", inverse, _dot("...ij,...jk->...ik", a * corner, inverse))
        block *= 2
    return inverse


def rule_flops(key_dim: int, value_dim: int, chunk_tokens: int) -> int:
    """Forward FLOPs per token and head of the recurrence in chunks, the inverse of [C, C] counted as 2 C^2 per token."""
    c = chunk_tokens
    inside = 2 * c * (2 * key_dim + key_dim + value_dim + value_dim) + 2 * c * c
    return inside + 6 * key_dim * value_dim


def require_power_of_two(what: str, chunk_tokens: int) -> None:
    """Raises ValueError for a chunk size that cannot be halved down to 1."""
    if chunk_tokens < 1 or chunk_tokens & (chunk_tokens - 1):
        raise ValueError(
            f"{what}: needs a power of two as chunk_tokens, got chunk_tokens={chunk_tokens}; use 32, 64 or 128"
        )


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision=_EXACT)


def _pad_time(x: Array, multiple: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _validate(q, k, v, g, beta, state) -> Array:
    batch, n_tokens, heads, key = q.shape
    wanted = {"k": (k, q.shape), "v": (v, (batch, n_tokens, heads, v.shape[-1])), "g": (g, q.shape[:3])}
    wanted |= {"beta": (beta, q.shape[:3])}
    if state is None:
        state = jnp.zeros((batch, heads, key, v.shape[-1]), jnp.float32)
    wanted |= {"state": (state, (batch, heads, key, v.shape[-1]))}
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(
                f"gated_delta_rule: needs {name} of shape {shape} beside q of shape {q.shape}, got {array.shape}; "
                "all five streams share batch, time and heads"
            )
    return state

"""Fast-weight product-key memory: a table that each sequence writes for itself, chunk by chunk, in training and in decoding.

    q = RMSNorm(W_q x)        v = z-score(W_v x)        g = sigmoid(w_g . x + b_g)
    o = g read(q) + (1 - g) v                            y = W_o RMSNorm(o)
    after every C tokens of a document: one gradient step towards read(q_{t-1}) = v_t, weighted by g_{t-1}

`fast_weight_table` has the reads and the step. Tokens of a chunk read the table as it was at the chunk's start, which is
empty in a document's first chunk: values are 0 there and sub-keys the learned ones. A query's target is the value of the next
token, so a pair belongs to the chunk of its second token, and the last query of a chunk is carried into the next. Outer
gradients go through all steps, back to the learned sub-keys.

This is no monoid: a step depends on what the table holds, so chunks run in order, and a sequence cannot be split over
devices. Rows can.

Cost per token: 4 n K FLOPs of sub-scores, 6 k V of values, 2 k K of sub-keys, with n^2 slots; a full chunk is read twice, by
its tokens and by its step. State: n^2 V + n K numbers per row, and a chunk of C (K + V + 1). Training keeps one table per row
and chunk for the backward pass.

Reference: Zhao and Jones 2026, Fast-weight Product Key Memory, arXiv 2601.00671, section 3. Neither the paper nor its code
was at hand, only descriptions of both. By these the paper's step is 1 / N_m (`step="mean"`) and that of its code k / N_m, the
default. Choices of this implementation: values start at 0 and sub-keys normal, queries have one norm and x none of its own
before each projection, the z-scored v is also what the gate mixes in, a pair over the border of two chunks counts in the
second. Not compared with other code.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, NonNegative, Positive, checked
from jaxmem.layers.fast_weight_table import Pairs, Rates, Score, read, write
from jaxmem.layers.mixer import Call, Cursor, SequenceMixer, init_cursor, place_state
from jaxmem.layers.norm import RMSNorm
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.sharding import ROWS, VECTOR, constrain, einsum, local, matrix, param
from jaxmem.sharding.folds import from_last, sequence_axis, spread_like
from jaxmem.sharding.placement import n_shards_of
from jaxmem.showing import tree_text
from jaxmem.typing import Array, Bool, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True)
@checked
class FastWeightMemoryConfig:
    """One head; sizes as described of the paper's, with widths of our choice."""

    n_slots: Count = 512**2
    """n^2."""
    top_k: Count = 8
    """k: slots read per token."""
    key_dim: Count = 512
    """K: width of a query; a sub-key has K / 2."""
    value_dim: Count = 512
    """V."""
    chunk_tokens: Count = 512
    """C: tokens between steps."""
    score: Score = "idw"
    eps: Positive = 1e-3
    """Of "idw": squared distances below it count alike."""
    step: Literal["top_k", "mean"] = "top_k"
    """The step of a slot is its gradient times k / reads or 1 / reads. The first writes a target wholly where its k weights
    are equal, and overshoots, up to k times, the more one of them outweighs the others; the second never does."""
    learning_rate: NonNegative = 1.0
    """Times the step of values."""
    key_learning_rate: NonNegative = 1.0
    """Of sub-keys, on the addressing loss."""

    def __post_init__(self):
        if self.key_dim % 2:
            raise ValueError(
                f"FastWeightMemoryConfig: needs an even key_dim, got key_dim={self.key_dim}; each half has codebooks"
            )
        ProductKeysConfig(self.n_slots, 1, self.top_k, self.key_dim)  # checks n_slots and top_k

    @property
    def n_sub_keys(self) -> int:
        """n: sub-keys in each of the two codebooks."""
        return round(self.n_slots**0.5)

    @property
    def rates(self) -> Rates:
        step = self.learning_rate * (self.top_k if self.step == "top_k" else 1)
        return Rates(self.top_k, self.score, self.eps, step, self.key_learning_rate)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "FastWeightMemory":
        return FastWeightMemory(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token that are not 2 x parameters: of reading behind the first chunk, and of full chunks' steps.

        The sub-scores of reading are 2 x parameters, of which the first chunk has no use.
        """
        written = context_tokens // self.chunk_tokens * self.chunk_tokens
        values, scores = 2 * self.top_k * self.value_dim, 2 * self.n_sub_keys * self.key_dim
        step = scores + 2 * values + 2 * self.top_k * self.key_dim
        return (max(context_tokens - self.chunk_tokens, 0) * values + written * step) // context_tokens


def fwpkm(n_slots: int = 512**2) -> FastWeightMemoryConfig:
    """FwPKM: one head, 8 of 512^2 slots, scores of inverse distances, a step of rate 1 every 512 tokens."""
    return FastWeightMemoryConfig(n_slots)


class FastWeightState(NamedTuple):
    """What the layer remembers of a document, in fp32; all 0 before it starts."""

    values: Float[Array, "B M V"]
    moved: Float[Array, "B 2 n half"]
    """How far the sub-keys are from the learned ones."""
    pairs: Pairs
    """Those of the chunk that is not full yet, the latest last; 0 in front."""
    query: Float[Array, "B 1 2 half"]
    """Of the last token."""
    gate: Float[Array, "B 1"]
    """Of the last token."""
    cursor: Cursor

    __repr__ = tree_text


_TOKENS = ("batch", "time")
_PAIRS = Pairs(("batch", "tap", None, "key"), ("batch", "tap"), ("batch", "tap", "value"))
_STATE = FastWeightState(
    ("batch", None, "value"),
    ("batch", None, "sub_keys", "key"),
    _PAIRS,
    ("batch", "tap", None, "key"),
    ("batch", "tap"),
    Cursor(("batch",), ("batch",)),
)


class FastWeightMemory(SequenceMixer):
    """The layer of the module docstring; see `mixer` for how it is called.

    >>> config = FastWeightMemoryConfig(n_slots=16, top_k=2, key_dim=4, value_dim=6, chunk_tokens=3)
    >>> y, state = jax.jit(config.make(8, rngs=nnx.Rngs(0)))(jnp.ones((1, 5, 8)))
    >>> y.shape, state.values.shape
    ((1, 5, 8), (1, 16, 6))
    """

    state_type = FastWeightState

    def __init__(self, config: FastWeightMemoryConfig, d_model: int, *, rngs: nnx.Rngs):
        """Sub-keys start normal, as normalised queries are; gates at sigmoid(0) on average."""
        super().__init__(config, d_model)
        half = config.key_dim // 2
        init = jax.nn.initializers.lecun_normal()
        into = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        self.query = param(rngs, into, (d_model, 2, half), ("embed", None, "key"), matrix())
        self.value = param(rngs, init, (d_model, config.value_dim), ("embed", "value"), matrix())
        self.gate = param(rngs, jax.nn.initializers.normal(d_model**-0.5), (d_model,), ("embed",), matrix())
        self.gate_bias = param(rngs, jax.nn.initializers.zeros, (1,), (None,), VECTOR)
        self.query_norm = RMSNorm(config.key_dim, axes=("key",), rngs=rngs)
        normal, shape = jax.nn.initializers.normal(1.0), (2, config.n_sub_keys, half)
        self.keys = param(rngs, normal, shape, (None, "sub_keys", "key"), ROWS)
        self.out_norm = RMSNorm(config.value_dim, axes=("value",), rngs=rngs)
        self.out = param(rngs, init, (config.value_dim, d_model), ("value", "embed"), matrix())

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> FastWeightState:
        """The empty table; fp32 whatever the dtype."""
        c, half = self.config, self.config.key_dim // 2
        zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.float32)
        pairs = Pairs(zeros(c.chunk_tokens, 2, half), zeros(c.chunk_tokens), zeros(c.chunk_tokens, c.value_dim))
        values, moved = zeros(c.n_slots, c.value_dim), zeros(2, c.n_sub_keys, half)
        state = FastWeightState(values, moved, pairs, zeros(1, 2, half), zeros(1), init_cursor(batch))
        return place_state(state, _STATE)

    def mix(self, x: Float[Array, "B T D"], state: FastWeightState, call: Call) -> tuple[Array, FastWeightState]:
        """Raises: NotImplementedError on a mesh that splits the sequence."""
        if n_shards_of("time") > 1:
            raise NotImplementedError(
                "fast-weight memory: needs whole sequences on a device, since its chunks run in order, "
                f"got seq={n_shards_of('time')}; use a mesh with seq=1"
            )
        tokens = call.tokens
        full = x.astype(jnp.float32)
        q = einsum("btd,dpk->btpk", full, self.query[...], (*_TOKENS, None, "key"))
        q = self.query_norm(q.reshape(*q.shape[:2], -1)).reshape(q.shape)
        v = _z_score(einsum("btd,dv->btv", full, self.value[...], (*_TOKENS, "value")))
        gate = einsum("btd,d->bt", full, self.gate[...], _TOKENS) + constrain(self.gate_bias[...], None)
        g = jax.nn.sigmoid(gate)
        run = local(
            self._mix,
            in_axes=(
                Pairs((*_TOKENS, None, "key"), _TOKENS, (*_TOKENS, "value")),
                (_TOKENS, _TOKENS, _TOKENS, ("batch",)),
                (None, "sub_keys", "key"),
                _STATE[:-1],
            ),
            out_axes=((*_TOKENS, "value"), _STATE[:-1]),
        )
        places = tokens.position, tokens.starts, tokens.real, call.cursor.position
        found, remembered = run(Pairs(q, g, v), places, constrain(self.keys[...], None, "sub_keys", "key"), state[:-1])
        o = self.out_norm(g[..., None] * found + (1 - g[..., None]) * v)
        y = einsum("btv,vd->btd", o, self.out[...], (*_TOKENS, "embed"))
        return y, FastWeightState(*remembered, state.cursor)

    def _mix(self, new: Pairs, places, learned_keys: Float[Array, "2 n half"], state):
        """What tokens read, and the state behind them, on one device's rows.

        Args: new: of each token its own query, gate and value.
        """
        learned_keys, state = spread_like((learned_keys, state), new)  # so that gradients are exchanged once
        (position, starts, real, end_position), (values, moved, buffer, last_query, last_gate) = places, state
        size, rates, n_tokens = self.config.chunk_tokens, self.config.rates, position.shape[1]
        before = lambda last, a: jnp.where(_like(position > 0, a), jnp.concatenate([last, a[:, :-1]], axis=1), 0)
        pairs = Pairs(before(last_query, new.query), before(last_gate, new.gate), new.target)
        pairs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), buffer, pairs)  # [B C+T ...]

        version, start, end = _versions(position, real, size)
        width = min(size, n_tokens)

        def look(table, start):
            return read(_window(new.query, start, width), learned_keys + table[1], table[0], rates)

        def step(table, end):
            at = jnp.minimum(end, n_tokens - 1)
            first = jnp.take_along_axis(position, at[:, None], axis=1) < size  # [B 1], of a document: starts afresh
            values, moved = (jnp.where(_like(first[:, 0], a), 0, a) for a in table)
            valid = ~first | (jnp.arange(size) > 0)
            key_step, written = write(_window(pairs, at + 1, size), valid, learned_keys + moved, values, rates)
            new = written, moved + key_step
            return jax.tree.map(lambda a, b: jnp.where(_like(end < n_tokens, a), a, b), new, table)

        def turn(table, place):
            start, end = place
            found = look(table, start)
            return jax.lax.cond(jnp.any(end < n_tokens), step, lambda table, _: table, table, end), found

        table, found = jax.lax.scan(turn, (values, moved), (start[:-1], end))
        if n_tokens % size != 1 and size > 1:  # else no token stands behind the last end
            found = jnp.concatenate([found, look(table, start[-1])[None]])
        offset = jnp.arange(n_tokens) - jnp.take_along_axis(start.T, version, axis=1)
        row = jnp.arange(position.shape[0])[:, None]
        found = found.at[version, row, offset].get(mode="clip")
        found = jnp.where((real & (position >= size))[..., None], found, 0)

        n_real = jnp.sum(real, axis=1)  # rows of padding keep all as it was
        emptied = jnp.any(starts, axis=1) & (end_position < size)
        table = jax.tree.map(lambda a: jnp.where(_like(emptied, a), 0, a), table)
        kept = (jnp.arange(size) >= size - (end_position % size)[:, None]) | (n_real == 0)[:, None]
        buffer = jax.tree.map(lambda a: jnp.where(_like(kept, a), a, 0), _window(pairs, n_real, size))
        last = lambda last, a: _window(jnp.concatenate([last, a], axis=1), n_real, 1)
        remembered = *table, buffer, last(last_query, new.query), last(last_gate, new.gate)
        return found, from_last(remembered, sequence_axis())


def _versions(
    position: Int[Array, "B T"], real: Bool[Array, "B T"], size: int
) -> tuple[Int[Array, "B T"], Int[Array, "versions B"], Int[Array, "N B"]]:
    """Version w of the table is that between the w-th end of a chunk in this call and the next.

    Returns: the version that each token finds; the first token of each of the N + 1; the last token of each of the first N,
    T where it goes on.
    """
    n_tokens = position.shape[1]
    ends = real & (position % size == size - 1)
    n_ends = jnp.cumsum(ends, axis=1)
    versions = jnp.arange((n_tokens + size - 1) // size)
    end = jnp.sum(n_ends[:, None] <= versions[:, None], axis=-1).T
    return n_ends - ends, jnp.concatenate([jnp.zeros_like(end[:1]), end + 1]), end


def _window(tree, start: Int[Array, "B"], size: int):
    """a[b, start_b : start_b + size] of every array; the last element where there is none."""

    def of_array(a: Array) -> Array:
        at = jnp.minimum(start[:, None] + jnp.arange(size), a.shape[1] - 1)
        return jnp.take_along_axis(a, _like(at, a), axis=1)

    return jax.tree.map(of_array, tree)


def _like(x: Array, a: Array) -> Array:
    """x with dimensions of size 1 behind, as many as a has more."""
    return x.reshape(x.shape + (1,) * (a.ndim - x.ndim))


def _z_score(v: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    centred = v - jnp.mean(v, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)

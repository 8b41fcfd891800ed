"""Softmax attention over everything seen, or over the last W tokens; heads may share keys and values (grouped queries).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s   over the tokens s <= t of the same document, t - s < W

with rotary embedding of q and k. The state is a ring of S slots for keys and values: the token of index i in its row
stands in slot i mod S, so the row's length says which token each slot holds, and the cursor which of them are of the document
that it stands in: the last `position` of them. A call attends over the cache and, merged by the log-sum-exp rule of the
softmax algebra, over its own tokens; a single token is written first and then attends over the cache alone.

A window of W tokens needs S = W slots for a stream of any length. Full attention needs S >= the length of the longest
document: the tokens of a document beyond S get NaN under jit, where nothing can be raised, and a ValueError elsewhere.

Cost: 2 (K + V) FLOPs per head, token and token seen; S G (K + V) cached values per row.
Reference: Vaswani et al. 2017, arXiv 1706.03762, equation 1; Shazeer 2019, arXiv 1911.02150, and Ainslie et al. 2023,
arXiv 2305.13245 (grouped queries); Henry et al. 2020, arXiv 2010.04245 (normalised q and k, here by RMSNorm).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.algebra.softmax import combine
from jaxmem.devices import kind_of_device
from jaxmem.fields import Count, Positive, checked
from jaxmem.layers.mixer import Call, Cursor, SequenceMixer, Tokens, init_cursor, place_state
from jaxmem.layers.norm import RMSNorm
from jaxmem.layers.rotary import rotary
from jaxmem.pallas_kernels.flash_attention import Implementation, flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.sharding import current_rules, einsum, local, matrix, param
from jaxmem.sharding.attention import Scheme, sharded_attention
from jaxmem.sharding.attention_scheme import Shape, chip_of, choose_scheme
from jaxmem.sharding.folds import n_shards, sequence_axis, spread, total
from jaxmem.sharding.layouts import own_tokens
from jaxmem.showing import tree_text
from jaxmem.typing import Array, Bool, DTypeLike, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
@checked
class AttentionConfig:
    """Causal softmax attention."""

    n_heads: Count
    n_kv_heads: Count | None = None
    """Heads of keys and values, each shared by n_heads / n_kv_heads query heads; None is n_heads."""
    head_dim: Count | None = None
    """Width of q, k and v per head; None is d_model / n_heads."""
    window: Count | None = None
    """Tokens a token sees, itself included; None is all before it."""
    rope_theta: Positive | None = 10_000.0
    """Base of the rotary wavelengths; None is no rotary embedding."""
    qk_norm: bool = False
    """RMSNorm of every head of q and k before the rotary embedding."""
    implementation: Implementation | None = None
    """Of `flash_attention`; None picks the best."""
    scheme: Scheme | None = None
    """How keys come from other devices where the sequence is split; None is what `choose_scheme` says."""

    def __post_init__(self):
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"attention: needs n_heads divisible by n_kv_heads, got n_heads={self.n_heads}, "
                f"n_kv_heads={self.n_kv_heads}; change one of them"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def width(self, d_model: int) -> int:
        """Width per head in a model of width d_model."""
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(
                f"attention: needs d_model divisible by n_heads, got d_model={d_model}, n_heads={self.n_heads}; "
                "change one of them or set head_dim"
            )
        width = d_model // self.n_heads if self.head_dim is None else self.head_dim
        if self.rope_theta is not None and width % 2:
            raise ValueError(
                f"attention: needs an even head_dim for rotary embedding, got head_dim={width}; "
                "change it or set rope_theta=None"
            )
        return width

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Attention":
        """The layer for a model of width d_model."""
        return Attention(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token of scores and values, averaged over a document of context_tokens; no projections.

        >>> AttentionConfig(n_heads=2).mixing_flops(8, 3)  # 2 tokens seen on average, 2 heads, 2 x 4 multiply-adds
        64
        >>> AttentionConfig(n_heads=2, window=1).mixing_flops(8, 3)
        32
        """
        window = min(context_tokens, self.window or context_tokens)
        tokens_seen = window * (window + 1) // 2 + (context_tokens - window) * window
        return 4 * self.n_heads * self.width(d_model) * tokens_seen // context_tokens


class AttentionState(NamedTuple):
    """The key-value cache: a ring of S slots per row."""

    k: Float[Array, "B S G K"]
    """Keys, already turned by their position."""
    v: Float[Array, "B S G K"]
    length: Int[Array, "B"]
    """Tokens of the row seen so far: the index of the next."""
    cursor: Cursor

    __repr__ = tree_text


_HEADS = ("batch", "time", "heads", "key")
_KV_HEADS = ("batch", "time", "kv_heads", "key")
_TOKENS = Tokens(*(("batch", "time"),) * 3)
_STATE = AttentionState(
    k=("batch", None, "kv_heads", "key"),
    v=("batch", None, "kv_heads", "key"),
    length=("batch",),
    cursor=Cursor(("batch",), ("batch",)),
)


class Attention(SequenceMixer):
    """The mixer of `AttentionConfig`; see the module docstring.

    `positions` are of the rotary embedding. A document that outgrows the cache raises ValueError outside jit; under jit its
    tokens beyond come out NaN. A call without a state returns a cache of T tokens (of the window, with one).
    """

    state_type = AttentionState

    def __init__(self, config: AttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(config, d_model)
        self.head_dim = config.width(d_model)
        into = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        out_of = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        shape, kv_shape = (d_model, config.n_heads, self.head_dim), (d_model, config.kv_heads, self.head_dim)
        self.query = param(rngs, into, shape, ("embed", "heads", "key"), matrix())
        self.key = param(rngs, into, kv_shape, ("embed", "kv_heads", "key"), matrix())
        self.value = param(rngs, into, kv_shape, ("embed", "kv_heads", "value"), matrix())
        self.out = param(rngs, out_of, (*shape[1:], d_model), ("heads", "value", "embed"), matrix(2))
        self.query_norm = RMSNorm(self.head_dim, axes=("key",), rngs=rngs) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, axes=("key",), rngs=rngs) if config.qk_norm else None

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> AttentionState:
        """The empty cache; with a window, that many slots are enough, and None is that.

        Raises: ValueError if full attention is not told its capacity.
        """
        window = self.config.window
        if capacity is None and window is None:
            raise ValueError(
                "attention: needs a capacity for the cache of full attention, got capacity=None; "
                "pass the tokens of the longest document to init_state"
            )
        n_slots = min(n for n in (capacity, window) if n is not None)
        kv = batch, n_slots, self.config.kv_heads, self.head_dim
        state = AttentionState(
            k=jnp.zeros(kv, dtype),
            v=jnp.zeros(kv, dtype),
            length=jnp.zeros(batch, jnp.int32),
            cursor=init_cursor(batch),
        )
        return place_state(state, _STATE)

    def capacity_for(self, n_tokens: int) -> int | None:
        return None if self.config.window else n_tokens

    def capacity_of(self, state: AttentionState) -> int:
        return state.k.shape[1]

    def mix(self, x: Float[Array, "B T D"], state: AttentionState, call: Call) -> tuple[Array, AttentionState]:
        tokens = call.tokens
        limit = None if call.fresh else _document_limit(state, self.config.window)
        if limit is not None:
            _raise_if_outgrown(tokens, limit)
        q, k, v = self._project(x, tokens.position if call.positions is None else call.positions)
        mix = partial(_mix, config=self.config, fresh=call.fresh, one_document=call.one_document, limit=limit)
        cursors = _STATE.cursor
        o, state = local(mix, (_HEADS, _KV_HEADS, _KV_HEADS, _TOKENS, _STATE, cursors), (_HEADS, _STATE))(
            q, k, v, tokens, state, call.cursor
        )
        return einsum("bthv,hvd->btd", o, self.out[...], ("batch", "time", "embed")), state

    def _project(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
        q = einsum("btd,dhk->bthk", x, self.query[...], _HEADS)
        k = einsum("btd,dgk->btgk", x, self.key[...], _KV_HEADS)
        v = einsum("btd,dgv->btgv", x, self.value[...], _KV_HEADS)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.rope_theta is not None:
            q, k = (rotary(x, positions, theta=self.config.rope_theta) for x in (q, k))
        return q, k, v


def _mix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    tokens: Tokens,
    state: AttentionState,
    cursor: Cursor,
    *,
    config: AttentionConfig,
    fresh: bool,
    one_document: bool,
    limit: int | None,
) -> tuple[Float[Array, "B T H K"], AttentionState]:
    """Attention of new tokens over the cache and themselves, and the cache with them.

    Args: state, cursor: before the call, and behind it; fresh, one_document: see `Call`.
    """
    n_tokens, axis = q.shape[1], sequence_axis(any_layout=True)
    index = state.length[:, None] + own_tokens(current_rules().layout, n_tokens, axis)
    if limit is not None:
        fits = ((tokens.position < limit) | ~tokens.real)[:, :, None, None]
        q, k, v = (jnp.where(fits, x, 0) for x in (q, k, v))  # NaN of the layer below must not reach tokens that fit
    written = _write(state, k, v, index, tokens.real, axis)._replace(cursor=cursor)
    here, mask = Place(index, tokens.document), Mask(window=config.window)

    def of_cache(state: AttentionState, document: Int[Array, "#B 1"] | int):
        """document: the number of the one that the cursor of this state stands in."""
        slots = _slots(state)
        of_it = slots >= (state.length - state.cursor.position)[:, None]
        k, v, place = spread((state.k, state.v, Place(jnp.maximum(slots, 0), jnp.where(of_it, document, 0))), axis)
        return flash_attention(q, k, v, mask, q_place=here, k_place=place, implementation=config.implementation)

    if n_tokens == 1 and not fresh and n_shards(axis) == 1:
        o = of_cache(written, tokens.document).o
    elif one_document and n_shards(axis) == 1:  # known, so that cuDNN may serve
        o = flash_attention(q, k, v, mask, implementation=config.implementation).o
    else:
        mixed = sharded_attention(
            q, k, v, mask, q_place=here, k_place=here, axis=axis, scheme=_scheme(config, q, k, axis),
            implementation=config.implementation,
        )  # fmt: skip
        o = (mixed if fresh else combine(of_cache(state, 1), mixed)).o
    if limit is not None:
        o = jnp.where(fits, o, jnp.nan)
    return o.astype(q.dtype), written


def _scheme(
    config: AttentionConfig, q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], axis: str | None
) -> Scheme:
    n = n_shards(axis)
    if n == 1 or config.scheme is not None:
        return config.scheme or Scheme()
    batch, n_tokens, heads, width = q.shape
    shape = Shape(batch, n * n_tokens, heads, k.shape[2], width, width, q.dtype.itemsize)
    chip = chip_of(kind_of_device())
    return choose_scheme(shape, n, Mask(window=config.window), layouts=(current_rules().layout,), chip=chip).scheme


def _write(
    state: AttentionState,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    index: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    axis: str | None,
) -> AttentionState:
    """The cache with the last S real tokens of each row in their slots; the others, and padding, go nowhere."""
    n_slots = state.k.shape[1]
    length = state.length + total(jnp.sum(real, axis=1, dtype=jnp.int32), axis)
    kept = real & (index >= length[:, None] - n_slots)
    slot = jnp.where(kept, index % n_slots, n_slots)

    @jax.vmap
    def put(cache: Shaped[Array, "S *rest"], new: Shaped[Array, "T *rest"], slot: Int[Array, "T"]):
        return cache.at[slot].set(new.astype(cache.dtype), mode="drop")

    if axis is None:
        place = put
    else:  # every slot is written by one device at most
        written = lambda cache, x: total(put(spread(jnp.zeros_like(cache), axis), x, slot), axis)
        new = _slots(state._replace(length=length)) >= state.length[:, None]

        def place(cache: Shaped[Array, "B S *rest"], x: Shaped[Array, "B T *rest"], slot: Int[Array, "B T"]):
            return jnp.where(new.reshape(*new.shape, *(1,) * (cache.ndim - 2)), written(cache, x), cache)

    return state._replace(
        k=place(state.k, k, slot),
        v=place(state.v, v, slot),
        length=length,
    )


def _slots(state: AttentionState) -> Int[Array, "B S"]:
    """The index of the token in each slot: the last below the row's length that goes there; negative in an empty one."""
    n_slots, last = state.k.shape[1], state.length[:, None] - 1
    return last - (last - jnp.arange(n_slots, dtype=jnp.int32)) % n_slots


def _document_limit(state: AttentionState, window: int | None) -> int | None:
    """Tokens of one document that the cache serves exactly; None if any number, because it holds the whole window."""
    n_slots = state.k.shape[1]
    return None if window is not None and window <= n_slots else n_slots


def _raise_if_outgrown(tokens: Tokens, limit: int) -> None:
    """Raises where values are known; under jit the caller's NaN speaks instead."""
    length = jnp.max(jnp.where(tokens.real, tokens.position + 1, 0))
    if not isinstance(length, jax.core.Tracer) and length > limit:
        raise ValueError(
            f"attention: needs a cache of at least {int(length)} tokens for a document of that length, "
            f"got capacity={limit}; pass a larger capacity to init_state"
        )

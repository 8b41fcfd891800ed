"""Mixture of memories: several gated-delta-rule memories, of which a router picks a few for every token.

    p_t = softmax(R x_t),  top-k of p_t renormalised to weights w_t;   o_t = sum_m w_tm S_m(t)^T q_t + S_shared(t)^T q_t

Each memory sees only the tokens routed to it, in order and as if they stood side by side: between them it does not decay,
and its short convolution reaches back over its own tokens. Weights scale what is read, never what is written. The shared
memory sees every token; here it is simply one more memory that every token goes to with weight 1.

Unlike the published code, which lets the convolution slide over memory and sequence boundaries in training (so that the
future leaks into the past and training differs from evaluation), a memory's convolution reads its own history only: the
layer is strictly causal, and training, evaluation and decoding agree.

Cost per token: the projections of all memories are computed densely, (M + 1) / (k + 1) times what is used; then the gated
delta rule for k + 1 tokens. State: (M + 1) H K V floats, and (M + 1)(W - 1) H (2 K + V) values of history.
Reference: Du et al. 2025, arXiv 2502.13685, equations 4-9, with Gated DeltaNet inside as in the published models.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.layers.gated_delta_net import DecayGate, GatedOutput, split_qkv
from jaxmem.layers.mixer import Cursor, advance, init_cursor, place_state
from jaxmem.layers.packing import pack, pack_by_memory, unpack
from jaxmem.layers.short_convolution import convolve, init_taps, last_items, require_history
from jaxmem.recurrences.call import require_chunk
from jaxmem.recurrences.delta import gated_delta_streams
from jaxmem.recurrences.engine import Documents, Streams, chunks, forget, recurrence_flops, step
from jaxmem.sharding import einsum, local, param
from jaxmem.typing import Array, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True)
class MixtureOfMemoriesConfig:
    """The mixture of memories of the paper; the defaults are its published models'."""

    n_heads: int = 4
    key_dim: int = 256
    """Per head."""
    value_dim: int = 256
    """Per head."""
    n_memories: int = 4
    """Memories to choose from, the shared one not counted."""
    top_k: int = 2
    """Memories chosen per token."""
    shared_memory: bool = True
    """One more memory that sees every token."""
    single_kv: bool = False
    """One key, value, decay and write-strength projection for all memories, instead of one each."""
    convolution_width: int = 4
    chunk_tokens: int = 64
    norm_eps: float = 1e-6

    def __post_init__(self):
        if not 1 <= self.top_k <= self.n_memories:
            raise ValueError(
                "MixtureOfMemoriesConfig: needs 1 <= top_k <= n_memories, "
                f"got top_k={self.top_k} of n_memories={self.n_memories}; choose fewer or have more memories"
            )
        require_chunk("MixtureOfMemoriesConfig", self.chunk_tokens)
        require_history("MixtureOfMemoriesConfig", self.convolution_width)

    @property
    def n_slots(self) -> int:
        """M: memories in the state, the shared one last."""
        return self.n_memories + self.shared_memory

    @property
    def n_choices(self) -> int:
        """Memories every token goes to, the shared one included."""
        return self.top_k + self.shared_memory

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "MixtureOfMemories":
        return MixtureOfMemories(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token of the recurrences of all chosen memories, and of their convolutions but one.

        One convolution costs 2 x its parameters, as the projections of all memories do. What packing fills the last
        chunk of each memory with is not counted: up to M (C + W - 2) places beside T (k + 1) tokens.
        """
        rule = recurrence_flops(self.key_dim, self.value_dim, min(self.chunk_tokens, context_tokens))
        convolution = 2 * self.convolution_width * (2 * self.key_dim + self.value_dim)
        return self.n_heads * (self.n_choices * rule + (self.n_choices - 1) * convolution)


class MixtureState(NamedTuple):
    """What the layer remembers; M counts the shared memory, M' does not."""

    memories: Float[Array, "B M H K V"]
    """fp32."""
    history: Float[Array, "B M W-1 H 2K+V"]
    """The last inputs of each memory's convolution: q, k and v side by side."""
    segment: Int[Array, "B M"]
    """The document each memory last saw; it forgets when it meets another."""
    router: "RouterUse"
    cursor: Cursor


class RouterUse(NamedTuple):
    """How the router has been used so far, summed over tokens: enough for the load-balancing loss and its gradient."""

    chosen: Float[Array, "*B M'"]
    """Number of times each memory was chosen."""
    probability: Float[Array, "*B M'"]
    """Sum of its router probabilities."""


_STATE_AXES = MixtureState(
    memories=("batch", "memory", "heads", "key", "value"),
    history=("batch", "memory", "tap", "heads", "value"),
    segment=("batch", "memory"),
    router=RouterUse(("batch", "memory"), ("batch", "memory")),
    cursor=Cursor(("batch",), ("batch",)),
)


def route(
    logits: Float[Array, "B T M"], real: Array, top_k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], RouterUse]:
    """The chosen memories, their weights (softmax in fp32, top-k, renormalised to sum 1), and the router's use per row."""
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weight, memory = jax.lax.top_k(probability, top_k)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    counted = real[..., None].astype(jnp.float32)
    chosen = jnp.sum(memory[..., None] == jnp.arange(logits.shape[-1]), axis=-2)
    use = RouterUse(jnp.sum(chosen * counted, axis=1), jnp.sum(probability * counted, axis=1))
    return memory, weight, use


def load_balancing_loss(use: RouterUse, top_k: int) -> Float[Array, ""]:
    """M sum_m f_m P_m: f_m the share of tokens that chose m, P_m its mean probability, over all leading dimensions.

    Even use gives top_k, the minimum for a router whose choices follow its probabilities. 0 without tokens.
    Reference: Fedus et al. 2021, arXiv 2101.03961, equation 4, for top-k as in Mixtral's code; over all layers at once.

    >>> float(load_balancing_loss(RouterUse(jnp.array([2.0, 2.0]), jnp.array([2.0, 2.0])), top_k=1))
    1.0
    """
    chosen, probability = (x.sum(axis=range(x.ndim - 1)) for x in use)
    tokens = jnp.maximum(chosen.sum() / top_k, 1.0)
    return chosen.size * jnp.sum(chosen * probability) / tokens**2


_TOKENS, _CHANNELS = ("batch", "time"), ("batch", "time", "heads", "value")
_PER_MEMORY, _PER_CHOICE = ("batch", "time", "memory", "heads", "value"), ("batch", "time", None, "heads", "value")
_WEIGHT = ("tap", "heads", "value")


class MixtureOfMemories(nnx.Module):
    """The layer of the module docstring, with RMSNorm and a SiLU output gate as in Gated DeltaNet. See `mixer`."""

    def __init__(self, config: MixtureOfMemoriesConfig, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        heads, key, value = config.n_heads, config.key_dim, config.value_dim
        n_kv = 1 if config.single_kv else config.n_slots
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        self.router = param(rngs, init, (d_model, config.n_memories), ("embed", "memory"))
        self.query = param(rngs, init, (d_model, heads, key), ("embed", "heads", "key"))
        self.key = param(rngs, init, (n_kv, d_model, heads, key), ("memory", "embed", "heads", "key"))
        self.value = param(rngs, init, (n_kv, d_model, heads, value), ("memory", "embed", "heads", "value"))
        self.decay = param(rngs, init, (n_kv, d_model, heads), ("memory", "embed", "heads"))
        self.write = param(rngs, init, (n_kv, d_model, heads), ("memory", "embed", "heads"))
        self.gates = DecayGate(heads, rngs=rngs)
        self.convolution = param(
            rngs, init_taps, (config.convolution_width, heads, 2 * key + value), ("tap", "heads", "value")
        )
        self.output = GatedOutput(d_model, heads, value, eps=config.norm_eps, rngs=rngs)

    def init_state(self, batch: int, *, capacity: int | None = None, dtype: DTypeLike = jnp.float32) -> MixtureState:
        c = self.config
        width = 2 * c.key_dim + c.value_dim
        state = MixtureState(
            memories=jnp.zeros((batch, c.n_slots, c.n_heads, c.key_dim, c.value_dim), jnp.float32),
            history=jnp.zeros((batch, c.n_slots, c.convolution_width - 1, c.n_heads, width), dtype),
            segment=jnp.ones((batch, c.n_slots), jnp.int32),
            router=RouterUse(*jnp.zeros((2, batch, c.n_memories), jnp.float32)),
            cursor=init_cursor(batch),
        )
        return place_state(state, _STATE_AXES)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MixtureState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MixtureState]:
        c = self.config
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        tokens, cursor = advance(state.cursor, segment_ids, x.shape[1])
        logits = einsum("btd,dm->btm", x.astype(jnp.float32), self.router[...], ("batch", "time", "memory"))
        choose = local(
            lambda logits, real: route(logits, real, c.top_k),
            in_axes=((*_TOKENS, "memory"), _TOKENS),
            out_axes=((*_TOKENS, None), (*_TOKENS, None), _STATE_AXES.router),
        )
        memory, weight, use = choose(logits, tokens.real)

        q = einsum("btd,dhk->bthk", x, self.query[...], _CHANNELS)
        k, v = (einsum("btd,mdhk->btmhk", x, w[...], _PER_MEMORY) for w in (self.key, self.value))
        a, b = (einsum("btd,mdh->btmh", x, w[...], _PER_MEMORY[:4]) for w in (self.decay, self.write))
        gates = jnp.stack([self.gates(a), jax.nn.sigmoid(b.astype(jnp.float32))], axis=-1)

        mix = local(
            self._mix,
            in_axes=(_CHANNELS, _PER_MEMORY, _PER_MEMORY, _PER_MEMORY, (*_TOKENS, None), _TOKENS, _WEIGHT, _STATE_AXES),
            out_axes=(_PER_CHOICE, *_STATE_AXES[:3]),
        )
        o, *remembered = mix(q, k, v, gates, memory, tokens.segment, self.convolution[...], state)
        o = self._read(o, weight)
        y = self.output(o, x) * tokens.real[..., None]
        router = jax.tree.map(jnp.add, state.router, use)
        return y.astype(x.dtype), MixtureState(*remembered, router, cursor)

    def _read(self, o: Float[Array, "B T c H V"], weight: Float[Array, "B T k"]) -> Float[Array, "B T H V"]:
        k = self.config.top_k
        read = jnp.sum(o[:, :, :k] * weight[..., None, None].astype(o.dtype), axis=2)
        return read + o[:, :, k] if self.config.shared_memory else read

    def _mix(self, q, k, v, gates, memory, segment, weight, state):
        """The recurrences, on one device's rows and heads: o of every choice, new memories, history and segment."""
        c = self.config
        k, v, gates = (self._of_choices(x, memory) for x in (k, v, gates))
        q = jnp.broadcast_to(q[:, :, None], k.shape)
        qkv = jnp.concatenate([q, k, v], axis=-1)
        if c.shared_memory:
            memory = jnp.concatenate([memory, jnp.full_like(memory[..., :1], c.n_memories)], axis=-1)
        memory = jnp.where(segment[..., None] != 0, memory, c.n_slots)
        mix = self._mix_token if segment.shape[1] == 1 else self._mix_sequence
        return mix(qkv, gates, memory, segment, weight, state)

    def _of_choices(self, x: Float[Array, "B T M *x"], memory: Int[Array, "B T k"]) -> Float[Array, "B T c *x"]:
        """What each token's chosen memories, and the shared one, make of it."""
        c = self.config
        if c.single_kv:
            return jnp.broadcast_to(x, (*x.shape[:2], c.n_choices, *x.shape[3:]))
        picked = (memory[..., None] == jnp.arange(c.n_memories)).astype(x.dtype)
        chosen = jnp.einsum("btcm,btm...->btc...", picked, x[:, :, : c.n_memories])
        return jnp.concatenate([chosen, x[:, :, c.n_memories :]], axis=2)

    def _mix_sequence(self, qkv, gates, memory, segment, weight, state):
        c = self.config
        batch, n_tokens, n_choices = memory.shape
        n_history = c.convolution_width - 1
        packing = pack_by_memory(memory.reshape(batch, -1), c.n_slots, n_history, c.chunk_tokens)

        def packed(items: Array, history: Array) -> Array:
            items = items.reshape(batch, n_tokens * n_choices, *items.shape[3:])
            history = history.reshape(batch, c.n_slots * n_history, *history.shape[3:])
            return pack(packing, jnp.concatenate([history.astype(items.dtype), items], axis=1))

        segments = packed(
            jnp.broadcast_to(segment[..., None], memory.shape),
            jnp.broadcast_to(state.segment[..., None], (*state.segment.shape, n_history)),
        )
        inputs = packed(qkv, state.history)
        gates = packed(gates, jnp.zeros((*state.history.shape[:4], 2)))

        item = packing.holds_item
        lead = [(0, 0), (n_history, 0)]
        convolved = convolve(jnp.pad(inputs, lead + [(0, 0)] * 2), jnp.pad(segments, lead), weight)
        documents = Documents(item & (segments != jnp.roll(segments, 1, axis=1)), item)
        o, memories = chunks(self._streams, (convolved, gates), state.memories, packing.chunk_memory, 1, documents)

        o = unpack(packing, o.astype(qkv.dtype)).reshape(batch, n_tokens, n_choices, *o.shape[2:])
        history, segment = jax.vmap(
            lambda end: last_items(inputs, segments, end, c.convolution_width), in_axes=1, out_axes=1
        )(packing.end)
        return o, memories, history.astype(state.history.dtype), segment

    def _mix_token(self, qkv, gates, memory, segment, weight, state):
        """Decoding: one token per row touches only the memories it goes to."""
        c = self.config
        row, slot = jnp.arange(memory.shape[0])[:, None], memory[:, 0]
        of_choice = lambda x: x.at[row, slot].get(mode="clip")
        before = of_choice(state.segment)
        starts = before != segment
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        segments = jnp.stack([before] * (c.convolution_width - 1) + [jnp.broadcast_to(segment, before.shape)], axis=-1)
        inputs = jnp.concatenate([of_choice(state.history).astype(qkv.dtype), qkv[:, 0, :, None]], axis=2)
        convolved = convolve(flat(inputs), flat(segments), weight).reshape(qkv[:, 0].shape)
        x = forget(self._streams((convolved, gates[:, 0])), Documents(starts, jnp.ones_like(starts)))
        o, new = step(x, of_choice(state.memories))

        keep = jnp.where(starts, 0, 1).astype(inputs.dtype)[..., None, None, None]
        history = jnp.concatenate([keep * inputs[:, :, 1:-1], inputs[:, :, -1:]], axis=2)
        put = lambda x, new: x.at[row, slot].set(new.astype(x.dtype), mode="drop")
        segment = jnp.broadcast_to(segment, before.shape)
        updated = put(state.memories, new), put(state.history, history), put(state.segment, segment)
        return o[:, None].astype(qkv.dtype), *updated

    def _streams(self, inputs: tuple[Array, Array]) -> Streams:
        qkv, gates = (x.astype(jnp.float32) for x in inputs)
        key_dim = self.config.key_dim
        return gated_delta_streams(*split_qkv(qkv, key_dim), gates[..., 0], gates[..., 1], scale=key_dim**-0.5)

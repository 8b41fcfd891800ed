"""Mixture of memories: several memories of one linear recurrence, of which a router picks a few for every token.

    p_t = softmax(R x_t),  top-k of p_t renormalised to weights w_t;   o_t = sum_m w_tm S_m(t)^T q_t + S_shared(t)^T q_t

Each memory sees only the tokens routed to it, in order and as if they stood side by side: between them it does not decay,
its short convolution reaches back over its own tokens, and what depends on the position (RetNet's rotary embedding) or on the
first token (Griffin's scale) goes by its own count of them; `positions` stand for that count where a caller gives them.
Weights scale what is read, never what is written. The shared memory sees every token; here it is simply one more memory
that every token goes to with weight 1. Queries, small parameters such as rates, convolution filters and the output are
shared by all memories; other projections are one per memory.

The recurrence inside can be any `RecurrentConfig`; that of the published models is Gated DeltaNet. A projection that reads
the token before (RWKV-7's) reads the one before in the sequence, not in the memory.

Unlike the published code, which lets the convolution slide over memory and sequence boundaries in training (so that the
future leaks into the past and training differs from evaluation), a memory's convolution reads its own history only: the
layer is strictly causal, and training, evaluation and decoding agree.

Cost per token: the projections of all memories are computed densely, (M + 1) / (k + 1) times what is used; then the
recurrence for k + 1 tokens. State: M + 1 times that of one memory.
Reference: Du et al. 2025, arXiv 2502.13685, equations 4-9, with Gated DeltaNet inside as in the published models.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.algebra import suffix
from jaxmem.algebra.suffix import Suffix
from jaxmem.fields import Count, checked
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixer import Call, Cursor, SequenceMixer, Tokens, init_cursor, place_state
from jaxmem.layers.packing import Packing, pack, pack_by_memory, unpack
from jaxmem.layers.recurrent import (
    Arrays,
    Projections,
    RecurrentConfig,
    in_full,
    make_parameters,
    make_taps,
    memory_dtype,
    prepared,
    shift,
    with_constants,
)
from jaxmem.layers.short_convolution import convolve, last_items, short_convolution
from jaxmem.recurrences.engine import chunks, steps
from jaxmem.recurrences.streams import Documents
from jaxmem.sharding import einsum, local, matrix, param
from jaxmem.sharding.folds import from_last, n_shards, prefix_fold, sequence_axis, spread, spread_like, total
from jaxmem.showing import tree_text
from jaxmem.typing import Array, Bool, DTypeLike, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
@checked
class MixtureOfMemoriesConfig:
    """The mixture of memories of the paper; the defaults are its published models'."""

    inner: RecurrentConfig = GatedDeltaNetConfig()
    """The recurrence of every memory."""
    n_memories: Count = 4
    """Memories to choose from, the shared one not counted."""
    top_k: Count = 2
    """Memories chosen per token."""
    shared_memory: bool = True
    """One more memory that sees every token."""
    single_kv: bool = False
    """One key, value, decay and write-strength projection for all memories, instead of one each."""

    def __post_init__(self):
        if self.top_k > self.n_memories:
            raise ValueError(
                "MixtureOfMemoriesConfig: needs top_k <= n_memories, "
                f"got top_k={self.top_k} of n_memories={self.n_memories}; choose fewer or have more memories"
            )

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
        inner = self.inner
        channels = sum(math.prod(spec.shape) for spec in inner.projections(d_model).values() if spec.convolved)
        convolution = 2 * inner.convolution_width * channels
        return self.n_choices * inner.mixing_flops(d_model, context_tokens) + (self.n_choices - 1) * convolution


STALE = -1


class MixtureState(NamedTuple):
    """What the layer remembers; M counts the shared memory, M' does not."""

    memories: Shaped[Array, "B M H K V"]
    """fp32, or float64 if x is."""
    history: Arrays
    """The last inputs [B M W-1 ...] of each memory's convolutions, by the name of the projection."""
    seen: Int[Array, "B M"]
    """Tokens of the cursor's document that each memory has seen; STALE where it still holds an earlier document, which it
    forgets when it meets a token."""
    router: "RouterUse"
    last: Arrays
    """The last x [B 1 D], if a projection reads it."""
    cursor: Cursor

    __repr__ = tree_text


class RouterUse(NamedTuple):
    """How a router has been used so far, summed over tokens: enough for its load-balancing loss and the gradient of that."""

    chosen: Float[Array, "*B M'"]
    """Number of times each memory was chosen."""
    probability: Float[Array, "*B M'"]
    """Sum of its router probabilities."""


def route(
    logits: Float[Array, "B T M"], real: Array, top_k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], RouterUse]:
    """The chosen memories, their weights (softmax in fp32, top-k, renormalised to sum 1), and the router's use per row."""
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weight, memory = jax.lax.top_k(probability, top_k)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    counted = real[..., None].astype(jnp.float32)
    chosen = jnp.sum(memory[..., None] == jnp.arange(logits.shape[-1]), axis=-2)
    use = total(RouterUse(jnp.sum(chosen * counted, axis=1), jnp.sum(probability * counted, axis=1)), sequence_axis())
    return memory, weight, use


def load_balancing_loss(use: RouterUse, top_k: int) -> Float[Array, "*L"]:
    """M sum_m f_m P_m of each router: f_m the share of its tokens that chose m, P_m its mean probability.

    Even use gives top_k, the minimum for a router whose choices follow its probabilities; one that is sure of a single memory
    gives M. 0 without tokens. Layers are not pooled: routers that send everything each to another memory would look even.

    Args:
      use: of one router [M] or [B M] or of several [*L B M]; rows are added up.

    Reference: Fedus et al. 2021, arXiv 2101.03961, equation 4, for top-k as in Mixtral's code, there over all layers at once.

    >>> even, collapsed = jnp.array([[2.0, 2.0]]), jnp.array([[4.0, 0.0]])  # of the four tokens of one row
    >>> load_balancing_loss(RouterUse(*2 * [jnp.stack([even, collapsed])]), top_k=1).tolist()
    [1.0, 2.0]
    """
    chosen, probability = (jnp.atleast_2d(x).sum(axis=-2) for x in use)
    tokens = jnp.maximum(chosen.sum(axis=-1) / top_k, 1.0)
    return chosen.shape[-1] * jnp.sum(chosen * probability, axis=-1) / tokens**2


_TOKENS = ("batch", "time")
_CHOICES = (*_TOKENS, None)
_ROUTER_AXES = RouterUse(("batch", "memory"), ("batch", "memory"))


class MixtureOfMemories(SequenceMixer):
    """The layer of the module docstring. See `mixer` for how it is called."""

    state_type = MixtureState

    def __init__(self, config: MixtureOfMemoriesConfig, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(config, d_model)
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        self.router = param(rngs, init, (d_model, config.n_memories), ("embed", "memory"), matrix())
        n_kv = 1 if config.single_kv else config.n_slots
        self.projections = Projections(config.inner, d_model, n_memories=n_kv, rngs=rngs)
        self.taps = make_taps(config.inner, d_model, rngs=rngs)
        self.parameters = make_parameters(config.inner, d_model, rngs=rngs)
        self.output = config.inner.output(d_model, rngs=rngs)

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> MixtureState:
        c, inner, specs = self.config, self.config.inner, self.projections.specs
        lead = (batch, c.n_slots)
        width = inner.convolution_width - 1
        state = MixtureState(
            memories=jnp.zeros((*lead, *inner.state_shape), memory_dtype(inner.is_complex, dtype)),
            history={name: jnp.zeros((*lead, width, *specs[name].shape), dtype) for name in self.taps},
            seen=jnp.zeros(lead, jnp.int32),
            router=RouterUse(*jnp.zeros((2, batch, c.n_memories), jnp.float32)),
            last={"x": jnp.zeros((batch, 1, self.d_model), dtype)} if self.projections.is_shifted else {},
            cursor=init_cursor(batch),
        )
        return place_state(state, self._state_axes)

    @property
    def _state_axes(self) -> MixtureState:
        return MixtureState(
            memories=("batch", "memory", "heads", "key", "value"),
            history={name: ("batch", "memory", "tap", *self.projections.specs[name].axes) for name in self.taps},
            seen=("batch", "memory"),
            router=_ROUTER_AXES,
            last={"x": ("batch", "tap", "embed")} if self.projections.is_shifted else {},
            cursor=Cursor(("batch",), ("batch",)),
        )

    def mix(self, x: Float[Array, "B T D"], state: MixtureState, call: Call) -> tuple[Array, MixtureState]:
        c, tokens = self.config, call.tokens
        state = state._replace(memories=state.memories.astype(jnp.promote_types(x.dtype, state.memories.dtype)))
        logits = einsum("btd,dm->btm", x.astype(jnp.float32), self.router[...], ("batch", "time", "memory"))
        choose = local(
            lambda logits, real: route(logits, real, c.top_k),
            in_axes=((*_TOKENS, "memory"), _TOKENS),
            out_axes=(_CHOICES, _CHOICES, _ROUTER_AXES),
        )
        memory, weight, use = choose(logits, tokens.real)

        before, last = None, state.last
        if self.projections.is_shifted:
            before, last = shift(x, state.last, tokens.document)
        projected = self.projections(x, before)
        axes, (p, p_axes) = self._state_axes, with_constants(c.inner, self.d_model, self.parameters)
        remembered_axes = axes.memories, axes.history, axes.seen
        run = local(
            self._mix,
            in_axes=(
                {name: self.projections.axes(name) for name in projected},
                (_CHOICES, Tokens(_TOKENS, _TOKENS, _TOKENS), None if call.positions is None else _TOKENS),
                {name: ("tap", *self.projections.specs[name].axes) for name in self.taps},
                p_axes,
                remembered_axes,
            ),
            out_axes=((*_CHOICES, "heads", "value"), *remembered_axes),
        )
        o, *remembered = run(
            projected,
            (memory, tokens, call.positions),
            {name: weight[...] for name, weight in self.taps.items()},
            p,
            (state.memories, state.history, state.seen),
        )
        router = jax.tree.map(jnp.add, state.router, use)
        return self.output(self._read(o, weight), x), MixtureState(*remembered, router, last, state.cursor)

    def _read(self, o: Float[Array, "B T c H V"], weight: Float[Array, "B T k"]) -> Float[Array, "B T H V"]:
        k = self.config.top_k
        read = jnp.sum(o[:, :, :k] * weight[..., None, None].astype(o.dtype), axis=2)
        return read + o[:, :, k] if self.config.shared_memory else read

    def _mix(self, x: Arrays, places, taps: Arrays, p: Arrays, remembered):
        """The recurrences, on one device's rows and heads: o of every choice, new memories, histories and counts."""
        c, (memory, tokens, positions) = self.config, places
        taps, p = spread_like((taps, p), x)  # so that their gradients are exchanged once, in the end
        dtype = jax.tree.leaves(x)[0].dtype
        x = {name: self._of_choices(name, a, memory) for name, a in x.items()}
        if positions is not None:
            x["position"] = jnp.broadcast_to(positions[..., None], (*positions.shape, c.n_choices))
        if c.shared_memory:
            memory = jnp.concatenate([memory, jnp.full_like(memory[..., :1], c.n_memories)], axis=-1)
        memory = jnp.where(tokens.real[..., None], memory, c.n_slots)
        is_token = memory.shape[1] == 1 and n_shards(sequence_axis()) == 1
        o, *remembered = (self._mix_token if is_token else self._mix_sequence)(x, memory, tokens, taps, p, *remembered)
        return o.astype(dtype), *remembered

    def _of_choices(self, name: str, x: Array, memory: Int[Array, "B T k"]) -> Shaped[Array, "B T c *x"]:
        """What each token's chosen memories, and the shared one, make of it."""
        c = self.config
        if not self.projections.is_per_memory(name):
            x = x[:, :, None]
        elif not c.single_kv:
            picked = (memory[..., None] == jnp.arange(c.n_memories)).astype(x.dtype)
            chosen = jnp.einsum("btcm,btm...->btc...", picked, x[:, :, : c.n_memories])
            return jnp.concatenate([chosen, x[:, :, c.n_memories :]], axis=2)
        return jnp.broadcast_to(x, (*x.shape[:2], c.n_choices, *x.shape[3:]))

    def _mix_sequence(self, x, memory, tokens, taps, p, memories, history, seen):
        c, inner = self.config, self.config.inner
        batch, n_tokens, n_choices = memory.shape
        n_history = max(inner.convolution_width - 1, 0)
        packing = pack_by_memory(memory.reshape(batch, -1), c.n_slots, n_history, inner.chunk_tokens)

        def packed(items: Array, past: Array | None = None) -> Array:
            items = items.reshape(batch, n_tokens * n_choices, *items.shape[3:])
            if past is None:
                past = jnp.zeros((batch, c.n_slots, n_history, *items.shape[2:]), items.dtype)
            past = past.reshape(batch, c.n_slots * n_history, *items.shape[2:])
            return pack(packing, jnp.concatenate([past.astype(items.dtype), items], axis=1))

        axis, before, was_stale = sequence_axis(), history, (seen == STALE)[..., None]
        position, starts, before_call, seen = count_own(memory, tokens, seen, axis)
        x = {"position": position, "first": position == 0} | x
        if n_shards(axis) > 1 and history:
            before = remembered_before(history, {name: packed(x[name]) for name in history}, packing, axis)
        recent = jnp.arange(n_history, 0, -1) <= before_call.tokens[..., None]  # [B M n]
        # before those that a state has seen it has zeros
        recent |= (before_call.document[..., None] == 1) & ~was_stale
        of_items = jnp.broadcast_to(tokens.document[..., None], memory.shape)
        documents = packed(of_items, jnp.where(recent, before_call.document[..., None], 0))
        inputs = {name: packed(a, before.get(name)) for name, a in x.items()}
        lead = lambda a: jnp.pad(a, [(0, 0), (n_history, 0)] + [(0, 0)] * (a.ndim - 2))
        convolved = {name: convolve(lead(inputs[name]), lead(documents), weight) for name, weight in taps.items()}

        x = prepared(inner, inputs | convolved, p)
        make = lambda x: inner.streams(in_full(x), p)
        of_chunks = packing.chunk_memory, inner.n_steps, Documents(packed(starts), packing.holds_item)
        o, memories = chunks(make, x, memories, *of_chunks)
        o = unpack(packing, inner.finish(o, in_full(x), p))
        last = lambda a: jax.vmap(lambda end: last_items(a, documents, end, n_history + 1), in_axes=1, out_axes=1)
        history = {name: last(inputs[name])(packing.end)[0].astype(a.dtype) for name, a in history.items()}
        history, seen = from_last((history, seen), axis)
        return o.reshape(batch, n_tokens, n_choices, *o.shape[2:]), memories, history, seen

    def _mix_token(self, x, memory, tokens, taps, p, memories, history, seen):
        """Decoding: one token per row touches only the memories it goes to, each a row of its own here."""
        inner, shape = self.config.inner, (memory.shape[0], memory.shape[2])
        row, slot = jnp.arange(shape[0])[:, None], memory[:, 0]
        flat = lambda a: a.reshape(-1, *a.shape[2:])
        take = lambda a: flat(a.at[row, slot].get(mode="clip"))
        put = lambda a, new: a.at[row, slot].set(new.reshape(*shape, *new.shape[1:]).astype(a.dtype), mode="drop")

        seen = jnp.where(tokens.starts, STALE, seen)
        real, before = flat(jnp.broadcast_to(tokens.real[..., None], (shape[0], shape[1], 1))), take(seen)
        counted = {"position": jnp.maximum(before, 0)[:, None], "first": (before <= 0)[:, None]}
        x, new_history = counted | {name: flat(a[:, 0])[:, None] for name, a in x.items()}, {}
        for name, weight in taps.items():
            past = take(history[name])
            past = jnp.where((before == STALE).reshape(-1, *[1] * (past.ndim - 1)), 0, past)
            x[name], new = short_convolution(x[name], weight, past, real.astype(jnp.int32))
            new_history[name] = put(history[name], new)
        x = prepared(inner, x, p)
        make = lambda x: inner.streams(in_full(x), p)
        o, new = steps(make, x, take(memories), inner.n_steps, Documents((before == STALE)[:, None], real))
        o = inner.finish(o, in_full(x), p).reshape(shape[0], 1, shape[1], *o.shape[2:])
        remembered = put(memories, new), new_history, put(seen, jnp.maximum(before, 0) + 1)
        return o, *from_last(remembered, sequence_axis())


class Seen(NamedTuple):
    """What memories have seen of some tokens."""

    document: Int[Array, "B M"]
    """The last one of which a memory has tokens; 0: none in this call."""
    tokens: Int[Array, "B M"]
    """So many of it."""


def count_own(
    memory: Int[Array, "B T c"], tokens: Tokens, seen: Int[Array, "B M"], axis: str | None
) -> tuple[Int[Array, "B T c"], Bool[Array, "B T c"], Seen, Int[Array, "B M"]]:
    """Each memory's own count of the tokens that go to it, M and more being no memory; inside `local`.

    Returns: a token's position among those of its document that its memory sees; whether the memory forgets before it; what
    memories have seen before this device's tokens; and `MixtureState.seen` behind all, on the device of the last.
    """
    document, n_memories = tokens.document, seen.shape[1]
    goes = jnp.any(memory[..., None] == jnp.arange(n_memories), axis=2)  # [B T M]
    so_far = jnp.cumsum(goes, axis=1, dtype=jnp.int32)
    before = so_far - goes
    base = jax.lax.cummax(jnp.where(tokens.starts[..., None], before, -1), axis=1)  # -1: no start on this device yet

    last = jnp.max(jnp.where(goes, document[..., None], 0), axis=1)
    own = Seen(last, jnp.sum(goes & (document[..., None] == last[:, None]), axis=1, dtype=jnp.int32))
    nothing = Seen(jnp.zeros_like(last), jnp.zeros_like(last))
    seen = spread(seen, axis)
    given = Seen(jnp.where(seen == STALE, 0, 1), jnp.maximum(seen, 0))
    earlier = _and_then(given, prefix_fold(_and_then, nothing, own, axis))
    all_seen = _and_then(earlier, own)

    same = earlier.document[:, None] == document[..., None]
    position = jnp.where(base < 0, before + jnp.where(same, earlier.tokens[:, None], 0), before - base)
    at = jnp.minimum(memory, n_memories - 1)
    position = jnp.take_along_axis(position, at, axis=2)
    was_stale = jnp.take_along_axis(jnp.broadcast_to(seen[:, None] == STALE, before.shape), at, axis=2)
    starts = (position == 0) & ((document[..., None] > 1) | was_stale) & (memory < n_memories)

    latest = jnp.max(document, axis=1)
    latest = jnp.maximum(jnp.maximum(latest, prefix_fold(jnp.maximum, jnp.zeros_like(latest), latest, axis)), 1)
    return position, starts, earlier, jnp.where(all_seen.document == latest[:, None], all_seen.tokens, STALE)


def _and_then(a: Seen, b: Seen) -> Seen:
    same = a.document == b.document
    return Seen(
        jnp.where(b.document == 0, a.document, b.document),
        jnp.where(b.document == 0, a.tokens, b.tokens + jnp.where(same, a.tokens, 0)),
    )


def remembered_before(before: Arrays, packed: Arrays, packing: Packing, axis: str | None) -> Arrays:
    """The last things [B M n ...] each memory saw before this device's tokens: those `before` the sequence, then those of
    the devices in front of it, whose things [B P ...] are packed with nothing as their history."""
    places = packing.history.reshape(*packing.end.shape, -1)  # [B M n]
    n_history = places.shape[-1]
    n_items = packing.end - places[..., 0] - n_history

    def of_array(before: Array, packed: Array) -> Array:
        flat = lambda a: a.reshape(*a.shape[:3], -1).astype(jnp.promote_types(a.dtype, jnp.float32))
        window = packing.end[..., None] - n_history + jnp.arange(n_history)  # [B M n]
        mine = jax.vmap(lambda row, at: row[at])(packed, window)
        own = Suffix(flat(mine), jnp.minimum(n_items, n_history))
        first = Suffix(flat(before), jnp.full_like(n_items, n_history))
        nothing = suffix.identity(own.items.shape, own.items.dtype)
        earlier = prefix_fold(suffix.combine, nothing, own, axis)
        items = suffix.combine(spread(first, axis), earlier).items
        return items.reshape(before.shape).astype(before.dtype)

    return {name: of_array(before[name], packed[name]) for name in before}

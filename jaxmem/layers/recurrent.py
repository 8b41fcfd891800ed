"""The layer around any linear recurrence: projections, short convolutions, the recurrence, and what is made of its output.

    x -> projections, each perhaps convolved over W tokens -> streams -> S_t = M_t S_{t-1} + B_t, o_t = S_t^T q_t -> output

A named layer is a `RecurrentConfig` that lists its projections and small parameters, and turns them into the streams of
`jaxmem.recurrences`, token by token. `Recurrent` runs it over a sequence, `MixtureOfMemories` over several memories.

Cost per token: the projections, 2 W FLOPs per convolved channel, and the recurrence. State: H K V floats and W - 1 tokens
of every convolved channel.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Natural, Positive, check_fields
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.mixer import Call, Cursor, SequenceMixer, init_cursor, place_state
from jaxmem.layers.short_convolution import init_taps, require_history, short_convolution
from jaxmem.recurrences.call import require_chunk, require_rows
from jaxmem.recurrences.engine import ELEMENTWISE_FLOPS, recurrence, recurrence_flops
from jaxmem.recurrences.streams import Documents, Streams
from jaxmem.sharding import VECTOR, constrain, einsum, local, matrix, param
from jaxmem.sharding.folds import spread_like
from jaxmem.sharding.kinds import Kind
from jaxmem.sharding.rules import Axes
from jaxmem.showing import Module, tree_text
from jaxmem.typing import Array, DTypeLike, Float, Initializer, Int, PRNGKeyArray, PyTree, Shaped

Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Projection:
    """How x [D] becomes one input of a recurrence: W x, or W_up f(W_down x) through a bottleneck; perhaps plus a bias."""

    shape: tuple[int, ...]
    """Of what comes out per token, such as (H, K)."""
    axes: tuple[str, ...]
    """Logical names of these dimensions."""
    convolved: bool = False
    """Goes through a short convolution, one filter per channel."""
    per_memory: bool = True
    """In a mixture of memories: one for every memory."""
    rank: int | None = None
    """Width of the bottleneck; None: none."""
    activation: Callable[[Array], Array] | None = None
    """f, in the bottleneck."""
    shifted: bool = False
    """Reads x_t + mu * (x_{t-1} - x_t) instead of x_t, mu learned per channel of x."""
    bias: bool = False
    """Adds one."""
    is_identity: bool = False
    """x itself; shape is (D,)."""


class Parameter(NamedTuple):
    """A small parameter of a recurrence, such as a rate per head; in a mixture, shared by all memories."""

    init: Initializer
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: Kind | None = None
    """What it is, for the optimiser; see `jaxmem.sharding.kinds`."""


class RecurrentConfig(abc.ABC):
    """A linear recurrence as a layer; a frozen dataclass with, besides its sizes, `chunk_tokens` and `convolution_width`."""

    chunk_tokens: int
    convolution_width: int

    n_steps: ClassVar[int] = 1
    """Steps of the recurrence per token."""
    erases: ClassVar[Literal["nothing", "at k", "at b"]] = "nothing"
    """What the recurrence erases, for counting FLOPs."""
    is_complex: ClassVar[bool] = False
    is_per_channel: ClassVar[bool] = False
    """Whether every key channel decays on its own, for counting FLOPs."""
    is_elementwise: ClassVar[bool] = False
    """Whether every number of the state decays on its own, for counting FLOPs."""

    def __post_init__(self):
        check_fields(self)
        require_chunk(type(self).__name__, self.chunk_tokens)
        if self.erases != "nothing":
            require_rows(type(self).__name__, self.chunk_tokens, self.n_steps)
        if self.convolution_width:
            require_history(type(self).__name__, self.convolution_width)

    @property
    @abc.abstractmethod
    def state_shape(self) -> tuple[int, int, int]:
        """H, K, V."""

    @abc.abstractmethod
    def projections(self, d_model: int) -> dict[str, Projection]:
        """What is made of x."""

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        """What else is learned."""
        return {}

    def constants(self, d_model: int) -> dict[str, tuple[Array, Axes]]:
        """What else `streams` needs, not learned: arrays and the logical names of their dimensions."""
        return {}

    @abc.abstractmethod
    def streams(self, x: Arrays, p: Arrays) -> Streams:
        """The recurrence's streams of projections x [*tokens, ...], in fp32, and parameters and constants p, token by token.

        x has also "position" [*tokens], the caller's or else counted from 0 in each document, and "first" [*tokens], whether
        a token is the first of its document: for a memory of a mixture, the first that it sees, and counted by what it sees.
        Streams may be made several times, and where every number of the state decays on its own, one token after the
        other: products of matrices then belong into `prepare`.
        """

    def prepare(self, x: Arrays, p: Arrays) -> Arrays:
        """More inputs of `streams`, made of the projections once for the whole sequence, token by token."""
        return x

    def finish(self, o: Float[Array, "*tokens H V"], x: Arrays, p: Arrays) -> Float[Array, "*tokens H V"]:
        """What the output layer is given of o, token by token."""
        return o

    @abc.abstractmethod
    def output(self, d_model: int, *, rngs: nnx.Rngs) -> Callable[[Array, Array], Array]:
        """The module that turns (o [B T H V], x [B T D]) into y [B T D]."""

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Recurrent":
        return Recurrent(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token of the recurrence; the convolution costs 2 x its parameters."""
        heads, key, value = self.state_shape
        if self.is_elementwise:
            return ELEMENTWISE_FLOPS * heads * key * value
        chunk = min(self.chunk_tokens, context_tokens) * self.n_steps
        return heads * self.n_steps * recurrence_flops(key, value, chunk, self.erases, self.is_per_channel)


@dataclasses.dataclass(frozen=True)
class HeadsConfig(RecurrentConfig):
    """A recurrence of H heads with queries and keys of width K and values of width V."""

    n_heads: Count = 4
    key_dim: Count = 256
    """Per head."""
    value_dim: Count = 256
    """Per head."""
    n_key_heads: Count | None = None
    """Heads of q and k, each serving n_heads / n_key_heads of v; None: as many."""
    convolution_width: Natural = 4
    """Of the filters of q, k and v; 0: none."""
    chunk_tokens: Count = 32
    norm_eps: Positive = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.n_heads % self.key_heads:
            raise ValueError(
                f"{type(self).__name__}: needs n_heads to be a multiple of n_key_heads, got n_heads={self.n_heads} and "
                f"n_key_heads={self.n_key_heads}; every key head serves equally many heads"
            )

    @property
    def key_heads(self) -> int:
        return self.n_heads if self.n_key_heads is None else self.n_key_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_heads, self.key_dim, self.value_dim

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def projections(self, d_model: int) -> dict[str, Projection]:
        keys = (self.key_heads, self.key_dim), ("heads", "key")
        values = (self.n_heads, self.value_dim), ("heads", "value")
        return {
            "query": Projection(*keys, convolved=True, per_memory=False),
            "key": Projection(*keys, convolved=True),
            "value": Projection(*values, convolved=True),
        }

    def per_head(self, **options) -> Projection:
        """A projection to one number per head."""
        return Projection((self.n_heads,), ("heads",), **options)

    def per_key(self, **options) -> Projection:
        """A projection to one number per head and key channel."""
        return Projection((self.n_heads, self.key_dim), ("heads", "key"), **options)

    def qkv(self, x: Arrays) -> tuple[Array, Array, Array]:
        """silu of all, if there are convolutions."""
        return tuple(jax.nn.silu(x[n]) if self.convolution_width else x[n] for n in ("query", "key", "value"))

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedOutput":
        return GatedOutput(d_model, self.n_heads, self.value_dim, eps=self.norm_eps, rngs=rngs)


_TOKENS = ("batch", "time")


class Projections(Module):
    """All projections of x, for one memory or for several; [*tokens, *shape] or [*tokens, M, *shape] each."""

    def __init__(self, config: RecurrentConfig, d_model: int, *, n_memories: int | None = None, rngs: nnx.Rngs):
        self.config, self.d_model, self.n_memories = config, d_model, n_memories
        self.mix = nnx.Dict()
        self.down = nnx.Dict()
        self.weight = nnx.Dict()
        self.bias = nnx.Dict()
        normal = lambda width: nnx.initializers.truncated_normal(width**-0.5)
        for name, spec in self.specs.items():
            if spec.is_identity:
                continue
            lead, lead_axes = ((n_memories,), ("memory",)) if self.is_per_memory(name) else ((), ())
            linear = matrix(copies=len(lead))
            if spec.shifted:
                self.mix[name] = param(rngs, nnx.initializers.constant(0.5), (d_model,), ("embed",), VECTOR)
            if spec.rank is None:
                shape, axes = (d_model, *spec.shape), ("embed", *spec.axes)
            else:
                down = (*lead, d_model, spec.rank), (*lead_axes, "embed", "rank"), linear
                self.down[name] = param(rngs, normal(d_model), *down)
                shape, axes = (spec.rank, *spec.shape), ("rank", *spec.axes)
            self.weight[name] = param(rngs, normal(shape[0]), (*lead, *shape), (*lead_axes, *axes), linear)
            if spec.bias:
                bias = (*lead, *spec.shape), (*lead_axes, *spec.axes), VECTOR
                self.bias[name] = param(rngs, nnx.initializers.zeros, *bias)

    @property
    def specs(self) -> dict[str, Projection]:
        return self.config.projections(self.d_model)

    @property
    def is_shifted(self) -> bool:
        """Whether a projection reads the token before."""
        return any(spec.shifted for spec in self.specs.values())

    def is_per_memory(self, name: str) -> bool:
        return self.n_memories is not None and self.specs[name].per_memory and not self.specs[name].is_identity

    def axes(self, name: str) -> Axes:
        """Logical names of the dimensions of a projection."""
        return (*_TOKENS, *(("memory",) if self.is_per_memory(name) else ()), *self.specs[name].axes)

    def __call__(self, x: Float[Array, "B T D"], before: Float[Array, "B T D"] | None = None) -> Arrays:
        """Args: before: x of the token before, where some are shifted."""
        made = {}
        for name, spec in self.specs.items():
            if spec.is_identity:
                made[name] = constrain(x, *self.axes(name))
                continue
            m = "m" if self.is_per_memory(name) else ""
            out = "hijk"[: len(spec.shape)]
            source, letters = x, "btd"
            if spec.shifted:
                source = x + (before - x) * constrain(self.mix[name][...], "embed").astype(x.dtype)
            if spec.rank is not None:
                axes = (*_TOKENS, *(("memory",) if m else ()), "rank")
                source = einsum(f"btd,{m}dr->bt{m}r", source, self.down[name][...], axes)
                source, letters = (source if spec.activation is None else spec.activation(source)), f"bt{m}r"
            subscripts = f"{letters},{m}{letters[-1]}{out}->bt{m}{out}"
            made[name] = einsum(subscripts, source, self.weight[name][...], self.axes(name))
            if spec.bias:
                made[name] += self.bias[name][...].astype(x.dtype)
        return made


def memory_dtype(is_complex: bool, dtype: DTypeLike) -> jnp.dtype:
    """Of a memory beside what is cached in `dtype`: fp32, or better if that is."""
    return jnp.promote_types(dtype, jnp.complex64 if is_complex else jnp.float32)


class RecurrentState(NamedTuple):
    """What the layer remembers."""

    memory: Shaped[Array, "B H K V"]
    """fp32, or float64 if x is."""
    history: Arrays
    """The last W - 1 inputs [B W-1 ...] of each convolution, by the name of the projection."""
    last: Arrays
    """The last x [B 1 D], if a projection reads it."""
    cursor: Cursor

    __repr__ = tree_text


class Recurrent(SequenceMixer):
    """A linear recurrence as a mixer; see `mixer` for how it is called."""

    state_type = RecurrentState

    def __init__(self, config: RecurrentConfig, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(config, d_model)
        self.projections = Projections(config, d_model, rngs=rngs)
        self.taps = make_taps(config, d_model, rngs=rngs)
        self.parameters = make_parameters(config, d_model, rngs=rngs)
        self.output = config.output(d_model, rngs=rngs)

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> RecurrentState:
        c, specs = self.config, self.projections.specs
        state = RecurrentState(
            memory=jnp.zeros((batch, *c.state_shape), memory_dtype(c.is_complex, dtype)),
            history={
                name: jnp.zeros((batch, c.convolution_width - 1, *specs[name].shape), dtype) for name in self.taps
            },
            last={"x": jnp.zeros((batch, 1, self.d_model), dtype)} if self.projections.is_shifted else {},
            cursor=init_cursor(batch),
        )
        return place_state(state, self._state_axes)

    @property
    def _state_axes(self) -> RecurrentState:
        return RecurrentState(
            memory=("batch", "heads", "key", "value"),
            history={name: ("batch", "tap", *self.projections.specs[name].axes) for name in self.taps},
            last={"x": ("batch", "tap", "embed")} if self.projections.is_shifted else {},
            cursor=Cursor(("batch",), ("batch",)),
        )

    def mix(self, x: Float[Array, "B T D"], state: RecurrentState, call: Call) -> tuple[Array, RecurrentState]:
        tokens, before, last = call.tokens, None, state.last
        state = state._replace(memory=state.memory.astype(jnp.promote_types(x.dtype, state.memory.dtype)))
        if self.projections.is_shifted:
            before, last = shift(x, state.last, tokens.document)
        projected = self.projections(x, before)
        axes, (p, p_axes) = self._state_axes, with_constants(self.config, self.d_model, self.parameters)
        run = local(
            self._mix,
            in_axes=(
                {name: self.projections.axes(name) for name in projected},
                Documents(_TOKENS, _TOKENS),
                (_TOKENS, {"position": _TOKENS, "first": _TOKENS}),
                {name: ("tap", *self.projections.specs[name].axes) for name in self.taps},
                p_axes,
                (axes.memory, axes.history),
            ),
            out_axes=((*_TOKENS, "heads", "value"), axes.memory, axes.history),
        )
        position = tokens.position if call.positions is None else call.positions
        o, memory, history = run(
            projected,
            Documents(tokens.starts, tokens.real),
            (tokens.document, {"position": position, "first": tokens.position == 0}),
            {name: weight[...] for name, weight in self.taps.items()},
            p,
            (state.memory, state.history),
        )
        return self.output(o, x), RecurrentState(memory, history, last, state.cursor)

    def _mix(self, x: Arrays, documents: Documents, places, taps: Arrays, p: Arrays, state):
        """Convolutions and the recurrence, on one device's rows and heads."""
        (document, counted), (memory, history), c = places, state, self.config
        taps, p = spread_like((taps, p), x)  # so that their gradients are exchanged once, in the end
        dtype, new_history = jax.tree.leaves(x)[0].dtype, {}
        for name, weight in taps.items():
            x[name], new_history[name] = short_convolution(x[name], weight, history[name], document)
        x = prepared(c, x | counted, p)
        o, memory = recurrence(
            lambda x: c.streams(in_full(x), p),
            x,
            memory,
            n_steps=c.n_steps,
            documents=documents,
            chunk_tokens=c.chunk_tokens,
        )
        return c.finish(o, in_full(x), p).astype(dtype), memory, new_history


def make_taps(config: RecurrentConfig, d_model: int, *, rngs: nnx.Rngs) -> PyTree:
    """The filters of the convolved projections, by name."""
    width = config.convolution_width
    return nnx.Dict(
        {
            name: param(rngs, init_taps, (width, *spec.shape), ("tap", *spec.axes), VECTOR)
            for name, spec in config.projections(d_model).items()
            if spec.convolved and width
        }
    )


def make_parameters(config: RecurrentConfig, d_model: int, *, rngs: nnx.Rngs) -> PyTree:
    """The small parameters of a recurrence, by name."""
    return nnx.Dict({name: param(rngs, *spec) for name, spec in config.parameters(d_model).items()})


def with_constants(config: RecurrentConfig, d_model: int, parameters: PyTree) -> tuple[Arrays, dict[str, Axes]]:
    """The values of the small parameters and the constants of a recurrence, and the logical names of their dimensions."""
    constants = config.constants(d_model)
    values = {name: p[...] for name, p in parameters.items()}
    values |= {name: constrain(value, *axes) for name, (value, axes) in constants.items()}
    axes = {name: spec.axes for name, spec in config.parameters(d_model).items()}
    return values, axes | {name: axes for name, (_, axes) in constants.items()}


def prepared(config: RecurrentConfig, x: Arrays, p: Arrays) -> Arrays:
    """config.prepare(x, p), with all that comes out free to differ wherever a part of it does: an input that were the same
    on some devices would have its gradients exchanged in every turn of a loop."""
    x = config.prepare(x, p)
    return spread_like(x, x)


def in_full(x: Arrays) -> Arrays:
    """Floats as fp32 (or better, if that is what comes in)."""
    full = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)) if jnp.issubdtype(a.dtype, jnp.inexact) else a
    return jax.tree.map(full, x)


def shift(x: Float[Array, "B T D"], last: Arrays, document: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Arrays]:
    """x of the token before, 0 where a document starts, and the last x."""

    def previous(x, last, document):
        weight = jnp.stack([jnp.ones_like(x[0, 0]), jnp.zeros_like(x[0, 0])])
        return short_convolution(x, weight, last, document)

    tokens, rows = (*_TOKENS, "embed"), ("batch", "tap", "embed")
    mix = local(previous, in_axes=(tokens, rows, _TOKENS), out_axes=(tokens, rows))
    before, last_x = mix(x, last["x"], document)
    return before, {"x": last_x}


def init_a_log(low: float, high: float) -> Initializer:
    """log U(low, high): rates of heads between slow and fast."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, max(low, 1e-3), high))

    return init


def init_dt_bias(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The inverse softplus of step sizes, log-uniform in [1e-3, 1e-1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))

"""Gated DeltaNet: the gated delta rule behind short convolutions, with an output gate.

    q, k, v = silu(conv(W x));   g = -e^{a_log} softplus(W_a x + dt_bias);   beta = sigmoid(W_b x)
    y = W_o (RMSNorm(o) * silu(W_g x)),   o the gated delta rule of l2-normalised q and k

Cost per token: the projections, 2 W FLOPs per convolved channel, and the recurrence. State: H K V floats and
(W - 1) H (2 K + V) values of convolution history.
Reference: Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, section 3.4.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.layers.mixer import Cursor, advance, init_cursor, place_state
from jaxmem.layers.norm import RMSNorm, l2_normalize
from jaxmem.layers.short_convolution import init_taps, require_history, short_convolution
from jaxmem.recurrences.call import require_chunk
from jaxmem.recurrences.delta import gated_delta_rule
from jaxmem.recurrences.engine import recurrence_flops
from jaxmem.sharding import einsum, local, param
from jaxmem.typing import Array, DTypeLike, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """One gated-delta-rule memory per head."""

    n_heads: int = 4
    key_dim: int = 256
    """Per head."""
    value_dim: int = 256
    """Per head."""
    convolution_width: int = 4
    chunk_tokens: int = 64
    norm_eps: float = 1e-6

    def __post_init__(self):
        require_chunk("GatedDeltaNetConfig", self.chunk_tokens)
        require_history("GatedDeltaNetConfig", self.convolution_width)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        return GatedDeltaNet(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token of the recurrence; the convolution costs 2 x its parameters."""
        return self.n_heads * recurrence_flops(self.key_dim, self.value_dim, min(self.chunk_tokens, context_tokens))


class GatedDeltaNetState(NamedTuple):
    """What the layer remembers."""

    memory: Float[Array, "B H K V"]
    """fp32."""
    history: Float[Array, "B W-1 H 2K+V"]
    """The last inputs of the convolution: q, k and v side by side."""
    cursor: Cursor


_STATE_AXES = GatedDeltaNetState(
    memory=("batch", "heads", "key", "value"),
    history=("batch", "tap", "heads", "value"),
    cursor=Cursor(("batch",), ("batch",)),
)
_CHANNELS, _GATES, _TOKENS = ("batch", "time", "heads", "value"), ("batch", "time", "heads"), ("batch", "time")


class GatedDeltaNet(nnx.Module):
    """The layer of the module docstring; see `mixer` for how it is called."""

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        heads, key, value = config.n_heads, config.key_dim, config.value_dim
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        self.query = param(rngs, init, (d_model, heads, key), ("embed", "heads", "key"))
        self.key = param(rngs, init, (d_model, heads, key), ("embed", "heads", "key"))
        self.value = param(rngs, init, (d_model, heads, value), ("embed", "heads", "value"))
        self.decay = param(rngs, init, (d_model, heads), ("embed", "heads"))
        self.write = param(rngs, init, (d_model, heads), ("embed", "heads"))
        self.gates = DecayGate(heads, rngs=rngs)
        self.convolution = param(
            rngs, init_taps, (config.convolution_width, heads, 2 * key + value), ("tap", "heads", "value")
        )
        self.output = GatedOutput(d_model, heads, value, eps=config.norm_eps, rngs=rngs)

    def init_state(
        self, batch: int, *, capacity: int | None = None, dtype: DTypeLike = jnp.float32
    ) -> GatedDeltaNetState:
        c = self.config
        state = GatedDeltaNetState(
            memory=jnp.zeros((batch, c.n_heads, c.key_dim, c.value_dim), jnp.float32),
            history=jnp.zeros((batch, c.convolution_width - 1, c.n_heads, 2 * c.key_dim + c.value_dim), dtype),
            cursor=init_cursor(batch),
        )
        return place_state(state, _STATE_AXES)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GatedDeltaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedDeltaNetState]:
        state = self.init_state(x.shape[0], dtype=x.dtype) if state is None else state
        tokens, cursor = advance(state.cursor, segment_ids, x.shape[1])
        project = (einsum("btd,dhk->bthk", x, w[...], _CHANNELS) for w in (self.query, self.key, self.value))
        qkv = jnp.concatenate(list(project), axis=-1)
        g = self.gates(einsum("btd,dh->bth", x, self.decay[...], _GATES))
        beta = jax.nn.sigmoid(einsum("btd,dh->bth", x, self.write[...], _GATES).astype(jnp.float32))

        mix = local(
            self._mix,
            in_axes=(_CHANNELS, _GATES, _GATES, _TOKENS, _TOKENS, ("tap", "heads", "value"), _STATE_AXES),
            out_axes=(_CHANNELS, _STATE_AXES.memory, _STATE_AXES.history),
        )
        o, memory, history = mix(qkv, g, beta, tokens.segment, tokens.starts, self.convolution[...], state)
        y = self.output(o, x) * tokens.real[..., None]
        return y.astype(x.dtype), GatedDeltaNetState(memory, history, cursor)

    def _mix(self, qkv, g, beta, segment, starts, weight, state):
        qkv, history = short_convolution(qkv, weight, state.history, segment, state.cursor.segment)
        real = (segment != 0)[..., None]
        q, k, v = split_qkv(qkv, self.config.key_dim)
        g = jnp.where(starts[..., None], -jnp.inf, jnp.where(real, g, 0))
        beta = jnp.where(real, beta, 0)
        o, memory = gated_delta_rule(q, k, v, g, beta, state.memory, chunk_tokens=self.config.chunk_tokens)
        return o, memory, history


class DecayGate(nnx.Module):
    """g = -e^{a_log} softplus(a + dt_bias), one scalar log-decay per head and token, in fp32.

    a_log starts as the log of U(0, 16), dt_bias as the inverse softplus of a log-uniform step in [1e-3, 1e-1].
    Reference: Gu and Dao 2023, arXiv 2312.00752; Yang et al. 2024, arXiv 2412.06464.
    """

    def __init__(self, n_heads: int, *, rngs: nnx.Rngs):
        self.a_log = param(rngs, _init_a_log, (n_heads,), ("heads",))
        self.dt_bias = param(rngs, _init_dt_bias, (n_heads,), ("heads",))

    def __call__(self, a: Float[Array, "*tokens H"]) -> Float[Array, "*tokens H"]:
        return -jnp.exp(self.a_log[...]) * jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...])


class GatedOutput(nnx.Module):
    """y = W_o (RMSNorm(o) * silu(W_g x)), the norm per head."""

    def __init__(self, d_model: int, n_heads: int, value_dim: int, *, eps: float, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        out_init = nnx.initializers.truncated_normal((n_heads * value_dim) ** -0.5)
        self.gate = param(rngs, init, (d_model, n_heads, value_dim), ("embed", "heads", "value"))
        self.norm = RMSNorm(value_dim, axes=("value",), eps=eps, rngs=rngs)
        self.out = param(rngs, out_init, (n_heads, value_dim, d_model), ("heads", "value", "embed"))

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = jax.nn.silu(einsum("btd,dhv->bthv", x, self.gate[...], _CHANNELS))
        return einsum("bthv,hvd->btd", self.norm(o).astype(x.dtype) * gate, self.out[...], ("batch", "time", "embed"))


def split_qkv(qkv: Float[Array, "*tokens H channels"], key_dim: int) -> tuple[Array, Array, Array]:
    """q, k and v of convolved channels: silu, then q and k at unit length."""
    q, k, v = jnp.split(jax.nn.silu(qkv), [key_dim, 2 * key_dim], axis=-1)
    return l2_normalize(q), l2_normalize(k), v


def _init_a_log(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-3, 16.0))


def _init_dt_bias(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    step = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))

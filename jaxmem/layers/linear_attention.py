"""Layers whose memories only decay, with queries and keys: linear attention, RetNet, lightning attention, GLA.

| layer | q, k, v | log-decay | output |
|---|---|---|---|
| linear attention | elu + 1 of q and k | none; o / (q . sum k) | W_o o |
| RetNet | rotary q and k | log(1 - 2^{-5-h}) | W_o (RMSNorm(o) * silu(W_g x)) |
| lightning attention | silu of all | -slope of head and layer | W_o (RMSNorm of all heads(o) * sigmoid(W_g x)) |
| simple GLA | plain | log sigmoid(W_a x + b) / 16 per head | as RetNet |
| GLA | plain | log sigmoid(W_2 W_1 x + b) / 16 per channel | as RetNet |

Plain means W x, or silu(conv(W x)) where `convolution_width` is not 0. Cost and state: see `recurrent`.
References: Katharopoulos et al. 2020, arXiv 2006.16236; Sun et al. 2023, arXiv 2307.08621; Qin et al. 2024, arXiv
2401.04658, and MiniMax 2025, arXiv 2501.08313; Yang et al. 2023, arXiv 2312.06635, section 5.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Natural, Positive
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.recurrent import Arrays, HeadsConfig, Parameter, Projection
from jaxmem.layers.rotary import rotary
from jaxmem.recurrences import decay_only
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR
from jaxmem.typing import Array

GATE_TEMPERATURE = 16.0
"""What log sigmoid is divided by, so that gates start near 1."""


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(HeadsConfig):
    """No decay; each output is a weighted mean of values."""

    convolution_width: Natural = 0

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """The sum of the keys is one more column."""
        return self.n_heads, self.key_dim, self.value_dim + 1

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        counted = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        feature = lambda a: jax.nn.elu(a) + 1
        g = jnp.zeros(v.shape[:-1], v.dtype)
        return decay_only.simple_gla_streams(feature(q), feature(k), counted, g, scale=self.scale)

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        return o[..., :-1] / (o[..., -1:] + 1e-10)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return GatedOutput(d_model, self.n_heads, self.value_dim, gate=None, norm=None, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class RetNetConfig(HeadsConfig):
    """A constant decay per head, between 1 - 2^-5 and ever closer to 1."""

    convolution_width: Natural = 0
    rope_theta: Positive = 10_000.0

    def __post_init__(self):
        super().__post_init__()
        if self.key_dim % 2:
            raise ValueError(
                f"RetNetConfig: needs an even key_dim for its rotary embedding, got key_dim={self.key_dim}; "
                f"use {self.key_dim + 1}"
            )

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        q, k = (rotary(a, x["position"], theta=self.rope_theta) for a in (q, k))
        g = jnp.broadcast_to(p["log_decay"], v.shape[:-1])
        return decay_only.simple_gla_streams(q, k, v, g, scale=self.scale)

    def constants(self, d_model: int) -> dict[str, tuple[Array, tuple[str, ...]]]:
        return {"log_decay": (decay_only.retention_decays(self.n_heads), ("heads",))}


@dataclasses.dataclass(frozen=True)
class LightningAttentionConfig(HeadsConfig):
    """A constant decay per head and layer."""

    convolution_width: Natural = 0
    layer: Natural = 0
    """The layer whose slopes are used, from 0."""
    n_layers: Count = 1
    slopes: Literal["minimax", "fla"] = "minimax"
    """The convention of the slopes; see `lightning_slopes`."""

    def qkv(self, x: Arrays) -> tuple[Array, Array, Array]:
        return tuple(jax.nn.silu(x[name]) for name in ("query", "key", "value"))

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        g = jnp.broadcast_to(p["log_decay"], v.shape[:-1])
        return decay_only.simple_gla_streams(q, k, v, g, scale=1.0)

    def constants(self, d_model: int) -> dict[str, tuple[Array, tuple[str, ...]]]:
        slopes = decay_only.lightning_slopes(self.n_heads, self.layer, self.n_layers, self.slopes)
        return {"log_decay": (-slopes, ("heads",))}

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        options = {"gate": jax.nn.sigmoid, "norm": "all", "eps": self.norm_eps}
        return GatedOutput(d_model, self.n_heads, self.value_dim, **options, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class SimpleGlaConfig(HeadsConfig):
    """A decay per token and head."""

    convolution_width: Natural = 0

    def projections(self, d_model: int) -> dict[str, Projection]:
        return super().projections(d_model) | {"decay": self.per_head()}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        return {"decay_bias": Parameter(nnx.initializers.zeros, (self.n_heads,), ("heads",), VECTOR)}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        g = jax.nn.log_sigmoid(x["decay"] + p["decay_bias"]) / GATE_TEMPERATURE
        return decay_only.simple_gla_streams(*self.qkv(x), g, scale=self.scale)


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionConfig(HeadsConfig):
    """A decay per token, head and key channel."""

    convolution_width: Natural = 0
    gate_rank: Count = 16

    is_per_channel: ClassVar[bool] = True

    def projections(self, d_model: int) -> dict[str, Projection]:
        return super().projections(d_model) | {"decay": self.per_key(rank=self.gate_rank)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        return {"decay_bias": Parameter(nnx.initializers.zeros, (self.n_heads, self.key_dim), ("heads", "key"), VECTOR)}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        g = jax.nn.log_sigmoid(x["decay"] + p["decay_bias"]) / GATE_TEMPERATURE
        return decay_only.gated_linear_streams(*self.qkv(x), g, scale=self.scale)

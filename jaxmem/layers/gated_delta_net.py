"""Layers of delta rules with one decay per head, or none.

    q, k, v = silu(conv(W x)), q and k at unit length;   beta = sigmoid(W_b x);   g = -e^{a_log} softplus(W_a x + dt_bias)

| layer | recurrence | output |
|---|---|---|
| DeltaNet | `delta_rule`: no g | W_o RMSNorm(o) |
| Gated DeltaNet | `gated_delta_rule` | W_o (RMSNorm(o) * silu(W_g x)) |
| Gated DeltaProduct | `gated_delta_product`: n keys, values and strengths per token | as Gated DeltaNet |
| Comba | `comba`: reads for p = c_h k before the decay, and q - d_h p instead of q | as Gated DeltaNet |

Cost and state: see `recurrent`.
References: Yang et al. 2024, arXiv 2406.06484; Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, section 3.4; Siems et al.
2025, arXiv 2502.10297; Hu et al. 2025, arXiv 2506.02475.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.norm import l2_normalize
from jaxmem.layers.recurrent import (
    Arrays,
    HeadsConfig,
    Parameter,
    Projection,
    init_a_log,
    init_dt_bias,
)
from jaxmem.recurrences import delta
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR
from jaxmem.typing import Array


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(HeadsConfig):
    """One delta-rule memory per head."""

    negative_eigenvalues: bool = False
    """Write strengths in (0, 2) instead of (0, 1): a memory can then also turn over what it holds."""

    erases: ClassVar[Literal["nothing", "at k", "at b"]] = "at k"

    def projections(self, d_model: int) -> dict[str, Projection]:
        return super().projections(d_model) | {"write": self.per_head()}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return delta.delta_streams(*self.qkv(x), self.strength(x), scale=self.scale)

    def qkv(self, x: Arrays) -> tuple[Array, Array, Array]:
        """silu of all, q and k at unit length."""
        q, k, v = (jax.nn.silu(x[name]) for name in ("query", "key", "value"))
        return l2_normalize(q), l2_normalize(k), v

    def strength(self, x: Arrays) -> Array:
        """beta."""
        return jax.nn.sigmoid(x["write"]) * (2 if self.negative_eigenvalues else 1)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return GatedOutput(d_model, self.n_heads, self.value_dim, gate=None, eps=self.norm_eps, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaNetConfig):
    """One gated-delta-rule memory per head. a_log starts as the log of U(0, 16)."""

    def projections(self, d_model: int) -> dict[str, Projection]:
        return super().projections(d_model) | {"decay": self.per_head()}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        heads = (self.n_heads,), ("heads",), VECTOR
        return {"a_log": Parameter(init_a_log(0.0, 16.0), *heads), "dt_bias": Parameter(init_dt_bias, *heads)}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        return delta.gated_delta_streams(q, k, v, log_decay(x, p), self.strength(x), scale=self.scale)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return HeadsConfig.output(self, d_model, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig):
    """Several delta rules per token: a product of as many reflections, which can permute what is held."""

    n_householder: Count = 2
    """Steps per token."""

    def __post_init__(self):
        super().__post_init__()
        if self.key_heads != self.n_heads:
            raise ValueError(
                f"GatedDeltaProductConfig: needs as many key heads as heads, got n_key_heads={self.n_key_heads} "
                f"of n_heads={self.n_heads}; leave n_key_heads out"
            )

    @property
    def n_steps(self) -> int:
        return self.n_householder

    def projections(self, d_model: int) -> dict[str, Projection]:
        several = {
            name: dataclasses.replace(spec, shape=(self.n_steps, *spec.shape), axes=("tap", *spec.axes))
            for name, spec in super().projections(d_model).items()
            if name in ("key", "value", "write")
        }
        return super().projections(d_model) | several

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        return delta.gated_delta_product_streams(q, k, v, log_decay(x, p), self.strength(x), scale=self.scale)


@dataclasses.dataclass(frozen=True)
class CombaConfig(GatedDeltaNetConfig):
    """Corrects by what the state held before it decayed, and for less of the key.

    The query is corrected too, q - d_h p. c starts as sigmoid(1), d as 1.
    """

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        one = Parameter(nnx.initializers.ones, (self.key_heads,), ("heads",), VECTOR)
        return super().parameters(d_model) | {"correction": one, "query_correction": one}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        read = jax.nn.sigmoid(p["correction"])[:, None] * k
        q = q - p["query_correction"][:, None] * read
        return delta.comba_streams(q, k, v, read, log_decay(x, p), self.strength(x), scale=self.scale)


def log_decay(x: Arrays, p: Arrays) -> Array:
    """g = -e^{a_log} softplus(a + dt_bias) per head.

    Reference: Gu and Dao 2023, arXiv 2312.00752; Yang et al. 2024, arXiv 2412.06464.
    """
    return -jnp.exp(p["a_log"]) * jax.nn.softplus(x["decay"] + p["dt_bias"])

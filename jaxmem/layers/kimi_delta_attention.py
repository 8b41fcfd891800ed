"""Delta rules with a decay per key channel: Kimi delta attention and Gated DeltaNet 2.

    q, k, v = silu(conv(W x)), q and k at unit length;   beta = sigmoid(W_b x);   f = W_2 W_1 x
    KDA:   g = -e^{a_log} softplus(f + dt_bias), or with a lower bound l < 0, g = l sigmoid(e^{a_log} (f + dt_bias))
    GDN-2: the same g; b = sigmoid(W_b x) per key channel erases, w = sigmoid(W_w x) per value channel writes
    y = W_o (RMSNorm(o) * sigmoid(W_4 W_3 x + c)), c where there is a `gate_bias`

Cost and state: see `recurrent`.
References: Kimi Team 2025, arXiv 2510.26692; GDN-2 as in flash-linear-attention 0.6.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Bounds, Positive
from jaxmem.layers.gated_delta_net import DeltaNetConfig
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.recurrent import Arrays, Parameter, Projection, init_a_log, init_dt_bias
from jaxmem.recurrences import delta
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR
from jaxmem.typing import Array


@dataclasses.dataclass(frozen=True)
class KimiDeltaAttentionConfig(DeltaNetConfig):
    """KDA; a_log starts as the log of U(1, 16), or at 0 with a lower bound."""

    lower_bound: Annotated[float, Bounds("(-inf, 0)")] | None = None
    """Of g, such as -5; None: the softplus gate, as in Kimi-Linear-48B."""
    gate_bias: bool = True
    """Of the output's gate, as in flash-linear-attention; False: none, as in Kimi-Linear-48B."""
    norm_eps: Positive = 1e-5

    is_per_channel: ClassVar[bool] = True

    def projections(self, d_model: int) -> dict[str, Projection]:
        return super().projections(d_model) | {"decay": self.per_key(rank=self.value_dim)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        init = init_a_log(1.0, 16.0) if self.lower_bound is None else nnx.initializers.zeros
        return {
            "a_log": Parameter(init, (self.n_heads,), ("heads",), VECTOR),
            "dt_bias": Parameter(init_dt_bias, (self.n_heads, self.key_dim), ("heads", "key"), VECTOR),
        }

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        return delta.kimi_delta_streams(q, k, v, self.log_decay(x, p), self.strength(x), scale=self.scale)

    def log_decay(self, x: Arrays, p: Arrays) -> Array:
        """g per head and key channel."""
        rate, f = jnp.exp(p["a_log"])[:, None], x["decay"] + p["dt_bias"]
        return -rate * jax.nn.softplus(f) if self.lower_bound is None else self.lower_bound * jax.nn.sigmoid(rate * f)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        gate = {"gate": jax.nn.sigmoid, "gate_rank": self.value_dim, "gate_bias": self.gate_bias}
        return GatedOutput(d_model, self.n_heads, self.value_dim, **gate, eps=self.norm_eps, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet2Config(KimiDeltaAttentionConfig):
    """GDN-2; `negative_eigenvalues` doubles what erases."""

    def projections(self, d_model: int) -> dict[str, Projection]:
        values = Projection((self.n_heads, self.value_dim), ("heads", "value"))
        return super().projections(d_model) | {"erase": self.per_key(), "write": values}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        q, k, v = self.qkv(x)
        erase = jax.nn.sigmoid(x["erase"]) * (2 if self.negative_eigenvalues else 1)
        write = jax.nn.sigmoid(x["write"])
        return delta.gated_delta_net_2_streams(q, k, v, self.log_decay(x, p), erase, write, scale=self.scale)

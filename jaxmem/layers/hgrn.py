"""HGRN and HGRN2: gates that forget, and let in as much as they forget.

    HGRN:   g = log sigmoid(W_f x),  h_t = e^g h_{t-1} + (1 - e^g) silu(W_i x),      y = W_o (RMSNorm(h) * silu(W_g x))
    HGRN2:  the same with a matrix per head, k = 1 - e^g, q = silu(W_q x), v = W_i x,  y = W_o RMSNorm(o)

A lower bound b on what is kept makes deeper layers remember longer: e^g becomes b + (1 - b) e^g.

Cost and state: see `recurrent`; HGRN keeps one number per channel.
References: Qin, Yang, Zhong 2023, arXiv 2311.04823; Qin et al. 2024, arXiv 2404.07904. There the bounds are learned, for all
layers together; here each layer is given its own.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Decay, Natural, Positive
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.recurrent import Arrays, HeadsConfig, Projection, RecurrentConfig
from jaxmem.recurrences import decay_only, elementwise
from jaxmem.recurrences.streams import Streams
from jaxmem.typing import Array


@dataclasses.dataclass(frozen=True)
class HgrnConfig(RecurrentConfig):
    """One number per channel."""

    n_channels: Count = 1024
    lower_bound: Decay = 0.0
    convolution_width: Natural = 0
    chunk_tokens: Count = 32
    norm_eps: Positive = 1e-6

    is_elementwise: ClassVar[bool] = True

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_channels, 1, 1

    def projections(self, d_model: int) -> dict[str, Projection]:
        channels = Projection((self.n_channels,), ("heads",), convolved=True)
        return {"input": channels, "forget": channels}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        g = bounded(x["forget"], self.lower_bound)
        return elementwise.hgrn_streams(-jnp.expm1(g) * jax.nn.silu(x["input"]), g, scale=1.0)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return GatedOutput(d_model, self.n_channels, 1, norm="all", eps=self.norm_eps, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Hgrn2Config(HeadsConfig):
    """A matrix per head; keys are what is forgotten."""

    convolution_width: Natural = 0
    lower_bound: Decay = 0.0

    is_per_channel: ClassVar[bool] = True

    def projections(self, d_model: int) -> dict[str, Projection]:
        common = super().projections(d_model)
        return {"query": common["query"], "value": common["value"], "forget": self.per_key(convolved=True)}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        g = bounded(x["forget"], self.lower_bound)
        return decay_only.hgrn2_streams(jax.nn.silu(x["query"]), x["value"], g, scale=self.scale)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        options = {"gate": None, "norm": "all", "eps": self.norm_eps}
        return GatedOutput(d_model, self.n_heads, self.value_dim, **options, rngs=rngs)


def bounded(f: Array, lower_bound: float) -> Array:
    """log(b + (1 - b) sigmoid(f)), the log-decay."""
    g = jax.nn.log_sigmoid(f)
    return g if lower_bound == 0 else jnp.logaddexp(jnp.log(lower_bound), jnp.log1p(-lower_bound) + g)

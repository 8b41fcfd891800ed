"""Mamba and Mamba-2: state spaces whose step sizes, inputs and outputs depend on the token.

    Mamba:   u = silu(conv(W_x x) + c);  dt = softplus(W_2 W_1 u + dt_bias);  B, C = W_b u, W_c u
             h = e^{dt A} h + dt u B^T,  y = W_o ((h C + d u) * silu(W_z x)),                      A = -e^{a_log} [D' N]
    Mamba-2: u, B, C = silu(conv(W x) + c);  dt = softplus(W_t x + dt_bias)
             S = e^{dt A} S + B (dt u)^T,  y = W_o RMSNorm((S^T C + d u) * silu(W_z x)),           A = -e^{a_log} [H]

Mamba-2's norm is over the heads that share B and C.

Cost: see `recurrent`; Mamba's state is N numbers per channel, and its scan 13 N FLOPs per channel and token.
References: Gu and Dao 2023, arXiv 2312.00752; Dao and Gu 2024, arXiv 2405.21060. Published projections are fused into one
matrix; here each has its own.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Natural, Positive
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.recurrent import (
    Arrays,
    HeadsConfig,
    Parameter,
    Projection,
    RecurrentConfig,
    in_full,
    init_a_log,
    init_dt_bias,
)
from jaxmem.recurrences import decay_only, elementwise
from jaxmem.recurrences.products import dot
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR, matrix, sum_over
from jaxmem.typing import Array, DTypeLike, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class MambaConfig(RecurrentConfig):
    """N numbers per channel."""

    n_channels: Count = 2048
    """D', usually twice the model's width."""
    n_states: Count = 16
    """N."""
    dt_rank: Count | None = None
    """Of the projection to step sizes; None: n_channels / 32, rounded up."""
    convolution_width: Natural = 4
    chunk_tokens: Count = 32

    is_elementwise: ClassVar[bool] = True

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_channels, self.n_states, 1

    @property
    def rank(self) -> int:
        return math.ceil(self.n_channels / 32) if self.dt_rank is None else self.dt_rank

    def projections(self, d_model: int) -> dict[str, Projection]:
        return {"input": Projection((self.n_channels,), ("heads",), convolved=True)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        channels, n, rank = self.n_channels, self.n_states, self.rank
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        of_input = nnx.initializers.truncated_normal(channels**-0.5)
        return {
            "input_bias": Parameter(zeros, (channels,), ("heads",), VECTOR),
            "dt_down": Parameter(of_input, (channels, rank), ("heads", "rank"), matrix()),
            "dt_up": Parameter(
                nnx.initializers.truncated_normal(rank**-0.5), (rank, channels), ("rank", "heads"), matrix()
            ),
            "dt_bias": Parameter(init_dt_bias, (channels,), ("heads",), VECTOR),
            "b": Parameter(of_input, (channels, n), ("heads", "key"), matrix()),
            "c": Parameter(of_input, (channels, n), ("heads", "key"), matrix()),
            "a_log": Parameter(_init_a_log_by_state, (channels, n), ("heads", "key"), VECTOR),
            "d": Parameter(ones, (channels,), ("heads",), VECTOR),
        }

    def prepare(self, x: Arrays, p: Arrays) -> Arrays:
        dtype = x["input"].dtype
        u = jax.nn.silu(x["input"] + p["input_bias"].astype(dtype))
        mixed = {name: sum_over(u @ p[name].astype(dtype), "heads") for name in ("dt_down", "b", "c")}
        dt = dot("...r,rd->...d", in_full(mixed)["dt_down"], p["dt_up"]) + p["dt_bias"]
        return {"u": u, "dt": jax.nn.softplus(dt), "b": mixed["b"], "c": mixed["c"]}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return elementwise.selective_streams(x["u"], x["dt"], -jnp.exp(p["a_log"]), x["b"], x["c"])

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        return o + (p["d"] * x["u"])[..., None]

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return GatedOutput(d_model, self.n_channels, 1, norm=None, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(HeadsConfig):
    """H heads of width P, here value_dim, and N numbers for each, here key_dim; B and C are shared by groups of heads,
    here n_key_heads."""

    n_key_heads: Count | None = 1
    norm_eps: Positive = 1e-5

    def projections(self, d_model: int) -> dict[str, Projection]:
        common = super().projections(d_model)
        return {"c": common["query"], "b": common["key"], "input": common["value"], "dt": self.per_head()}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        heads = (self.n_heads,), ("heads",), VECTOR
        shapes = {
            name: (spec.shape, spec.axes, VECTOR) for name, spec in self.projections(d_model).items() if spec.convolved
        }
        biases = {f"{name}_bias": Parameter(nnx.initializers.zeros, *shape) for name, shape in shapes.items()}
        return biases | {
            "a_log": Parameter(init_a_log(1.0, 16.0), *heads),
            "dt_bias": Parameter(init_dt_bias, *heads),
            "d": Parameter(nnx.initializers.ones, *heads),
        }

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        u, b, c = (jax.nn.silu(x[name] + p[f"{name}_bias"]) for name in ("input", "b", "c"))
        dt = jax.nn.softplus(x["dt"] + p["dt_bias"])
        g = -dt * jnp.exp(p["a_log"])
        return decay_only.simple_gla_streams(c, b, dt[..., None] * u, g, scale=1.0)

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        return o + p["d"][:, None] * jax.nn.silu(x["input"] + p["input_bias"])

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        options = {"norm": self.key_heads, "gate_first": True, "eps": self.norm_eps}
        return GatedOutput(d_model, self.n_heads, self.value_dim, **options, rngs=rngs)


def _init_a_log_by_state(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """A = -1, -2, ..., -N in every channel (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)

"""RWKV-7's time mixing: a diagonal-plus-low-rank memory.

    r, k, v = W x';   w = -e^{-1/2} sigmoid(w_0 + W_2 tanh(W_1 x'))
    a = sigmoid(a_0 + W_4 W_3 x');   z = W_6 sigmoid(W_5 x')
    kappa = k * k_k at unit length per head;   k <- k (1 + (a - 1) k_a)
    S = diag(e^w) S - (kappa * a)(kappa^T S) + k v^T,   o = S^T r
    y = W_o ((GroupNorm(o) + (sum r k r_k) v) * z)

with x'_t = x_t + mu (x_{t-1} - x_t), a mu for each projection. Cost and state: see `recurrent`.
Reference: Peng et al. 2025, arXiv 2503.14456, equations 3-22. There v is also mixed with that of the first layer; here a
layer sees its own input only.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Natural
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.norm import l2_normalize
from jaxmem.layers.recurrent import Arrays, HeadsConfig, Parameter, Projection
from jaxmem.recurrences import delta
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR
from jaxmem.typing import Array

GROUP_NORM_EPS = 64e-5


@dataclasses.dataclass(frozen=True)
class Rwkv7Config(HeadsConfig):
    """RWKV-7 with its token shift instead of a convolution."""

    convolution_width: Natural = 0
    decay_rank: Count = 64
    strength_rank: Count = 64
    gate_rank: Count = 128

    erases: ClassVar[Literal["nothing", "at k", "at b"]] = "at b"
    is_per_channel: ClassVar[bool] = True

    def projections(self, d_model: int) -> dict[str, Projection]:
        shifted = {
            name: dataclasses.replace(spec, shifted=True, convolved=False)
            for name, spec in super().projections(d_model).items()
        }
        values = (self.n_heads, self.value_dim), ("heads", "value")
        return shifted | {
            "decay": self.per_key(shifted=True, rank=self.decay_rank, activation=jnp.tanh),
            "strength": self.per_key(shifted=True, rank=self.strength_rank),
            "gate": Projection(*values, shifted=True, per_memory=False, rank=self.gate_rank, activation=jax.nn.sigmoid),
        }

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        zeros, ones, half = nnx.initializers.zeros, nnx.initializers.ones, nnx.initializers.constant(0.5)
        keys = (self.n_heads, self.key_dim), ("heads", "key"), VECTOR
        values = (self.n_heads, self.value_dim), ("heads", "value"), VECTOR
        return {
            "decay_bias": Parameter(nnx.initializers.constant(-2.0), *keys),
            "strength_bias": Parameter(zeros, *keys),
            "erased": Parameter(ones, *keys),
            "kept": Parameter(half, *keys),
            "bonus": Parameter(zeros, *keys),
            "norm": Parameter(ones, *values),
            "norm_bias": Parameter(zeros, *values),
        }

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        w = -(jnp.e**-0.5) * jax.nn.sigmoid(x["decay"] + p["decay_bias"])
        k, strength = self._key(x, p)
        erased = l2_normalize(x["key"] * p["erased"])
        return delta.dplr_streams(x["query"], k, x["value"], -erased, erased * strength, w, scale=1.0)

    def _key(self, x: Arrays, p: Arrays) -> tuple[Array, Array]:
        strength = jax.nn.sigmoid(x["strength"] + p["strength_bias"])
        return x["key"] * (1 + (strength - 1) * p["kept"]), strength

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        centered = o - jnp.mean(o, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + GROUP_NORM_EPS) * p["norm"] + p["norm_bias"]
        k, _ = self._key(x, p)
        bonus = jnp.sum(x["query"] * k * p["bonus"], axis=-1, keepdims=True) * x["value"]
        return (normed + bonus) * x["gate"]

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        return GatedOutput(d_model, self.n_heads, self.value_dim, gate=None, norm=None, rngs=rngs)

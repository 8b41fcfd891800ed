"""Griffin's recurrent block: a real-gated linear recurrent unit behind a short convolution.

    u = conv(W_x x + b_x) + c;  r = sigmoid(W_r u + b_r), i = sigmoid(W_i u + b_i), W_r and W_i in blocks, one per head
    a = e^{-8 r softplus(lam)};  h = a h + sqrt(1 - a^2) (i * u);  y = W_o (h * gelu(W_y x + b_y)) + b_o

The first token of a document enters unscaled; in a mixture, the first that a memory sees. Cost and state: see `recurrent`;
one number per channel.
Reference: De et al. 2024, arXiv 2402.19427, section 2.4, with the blocks of the RecurrentGemma checkpoints.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Natural
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.recurrent import Arrays, Parameter, Projection, RecurrentConfig, in_full
from jaxmem.recurrences import elementwise
from jaxmem.recurrences.products import dot
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR, matrix
from jaxmem.typing import Array, DTypeLike, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class GriffinConfig(RecurrentConfig):
    """Heads share nothing but the projections; the gates of a channel see the channels of its head."""

    n_heads: Count = 8
    head_dim: Count = 128
    convolution_width: Natural = 4
    chunk_tokens: Count = 32

    is_elementwise: ClassVar[bool] = True

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_heads * self.head_dim, 1, 1

    def projections(self, d_model: int) -> dict[str, Projection]:
        return {"input": Projection((self.n_heads, self.head_dim), ("heads", "value"), convolved=True, bias=True)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        heads, width = self.n_heads, self.head_dim
        block = nnx.initializers.truncated_normal(width**-0.5)
        channels = (heads, width), ("heads", "value"), VECTOR
        blocks = (heads, width, width), ("heads", "key", "value"), matrix(copies=1)
        zeros = nnx.initializers.zeros
        return {
            "input_bias": Parameter(zeros, *channels),
            "recurrence": Parameter(block, *blocks),
            "recurrence_bias": Parameter(zeros, *channels),
            "admission": Parameter(block, *blocks),
            "admission_bias": Parameter(zeros, *channels),
            "lam": Parameter(_init_lam, *channels),
        }

    def prepare(self, x: Arrays, p: Arrays) -> Arrays:
        u = in_full(x)["input"] + p["input_bias"]
        of_block = lambda name: dot("...hk,hkv->...hv", u, p[name])
        r, i = (jax.nn.sigmoid(of_block(name) + p[f"{name}_bias"]) for name in ("recurrence", "admission"))
        g = -elementwise.GATE_POWER * r * jax.nn.softplus(p["lam"])
        flat = lambda a: a.reshape(*a.shape[:-2], -1)
        return {"u": flat(u), "g": flat(g), "i": flat(i), "first": x["first"]}

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return elementwise.rg_lru_streams(x["u"], x["g"], x["i"], x["first"], scale=1.0)

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> GatedOutput:
        options = {"gate": jax.nn.gelu, "gate_bias": True, "out_bias": True, "norm": None}
        return GatedOutput(d_model, self.n_heads * self.head_dim, 1, **options, rngs=rngs)


def _init_lam(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """So that a^2, with the recurrence gate open, is uniform in [0.9^2, 0.999^2]."""
    a_squared = jax.random.uniform(key, shape, dtype, 0.9**2, 0.999**2)
    return jnp.log(jnp.expm1(-jnp.log(a_squared) / (2 * elementwise.GATE_POWER)))

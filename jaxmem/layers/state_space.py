"""S4D: a time-invariant diagonal state space for each channel of x.

    h = e^{dt A} h + (e^{dt A} - 1) / A x,  y = 2 Re(C h) + d x,   A, C complex [D N/2];   W_1 u * sigmoid(W_2 u), u = gelu(y)

The same from an empty state as a convolution with `state_space_kernel`. Cost and state: see `recurrent`; N numbers per
channel, as N / 2 complex ones.
Reference: Gu et al. 2022, arXiv 2206.11893, with A_n = -1/2 + i pi n (S4D-Lin) to begin with, B = 1, and zero-order hold.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.layers.recurrent import Arrays, Parameter, Projection, RecurrentConfig
from jaxmem.recurrences import elementwise
from jaxmem.recurrences.engine import Streams
from jaxmem.sharding import einsum, param
from jaxmem.typing import Array, DTypeLike, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig(RecurrentConfig):
    """S4D over the channels of x."""

    n_channels: int = 1024
    """The model's width."""
    n_states: int = 64
    """N, even."""
    chunk_tokens: int = 64

    convolution_width: ClassVar[int] = 0
    is_complex: ClassVar[bool] = True

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_channels, self.n_states // 2, 1

    def projections(self, d_model: int) -> dict[str, Projection]:
        if d_model != self.n_channels:
            raise ValueError(
                f"StateSpaceConfig: needs n_channels to be the model's width, got n_channels={self.n_channels} for "
                f"d_model={d_model}; every channel of x has a state of its own"
            )
        return {"input": Projection((d_model,), ("heads",), is_identity=True)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        channels, pairs = (d_model,), (d_model, self.n_states // 2)
        normal = nnx.initializers.normal(0.5**0.5)
        return {
            "log_dt": Parameter(_init_log_dt, channels, ("heads",)),
            "a_log": Parameter(nnx.initializers.constant(jnp.log(0.5)), pairs, ("heads", "key")),
            "a_imaginary": Parameter(_init_frequencies, pairs, ("heads", "key")),
            "c_real": Parameter(normal, pairs, ("heads", "key")),
            "c_imaginary": Parameter(normal, pairs, ("heads", "key")),
            "d": Parameter(nnx.initializers.ones, channels, ("heads",)),
        }

    def system(self, p: Arrays) -> tuple[Array, Array, Array, Array]:
        """dt, A, B and C, as `state_space` and `state_space_kernel` take them."""
        a = jax.lax.complex(-jnp.exp(p["a_log"]), p["a_imaginary"])
        return jnp.exp(p["log_dt"]), a, jnp.ones_like(a), jax.lax.complex(p["c_real"], p["c_imaginary"])

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return elementwise.state_space_streams(x["input"], *self.system(p))

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        return jnp.real(o) + (p["d"] * x["input"])[..., None]

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedLinearUnit":
        return GatedLinearUnit(d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token of complex multiplications and additions."""
        return 12 * self.n_channels * self.n_states


class GatedLinearUnit(nnx.Module):
    """y = W_1 u * sigmoid(W_2 u), u = gelu(o)."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        self.value = param(rngs, init, (d_model, d_model), ("heads", "embed"))
        self.gate = param(rngs, init, (d_model, d_model), ("heads", "embed"))

    def __call__(self, o: Float[Array, "B T H 1"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        u = jax.nn.gelu(o[..., 0].astype(x.dtype))
        value, gate = (einsum("bth,hd->btd", u, w[...], ("batch", "time", "embed")) for w in (self.value, self.gate))
        return value * jax.nn.sigmoid(gate)


def _init_log_dt(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1))


def _init_frequencies(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.broadcast_to(jnp.pi * jnp.arange(shape[-1], dtype=dtype), shape)

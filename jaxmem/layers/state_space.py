"""Time-invariant state spaces over the channels of x: S4D, diagonal and complex, and LSSL, a matrix.

    S4D:   h = e^{dt A} h + (e^{dt A} - 1) / A x,  y = 2 Re(C h) + d x,                   A, C complex [D N/2]
    LSSL:  h = M h + (I - dt/2 A)^{-1} dt b x,     y = C h + d x,                         A [N N], b [N], C [D N],
           M = (I - dt/2 A)^{-1} (I + dt/2 A)
    out:   W_1 u * sigmoid(W_2 u), u = gelu(y)

dt [D] is a step size for each channel. From an empty state both are convolutions, with the kernels of
`jaxmem.recurrences.state_space`. LSSL's A and b start as HiPPO-LegS and are learned; A stays lower triangular.

Cost and state: see `recurrent`; N numbers per channel, S4D's as N / 2 complex ones.
References: Gu et al. 2022, arXiv 2206.11893, with A_n = -1/2 + i pi n (S4D-Lin) to begin with, B = 1, and zero-order hold; Gu
et al. 2021, arXiv 2110.13985. LSSL's output is there a linear layer behind gelu; here both have S4D's gate.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count
from jaxmem.layers.recurrent import Arrays, Parameter, Projection, RecurrentConfig
from jaxmem.recurrences import state_space
from jaxmem.recurrences.streams import Streams
from jaxmem.sharding import VECTOR, einsum, matrix, param
from jaxmem.showing import Module
from jaxmem.typing import Array, DTypeLike, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig(RecurrentConfig):
    """S4D."""

    n_channels: Count = 1024
    """The model's width."""
    n_states: Count = 64
    """N; of S4D, even."""
    chunk_tokens: Count = 32

    convolution_width: ClassVar[int] = 0
    is_complex: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.is_complex and self.n_states % 2:
            raise ValueError(
                f"{type(self).__name__}: needs an even n_states, got n_states={self.n_states}; a complex number of the state "
                "stands for two"
            )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_channels, self.n_states // 2, 1

    def projections(self, d_model: int) -> dict[str, Projection]:
        if d_model != self.n_channels:
            raise ValueError(
                f"{type(self).__name__}: needs n_channels to be the model's width, got n_channels={self.n_channels} for "
                f"d_model={d_model}; every channel of x has a state of its own"
            )
        return {"input": Projection((d_model,), ("heads",), is_identity=True)}

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        pairs = (d_model, self.n_states // 2), ("heads", "key"), VECTOR
        normal = nnx.initializers.normal(0.5**0.5)
        return _of_channels(d_model) | {
            "a_log": Parameter(nnx.initializers.constant(jnp.log(0.5)), *pairs),
            "a_imaginary": Parameter(_init_frequencies, *pairs),
            "c_real": Parameter(normal, *pairs),
            "c_imaginary": Parameter(normal, *pairs),
        }

    def system(self, p: Arrays) -> tuple[Array, Array, Array, Array]:
        """dt, A, B and C, as `state_space` and `state_space_kernel` take them."""
        a = jax.lax.complex(-jnp.exp(p["a_log"]), p["a_imaginary"])
        return jnp.exp(p["log_dt"]), a, jnp.ones_like(a), jax.lax.complex(p["c_real"], p["c_imaginary"])

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return state_space.state_space_streams(x["input"], *self.system(p))

    def finish(self, o: Array, x: Arrays, p: Arrays) -> Array:
        return jnp.real(o) + (p["d"] * x["input"])[..., None]

    def output(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedLinearUnit":
        return GatedLinearUnit(d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token, of complex multiplications and additions for S4D; what chunks share is not counted."""
        per_number = 4 if self.is_complex else 1
        return per_number * self.n_channels * (2 * min(self.chunk_tokens, context_tokens) + 4 * self.state_shape[1])


@dataclasses.dataclass(frozen=True)
class LinearStateSpaceConfig(StateSpaceConfig):
    """LSSL."""

    is_complex: ClassVar[bool] = False

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.n_channels, self.n_states, 1

    def parameters(self, d_model: int) -> dict[str, Parameter]:
        n = self.n_states  # a is the dynamics, as a_log is: shrinking it would change what is remembered
        return _of_channels(d_model) | {
            "a": Parameter(lambda *_: state_space.hippo_legs(n)[0], (n, n), ("key", "key"), VECTOR),
            "b": Parameter(lambda *_: state_space.hippo_legs(n)[1], (n,), ("key",), VECTOR),
            "c": Parameter(nnx.initializers.normal(1.0), (d_model, n), ("heads", "key"), VECTOR),
        }

    def system(self, p: Arrays) -> tuple[Array, Array, Array, Array]:
        """dt, A, b and C, as `linear_state_space` and `linear_state_space_kernel` take them."""
        return jnp.exp(p["log_dt"]), jnp.tril(p["a"]), p["b"], p["c"]

    def streams(self, x: Arrays, p: Arrays) -> Streams:
        return state_space.linear_state_space_streams(x["input"], *self.system(p))


def _of_channels(d_model: int) -> dict[str, Parameter]:
    channels = (d_model,), ("heads",), VECTOR
    return {"log_dt": Parameter(_init_log_dt, *channels), "d": Parameter(nnx.initializers.ones, *channels)}


class GatedLinearUnit(Module):
    """y = W_1 u * sigmoid(W_2 u), u = gelu(o)."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(d_model**-0.5)
        self.value = param(rngs, init, (d_model, d_model), ("heads", "embed"), matrix())
        self.gate = param(rngs, init, (d_model, d_model), ("heads", "embed"), matrix())

    def __call__(self, o: Float[Array, "B T H 1"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        u = jax.nn.gelu(o[..., 0].astype(x.dtype))
        value, gate = (einsum("bth,hd->btd", u, w[...], ("batch", "time", "embed")) for w in (self.value, self.gate))
        return value * jax.nn.sigmoid(gate)


def _init_log_dt(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.uniform(key, shape, dtype, jnp.log(1e-3), jnp.log(1e-1))


def _init_frequencies(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.broadcast_to(jnp.pi * jnp.arange(shape[-1], dtype=dtype), shape)

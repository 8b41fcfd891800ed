"""Normalisation of the last dimension: by its root mean square, by mean and variance, or to unit length.

    RMSNorm:       y = x / sqrt(mean(x^2) + eps) * scale
    LayerNorm:     y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * scale + bias
    l2_normalize:  y = x / sqrt(sum(x^2) + eps)

All compute in fp32 whatever comes in and return the dtype that came in. `eps` stands under the root, so that values
and gradients are finite at x = 0, where the slope is 1 / sqrt(eps).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.sharding import VECTOR, constrain, param
from jaxmem.sharding.rules import Axes
from jaxmem.showing import Module
from jaxmem.typing import Array, Float


class RMSNorm(Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last dimension of x.

    Reference: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, eq. 4.

    >>> norm = RMSNorm(4, rngs=nnx.Rngs(0))
    >>> norm(jnp.array([3.0, 3.0, 3.0, 3.0])).round(3).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, d: int, *, axes: Axes = ("embed",), rngs: nnx.Rngs, eps: float = 1e-6):
        """A norm of vectors of width d.

        Args:
          d: width of the last dimension.
          axes: logical name of that dimension, as a tuple of one.
          rngs: not drawn from; `scale` starts at 1.
          eps: added to the mean square; relevant only for |x| of about sqrt(eps) and below.
        """
        self.scale = param(rngs, jax.nn.initializers.ones, (d,), axes, VECTOR)
        self.axes = tuple(axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = constrain(self.scale[...], *self.axes)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class LayerNorm(Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last dimension of x.

    Reference: Ba et al. 2016, Layer Normalization, arXiv:1607.06450, eq. 4.

    >>> norm = LayerNorm(2, rngs=nnx.Rngs(0))
    >>> norm(jnp.array([5.0, 9.0])).round(3).tolist()
    [-1.0, 1.0]
    """

    def __init__(self, d: int, *, axes: Axes = ("embed",), rngs: nnx.Rngs, eps: float = 1e-5):
        """As `RMSNorm`; `bias` starts at 0."""
        self.scale = param(rngs, jax.nn.initializers.ones, (d,), axes, VECTOR)
        self.bias = param(rngs, jax.nn.initializers.zeros, (d,), axes, VECTOR)
        self.axes = tuple(axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scale, bias = (constrain(p[...], *self.axes) for p in (self.scale, self.bias))
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def l2_normalize(x: Float[Array, "... K"], eps: float = 1e-6) -> Float[Array, "... K"]:
    """x / sqrt(sum(x^2) + eps) over the last dimension: length 1, or shorter where |x| is about sqrt(eps) and below.

    >>> l2_normalize(jnp.array([0.0, -5.0])).round(3).tolist()
    [0.0, -1.0]
    """
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)

"""Rotary position embedding: pair i of a head turns by an angle proportional to its token's position,

    (x_i, x_{i+K/2}) <- (x_i cos a - x_{i+K/2} sin a,  x_{i+K/2} cos a + x_i sin a),   a = position * theta^(-2i/K),

so that q . k depends on positions only through their difference. Pairs are half a head apart ("rotate_half"), as in
Llama and Hugging Face checkpoints, and not neighbours as in the paper; a permutation of the key axis converts them.

Cost: 3 K FLOPs and K/2 sines and cosines per head and token; no state.
Reference: Su et al. 2021, arXiv 2104.09864, equation 34.
"""

import jax.numpy as jnp
import numpy as np

from jaxmem.typing import Array, Float, Int


def rotary(
    x: Float[Array, "*tokens heads K"], positions: Int[Array, "*tokens"], *, theta: float = 10_000.0
) -> Float[Array, "*tokens heads K"]:
    """x with every head turned by its token's position, in fp32 or in x.dtype if that is wider; returned in x.dtype.

    Args:
      positions: counted from 0 in tokens; only differences matter to attention.
      theta: base of the geometric series of wavelengths, which run from 2 pi tokens to nearly 2 pi theta tokens.

    Raises: ValueError if the head width is odd.

    >>> quarter = rotary(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[1]]))
    >>> bool(jnp.allclose(quarter[0, 0, 0], jnp.array([jnp.cos(1.0), jnp.sin(1.0)])))
    True
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary: needs an even head width, got K={width}; change head_dim or use rope_theta=None")
    angle = _angles(positions, width, theta)[..., None, :]  # [*tokens, 1, K/2]
    full = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angle).astype(full), jnp.sin(angle).astype(full)
    first, second = jnp.split(x.astype(full), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _angles(positions: Int[Array, "*tokens"], width: int, theta: float) -> Float[Array, "*tokens half"]:
    """position * theta^(-2i/K) modulo one turn, in [-pi, pi).

    Counted in integers of 2^-32 turn, whose product wraps around exactly where the circle does. In fp32 the product
    would be off by 0.01 and more at positions of a few 100,000, differently for every position; here the angle between
    two tokens is the same wherever they stand, and off by at most pi 2^-32 times their distance.
    """
    turns = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width) / (2 * np.pi)
    step = jnp.asarray(np.round(turns * 2.0**32).astype(np.uint32))
    phase = positions.astype(jnp.uint32)[..., None] * step
    return phase.astype(jnp.int32).astype(jnp.float32) * (2 * np.pi / 2.0**32)

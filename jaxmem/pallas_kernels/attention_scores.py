"""What attention computes for a pair of a query and a key, shared by all implementations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.masks import Mask, Place, sees
from jaxmem.typing import Array, Float, Int, UInt32


class Extras(NamedTuple):
    """Arrays that only some attention has; the R heads that share keys stand together."""

    relative: Float[Array, "G R L K"] | None
    """For each distance, what is added to the key."""
    seeds: UInt32[Array, "B G R"] | None
    """Of dropout."""


class Static(NamedTuple):
    """What is fixed when tracing."""

    mask: Mask
    scale: float
    soft_cap: float | None
    rate: float
    """Of dropout."""
    block_q: int | None
    block_k: int | None
    """Tokens per block; None is what suits the implementation."""
    implementation: str | None = None
    """"xla", "pallas_tpu", "pallas_gpu", "cudnn", or None: the best for the platform that is compiled for."""
    in_order: bool = False
    """Known to be whole rows of one document each, token i at index i, as many queries as keys."""

    def with_blocks(self, block_q: int, block_k: int) -> "Static":
        """Blocks where none are given."""
        return self._replace(block_q=self.block_q or block_q, block_k=self.block_k or block_k)


def score(
    products: Float[Array, "B G R T S"],
    by_distance: Float[Array, "B G R T L"] | None,
    q: Place,
    k: Place,
    static: Static,
) -> Float[Array, "B G R T S"]:
    """Logits in fp32, -inf where masked, of q . k and of q . r by distance."""
    if by_distance is not None:
        distance = jnp.clip(q.index[:, :, None] - k.index[:, None, :], 0, by_distance.shape[-1] - 1)
        products += jnp.take_along_axis(by_distance, distance[:, None, None], axis=-1)
    logits = static.scale * products
    if static.soft_cap is not None:
        logits = static.soft_cap * jnp.tanh(logits / static.soft_cap)
    return jnp.where(sees(static.mask, q, k)[:, None, None], logits, -jnp.inf)


def keep_factor(
    seeds: UInt32[Array, "B G R"] | None, q: Place, k: Place, rate: float
) -> Float[Array, "B G R T S"] | float:
    """0 for weights that are left out, 1 / (1 - rate) for the others: a hash of seed and both indices."""
    if seeds is None:
        return 1.0
    return kept(seeds[..., None, None], q.index[:, None, None, :, None], k.index[:, None, None, None, :], rate)


def kept(
    seed: UInt32[Array, "..."] | Int[Array, "..."], q_index: Int[Array, "..."], k_index: Int[Array, "..."], rate: float
) -> Float[Array, "..."]:
    """`keep_factor` of arrays that broadcast. Constants are NumPy's, which kernels may close over."""
    of_query = _mix(seed.astype(jnp.uint32) + q_index.astype(jnp.uint32) * np.uint32(0x9E3779B1))
    bits = _mix(of_query ^ (k_index.astype(jnp.uint32) * np.uint32(0x85EBCA77)))
    return jnp.where(bits >= np.uint32(round(rate * 2**32)), np.float32(1 / (1 - rate)), np.float32(0))


def _mix(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """The finaliser of MurmurHash3: every bit of x changes half of the bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def row_delta(result: Partial, cotangents: Partial) -> Float[Array, "B T H"]:
    """do . o - dlse: what the softmax takes off the gradient of every weight; 0 for rows that see nothing."""
    delta = jnp.sum(cotangents.o.astype(jnp.float32) * result.o, axis=-1)
    delta = delta if cotangents.lse is None else delta - cotangents.lse
    return jnp.where(result.lse == -jnp.inf, 0.0, delta)


def product(subscripts: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum in the dtype of its factors, exact if that is fp32, summed in fp32."""
    exact = jnp.result_type(x, y) == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def filled(x: Array, size: int, axis: int) -> Array:
    """Zeros behind the last one, up to a multiple of `size`."""
    return jnp.pad(x, [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)])


def fp32_result(like: Array, *shape: int) -> jax.ShapeDtypeStruct:
    """Of a kernel: it varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=jax.typeof(like).manual_axis_type)

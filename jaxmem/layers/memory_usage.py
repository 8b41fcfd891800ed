"""How evenly the slots of a memory are read: the two numbers of Lample et al. 2019, arXiv 1907.05242, section 4.3.

    z_m = sum of the weights, without sign, with which slot m was read, over tokens, heads and batches
    share used = #{m: z_m != 0} / M          KL(z / sum z || uniform) = log M + sum_m p_m log p_m

z is one fp32 number per slot: a weight of 1 is lost on a sum beyond 2^24. Cost: one scatter-add of H k numbers per token.
Of a decoder's layers z comes from `Decoder.with_memory_use`, and the numbers are in every evaluation of a run.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmem.sharding import constrain, local, sum_over
from jaxmem.sharding.folds import spread_like
from jaxmem.sharding.rules import Axes
from jaxmem.sharding.tables import CHOICES
from jaxmem.typing import Array, Bool, Float, Int


def slot_weights(
    ids: Int[Array, "B T H k"],
    weights: Float[Array, "B T H k"],
    n_slots: int,
    real: Bool[Array, "B T"] | None = None,
    axes: Axes = CHOICES,
) -> Float[Array, "M"]:
    """z_m: the sum of the weights with which slot m was read. Sums of batches add up: z = z + slot_weights(...).

    Args:
      ids, weights: of `Memory.choose`; a weight counts without its sign, and an id of -1 not at all.
      n_slots: M.
      real: False leaves a token out, as padding should be; None counts all.
      axes: of ids and weights.

    Returns: z, whole on every device.

    >>> slot_weights(jnp.array([[[[1, 3]]]]), jnp.array([[[[0.75, 0.25]]]]), 4).tolist()
    [0.0, 0.75, 0.0, 0.25]
    """
    real = constrain(jnp.ones(ids.shape[:2], bool), "batch", "time") if real is None else real

    def count(ids, weights, real):
        counted = jnp.where(real[..., None, None] & (ids >= 0), jnp.abs(weights.astype(jnp.float32)), 0.0)
        z = jnp.zeros(n_slots, jnp.float32)
        return sum_over(spread_like(z, counted).at[ids].add(counted), *(axis for axis in axes if axis is not None))

    return local(count, in_axes=(axes, axes, ("batch", "time")), out_axes=(None,))(ids, weights, real)


def share_used(z: Float[Array, "*layers M"]) -> Float[Array, "*layers"]:
    """The share of slots that were read with a weight that is not 0: 1 is best. Lample et al. 2019, section 4.3.

    >>> float(share_used(jnp.array([0.0, 0.75, 0.0, 0.25])))
    0.5
    """
    return jnp.mean(z != 0, axis=-1, dtype=jnp.float32)


def divergence_from_uniform(z: Float[Array, "*layers M"]) -> Float[Array, "*layers"]:
    """KL(z / sum z || uniform) = log M + sum_m p_m log p_m in nats: 0 is even use, log M is one slot. NaN before any use.

    >>> float(divergence_from_uniform(jnp.array([2.0, 2.0]))), round(float(divergence_from_uniform(jnp.array([0.0, 3.0]))), 4)
    (0.0, 0.6931)
    """
    p = z / jnp.sum(z, axis=-1, keepdims=True)
    return jnp.log(z.shape[-1]) + jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def weights_by_rank(z: Float[Array, "*layers M"], ranks: Sequence[int]) -> Float[Array, "*layers ranks"]:
    """Weights of the slots of these ranks, 1 for the most used, in units of the mean: all 1 is even use. Cost: a sort.

    >>> weights_by_rank(jnp.array([0.0, 6.0, 2.0, 0.0]), (1, 2, 4)).tolist()
    [3.0, 1.0, 0.0]
    """
    places = z.shape[-1] - jnp.asarray(ranks)
    return jnp.sort(z, axis=-1)[..., places] / jnp.mean(z, axis=-1, keepdims=True)

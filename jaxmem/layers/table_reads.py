"""The gradient of a table in factors: what was read, with which weights, and what came back.

    gradient of row m = sum_{t, j: ids_tj = m} w_tj y_t

A gradient has the shape of what it is the gradient of, so that a table's is as large as the table. `TableReads` are zeros
as large as a step's reads, which stand beside a table only to have a gradient: its factors. Every layer has its own, also
those that share a table; `jaxmem.training.tables` makes of them the gradients of the rows that were read.

Cost: B T (3 H k + V) numbers per layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.sharding import constrain
from jaxmem.sharding.rules import Axes
from jaxmem.sharding.tables import CHOICES, X
from jaxmem.typing import Array, Float, Int

_HALF = 2**16


class TableReads(NamedTuple):
    """Factors of a gradient, in fp32."""

    ids: Float[Array, "*batch T H k 2"]
    """id // 2^16 and id % 2^16: fp32 has not all integers beyond 2^24."""
    weights: Float[Array, "*batch T H k"]
    y: Float[Array, "*batch T V"]


class LayerReads(NamedTuple):
    """Of one layer: of its values, and of its experts' inputs."""

    values: TableReads
    inputs: TableReads | None


def no_reads(batch: int, n_tokens: int, choices: tuple[int, int], width: int, axes: Axes = CHOICES) -> TableReads:
    """Zeros for one layer's reads of a batch: `choices` are H and k, and `axes` those of ids and weights."""
    ids = constrain(jnp.zeros((batch, n_tokens, *choices, 2), jnp.float32), *axes, None)
    weights = constrain(jnp.zeros((batch, n_tokens, *choices), jnp.float32), *axes)
    return TableReads(ids, weights, constrain(jnp.zeros((batch, n_tokens, width), jnp.float32), *X))


def ids_of(reads: TableReads) -> Int[Array, "*batch T H k"]:
    high, low = reads.ids[..., 0].astype(jnp.int32), reads.ids[..., 1].astype(jnp.int32)
    return high * _HALF + low


@jax.custom_vjp
def record_bag(
    y: Float[Array, "B T V"], reads: TableReads, ids: Int[Array, "B T H k"], weights: Float[Array, "B T H k"]
) -> Float[Array, "B T V"]:
    """y = bag(values, ids, weights) as it is; the gradient of `reads` is that of values."""
    return y


@jax.custom_vjp
def record_dots(
    d: Float[Array, "B T H k"], reads: TableReads, ids: Int[Array, "B T H k"], x: Float[Array, "B T V"]
) -> Float[Array, "B T H k"]:
    """d = dots(values, ids, x) as it is; the gradient of `reads` is that of values."""
    return d


def _factors(ids, weights, y) -> TableReads:
    pairs = jnp.stack([ids // _HALF, ids % _HALF], axis=-1).astype(jnp.float32)
    return TableReads(pairs, weights.astype(jnp.float32), y.astype(jnp.float32))


record_bag.defvjp(
    lambda y, reads, ids, weights: (y, (ids, weights)),
    lambda saved, dy: (dy, _factors(*saved, dy), None, jnp.zeros_like(saved[1])),
)
record_dots.defvjp(
    lambda d, reads, ids, x: (d, (ids, x)),
    lambda saved, dd: (dd, _factors(saved[0], dd, saved[1]), None, jnp.zeros_like(saved[1])),
)

"""The rows of memories, and reading them: what product-key memories and word experts have in common."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.layers.table_reads import LayerReads, record_bag, record_dots
from jaxmem.sharding import MEMORY, param
from jaxmem.sharding.rules import Axes
from jaxmem.sharding.tables import CHOICES, TABLE, bag, dots
from jaxmem.showing import Module
from jaxmem.typing import Array, DTypeLike, Float, Int

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
TableDtype = Literal["float32", "bfloat16"]


class MemoryTable(Module):
    """The rows of a memory: one value per slot, and for experts one input vector.

    >>> MemoryTable(16, 8, rngs=nnx.Rngs(0)).values.shape
    (16, 8)
    """

    def __init__(
        self, n_slots: int, width: int, d_input: int | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        """Entries of values have variance 1 / V, as in XLM, and those of inputs 1 / D.

        Args:
          n_slots: rows M.
          width: V, of a value.
          d_input: D, of an expert's input vector; None: there are none.
          rngs: `params` draws the table.
          dtype: as it is stored.
        """
        normal = lambda width: jax.nn.initializers.normal(width**-0.5)
        rows = lambda width: param(rngs, normal(width), (n_slots, width), TABLE, MEMORY, dtype=dtype)
        self.values = rows(width)
        self.inputs = None if d_input is None else rows(d_input)

    def read(
        self,
        x: Float[Array, "B T D"],
        ids: Int[Array, "B T H k"],
        weights: Float[Array, "B T H k"] | None,
        expert: Activation | None = None,
        reads: LayerReads | None = None,
        layer: Int[Array, ""] | None = None,
        axes: Axes = CHOICES,
    ) -> Float[Array, "B T V"]:
        """y = sum_hk weights values[ids], the weights times expert(<inputs[ids], x>) if slots are neurons; in fp32.

        Args:
          weights: None is 1.
          reads: what gradients go to instead of to this table; None: they go to the table.
          layer: which table of a stack [L M V] is read; None: there is one.
          axes: of ids and weights.
        """
        values, inputs = (None if array is None else array[...] for array in (self.values, self.inputs))
        if reads is not None:
            values, inputs = jax.lax.stop_gradient((values, inputs))
        if expert is not None:
            x = x.astype(jnp.float32)
            hidden = dots(inputs, ids, x, layer, axes)
            if reads is not None:
                hidden = record_dots(hidden, reads.inputs, ids, x)
            active = ACTIVATIONS[expert](hidden)
            weights = active if weights is None else weights * active
        y = bag(values, ids, weights, layer, axes)
        return y if reads is None else record_bag(y, reads.values, ids, weights)


def table_to_read(what: str, layer: Any, given: MemoryTable | None) -> MemoryTable:
    """The layer's own table, or the one it is given.

    Raises: ValueError for a table that is missing, not asked for, or of other shapes.
    """
    config = layer.config
    if (given is not None) != config.shared_table:
        raise ValueError(
            f"{what}: needs a table in the call if and only if shared_table=True, "
            f"got {'none' if given is None else 'one'} with shared_table={config.shared_table}; "
            "make one with config.make_table, or change shared_table"
        )
    if given is None:
        return layer.table
    want = config.table_shape(layer.d_model)
    got = *given.values.shape, None if given.inputs is None else given.inputs.shape[1]
    if got != want:
        raise ValueError(
            f"{what}: needs a table with (n_slots, value_dim, d_input)={want}, got {got}; make it with config.make_table"
        )
    return given

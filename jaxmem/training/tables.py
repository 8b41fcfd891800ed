"""How a training step updates memory tables: apart from other parameters, and only the rows that it read.

A step differentiates in the layers' `TableReads` instead of in the tables, and sums what came back per row, of all layers and
parts of a batch at once. With `update="lazy"` that is a gradient of the rows that were read, for `lazy_adam`: nothing is as
large as a table but tables and moments, of which rows are changed in place, so that time and memory are those of the rows.
With "dense" it is a table's whole gradient, for AdamW. Either way tables have their own learning rate, decay and clipping, as
in Memory Layers at Scale, arXiv 2412.09764.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmem.layers.table_reads import LayerReads, TableReads, ids_of, no_reads
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.pallas_kernels.memory_lookup import RowGradient
from jaxmem.sharding import n_shards_of
from jaxmem.sharding.kinds import is_memory
from jaxmem.sharding.rules import Axes
from jaxmem.sharding.tables import gradient_of_rows, gradient_of_table
from jaxmem.training.lazy_adam import apply_rows
from jaxmem.training.optimizer import make_table_optimizer
from jaxmem.typing import Array, Bool, Float, PyTree

Gradients = dict[str, RowGradient | Array]
"""By the path of a table: "table/values" of all layers together, "blocks/1/memory/table/values" stacked over the repeats."""
TABLES = "memory tables"
"""Their parameter group in metrics."""


class TableTraining:
    """What a step does with the memory tables of a model; nothing if it has none."""

    def __init__(self, config: Any):
        """Args: config: a `TrainConfig`."""
        self._model: DecoderConfig = config.model
        self._config = config.optimizer.tables
        self._optimizer = make_table_optimizer(config.optimizer, config.steps)

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(other parameters, tables)."""
        tables, others = nnx.split_state(params, lambda path, variable: is_memory(variable), ...)
        return others, tables

    def init(self, tables: nnx.State) -> PyTree:
        """The optimiser's state."""
        return self._optimizer.init(by_path(tables))

    def no_reads(self, batch: int, n_tokens: int) -> PyTree:
        """Zeros for every memory of the pattern, stacked over the repeats: what a step differentiates in."""

        def of_place(memory: Any) -> LayerReads:
            zeros = lambda width: no_reads(batch, n_tokens, memory.choices, width, memory.choice_axes)
            _, width, d_input = memory.table_shape(self._model.d_model)
            one = LayerReads(zeros(width), None if d_input is None else zeros(d_input))
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self._model.repeats, *x.shape)), one)

        return tuple(None if memory is None else of_place(memory) for memory in self._model.memories)

    def attach(self, model: Decoder, reads: PyTree) -> Decoder:
        """The model whose memories pass back to `reads` instead of to their tables."""
        for block, of_place in zip(model.blocks, reads, strict=False):
            if of_place is not None:
                block.memory.reads = nnx.data(of_place)
        return model

    def gradients(self, tables: nnx.State, reads: PyTree) -> Gradients:
        """Of all parts of a batch; reads have dimensions [parts repeats B T ..]."""
        found = {}
        for path, table in by_path(tables).items():
            *_, kind = where = path.split("/")
            if where[0] == "blocks":  # [M V] of each repeat
                place = int(where[1])
                of_layers = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), getattr(reads[place], kind))
                axes = self._model.memories[place].choice_axes
                of_layer = functools.partial(self._gradient, n_rows=table.shape[1], axes=axes)
                found[path] = jax.lax.map(of_layer, of_layers)
            else:
                memories = self._model.memories
                readers = [place for place, m in enumerate(memories) if m is not None and m.shared_table]
                all_reads = _together([getattr(reads[place], kind) for place in readers])
                found[path] = self._gradient(all_reads, table.shape[0], memories[readers[0]].choice_axes)
        return found

    def _gradient(self, reads: TableReads, n_rows: int, axes: Axes) -> RowGradient | Array:
        factors = ids_of(reads), reads.weights, reads.y
        if self._config.update == "dense":
            return gradient_of_table(*factors, n_rows, axes)
        most = min(n_rows // n_shards_of("slots"), reads.weights.size, self._config.max_rows or n_rows)
        return gradient_of_rows(*factors, n_rows, most, axes)

    def update(
        self, gradients: Gradients, state: PyTree, tables: nnx.State, finite: Bool[Array, ""]
    ) -> tuple[nnx.State, PyTree, Float[Array, ""]]:
        """(tables, state, norm of the updates) after a step; if it is not finite, they are as before."""
        arrays, if_finite = by_path(tables), lambda new, old: jnp.where(finite, new, old)
        if self._config.update == "lazy":
            nowhere = jnp.iinfo(jnp.int32).max
            gradients = {path: g._replace(rows=if_finite(g.rows, nowhere)) for path, g in gradients.items()}
            updates, new = self._optimizer.update(gradients, state, arrays)
            arrays, new = apply_rows(arrays, updates), new._replace(count=if_finite(new.count, state.count))
        else:
            updates, new = self._optimizer.update(gradients, state, arrays)
            changed = optax.apply_updates(arrays, updates), new
            arrays, new = jax.tree.map(if_finite, changed, (arrays, state))
        return with_arrays(tables, arrays), new, gradients_norm(updates)


def gradients_norm(gradients: Gradients) -> Float[Array, ""]:
    """L2 norm of all tables' gradients or updates."""
    arrays = [g.sums if isinstance(g, RowGradient) else g for g in gradients.values()]
    return optax.tree.norm(arrays) if arrays else jnp.float32(0)


def _together(reads: list[TableReads]) -> TableReads:
    """[parts repeats B T ..] of several layers as one, filled up to the k of the one that reads most."""
    k = max(r.weights.shape[-1] for r in reads)
    fill = lambda x, axis, value: jnp.pad(
        x, [(0, k - x.shape[axis]) if d == axis else (0, 0) for d in range(x.ndim)], constant_values=value
    )
    filled = [r._replace(ids=fill(r.ids, 5, -1), weights=fill(r.weights, 5, 0)) for r in reads]
    return jax.tree.map(lambda *x: jnp.concatenate([a.reshape(-1, *a.shape[2:]) for a in x]), *filled)


def by_path(tables: nnx.State) -> dict[str, Array]:
    """The arrays of tables."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(tables)}


def with_arrays(tables: nnx.State, arrays: dict[str, Array]) -> nnx.State:
    """Tables with other arrays."""
    return nnx.from_flat_state([(path, v.replace(arrays[_name(path)])) for path, v in nnx.to_flat_state(tables)])


def _name(path: tuple) -> str:
    return "/".join(map(str, path))

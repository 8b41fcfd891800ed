"""How a training step updates memory tables: apart from other parameters, and only the rows that it read.

A step differentiates in the layers' `TableReads` instead of in the tables, sums what came back per row (`gradient_of_rows`),
and hands that to `lazy_adam`. Nothing in it is as large as a table but tables and moments, of which it changes the rows that
were read, in place: time and memory are those of the rows. With `update="dense"` tables are a group of `make_optimizer`
with dense gradients. Either way they have their own learning rate, decay and clipping, as in Memory Layers at Scale,
arXiv 2412.09764.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmem.layers.table_reads import LayerReads, TableReads, ids_of, no_reads
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.pallas_kernels.memory_lookup import RowGradient
from jaxmem.sharding import n_shards_of
from jaxmem.sharding.tables import gradient_of_rows
from jaxmem.training.lazy_adam import LazyAdamState, apply_rows, lazy_adam
from jaxmem.training.optimizer import TableOptimizerConfig, is_memory_table, make_table_schedule
from jaxmem.typing import Array, Bool, Float, PyTree

Rows = dict[str, RowGradient]
"""By the path of a table: "table/values" of all layers together, "blocks/1/memory/table/values" stacked over the repeats."""
TABLES = "memory tables"
"""Their parameter group in metrics."""


class LazyTables:
    """The memory tables of a model whose rows a step updates one by one; none if `update` is "dense"."""

    def __init__(self, config: Any):
        """Args: config: a `TrainConfig`."""
        self._model: DecoderConfig = config.model
        self._config: TableOptimizerConfig = config.optimizer.tables
        c = self._config
        rate = make_table_schedule(config.optimizer, config.steps)
        self._optimizer = lazy_adam(rate, c.b1, c.b2, c.eps, c.weight_decay, c.clip_norm)

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """(other parameters, lazy tables)."""
        of_tables = lambda path, variable: self._config.update == "lazy" and is_memory_table(variable)
        tables, others = nnx.split_state(params, of_tables, ...)
        return others, tables

    def init(self, tables: nnx.State) -> LazyAdamState:
        return self._optimizer.init(_by_path(tables))

    def no_reads(self, tables: nnx.State, batch: int, n_tokens: int) -> PyTree:
        """Zeros for every memory of the pattern, stacked over the repeats: what a step differentiates in."""

        def of_place(memory: Any) -> LayerReads:
            zeros = lambda width: no_reads(batch, n_tokens, memory.keys.n_heads, memory.keys.top_k, width)
            d_model = self._model.d_model
            one = LayerReads(zeros(memory.width(d_model)), None if memory.expert is None else zeros(d_model))
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self._model.repeats, *x.shape)), one)

        return tuple(m and of_place(m) for m in self._model.memories) if tables else ()

    def attach(self, model: Decoder, reads: PyTree) -> Decoder:
        """The model whose memories pass back to `reads` instead of to their tables."""
        for block, of_place in zip(model.blocks, reads, strict=False):
            if of_place is not None:
                block.memory.reads = nnx.data(of_place)
        return model

    def gradients(self, tables: nnx.State, reads: PyTree) -> Rows:
        """Of the rows that all parts of a batch read; reads have dimensions [parts repeats B T ..]."""
        found = {}
        for path, table in _by_path(tables).items():
            *_, kind = where = path.split("/")
            if where[0] == "blocks":  # [M V] of each repeat
                of_layers = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), getattr(reads[int(where[1])], kind))
                found[path] = jax.lax.map(lambda layer, n=table.shape[1]: self._rows(layer, n), of_layers)
            else:
                places = zip(reads, self._model.memories, strict=True)
                of_layers = [getattr(of_place, kind) for of_place, m in places if m is not None and m.shared_table]
                together = lambda *x: jnp.concatenate([a.reshape(-1, *a.shape[2:]) for a in x])
                found[path] = self._rows(jax.tree.map(together, *of_layers), table.shape[0])
        return found

    def _rows(self, reads: TableReads, n_rows: int) -> RowGradient:
        most = min(n_rows // n_shards_of("slots"), reads.weights.size, self._config.max_rows or n_rows)
        return gradient_of_rows(ids_of(reads), reads.weights, reads.y, n_rows, most)

    def update(
        self, gradients: Rows, state: LazyAdamState, tables: nnx.State, finite: Bool[Array, ""]
    ) -> tuple[nnx.State, LazyAdamState, Float[Array, ""]]:
        """(tables, state, norm of the updates) after a step; if it is not finite, no row is."""
        nowhere = lambda g: jnp.where(finite, g.rows, jnp.iinfo(jnp.int32).max)
        gradients = {path: g._replace(rows=nowhere(g)) for path, g in gradients.items()}
        arrays = _by_path(tables)
        updates, new = self._optimizer.update(gradients, state, arrays)
        arrays, new = apply_rows(arrays, updates), new._replace(count=jnp.where(finite, new.count, state.count))
        variables = [(path, v.replace(arrays[_name(path)])) for path, v in nnx.to_flat_state(tables)]
        return nnx.from_flat_state(variables), new, rows_norm(updates)


def rows_norm(rows: Rows) -> Float[Array, ""]:
    """L2 norm of the sums of all tables."""
    return jnp.float32(optax.tree.norm([of_table.sums for of_table in rows.values()])) if rows else jnp.zeros(())


def _by_path(tables: nnx.State) -> dict[str, Array]:
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(tables)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))

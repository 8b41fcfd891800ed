"""Checkpoints of a run's memory tables of which only the rows are written that changed since the one before.

    run/tables/<table>.<layer>    a `TableStore` with arrays values, mu and nu, of which every checkpoint is a version
    run/checkpoints/<step>        all else

A step's tables are on disk before its checkpoint is begun, and versions are dropped only when their checkpoint is: whatever
moment a run is killed at, each complete checkpoint has its tables. Going on from one rewinds the tables to it.

Cost: the rows changed, once to the host and once to disk; the first checkpoint writes whole tables.
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmem.checkpoints import RowArray, TableStore
from jaxmem.checkpoints.table_steps import rows_on_host
from jaxmem.checkpoints.table_versions import MANIFEST
from jaxmem.training.lazy_adam import LazyAdamState
from jaxmem.training.step import TrainState
from jaxmem.training.tables import TableTraining, by_path, with_arrays
from jaxmem.typing import Array, PyTree

Layer = tuple[int, ...]
"""(place in a stack,), or () for a table that is none."""


class TableCheckpoints:
    """The tables of one run, written by one process.

    Raises: ValueError in a run of several processes.
    """

    def __init__(self, directory: Path, config: Any):
        """Args: directory: run/tables, made when something is saved; config: the run's `TrainConfig`."""
        if jax.process_count() > 1:
            raise ValueError(
                "checkpoints: needs one process to write touched rows of tables, "
                f"got {jax.process_count()}; use checkpoint.tables='whole'"
            )
        self._directory, self._training = directory, TableTraining(config)

    def rest(self, state: TrainState) -> dict[str, PyTree]:
        """What else a checkpoint holds."""
        others, tables = self._training.split(state.params)
        opt_state = (state.opt_state[0], state.opt_state[1].count) if tables else state.opt_state
        return {"step": state.step, "params": others, "opt_state": opt_state}

    def save(self, state: TrainState, complete: list[int]) -> TrainState:
        """Writes the rows that changed as those of the state's step; returns the state, in which none has changed.

        Args:
          complete: checkpoints whose tables are still needed; those of others are dropped.

        Raises: CheckpointError if they cannot be written; earlier ones are intact.
        """
        step = int(state.step)
        for path, layer, arrays in self._arrays(state):
            store = self._store(path, layer) or self._create(path, layer, arrays)
            if step in store.steps():
                continue  # this is tried again, as the disk was full when others were written
            touched = state.opt_state[1].touched[path]
            rows = np.flatnonzero(np.asarray(touched[layer] if layer else touched))
            store.write(rows, {name: rows_on_host(array, rows, layer) for name, array in arrays.items()}, step)
            store.keep_or_warn([kept for kept in store.steps() if kept in complete or kept == step])
        return self._untouched(state)

    def restore(self, rest: dict[str, PyTree], abstract: TrainState) -> TrainState:
        """The whole state of a checkpoint, laid out as `abstract` is; the tables of later steps are dropped.

        Raises: ValueError for tables of other shapes, or without that step; CheckpointError for damaged ones.
        """
        step = int(rest["step"])
        for path, layer, _ in self._arrays(abstract):
            self._needed(path, layer).rewind(step)
        _, tables = self._training.split(abstract.params)
        if not tables:
            return TrainState(**rest)
        opt_state, count = rest["opt_state"]
        moments = abstract.opt_state[1]
        mu, nu = (
            {path: self._load(path, n, step, like) for path, like in getattr(moments, n).items()} for n in ("mu", "nu")
        )
        every = jax.tree.map(lambda like: jax.device_put(np.ones(like.shape, bool), like.sharding), moments.touched)
        params = nnx.merge_state(rest["params"], self.load(step, tables))
        return self._untouched(TrainState(rest["step"], params, (opt_state, LazyAdamState(count, mu, nu, every))))

    def load(self, step: int, tables: nnx.State) -> nnx.State:
        """The tables of a step, in the place of their shapes; nothing on disk changes. Raises: as `restore`."""
        return with_arrays(tables, {path: self._load(path, "values", step, a) for path, a in by_path(tables).items()})

    def forget(self) -> None:
        """Deletes tables of a run that has no complete checkpoint."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _untouched(self, state: TrainState) -> TrainState:
        _, tables = self._training.split(state.params)
        if not tables:
            return state
        opt_state, lazy = state.opt_state
        return state._replace(opt_state=(opt_state, lazy._replace(touched=_none(lazy.touched))))

    def _arrays(self, state: TrainState) -> Iterator[tuple[str, Layer, dict[str, Array]]]:
        _, tables = self._training.split(state.params)
        for path, values in by_path(tables).items():
            lazy = state.opt_state[1]
            arrays = {"values": values, "mu": lazy.mu[path], "nu": lazy.nu[path]}
            yield from ((path, layer, arrays) for layer in np.ndindex(values.shape[:-2]))

    def _folder(self, path: str, layer: Layer) -> Path:
        return self._directory / ".".join((*path.split("/"), *map(str, layer)))

    def _store(self, path: str, layer: Layer) -> TableStore | None:
        folder = self._folder(path, layer)
        return self._own(TableStore(folder)) if (folder / MANIFEST).exists() else None

    def _own(self, store: TableStore) -> TableStore:
        if store.label not in ("", store.directory.name):
            raise ValueError(
                f"table {store.directory}: needs the rows of {store.directory.name}, got those of {store.label}; "
                "rename the folders back"
            )
        return store

    def _needed(self, path: str, layer: Layer) -> TableStore:
        return self._store(path, layer) or TableStore(self._folder(path, layer))  # which says that there is none

    def _create(self, path: str, layer: Layer, arrays: dict[str, Array]) -> TableStore:
        kinds = {name: RowArray(array.shape[-1], str(array.dtype)) for name, array in arrays.items()}
        label = self._folder(path, layer).name
        return TableStore.create(self._folder(path, layer), arrays["values"].shape[-2], kinds, label)

    def _load(self, path: str, name: str, step: int, like: jax.ShapeDtypeStruct) -> Array:
        """Each device's part is read for it alone."""
        *stack, n_rows, width = like.shape
        stores = {layer: self._needed(path, layer) for layer in np.ndindex(*stack)}
        for store in stores.values():
            store.expect({name: jax.ShapeDtypeStruct((n_rows, width), like.dtype)}, n_rows)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            *layers, rows, columns = (slice(*at.indices(size)) for at, size in zip(index, like.shape, strict=True))
            picked = [np.arange(size)[at] for at, size in zip(layers, stack, strict=True)]
            found = [
                stores[tuple(map(int, layer))].read(name, rows, columns, step) for layer in itertools.product(*picked)
            ]
            return np.reshape(np.stack(found), (*map(len, picked), *found[0].shape))

        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(like.shape, like.sharding or first, part)


@jax.jit
def _none(touched: PyTree) -> PyTree:
    return jax.tree.map(lambda rows: rows & False, touched)

"""Between hosts and the mesh: batches to devices, and every process's place in the data into one checkpoint."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.sharding import current_rules
from jaxmem.typing import Array, Int, PyTree


def on_mesh(mesh: Mesh | None) -> Callable[[Int[np.ndarray, "*parts B T"]], Array]:
    """A function that puts this process's rows of a batch where the step wants them; B is split, parts and T are not."""

    def place(rows: np.ndarray) -> Array:
        if mesh is None:
            return jax.device_put(rows)
        batch = current_rules().spec(("batch",), "activations", (rows.shape[-2] * jax.process_count(),), mesh)
        sharding = NamedSharding(mesh, P(*[None] * (rows.ndim - 2), *batch, None))
        return jax.make_array_from_process_local_data(sharding, rows)

    return place


def on_devices(abstract: PyTree, mesh: Mesh | None) -> PyTree:
    """Abstract arrays as traced under `mesh`, with shardings that name its devices: what a checkpoint is restored to."""
    if mesh is None:
        return abstract

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec  # a scalar is traced without any
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def any_process(flag: bool) -> bool:
    """True on every process if it is on any; all must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array([flag])).any())


def to_host(tree: PyTree) -> PyTree:
    """Global arrays as numpy arrays, whole on every process."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def gather_states(state: Any) -> list[Any]:
    """The JSON-like states of all processes, by process, on every process."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[: int(n)])) for row, n in zip(rows, lengths.ravel(), strict=True)]


def scatter_state(states: list[Any]) -> Any:
    """This process's part of what `gather_states` gave.

    Raises: ValueError if another number of processes wrote it.
    """
    if len(states) != jax.process_count():
        raise ValueError(
            f"resume: needs the {len(states)} processes that read the data before, got {jax.process_count()}; "
            "start as many, the mesh may differ"
        )
    return states[jax.process_index()]

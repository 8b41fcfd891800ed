"""Between hosts and the mesh: batches to devices, and every process's place in the data into one checkpoint."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.sharding import current_rules
from jaxmem.sharding.layouts import check_layout
from jaxmem.sharding.rules import rules_of
from jaxmem.training.experiment import TrainConfig
from jaxmem.typing import Array, Int, PyTree


def require_fit(config: TrainConfig, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises ValueError for a batch that the mesh does not split, now and not when all is compiled."""
    if mesh is not None:
        shape = config.data.batch_size // config.accumulate, config.data.context_tokens
        rules_of(config.mesh).spec(("batch", "time"), "activations", shape, mesh)
        check_layout(config.mesh.layout, shape[1], mesh.shape["seq"])


def share_of_rows(mesh: Mesh | None) -> tuple[int, int]:
    """(which, of how many): the share of a batch's rows that this process reads. Processes that share the tokens of the same
    rows, as over the mesh axis `seq`, have the same.

    Raises: ValueError for a mesh in which a process would need pieces of several shares.
    """
    if mesh is None:
        return jax.process_index(), jax.process_count()
    of_batch = current_rules().activations["batch"]
    n = math.prod(mesh.shape[axis] for axis in of_batch)
    held: dict[int, set[int]] = {}
    for device, (part,) in NamedSharding(mesh, P(of_batch)).devices_indices_map((n,)).items():
        held.setdefault(device.process_index, set()).add(part.indices(n)[0])
    return whole_share(held, jax.process_index(), n)


def whole_share(held: dict[int, set[int]], process: int, n_pieces: int) -> tuple[int, int]:
    """(which, of how many) shares a process has, of the pieces of a batch that each process holds.

    Raises: ValueError if these are not shares of one size.

    >>> whole_share({0: {0, 1}, 1: {2, 3}}, process=1, n_pieces=4)
    (1, 2)
    >>> whole_share({0: {0}, 1: {0}, 2: {1}, 3: {1}}, process=2, n_pieces=2)
    (1, 2)
    """
    size = len(held[process])
    if any(pieces != set(range(min(pieces), min(pieces) + size)) or min(pieces) % size for pieces in held.values()):
        raise ValueError(
            f"mesh: needs processes that hold the same rows of a batch or none in common, got the pieces {held} by process; "
            "let the devices of a process be neighbours in the mesh, and its axes multiples of each other"
        )
    return min(held[process]) // size, n_pieces // size


def on_mesh(mesh: Mesh | None) -> Callable[[Int[np.ndarray, "*parts B T"]], Array]:
    """A function that puts this process's rows of a batch where the step wants them; B and T are split, parts are not."""
    n_shares = share_of_rows(mesh)[1]

    def place(rows: np.ndarray) -> Array:
        if mesh is None:
            return jax.device_put(rows)
        shape = *rows.shape[:-2], rows.shape[-2] * n_shares, rows.shape[-1]
        spec = current_rules().spec(("batch", "time"), "activations", shape[-2:], mesh)
        sharding = NamedSharding(mesh, P(*[None] * (rows.ndim - 2), *spec))
        return jax.make_array_from_process_local_data(sharding, rows, shape)

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

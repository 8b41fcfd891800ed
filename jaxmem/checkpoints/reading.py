"""Reading checkpoints: the newest intact one, compared with the model before it is loaded, onto any mesh.

Nothing here writes, so an evaluation may read beside a training run.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import GetAttrKey, keystr

from jaxmem.checkpoints.integrity import DamagedCheckpoint, check_files

ARRAYS, RUN_CONFIG, DATA_STATE, METRIC = "arrays", "run_config", "data_state", "metric"
LINES_IN_MESSAGE = 5
_READINGS = 20
"""At most, of a run that drops its checkpoints faster than they are read."""


Read = TypeVar("Read")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be read; the message says what is left."""


class Restored(NamedTuple):
    """One checkpoint; `notes` says in a sentence each which newer ones were passed over, and why."""

    step: int
    tree: Any
    data_state: Any
    run_config: dict[str, Any]
    notes: list[str]


def complete_steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints that were written to their end, oldest first; empty without a directory."""
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(absolute(directory)))


def best_step(directory: str | os.PathLike) -> int | None:
    """The complete checkpoint with the lowest metric, or None where no checkpoint has one."""
    metrics = saved_metrics(directory)
    return min(metrics, key=metrics.__getitem__, default=None)


def read_run_config(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The resolved configuration beside the arrays of a checkpoint: enough to build the model that they fit.

    Raises: as `load_checkpoint`.
    """

    def read() -> dict[str, Any]:
        found, _ = _newest_intact(directory, step)
        return read_json(absolute(directory) / str(found), RUN_CONFIG)

    return again_if_gone(directory, read)


def load_checkpoint(
    directory: str | os.PathLike,
    abstract_tree: Any,
    step: int | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> Restored:
    """A checkpoint as arrays of the shapes, dtypes and shardings asked for, whatever mesh wrote it.

    Args:
      abstract_tree: pytree with `jax.ShapeDtypeStruct` leaves; no sharding means the first device. Where it is a dict,
        leaving out keys at the top ("opt_state") leaves out what is below them.
      step: None is the newest one that is intact; older ones step in for damaged ones, with a note.
      run_config: the configuration in use, for the message when the model does not fit.

    Raises:
      CheckpointError: no intact checkpoint.
      ValueError: no checkpoint of that step, or a checkpoint of another model, which is never passed over.
    Cost: every byte is read twice, the first time for its checksum.
    """
    return again_if_gone(directory, lambda: _load(directory, abstract_tree, step, run_config))


def again_if_gone(directory: str | os.PathLike, read: Callable[[], Read]) -> Read:
    """What `read` returns, anew where it fails while a checkpoint disappears, as beside a run that keeps only the last."""
    for _ in range(_READINGS):
        before = complete_steps(directory)
        try:
            return read()
        except Exception:  # of a file in the middle of it, or of a checkpoint that is not there any more
            if set(before) <= set(complete_steps(directory)):
                raise
    return read()


def _load(
    directory: str | os.PathLike, abstract_tree: Any, step: int | None, run_config: Mapping[str, Any] | None
) -> Restored:
    found, notes = _newest_intact(directory, step)
    folder = absolute(directory) / str(found)
    saved_config = read_json(folder, RUN_CONFIG)
    wanted = named_leaves(abstract_tree)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = handler.metadata(folder / ARRAYS).tree
        if differences := list(_array_differences(saved, wanted)):
            changes = config_differences(saved_config, run_config) if run_config is not None else []
            if all(line.startswith("opt_state/") for line in differences) and not _of_model(changes):
                raise ValueError(
                    f"checkpoint {folder}: needs an optimiser that keeps of each parameter what is saved of it, got another: "
                    f"{_first(differences)}; its parameters fit and can be used, but a run goes on with the version of "
                    "jaxmem and the optimizer that it began with only; use these, or start a new run"
                )
            raise ValueError(
                f"checkpoint {folder}: needs the arrays of this model, got {_first(differences)}; "
                + (f"the configurations differ in {_first(changes)}; " if changes else "")
                + "use the configuration saved in the checkpoint, or another directory"
            )
        arrays = handler.restore(folder / ARRAYS, args=_restore_args(wanted))
    tree = jax.tree.unflatten(jax.tree.structure(abstract_tree), [arrays[name] for name in wanted])
    return Restored(found, tree, read_json(folder, DATA_STATE), saved_config, notes)


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each entry of two nested configurations that differs.

    >>> config_differences({"model": {"width": 128}, "seed": 0}, {"model": {"width": 256}, "seed": 0})
    ['model.width: checkpoint 128, now 256']
    >>> config_differences({"pattern": [{"n_heads": 2}, {"window": 8}]}, {"pattern": [{"n_heads": 2}, {"window": 9}]})
    ['pattern.1.window: checkpoint 8, now 9']
    """
    lines = []
    for key in dict.fromkeys((*saved, *current)):
        before, now = saved.get(key), current.get(key)
        of_configs = isinstance(before, list) and any(isinstance(part, Mapping) for part in before)
        if of_configs and isinstance(now, list) and len(before) == len(now):
            before, now = dict(enumerate(before)), dict(enumerate(now))
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += config_differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: checkpoint {before!r}, now {now!r}")
    return lines


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, "params/embedding/table", in the order of `jax.tree.leaves`.

    Raises: ValueError for a leaf that is no plain array, a dtype that jax would narrow, for two leaves of one name.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if path and path[-1] == GetAttrKey("value"):  # an nnx.Variable is one array to its reader
            path = path[:-1]
        name = keystr(path, simple=True, separator="/")
        dtype = getattr(leaf, "dtype", None)
        if not isinstance(dtype, np.dtype) or dtype != jax.dtypes.canonicalize_dtype(dtype):
            raise ValueError(
                "checkpoint: needs arrays of dtypes that jax restores exactly, "
                f"got {name}={leaf if dtype is None else dtype}; "
                "convert it with jnp.asarray, or a random key with jax.random.key_data"
            )
        if name in leaves:
            raise ValueError(f"checkpoint: needs one name for each array, got {name} twice; rename one of them")
        leaves[name] = leaf
    return leaves


def absolute(directory: str | os.PathLike) -> epath.Path:
    """The directory as orbax wants it; `gs://` and the like stay as they are."""
    path = epath.Path(directory).expanduser()
    return path if "://" in str(path) else path.resolve()


def read_json(folder: epath.Path, item: str) -> Any:
    """A JSON item of one checkpoint."""
    return json.loads((folder / item / json_file(item)).read_text())


def json_file(item: str) -> str:
    """The file of a JSON item, in the folder of that item."""
    return f"{item}.json"


def saved_metrics(directory: str | os.PathLike) -> dict[int, float]:
    """The metric of each complete checkpoint that has one; one that cannot be read counts as none."""
    metrics = {}
    for step in complete_steps(directory):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            metrics[step] = float(read_json(absolute(directory) / str(step), METRIC)["metric"])
    return metrics


def _newest_intact(directory: str | os.PathLike, step: int | None) -> tuple[int, list[str]]:
    steps = complete_steps(directory)
    if step is not None and step not in steps:
        raise ValueError(f"checkpoints in {directory}: needs one of the steps {steps}, got step={step}; choose another")
    notes: list[str] = []
    for candidate in [step] if step is not None else reversed(steps):
        try:
            check_files(absolute(directory) / str(candidate))
        except DamagedCheckpoint as damage:
            if not (absolute(directory) / str(candidate)).exists():
                raise  # dropped meanwhile, so there are newer ones
            notes.append(str(damage))
        else:
            return candidate, notes
    raise CheckpointError(
        f"checkpoints in {directory}: needs an intact checkpoint, got {'; '.join(notes) or 'none'}; "
        + (
            "copy one back from elsewhere, or start again in another directory"
            if notes
            else "wait for the first, or put them back"
        )
    )


def _restore_args(wanted: Mapping[str, Any]) -> ocp.args.PyTreeRestore:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
        for name, leaf in wanted.items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    return ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=True)


def _array_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Arrays that are missing on one side, or differ in shape or dtype, below the top keys of `wanted`."""
    tops = {name.split("/")[0] for name in wanted}
    for name in dict.fromkeys((*wanted, *saved)):
        before, now = _describe(saved.get(name)), _describe(wanted.get(name))
        if before != now and name.split("/")[0] in tops:
            yield f"{name}: checkpoint {before}, model {now}"


def _of_model(changes: list[str]) -> list[str]:
    return [line for line in changes if line.startswith("model.")]


def _describe(array: Any) -> str:
    return "has none" if array is None else f"{np.dtype(array.dtype)}{list(array.shape)}"


def _first(lines: list[str]) -> str:
    """The first few lines, and how many are left out."""
    more = len(lines) - LINES_IN_MESSAGE
    return "; ".join(lines[:LINES_IN_MESSAGE]) + (f"; and {more} more" if more > 0 else "")

"""Writing checkpoints: asynchronous and atomic through orbax, the last few and the best ones kept.

A run directory holds `checkpoints/<step>/` with the arrays, the resolved configuration, the state of the data, the
metric and the checksums of all of it. A folder of that name appears only when everything in it is on disk.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxmem.checkpoints.integrity import CHECKSUMS, ChecksumHandler
from jaxmem.checkpoints.reading import (
    ARRAYS,
    DATA_STATE,
    METRIC,
    RUN_CONFIG,
    CheckpointError,
    Restored,
    absolute,
    complete_steps,
    json_file,
    load_checkpoint,
    named_leaves,
    saved_metrics,
)
from jaxmem.fields import Count, Natural, checked

_RETIRED = "retired"


@dataclasses.dataclass(frozen=True)
@checked
class CheckpointConfig:
    """When to save and what to keep; a checkpoint stays if it is among the last or among the best.

    Raises: ValueError for less than one step or one last checkpoint, and for a negative number of best ones.
    """

    every_steps: Count = 1000
    keep_last: Count = 3
    keep_best: Natural = 1
    """By the lowest metric, of those that have one."""
    checksum_arrays: bool = True
    """Read every file once more for its CRC-32, about a second per GB; if False, only sizes above 1 MiB."""
    tables: Literal["whole", "touched"] = "whole"
    """Memory tables as all else, or of them and their moments only the rows that changed since the checkpoint before."""


@dataclasses.dataclass
class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Orbax policy: the n steps with the lowest metric, later ones first where equal."""

    n: int
    metrics: dict[int, float]

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        ranked = sorted((self.metrics[c.step], -c.step) for c in checkpoints if c.step in self.metrics)
        best = {-step for _, step in ranked[: self.n]}
        return [c.step in best for c in checkpoints]


class CheckpointStore:
    """The checkpoints of one run, written by one job; a context manager that waits for the last save.

    Opening it removes what killed saves left behind, so a second program that only reads takes `load_checkpoint`.

    Args:
      directory: `checkpoints` of the run directory; made if it does not exist.
      run_config: the resolved configuration, JSON values only, saved in every checkpoint.

    Raises:
      CheckpointError: the directory cannot be made.

    In a loop:

        with CheckpointStore(directory, CheckpointConfig(every_steps=100), {"seed": 0}) as store:
            restored = store.restore(abstract_tree) if store.steps() else None
            store.save(100, {"params": params, "opt_state": opt_state}, data_state={"position": 6400}, metric=2.5)
    """

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig, run_config: Mapping[str, Any]):
        self._directory = absolute(directory)
        self._config = config
        self._run_config = json.loads(json.dumps(run_config))
        self._saving: int | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints: needs a directory that can be written, got {self._directory} ({error}); name another one"
            ) from error
        self._open()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return complete_steps(self._directory)

    def describe(self, run_config: Mapping[str, Any]) -> None:
        """Saves another resolved configuration from now on: that of a run which goes on with other rates, say."""
        self._run_config = json.loads(json.dumps(run_config))

    def save(self, step: int, tree: Any, data_state: Any, metric: float | None = None) -> None:
        """Starts a checkpoint; returns when the arrays are copied, so a train step may donate them next.

        Args:
          tree: pytree of arrays; in a run on several processes all of them call this with the same global arrays.
          data_state: JSON values, restored with the arrays: where the data iterator stands.
          metric: lower is better; None and NaN are never among the best.

        Raises:
          CheckpointError: this or the previous save could not be written. Nothing else is lost; a next save may work.
          ValueError: the step exists, or the tree has leaves that are no arrays.
          TypeError: `data_state` is not JSON.
        Cost: the tree once in host memory until it is written.
        """
        self.wait()
        if step in self.steps():
            raise ValueError(
                f"checkpoints in {self._directory}: needs a step that is not saved yet, got step={step}; "
                "continue from the newest checkpoint, or use another directory"
            )
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        json_items = {
            RUN_CONFIG: self._run_config,
            DATA_STATE: json.loads(json.dumps(data_state)),  # a copy: the iterator moves on while this is written
            METRIC: {"metric": metric},
            CHECKSUMS: {"step": step},  # and more when the others are on disk
        }
        items = {ARRAYS: ocp.args.PyTreeSave(named_leaves(tree))}
        items |= {name: ocp.args.JsonSave(value) for name, value in json_items.items()}
        if metric is not None:
            self._metrics[step] = metric
        self._saving = step
        with self._failure_explained():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises: CheckpointError, once, if it could not be written.
        """
        with self._failure_explained():
            self._manager.wait_until_finished()
        self._delete_retired()

    def restore(self, abstract_tree: Any, step: int | None = None) -> Restored:
        """`load_checkpoint` from this directory; newer checkpoints that are damaged are renamed out of the way.

        Raises: as `load_checkpoint`, and CheckpointError as `wait`.
        """
        self.wait()
        restored = load_checkpoint(self._directory, abstract_tree, step, self._run_config)
        if restored.notes:
            self._set_aside([newer for newer in self.steps() if newer > restored.step], "damaged")
        return restored

    def set_aside_after(self, step: int) -> list[int]:
        """The steps of later checkpoints, now renamed to `<step>.set-aside`, for a run that goes on from an earlier one."""
        self.wait()
        if later := [newer for newer in self.steps() if newer > step]:
            self._set_aside(later, "set-aside")
            for newer in later:
                self._metrics.pop(newer, None)
        return later

    def close(self) -> None:
        """Waits for the last save and releases orbax's threads.

        Raises: CheckpointError as `wait`.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _open(self) -> None:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(ARRAYS, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler())
        for item in (RUN_CONFIG, DATA_STATE, METRIC):
            registry.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler(json_file(item)))
        # Orbax finalizes items in this order, and the checksums are those of all items before them.
        registry.add(CHECKSUMS, ocp.args.JsonSave, ChecksumHandler(self._config.checksum_arrays))
        self._metrics = saved_metrics(self._directory)
        kept = [
            checkpoint_managers.LatestN(self._config.keep_last),
            _KeepBest(self._config.keep_best, self._metrics),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            todelete_subdir=_RETIRED,  # renamed, which is atomic: a kill must not leave half of an old checkpoint
        )
        self._delete_retired()
        self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)

    def _delete_retired(self) -> None:
        """Frees the space of the checkpoints that orbax has put away."""
        if ocp.multihost.is_primary_host(0):
            (self._directory / _RETIRED).rmtree(missing_ok=True)

    @contextlib.contextmanager
    def _failure_explained(self) -> Iterator[None]:
        """Turns whatever stopped orbax's threads into one sentence, and starts orbax anew for the next save."""
        try:
            yield
        except Exception as error:
            try:
                self._manager.close()
            except Exception as further:  # other threads of the same save
                error.add_note(f"and then {type(further).__name__}: {further}")
            self._open()  # forgets the failed step, remembers those it would have replaced, frees its space
            steps = self.steps()
            left = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
            raise CheckpointError(
                f"checkpoint {self._saving}: needs to be written to {self._directory}, got {_root_cause(error)}; "
                f"{left}; make room there or name another directory, and resume"
            ) from error

    def _set_aside(self, steps: Sequence[int], why: str) -> None:
        """Renames checkpoints to `<step>.<why>`, so that their steps can be saved again."""
        ocp.multihost.sync_global_processes("jaxmem: all processes have passed over these checkpoints")
        if ocp.multihost.is_primary_host(0):
            for step in steps:
                copies = len(list(self._directory.glob(f"{step}.{why}*")))
                name = f"{step}.{why}" + (f".{copies + 1}" if copies else "")
                (self._directory / str(step)).rename(self._directory / name)
        ocp.multihost.sync_global_processes("jaxmem: these checkpoints are renamed")
        self._manager.reload()


def _root_cause(error: BaseException) -> str:
    """The reason below orbax's layers; TensorStore names each file on the way and the reason last."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).rpartition('": ')[-1] or type(error).__name__
    return reason.splitlines()[0]

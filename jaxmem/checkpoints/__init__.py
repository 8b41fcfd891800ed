"""Checkpoints: written by `CheckpointStore`, read by `load_checkpoint`, on any mesh; tables on disk in a `TableStore`."""

from jaxmem.checkpoints.disk_rows import DiskRows
from jaxmem.checkpoints.reading import (
    CheckpointError,
    Restored,
    again_if_gone,
    best_step,
    complete_steps,
    config_differences,
    load_checkpoint,
    read_run_config,
)
from jaxmem.checkpoints.store import CheckpointConfig, CheckpointStore
from jaxmem.checkpoints.table_rows import RowArray
from jaxmem.checkpoints.table_steps import load_table, none_touched, save_touched, touch
from jaxmem.checkpoints.table_store import TableStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "DiskRows",
    "Restored",
    "RowArray",
    "TableStore",
    "again_if_gone",
    "best_step",
    "complete_steps",
    "config_differences",
    "load_checkpoint",
    "load_table",
    "none_touched",
    "read_run_config",
    "save_touched",
    "touch",
]

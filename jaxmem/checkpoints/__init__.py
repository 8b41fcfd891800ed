"""Checkpoints: written by `CheckpointStore`, read by `load_checkpoint`, on any mesh."""

from jaxmem.checkpoints.reading import (
    CheckpointError,
    Restored,
    best_step,
    complete_steps,
    config_differences,
    load_checkpoint,
    read_run_config,
)
from jaxmem.checkpoints.store import CheckpointConfig, CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Restored",
    "best_step",
    "complete_steps",
    "config_differences",
    "load_checkpoint",
    "read_run_config",
]

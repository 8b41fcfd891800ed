"""What may go on in a folder that holds a run: the rules of `--resume`."""

import contextlib
import json
from pathlib import Path

from jaxmem.checkpoints import complete_steps, config_differences
from jaxmem.config import to_json
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.metrics import read_metrics

MAY_CHANGE = ("steps", "checkpoint", "mesh", "eval_every_steps", "eval_bytes", "sample_prompt", "sample_tokens")
"""Fields of a TrainConfig that a resumed run may change."""


def check_run_dir(run_dir: Path, config: TrainConfig, resume: bool) -> None:
    """Raises ValueError for a folder that holds a run that `config` would neither start nor go on with."""
    if not has_begun(run_dir):
        return
    if not resume:
        raise ValueError(
            f"train: needs a new folder for a new run, got {str(run_dir)!r} with one in it; "
            "add --resume to go on with it, or name another with --out"
        )
    saved_config = run_dir / "config.json"
    if not saved_config.exists():
        return  # what is in the checkpoint is compared when it is restored
    before, now = json.loads(saved_config.read_text()), to_json(config)
    for name in MAY_CHANGE:
        before.pop(name, None), now.pop(name, None)
    if differences := config_differences(before, now):
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(
            f"resume: needs the config of the run in {str(run_dir)!r}, got another: {shown}; "
            "use the same experiment and options, or start a new run with --out"
        )


def has_begun(run_dir: Path) -> bool:
    """Whether a run in this folder made a step; one that found its input wrong, say, leaves nothing to lose."""
    with contextlib.suppress(FileNotFoundError):
        return bool(complete_steps(run_dir / "checkpoints") or read_metrics(run_dir))
    return False

"""The rules of `--resume`: with which config a run may go on, and when it would lose what it has.

The truth about a run is in its checkpoints, each of which has the config that made it; config.json is for people and for a
run that has no checkpoint yet.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmem.checkpoints import complete_steps, config_differences, read_run_config
from jaxmem.config import UnknownClass, from_json, to_json
from jaxmem.training import rates
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.metrics import METRICS_FILE, read_metrics
from jaxmem.training.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    TABLES,
    checkpoint_files,
    has_begun,
    has_tables,
    read_config,
)

MAY_CHANGE = (
    # when to stop, to save, to look, and where to run
    "steps",
    *(f"checkpoint.{name}" for name in ("every_steps", "keep_last", "keep_best", "checksum_arrays")),
    "mesh",
    "eval_every_steps",
    "eval_bytes",
    "sample_prompt",
    "sample_tokens",
    # how the same batches and gradients are computed
    "accumulate",
    "data.read_threads",
    "model.remat",
    "model.ffn_block_tokens",
    # what is minimised, and the size of steps: moments stay moments, of gradients from here on
    "load_balance",
    "core_rank_penalty",
    "z_loss",
    *(
        f"optimizer.{name}"
        for name in (
            *rates.FIELDS,
            *("learning_rate", "warmup_steps", "schedule", "decay_fraction", "final_fraction"),
            *("weight_decay", "clip_norm", "b1", "b2", "eps", "momentum"),
            *(f"tables.{n}" for n in ("learning_rate", "weight_decay", "clip_norm", "b1", "b2", "eps", "max_rows")),
        )
    ),
)
"""Fields of a TrainConfig that a resumed run may change, with all below them. Not among them is what the state is a state
of: the model, the kind of optimiser, how tables are updated and saved, which text is read in which order, and the seed."""


def check_run_dir(run_dir: Path, config: TrainConfig, resume: bool, from_step: int | None = None) -> None:
    """Raises ValueError for a folder that holds a run that `config` would neither start nor go on with."""
    if from_step is not None and not resume:
        raise ValueError(f"train: needs --resume to go on from a step, got --from-step {from_step} alone; add it")
    if not has_begun(run_dir):
        return
    if not resume:
        raise ValueError(
            f"train: needs a new folder for a new run, got {str(run_dir)!r}, where one has begun; "
            "add --resume to go on with it, or name another with --out"
        )
    checkpoints = run_dir / CHECKPOINTS
    if steps := complete_steps(checkpoints):
        saved = unchecked_config(checkpoints, steps[-1] if from_step is None else from_step)
        if saved is None or _split(saved, config)[0]:
            check_config(run_dir, read_run_config(checkpoints, from_step), config)
        return
    if (run_dir / CONFIG_FILE).exists():
        check_config(run_dir, read_config(run_dir), config)
    _check_nothing_is_missing(run_dir, config)


def check_config(run_dir: Path, saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises ValueError if a run of the config `saved` cannot go on with `config`."""
    if differences := _split(saved, config)[0]:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(
            f"resume: needs the config of the run in {str(run_dir)!r}, got another: {shown}; "
            "use the same experiment and options, or start a new run with --out"
        )


def notes_on_config(run_dir: Path, saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What to tell about the config of a run that goes on: what changes, and what config.json is not.

    Args:
      saved: that of the checkpoint.
    """
    of_rates = tuple(f"optimizer.{name}:" for name in rates.FIELDS)  # which `rates` tells
    changed = [line for line in _split(saved, config)[1] if not line.startswith(of_rates)]
    notes = [f"changed from here on: {'; '.join(changed)}"] if changed else []
    return notes + notes_on_config_file(run_dir, saved, "it is written again")


def notes_on_config_file(run_dir: Path, saved: Mapping[str, Any], fate: str) -> list[str]:
    """What to tell if config.json is missing, damaged, or not that of the checkpoint, which counts.

    Args:
      fate: what is done then.
    """
    try:
        found = read_config(run_dir)
    except ValueError as error:
        return [f"{str(error).rpartition('; ')[0]}: {fate}"]
    try:
        from_json(dict(found))
    except UnknownClass:
        pass
    except ValueError as error:
        return [f"{run_dir / CONFIG_FILE}: {str(error).rpartition('; ')[0]}: {fate}"]
    if differences := [
        line for line in config_differences(_complete(saved), _complete(found)) if not _may_change(line)
    ]:
        shown = "; ".join(line.replace(", now ", f", {CONFIG_FILE} ") for line in differences[:3])
        return [f"{run_dir / CONFIG_FILE} is not the checkpoint's, which counts ({shown}): {fate}"]
    return []


def _check_nothing_is_missing(run_dir: Path, config: TrainConfig) -> None:
    """Raises ValueError if starting again at step 0 would lose what checkpoints elsewhere belong to."""
    records = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
    last = max((record["step"] for record in records), default=0)
    if not last and not has_tables(run_dir):
        return
    names = [path.name for path in checkpoint_files(run_dir)]
    aside = [name for name in names if name.partition(".")[2].startswith(("damaged", "set-aside"))]
    every = config.checkpoint.every_steps
    with contextlib.suppress(ValueError, KeyError, TypeError):
        every = int(read_config(run_dir)["checkpoint"]["every_steps"])
    if aside:
        got = f"only {', '.join(aside)}"
    elif not names:
        got = "none (is a disk not mounted?)"
    elif last > 2 * every:  # a save may still be under way when the next is due
        got = "none of them"
    else:
        return
    has = [f"{METRICS_FILE} up to step {last}"] * bool(last) + [f"{TABLES}/"] * has_tables(run_dir)
    raise ValueError(
        f"resume: needs the checkpoints of the run in {str(run_dir)!r}, which has {' and '.join(has)}, got {got} in "
        f"{CHECKPOINTS}/; put them back, start a new run with --out, or remove what is left to begin again at step 0"
    )


def unchecked_config(checkpoints: Path, step: int) -> dict[str, Any] | None:
    """The config in a checkpoint, without the cost of reading all of that for its checksums; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((checkpoints / str(step) / "run_config" / "run_config.json").read_bytes())
        return found if isinstance(found, dict) else None
    return None


def _split(saved: Mapping[str, Any], config: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs and must not, and what differs and may."""
    lines = config_differences(_complete(saved), to_json(config))
    return [line for line in lines if not _may_change(line)], [line for line in lines if _may_change(line)]


def _may_change(difference: str) -> bool:
    path = difference.partition(":")[0]
    return any(path == name or path.startswith(f"{name}.") for name in MAY_CHANGE)


def _complete(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of fields that are newer than the file."""
    with contextlib.suppress(ValueError):
        config = from_json(dict(saved))
        return to_json(config) if isinstance(config, TrainConfig) else saved
    return saved

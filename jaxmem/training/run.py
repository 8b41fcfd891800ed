"""Reading a finished or unfinished run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxmem.checkpoints import Restored, again_if_gone, complete_steps, load_checkpoint, read_run_config
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.models.tokenizer import Tokenizer
from jaxmem.programs import keep_programs
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.identity import check_tokenizer, tokenizer_of_run
from jaxmem.training.metrics import METRICS_FILE, read_metrics
from jaxmem.training.own_code import read_own
from jaxmem.training.resume import notes_on_config_file, unchecked_config
from jaxmem.training.run_folder import CHECKPOINTS, CONFIG_FILE, TABLES, read_config
from jaxmem.training.step import init_state, merge
from jaxmem.training.table_checkpoints import TableCheckpoints
from jaxmem.training.tables import TableTraining


class LoadedRun(NamedTuple):
    """A trained model and what goes with it."""

    config: TrainConfig
    model: Decoder
    tokenizer: Tokenizer
    step: int
    notes: list[str]
    """Sentences on newer checkpoints that were passed over because they are damaged, and on another config in config.json."""


def load_run(run_dir: str | Path, step: int | None = None, imports: Sequence[str | Path] = ()) -> LoadedRun:
    """The model of a run's folder, from one checkpoint, on one device. Its config is that of the checkpoint.

    Nothing in the folder is executed.

    Args:
      step: of the checkpoint; None is the newest intact one.
      imports: Python files that define classes of the config which are not jaxmem's; they are run.

    Raises:
      ValueError: no run there, no such step, a class that no file defines, or a tokenizer that does not fit the model.
      CheckpointError: no intact checkpoint.
    """
    run_dir = Path(run_dir)
    keep_programs()
    saved, where, notes = _config_of(run_dir, step)
    config = read_own(saved, where, run_dir, imports)
    tokenizer = tokenizer_of_run(config.data.tokenizer, run_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"run: needs a tokenizer of at most {config.model.vocab_size} tokens, got vocab_size={tokenizer.vocab_size} "
            f"in {config.data.tokenizer}; put back the tokenizer that the model was trained with"
        )
    params = jax.eval_shape(lambda: init_state(config)).params
    apart = config.checkpoint.tables == "touched"
    others, tables = TableTraining(config).split(params) if apart else (params, nnx.State({}))

    def load() -> tuple[Restored, nnx.State]:
        restored = load_checkpoint(run_dir / CHECKPOINTS, {"params": others}, step)
        params = restored.tree["params"]
        if tables:
            params = nnx.merge_state(params, TableCheckpoints(run_dir / TABLES, config).load(restored.step, tables))
        return restored, params

    restored, params = again_if_gone(run_dir / CHECKPOINTS, load)  # its tables too
    check_tokenizer((restored.data_state or {}).get("data"), tokenizer, run_dir)
    model = merge(config.model, params)
    return LoadedRun(
        config, model, tokenizer, restored.step, [*(f"passed over: {note}" for note in restored.notes), *notes]
    )


def describe_run(run_dir: str | Path) -> tuple[DecoderConfig, list[str]]:
    """The model's config and a few lines on how a run stands; nothing is loaded, and nothing of the folder is executed.

    Raises: ValueError as `load_run`.
    """
    run_dir = Path(run_dir)
    saved, where, notes = _config_of(run_dir, None)
    config = read_own(saved, where, run_dir)
    steps = complete_steps(run_dir / CHECKPOINTS)
    records = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    last = lambda kind: next((line for line in reversed(records) if line["kind"] == kind), None)
    train, held_out, final = map(last, ("train", "eval", "final"))
    made = train["step"] if train else 0
    lines = [f"{run_dir}: {made:,} of {config.steps:,} steps{', ended' if final else ''}"]
    lines.append(f"checkpoints: {', '.join(f'{step:,}' for step in steps) or 'none'}")
    if held_out:
        lines.append(f"held out: {held_out['bits_per_byte']:.3f} bits per byte at step {held_out['step']:,}")
    if train:
        lines.append(f"trained: {train['bits_per_byte']:.3f} bits per byte, {train['tokens_per_s']:,.0f} tokens/s")
    return config.model, [*lines, *notes]


def _config_of(run_dir: Path, step: int | None) -> tuple[dict[str, Any], Path, list[str]]:
    """The config of a run, as `_config`, of a folder in which there is one."""
    if not (run_dir / CONFIG_FILE).is_file() and not complete_steps(run_dir / CHECKPOINTS):
        missing = "which has no config.json" if run_dir.is_dir() else "which is no folder"
        raise ValueError(
            f"run: needs a folder with a run, got {str(run_dir)!r}, {missing}; "
            "name the --out of `jaxmem train`, e.g. runs/quickstart"
        )
    return again_if_gone(run_dir / CHECKPOINTS, lambda: _config(run_dir, step))


def _config(run_dir: Path, step: int | None) -> tuple[dict[str, Any], Path, list[str]]:
    """The config of the checkpoint, as JSON, and where it is; what to tell if config.json says something else."""
    checkpoints = run_dir / CHECKPOINTS
    if not (steps := complete_steps(checkpoints)):
        return read_config(run_dir), run_dir / CONFIG_FILE, []
    chosen = steps[-1] if step is None else step
    saved = unchecked_config(checkpoints, chosen)
    if saved is None or notes_on_config_file(run_dir, saved, ""):  # two that agree need not be read whole
        saved = read_run_config(checkpoints, step)
    return saved, checkpoints / str(chosen), notes_on_config_file(run_dir, saved, "the checkpoint's own copy is used")

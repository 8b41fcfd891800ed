"""Reading a finished or unfinished run's folder."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from jaxmem.checkpoints import load_checkpoint
from jaxmem.config import from_json
from jaxmem.models.decoder import Decoder
from jaxmem.models.tokenizer import Tokenizer
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.identity import tokenizer_of_run
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
    """Newer checkpoints that were passed over because they are damaged."""


def load_run(run_dir: str | Path, step: int | None = None) -> LoadedRun:
    """The model of a run's folder, from one checkpoint, on one device.

    Args:
      step: of the checkpoint; None is the newest intact one.

    Raises:
      ValueError: no run there, no such step, or a tokenizer that does not fit the model.
      CheckpointError: no intact checkpoint.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise ValueError(
            f"run: needs a folder with a run, got {str(run_dir)!r} without config.json; "
            "name the --out of `jaxmem train`, e.g. runs/quickstart"
        )
    config: TrainConfig = from_json(json.loads((run_dir / "config.json").read_text()))
    tokenizer = tokenizer_of_run(config.data.tokenizer, run_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"run: needs a tokenizer of at most {config.model.vocab_size} tokens, got vocab_size={tokenizer.vocab_size} "
            f"in {config.data.tokenizer}; put back the tokenizer that the model was trained with"
        )
    params = jax.eval_shape(lambda: init_state(config)).params
    apart = config.checkpoint.tables == "touched"
    others, tables = TableTraining(config).split(params) if apart else (params, nnx.State({}))
    restored = load_checkpoint(run_dir / "checkpoints", {"params": others}, step)
    params = restored.tree["params"]
    if tables:
        params = nnx.merge_state(params, TableCheckpoints(run_dir / "tables", config).load(restored.step, tables))
    model = merge(config.model, params)
    return LoadedRun(config, model, tokenizer, restored.step, restored.notes)

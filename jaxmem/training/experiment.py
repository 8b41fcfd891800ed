"""An experiment: everything that decides a run, as one frozen dataclass, and the Python file that makes it."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.fields import Count, Natural, NonNegative, Seed, checked
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig
from jaxmem.training.data import DataConfig
from jaxmem.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
@checked
class TrainConfig:
    """A training run, resolved: the same config on the same machine and versions gives the same parameters, bit for bit."""

    model: DecoderConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: Count
    """Updates of the parameters."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    accumulate: Count = 1
    """Parts of a batch whose gradients are added up before an update; divides the batch."""
    load_balance: NonNegative = 0.01
    """Weight of the routers' load-balancing loss."""
    core_rank_penalty: NonNegative = 0.0
    """Weight of what keeps the Tucker cores of UltraMem's keys near rank 1 (`tucker_keys.rank_penalty`)."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-partition of the output."""
    eval_every_steps: Count = 500
    """Held-out evaluation; one more comes at the end."""
    eval_bytes: Count | None = None
    """Held-out bytes per evaluation on the way; None is all. The last evaluation takes all."""
    sample_prompt: str = ""
    """What the trained model continues for the report."""
    sample_tokens: Natural = 0
    seed: Seed = 0
    """Of the initial parameters."""

    def __post_init__(self):
        if self.data.batch_size % self.accumulate:
            raise ValueError(
                "TrainConfig: needs data.batch_size divisible by accumulate, "
                f"got batch_size={self.data.batch_size}, accumulate={self.accumulate}; change one of them"
            )
        if self.checkpoint.tables == "touched" and self.optimizer.tables.update == "dense":
            raise ValueError(
                "TrainConfig: needs checkpoint.tables='whole' where every row changes at every step, "
                "got checkpoint.tables='touched' with optimizer.tables.update='dense'; change one of them"
            )


def load_experiment(path: str | Path) -> TrainConfig:
    """The config of an experiment file: what its function `config()` returns.

    Raises: ValueError for a file that is not there or has no such function.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"experiment: needs a Python file, got {str(path)!r}; name one, e.g. experiments/quickstart.py"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"experiment: needs a file that ends in .py, got {str(path)!r}; rename it")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not callable(config) or not isinstance(experiment := config(), TrainConfig):
        raise ValueError(
            f"experiment: needs a function config() that returns a TrainConfig, got none in {str(path)!r}; "
            "experiments/quickstart.py is one to copy"
        )
    return experiment

"""An experiment: everything that decides a run, as one frozen dataclass, and the Python file that makes it."""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from jaxmem.arguments import nearest
from jaxmem.checkpoints import CheckpointConfig
from jaxmem.fields import Count, Natural, NonNegative, Seed, checked, shown
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

    Raises: ValueError for a file that is not there or has no such function, and for whatever the file itself raises, with
      the line.
    """
    path = Path(path)
    if not path.is_file():
        got = f"{str(path)!r}" + (", a folder" if path.is_dir() else ", which is not there")
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], 1)
        advice = f"did you mean {path.with_name(near[0])}?" if near else "name one, e.g. experiments/quickstart.py"
        raise ValueError(f"experiment: needs a Python file, got {got}; {advice}")
    with running(path) as module:
        config = getattr(module, "config", None)
        if inspect.isfunction(config):
            _require_no_arguments(config)
        made = config() if inspect.isroutine(config) else config
    if not isinstance(made, TrainConfig) or made is config:
        got = (
            "none" if config is None else f"{shown(made)} {'from it' if inspect.isroutine(config) else 'of that name'}"
        )
        raise ValueError(
            f"experiment: needs a function config() that returns a TrainConfig, got {got} in {str(path)!r}; "
            "experiments/quickstart.py is one to copy"
        )
    return made


def _require_no_arguments(config: Callable[..., object]) -> None:
    signature = inspect.signature(config)
    try:
        signature.bind()
    except TypeError:
        raise ValueError(
            f"config: needs no arguments, got config{signature} in line {config.__code__.co_firstlineno}; "
            "give them defaults or leave them out"
        ) from None


@contextlib.contextmanager
def running(path: Path) -> Iterator[ModuleType]:
    """A Python file, run as a module that finds what lies beside it.

    Raises: ValueError for whatever the file, or what is done with its module, raises, with the line.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"experiment: needs a file that ends in .py, got {str(path)!r}; rename it")
    module = importlib.util.module_from_spec(spec)
    is_new = sys.modules.setdefault(path.stem, module) is module
    try:
        with found_beside(path):
            spec.loader.exec_module(module)
            yield module
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if is_new:
            del sys.modules[path.stem]
        raise ValueError(explained(error, path)) from error


@contextlib.contextmanager
def found_beside(path: Path) -> Iterator[None]:
    """Modules in the folder of a file can be imported, unless installed ones have their names."""
    folder = str(path.resolve().parent)
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def explained(error: BaseException, path: Path) -> str:
    """One sentence: the line of the experiment file that an error comes from, and what it says."""
    is_own = lambda filename: filename is not None and os.path.abspath(filename) == os.path.abspath(path)
    frames = [frame for frame in traceback.walk_tb(error.__traceback__) if is_own(frame[0].f_code.co_filename)]
    line = frames[-1][1] if frames else None
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and is_own(error.filename):
        line, text = error.lineno, error.msg
    elif isinstance(error, SyntaxError):
        text = error.msg + (f" in {error.filename}, line {error.lineno}" if error.filename else "")
    where = f"experiment {path}" + (f", line {line}" if line else "")
    unknown = re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'.*", text)
    cls = frames[-1][0].f_globals.get(unknown[1]) if unknown and frames else None
    if dataclasses.is_dataclass(cls):
        known = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(cls)}
        near = known.get(nearest(unknown[2].replace("_", "-"), known))
        advice = f"did you mean {near}?" if near else f"it has {', '.join(known.values())}"
        return f"{where}: {unknown[1]}: needs fields that it has, got {unknown[2]}; {advice}"
    if isinstance(error, ValueError) and ": needs " in text:
        return f"{where}: {text}"
    got = f"{type(error).__name__}: {text}" if text else type(error).__name__
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    advice = f"install {missing}, or put {missing}.py beside it" if missing else "correct it"
    return f"{where}: needs a file that runs without an error, got {got}; {advice}"

"""The text that tests/training/tiny.py trains on, and what two runs are compared by."""

import dataclasses
import functools
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.checkpoints import CheckpointConfig, CheckpointStore, complete_steps, load_checkpoint
from jaxmem.config import to_json
from jaxmem.sharding import MeshConfig
from jaxmem.training import loop
from jaxmem.training.experiment import TrainConfig, load_experiment
from jaxmem.training.loop import Outcome, train
from jaxmem.training.metrics import read_metrics
from jaxmem.training.step import init_state

TINY = Path(__file__).with_name("tiny.py")
SAVED = (3, 6, 8)
"""Steps of the checkpoints of `whole`."""
TIMINGS = ("tokens_per_s", "step_s", "wait_s", "save_s", "mfu", "peak_memory_bytes", "wall_s")


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with `text`, 12 files of 100 to 600 bytes, for experiments that are started in it."""
    root = tmp_path_factory.mktemp("work")
    (root / "text").mkdir()
    rng = random.Random(0)
    words = ("memory", "state", "chunk", "ring", "fold", "key", "value", "head", "decay", "router")
    for i in range(12):
        (root / "text" / f"{i:02d}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(20, 90))))
    return root


def checkpoint_bytes(config: TrainConfig, run_dir: Path, step: int) -> tuple[dict[str, bytes], object]:
    """Every array of a checkpoint, parameters and optimizer state, and where the data stand."""
    abstract = jax.eval_shape(lambda: init_state(config))._asdict()
    restored = load_checkpoint(run_dir / "checkpoints", abstract, step)
    leaves = jax.tree_util.tree_leaves_with_path(restored.tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, restored.data_state


def numbers(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics without what is measured by the clock."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run_dir)]


@pytest.fixture(scope="session")
def compare():
    """A function that asserts that two runs are the same to the last bit: state, place in the data, and metrics."""

    def assert_same(config: TrainConfig, found: Path, expected: Path) -> None:
        arrays, data_state = checkpoint_bytes(config, found, config.steps)
        expected_arrays, expected_data_state = checkpoint_bytes(config, expected, config.steps)
        assert len(arrays) > 20 and arrays.keys() == expected_arrays.keys()
        assert not [name for name in arrays if arrays[name] != expected_arrays[name]]
        assert data_state == expected_data_state
        assert numbers(found) == numbers(expected)
        assert (found / "report.html").stat().st_size > 10_000

    return assert_same


_train_step = functools.cache(loop.make_train_step)
_eval_step = functools.cache(loop.make_eval_step)


@pytest.fixture(scope="module")
def compiled():
    """Runs of one config share their compiled functions."""

    def without_saves(config):
        return dataclasses.replace(config, checkpoint=CheckpointConfig())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda config: _train_step(without_saves(config)))
        patch.setattr(loop, "make_eval_step", _eval_step)
        yield


@pytest.fixture(scope="session")
def config(work):
    """Of a run on eight devices."""
    tiny = load_experiment(TINY)
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, train=(str(work / "text"),)),
        mesh=MeshConfig(data=2, fsdp=2, model=2),
        steps=8,
        checkpoint=CheckpointConfig(every_steps=3),
        eval_every_steps=3,
    )


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(config, run_dir, experiment=TINY) == Outcome(8, stopped=False)
    return run_dir


@pytest.fixture
def killed_after(whole, tmp_path):
    """A function that copies the run as it was when killed after the save of a step, in the middle of a line."""

    def copy(step: int) -> Path:
        run_dir = shutil.copytree(whole, tmp_path / f"after_{step}")
        for later in complete_steps(run_dir / "checkpoints"):
            if later > step:
                shutil.rmtree(run_dir / "checkpoints" / str(later))
        path = run_dir / "metrics.jsonl"
        lines = [
            line for line, r in zip(path.read_text().splitlines(True), read_metrics(run_dir)) if r["step"] <= step + 3
        ]
        path.write_text("".join(lines)[:-40])
        (run_dir / "report.html").unlink()
        return run_dir

    return copy


@pytest.fixture(scope="session")
def save_again():
    """A function that replaces a checkpoint by one in which `change(tree)` was done."""

    def save(config, run_dir, step, change=lambda tree: tree, data_state=None):
        abstract = jax.eval_shape(lambda: init_state(config))._asdict()
        restored = load_checkpoint(run_dir / "checkpoints", abstract, step)
        shutil.rmtree(run_dir / "checkpoints" / str(step))
        with CheckpointStore(run_dir / "checkpoints", config.checkpoint, to_json(config)) as store:
            store.save(step, change(restored.tree), data_state or restored.data_state)

    return save

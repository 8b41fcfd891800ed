"""The text that tests/training/tiny.py trains on, and what two runs are compared by."""

import random
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.checkpoints import load_checkpoint
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.metrics import read_metrics
from jaxmem.training.step import init_state

TIMINGS = ("tokens_per_s", "step_s", "wait_s", "wall_s")


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

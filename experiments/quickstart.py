"""Can a laptop train a language model that remembers, in minutes, and see that it learned something?

    jaxmem train experiments/quickstart.py

A byte-level hybrid of mixtures of memories and sliding-window attention on the source of the running Python's own
standard library, split by file. Expected on two CPU cores: under five minutes, and fewer held-out bits per byte than
gzip -9, bzip2 -9 and xz -9 need on the same files in pieces of the model's context length.
"""

import sysconfig

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.models.presets import preset
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    library = sysconfig.get_paths()["stdlib"]
    return TrainConfig(
        model=preset("quickstart"),
        data=DataConfig(
            train=(f"{library}/**/*.py",),
            exclude=("site-packages/", "dist-packages/", "test/", "tests/", "idlelib/", "lib2to3/", "encodings/"),
            heldout_fraction=0.01,
            context_tokens=512,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, warmup_steps=20, schedule="wsd", decay_fraction=0.4),
        steps=180,
        accumulate=4,  # two rows at a time: their temporaries stay near the cores
        checkpoint=CheckpointConfig(every_steps=60),
        eval_every_steps=60,
        eval_bytes=32_768,
        sample_prompt="def read_lines(path):\n",
        sample_tokens=300,
    )

"""tests/training/tiny.py with memories, of whose tables checkpoints write the rows that changed."""

import dataclasses

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig

KEYS = ProductKeysConfig(n_slots=64**2, n_heads=2, top_k=2, key_dim=8)
OWN = MemoryConfig(KEYS, expert="gelu")
SHARED = MemoryConfig(dataclasses.replace(KEYS, n_slots=32**2), output="swilu", shared_table=True)


def config() -> TrainConfig:
    attention = AttentionConfig(n_heads=2, window=8)
    return TrainConfig(
        model=DecoderConfig(d_model=16, d_ffn=32, pattern=2 * (attention,), repeats=2, memories=(OWN, SHARED)),
        data=DataConfig(train=("text",), heldout_fraction=0.2, context_tokens=32, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=8,
        checkpoint=CheckpointConfig(every_steps=2, tables="touched"),
        mesh=MeshConfig(table_rows=("data",)),
        eval_every_steps=4,
        eval_bytes=256,
    )

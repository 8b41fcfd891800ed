"""A run of a few milliseconds a step, for tests: on the folder `text` where it is started, which conftest.py writes."""

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    inner = GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=8, chunk_tokens=16)
    memories = MixtureOfMemoriesConfig(inner, n_memories=2, top_k=1)
    attention = AttentionConfig(n_heads=2, window=8)
    return TrainConfig(
        model=DecoderConfig(d_model=16, d_ffn=32, pattern=(memories, attention)),
        data=DataConfig(train=("text",), heldout_fraction=0.2, context_tokens=32, batch_size=8),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, warmup_steps=2),
        steps=12,
        accumulate=2,
        checkpoint=CheckpointConfig(every_steps=2),
        eval_every_steps=4,
        eval_bytes=256,
    )

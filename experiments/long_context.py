"""Does a whole training step of exact attention over millions of tokens fit a pod?

    jaxmem plan experiments/long_context.py --tpu v5p:8x8x8
    jaxmem plan experiments/long_context.py --tpu v5p:8x16x16 --data.context-tokens 16777216 --mesh.seq 2048

A decoder of 8 billion parameters (32 layers of grouped-query attention, d_model 4096) on one row of 4 Mi tokens: 512 chips
hold 8,192 tokens each, in a zigzag, and parameters split over the same chips. Keys go round in a ring; feed-forwards and
cross-entropy work in blocks of tokens. Planned by the TPU's compiler on a laptop; it has not been trained.
"""

from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig
from jaxmem.sharding.attention import Scheme
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig


def config() -> TrainConfig:
    attention = AttentionConfig(n_heads=32, n_kv_heads=8, rope_theta=5e7, scheme=Scheme("ring"))
    return TrainConfig(
        model=DecoderConfig(
            d_model=4096,
            d_ffn=14336,
            pattern=(attention,),
            repeats=32,
            vocab_size=128_256,
            remat="block",
            dtype="bfloat16",
            ffn_block_tokens=2048,
        ),
        data=DataConfig(train=("texts/**/*.txt",), tokenizer="tokenizer.json", context_tokens=4 * 2**20, batch_size=1),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
        mesh=MeshConfig(data=1, seq=512, layout="zigzag", parameters=("fsdp", "seq")),
        steps=1000,
    )

"""What `import jaxmem as jm` gives; each name is imported when it is first used."""

__version__: str

# Modules

from . import (
    algebra as algebra,
    checkpoints as checkpoints,
    evals as evals,
    layers as layers,
    models as models,
    pallas_kernels as pallas_kernels,
    planning as planning,
    recurrences as recurrences,
    sharding as sharding,
    training as training,
)

# Mixers, by their configs: `jm.GatedDeltaNetConfig(n_heads=2).make(64, rngs=nnx.Rngs(0))` is a layer

from .layers.attention import AttentionConfig as AttentionConfig
from .layers.fast_weight_memory import FastWeightMemoryConfig as FastWeightMemoryConfig, fwpkm as fwpkm
from .layers.gated_delta_net import (
    CombaConfig as CombaConfig,
    DeltaNetConfig as DeltaNetConfig,
    GatedDeltaNetConfig as GatedDeltaNetConfig,
    GatedDeltaProductConfig as GatedDeltaProductConfig,
)
from .layers.griffin import GriffinConfig as GriffinConfig
from .layers.hgrn import Hgrn2Config as Hgrn2Config, HgrnConfig as HgrnConfig
from .layers.kimi_delta_attention import (
    GatedDeltaNet2Config as GatedDeltaNet2Config,
    KimiDeltaAttentionConfig as KimiDeltaAttentionConfig,
)
from .layers.linear_attention import (
    GatedLinearAttentionConfig as GatedLinearAttentionConfig,
    LightningAttentionConfig as LightningAttentionConfig,
    LinearAttentionConfig as LinearAttentionConfig,
    RetNetConfig as RetNetConfig,
    SimpleGlaConfig as SimpleGlaConfig,
)
from .layers.mamba import Mamba2Config as Mamba2Config, MambaConfig as MambaConfig
from .layers.mixture_of_memories import MixtureOfMemoriesConfig as MixtureOfMemoriesConfig
from .layers.rwkv7 import Rwkv7Config as Rwkv7Config
from .layers.short_convolution import ShortConvolutionConfig as ShortConvolutionConfig
from .layers.state_space import LinearStateSpaceConfig as LinearStateSpaceConfig, StateSpaceConfig as StateSpaceConfig

# Memory layers in the place of feed-forwards, or beside them

from .layers.memory import (
    MemoryConfig as MemoryConfig,
    memory_plus as memory_plus,
    peer as peer,
    pkm as pkm,
    ultramem as ultramem,
)
from .layers.word_experts import WordExpertsConfig as WordExpertsConfig, mowe as mowe

# Models

from .models.accounting import summary as summary
from .models.decoder import Decoder as Decoder, DecoderConfig as DecoderConfig
from .models.presets import preset as preset

# Training

from .checkpoints import CheckpointConfig as CheckpointConfig
from .training.data import DataConfig as DataConfig
from .training.experiment import TrainConfig as TrainConfig
from .training.loop import train as train
from .training.optimizer import OptimizerConfig as OptimizerConfig
from .training.run import load_run as load_run

# Text

from .models.generation import (
    generate as generate,
    generate_rows as generate_rows,
    generate_text as generate_text,
    generate_texts as generate_texts,
)
from .models.sampling import SamplingConfig as SamplingConfig

# Many devices

from .sharding import MeshConfig as MeshConfig, make_mesh as make_mesh, use_mesh as use_mesh

# Operations on arrays

from .layers.cross_entropy import chunked_cross_entropy as chunked_cross_entropy
from .pallas_kernels.flash_attention import flash_attention as flash_attention
from .pallas_kernels.memory_lookup import bag as bag
from .recurrences.decay_only import (
    linear_attention as linear_attention,
    retention as retention,
    simple_gla as simple_gla,
    state_space_dual as state_space_dual,
)
from .recurrences.delta import (
    delta_rule as delta_rule,
    gated_delta_rule as gated_delta_rule,
    kimi_delta_attention as kimi_delta_attention,
)
from .recurrences.elementwise import rg_lru as rg_lru, selective_scan as selective_scan
from .recurrences.engine import recurrence as recurrence

"""Writes transformers_layers.npz: what layers of Hugging Face transformers make of random weights, by the names they have
there.

    python tests/golden/make_transformers_layers.py

Needs what make_transformers_recurrences.py needs. A recording has the layer's input x and its weights as inputs, and o is
its output.
"""

from pathlib import Path

import torch
from recording import B, normal, record, save
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba.configuration_mamba import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

T, D = 13, 16  # tokens, width of the model


def gated_delta_net():
    config = Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
    )
    return Qwen3NextGatedDeltaNet(config, 0)


def kimi_delta_attention():
    return KimiLinearDeltaAttention(KimiLinearConfig(hidden_size=D, linear_num_heads=3, linear_head_dim=4), 0)


def mamba():
    return MambaMixer(MambaConfig(hidden_size=D, state_size=3, time_step_rank=2), 0)


def mamba2(n_groups):
    config = Mamba2Config(hidden_size=D, num_heads=4, head_dim=8, state_size=3, n_groups=n_groups, chunk_size=8)
    return Mamba2Mixer(config, 0)


def griffin():
    config = RecurrentGemmaConfig(hidden_size=D, num_attention_heads=4, num_key_value_heads=1, lru_width=24)
    return RecurrentGemmaRecurrentBlock(config, 0)


def lightning_attention():
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=3, num_key_value_heads=1, head_dim=4, num_hidden_layers=4, block_size=8
    )
    return MiniMaxLightningAttention(config, 1)


# recording: the layer, and what it is called with besides x
CASES = {
    "gated_delta_net": (gated_delta_net(), {}),
    "kimi_delta_attention": (kimi_delta_attention(), {}),
    "mamba": (mamba(), {}),
    "mamba2": (mamba2(2), {}),
    "mamba2_one_group": (mamba2(1), {}),
    "griffin": (
        griffin(),
        {"position_ids": torch.arange(T).expand(B, T), "attention_mask": None, "use_cache": False},
    ),
    "lightning_attention": (lightning_attention(), {"position_embeddings": None, "attention_mask": None}),
}


def drawn(shape):
    """Matrices and filters keep the scale of what they multiply; vectors are around -1, where steps and decays are small."""
    *several, width = shape
    return (lambda rng: normal(*shape)(rng) / width**0.5) if several else (lambda rng: normal(*shape)(rng) - 1)


def record_layer(layer, options):
    def function(x, **weights):
        found = torch.func.functional_call(layer, weights, (x,), options)
        return (found[0] if isinstance(found, tuple) else found,)

    weights = {name: drawn(weight.shape) for name, weight in layer.named_parameters()}
    return record(function, {"x": normal(B, T, D), **weights})


def main():
    recordings = {name: record_layer(*case) for name, case in CASES.items()}
    save(Path(__file__).with_name("transformers_layers.npz"), recordings, "torch", "transformers")


if __name__ == "__main__":
    main()

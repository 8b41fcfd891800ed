"""Named decoders. Sizes are those of the mixture-of-memories paper (arXiv 2502.13685): d_model 1024 and 24 layers for 340M,
d_model 2048 for 1.3B, four heads of 256, SwiGLU of 2 x d_model; 125M is the same family one size down (three heads).

The names are those of size classes, not counts: every memory has key and value projections of its own, so mom-125m has
160M parameters, mom-340m 512M and mom-1.3b 1.33B. The paper's own models are not matched by parameters either.
"""

import difflib

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.models.decoder import DecoderConfig


def mixture_of_memories(d_model: int, n_layers: int, vocab_size: int = 32_000) -> DecoderConfig:
    """A pure mixture-of-memories decoder of the paper's shape at this width."""
    mixer = MixtureOfMemoriesConfig(GatedDeltaNetConfig(n_heads=min(4, d_model // 256), key_dim=256, value_dim=256))
    return DecoderConfig(
        d_model=d_model,
        d_ffn=2 * d_model,
        pattern=(mixer,),
        repeats=n_layers,
        vocab_size=vocab_size,
        remat="block",
        dtype="bfloat16",
    )


def quickstart() -> DecoderConfig:
    """A byte-level hybrid for two CPU cores: mixtures of memories in turn with sliding-window attention."""
    memories = MixtureOfMemoriesConfig(GatedDeltaNetConfig(n_heads=2, key_dim=32, value_dim=64, chunk_tokens=32))
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, window=128)
    return DecoderConfig(d_model=128, d_ffn=384, pattern=(memories, attention), repeats=2, vocab_size=256)


PRESETS = {
    "quickstart": quickstart,
    "mom-125m": lambda: mixture_of_memories(768, 12),
    "mom-340m": lambda: mixture_of_memories(1024, 24),
    "mom-1.3b": lambda: mixture_of_memories(2048, 24),
}


def preset(name: str) -> DecoderConfig:
    """The decoder of this name.

    Raises: ValueError for an unknown name, with the nearest known ones.

    >>> preset("mom-340m").n_layers
    24
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=2)
        advice = f"did you mean {' or '.join(near)}?" if near else "or name an experiment file, which ends in .py"
        raise ValueError(f"preset: needs one of {', '.join(PRESETS)}, got {name!r}; {advice}")
    return PRESETS[name]()

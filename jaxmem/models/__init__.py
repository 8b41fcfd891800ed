"""Models: a decoder from a pattern of blocks, presets, their cost, tokenizers, generation."""

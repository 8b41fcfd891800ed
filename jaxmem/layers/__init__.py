"""Layers: mixers of sequences and what stands beside them, one file per family: config, state, pure functions, module."""

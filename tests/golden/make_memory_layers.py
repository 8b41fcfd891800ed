"""Writes memory_layers.npz: what product-key-memory, PEER-pytorch and ultra-mem make of random weights, by their names there.

    python tests/golden/make_memory_layers.py

Needs

    pip install torch==2.13.0 product-key-memory==0.3.0 PEER-pytorch==0.2.2 ultra-mem==0.1.2

in an environment of its own. PEER-pytorch keeps a single expert per head unless `non_competing_scores=False`. The path of
product-key-memory that concatenates heads is left out: it does not use the weights. ultra-mem has one query for both parts,
and scores the keys from before their norm; with all sub-keys as candidates the sign of its singular vectors does not matter.
"""

from pathlib import Path

import torch
from PEER_pytorch import PEER
from product_key_memory import PKM
from recording import B, normal, record, save
from ultra_mem.ultra_mem import UltraMem

T, D = 7, 12  # tokens, width of the model
PRODUCT_KEYS = {"heads": 3, "num_keys": 5, "topk": 4, "dim_head": 6}
EXPERTS = {"heads": 3, "num_experts": 25, "num_experts_per_head": 4, "dim_key": 6}
TUCKER = {"num_memories": 25, "topk": 5, "dim_queries_keys": 6, "dim_values": 8, "core_heads": 1, "value_expansion": 1}
UNUSED = ("key_ln.weight", "value_expansion_proj")

# recording: the layer
CASES = {
    "pkm": PKM(D, **PRODUCT_KEYS),
    "pkm_relu": PKM(D, **PRODUCT_KEYS, non_competitive_gates=True),
    "peer": PEER(D, **EXPERTS, non_competing_scores=False),
    "peer_one_expert": PEER(D, **EXPERTS, non_competing_scores=True),
    "ultramem": UltraMem(D, **TUCKER, pre_query_causal_conv=False, prenorm=False).eval(),
}


def drawn(shape):
    """Matrices keep the scale of what they multiply, vectors are around 1."""
    *several, width = shape
    return (lambda rng: normal(*shape)(rng) / width**0.5) if several else (lambda rng: normal(*shape)(rng) / 4 + 1)


def record_layer(layer):
    def function(x, **weights):
        found = torch.func.functional_call(layer, weights, (x,))
        return (found[0] if isinstance(found, tuple) else found,)

    weights = {name: drawn(weight.shape) for name, weight in layer.named_parameters() if name not in UNUSED}
    return record(function, {"x": normal(B, T, D), **weights})


def main():
    recordings = {name: record_layer(layer) for name, layer in CASES.items()}
    packages = "torch", "product-key-memory", "PEER-pytorch", "ultra-mem"
    save(Path(__file__).with_name("memory_layers.npz"), recordings, *packages)


if __name__ == "__main__":
    main()

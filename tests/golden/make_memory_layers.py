"""Writes memory_layers.npz: what product-key-memory and PEER-pytorch make of random weights, by the names they have there.

    python tests/golden/make_memory_layers.py

Needs

    pip install torch==2.13.0 product-key-memory==0.3.0 PEER-pytorch==0.2.2

in an environment of its own. PEER-pytorch keeps a single expert per head unless `non_competing_scores=False`. The path of
product-key-memory that concatenates heads is left out: it does not use the weights.
"""

from pathlib import Path

import torch
from PEER_pytorch import PEER
from product_key_memory import PKM
from recording import B, normal, record, save

T, D = 7, 12  # tokens, width of the model
PRODUCT_KEYS = {"heads": 3, "num_keys": 5, "topk": 4, "dim_head": 6}
EXPERTS = {"heads": 3, "num_experts": 25, "num_experts_per_head": 4, "dim_key": 6}

# recording: the layer
CASES = {
    "pkm": PKM(D, **PRODUCT_KEYS),
    "pkm_relu": PKM(D, **PRODUCT_KEYS, non_competitive_gates=True),
    "peer": PEER(D, **EXPERTS, non_competing_scores=False),
    "peer_one_expert": PEER(D, **EXPERTS, non_competing_scores=True),
}


def drawn(shape):
    """Matrices keep the scale of what they multiply, vectors are around 1."""
    *several, width = shape
    return (lambda rng: normal(*shape)(rng) / width**0.5) if several else (lambda rng: normal(*shape)(rng) / 4 + 1)


def record_layer(layer):
    def function(x, **weights):
        return (torch.func.functional_call(layer, weights, (x,)),)

    weights = {name: drawn(weight.shape) for name, weight in layer.named_parameters()}
    return record(function, {"x": normal(B, T, D), **weights})


def main():
    recordings = {name: record_layer(layer) for name, layer in CASES.items()}
    save(Path(__file__).with_name("memory_layers.npz"), recordings, "torch", "product-key-memory", "PEER-pytorch")


if __name__ == "__main__":
    main()

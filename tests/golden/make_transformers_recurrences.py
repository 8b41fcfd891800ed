"""Writes transformers_recurrences.npz: what Hugging Face transformers makes of the recurrences of the models it has.

    python tests/golden/make_transformers_recurrences.py

Needs

    pip install torch==2.13.0 transformers==5.23.0 numpy

in an environment of its own, without flash-linear-attention, mamba_ssm or Triton, which transformers would use instead of
torch.
"""

from pathlib import Path

import numpy as np
import torch
from recording import B, K, T, V, normal, per_strength, record, save, uniform, unit
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

D, N = 6, 3  # channels, and numbers of state per channel
G, H = 2, 4  # key heads and heads: each of the former serves two neighbours of the latter
N_LAYERS, N_SLOPES = 4, 8  # layers and heads that have slopes of lightning attention recorded
CHUNK = 8


def gated_delta_rule(q, k, v, g, beta, state):
    return torch_chunk_gated_delta_rule(q, k, v, g, beta, CHUNK, initial_state=state, output_final_state=True)


def kimi_delta_attention(q, k, v, g, beta, state):
    return chunk_kimi_delta_attention(q, k, v, g, beta, CHUNK, initial_state=state, output_final_state=True)


def state_space_dual(x, dt, a, b, c, d, state):
    y, state = mamba2_chunk_scan(x, dt, a, b, c, CHUNK, d, initial_states=state.mT, return_final_states=True)
    return y, state.mT


def selective_scan(x, dt, a, b, c, d):
    y, state = mamba_selective_scan(x.mT, dt.mT, a, b.mT, c.mT, d, return_last_state=True)
    return y.mT, state


def minimax(n_heads, layer, head_dim=1):
    config = MiniMaxConfig(
        hidden_size=3 * n_heads * head_dim,
        num_attention_heads=n_heads,
        head_dim=head_dim,
        num_hidden_layers=N_LAYERS,
        block_size=CHUNK,
        hidden_act="linear",
    )
    return MiniMaxLightningAttention(config, layer)


def lightning_attention(q, k, v, slopes, state=None):
    """What the layer norms, behind a projection that is the identity: in blocks, or from a state token by token."""
    layer, cache, seen = minimax(H, 0, K), None, []
    layer.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    if state is not None:
        cache = MiniMaxCache()
        cache.set_linear_cache(0, state)
    rates = slopes[:, None, None]
    replaced = dict(zip(("query_decay", "key_decay", "diagonal_decay"), layer.decay_factors(rates), strict=True))
    replaced |= {"slope_rate": rates, "qkv_proj.weight": torch.eye(3 * H * K)}
    x = torch.cat([q, k, v], dim=-1).flatten(2)
    _, state = torch.func.functional_call(layer, replaced, (x, None, None, cache))
    return seen[0].reshape(v.shape), state


def rg_lru(x, r, i, lam, state, first=None, segment_ids=None):
    """The layer's gates are sigmoids of its input times weights: here of two thirds of it, which do nothing else.

    It forgets at the `first` tokens of documents; jaxmem does by `segment_ids`.
    """
    layer = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=3 * D, num_attention_heads=1))
    zero, one = torch.zeros(D, D), torch.eye(D)
    column = lambda *blocks: torch.cat([torch.cat(blocks), torch.zeros(3 * D, 2 * D)], dim=1)[None]
    weights = {
        "recurrent_gate_weight": column(zero, one, zero),
        "input_gate_weight": column(zero, zero, one),
        "recurrent_gate_bias": torch.zeros(1, 3 * D),
        "input_gate_bias": torch.zeros(1, 3 * D),
        "recurrent_param": torch.cat([lam, torch.zeros(2 * D)]),
    }
    layer.recurrent_states = torch.cat([state, torch.zeros(B, 2 * D)], dim=1)
    positions = torch.ones(B, T) if first is None else (~first).int()
    y = torch.func.functional_call(layer, weights, (torch.cat([x, r.logit(), i.logit()], dim=-1), positions))
    return y[..., :D], layer.recurrent_states[:, :D]


DELTA = {"q": unit(B, T, G, K), "k": unit(B, T, G, K), "v": normal(B, T, H, V)}
DELTA |= {"beta": uniform(0, 1, B, T, H), "state": normal(B, H, K, V)}
LIGHTNING = {"q": unit(B, T, H, K), "k": unit(B, T, H, K), "v": normal(B, T, H, K)}
FIRST = np.stack([np.isin(np.arange(T), [6, 13]), np.arange(T) == 10])
GATES = {name: uniform(0.05, 0.95, B, T, D) for name in ("r", "i")}
RG_LRU = GATES | {"x": normal(B, T, D), "state": normal(B, D)}


def slopes(_):
    """Of the first layer, 40 times those, and of the last: next to none, since a slope of 0 would undo the causal mask."""
    first, last = (minimax(H, layer).slope_rate.flatten() for layer in (0, N_LAYERS - 1))
    return torch.stack([first, 40 * first, last]).numpy()


def lam(rng):
    """Where softplus(lam) is as strong as the case has it; 0 at -200, in fp32."""
    rates = per_strength(uniform(0.01, 0.1, D))(rng)
    return np.where(rates > 0, np.log(np.expm1(np.where(rates > 0, rates, 1))), -200)


# recording: the function, its inputs, decays and constants
CASES = {
    "gated_delta_rule": (gated_delta_rule, DELTA, {"g": per_strength(uniform(-0.2, 0, B, T, H))}),
    "kimi_delta_attention": (
        kimi_delta_attention,
        DELTA | {name: unit(B, T, H, K) for name in ("q", "k")},
        {"g": per_strength(uniform(-0.2, 0, B, T, H, K))},
    ),
    "state_space_dual": (
        state_space_dual,
        {"x": normal(B, T, H, V), "dt": uniform(0.01, 0.5, B, T, H), "b": normal(B, T, G, K), "c": normal(B, T, G, K)}
        | {"d": normal(H), "state": normal(B, H, K, V)},
        {"a": per_strength(uniform(-2, -0.2, H))},
    ),
    "selective_scan": (
        selective_scan,
        {"x": normal(B, T, D), "dt": uniform(0.01, 0.5, B, T, D), "b": normal(B, T, N), "c": normal(B, T, N)}
        | {"d": normal(D)},
        {"a": per_strength(uniform(-2, -0.2, D, N))},
    ),
    "lightning_attention": (lightning_attention, LIGHTNING, {"slopes": slopes}),
    "lightning_attention_from_state": (
        lightning_attention,
        LIGHTNING | {"state": normal(B, H, K, K)},
        {"slopes": slopes},
    ),
    "rg_lru": (rg_lru, RG_LRU, {"lam": lam}),
    "rg_lru_with_resets": (
        rg_lru,
        RG_LRU,
        {"lam": lam},
        {"first": FIRST, "segment_ids": 1 + np.cumsum(FIRST, axis=1, dtype=np.int32)},
    ),
}


def main():
    recordings = {name: record(*case) for name, case in CASES.items()}
    by_layer = [minimax(N_SLOPES, layer).slope_rate.flatten() for layer in range(N_LAYERS)]
    recordings["lightning_slopes"] = {"outputs/slopes": torch.stack(by_layer).numpy()}
    save(Path(__file__).with_name("transformers_recurrences.npz"), recordings, "torch", "transformers")


if __name__ == "__main__":
    main()

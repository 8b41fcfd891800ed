"""Writes fla_recurrences.npz: what flash-linear-attention makes of the recurrences, and torch of the short convolution.

    python tests/golden/make_fla_recurrences.py

Needs

    pip install torch==2.13.0 einops numpy
    pip install --no-deps fla-core==0.6.0

in an environment of its own. Files of naive functions are loaded by their path, since importing `fla.ops` needs Triton;
those of the gates import it themselves, so their functions are cut out of the source and run alone.
"""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path
from types import FunctionType

import torch
from recording import B, H, K, T, V, normal, per_strength, record, save, uniform, unit

WIDTH = 4  # of the convolution
STEPS = 2  # delta rules per token of a product


def located(file: str) -> Path:
    return Path(str(importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{file}")))


def naive(op: str, name: str) -> FunctionType:
    spec = importlib.util.spec_from_file_location(f"{op}.naive", located(f"{op}/naive.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def cut_out(file: str, name: str) -> FunctionType:
    """A function of a file that cannot be imported, in a namespace of torch and F."""
    functions = [node for node in ast.parse(located(file).read_text()).body if isinstance(node, ast.FunctionDef)]
    (found,) = [node for node in functions if node.name == name]
    namespace = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module([found], []), file, "exec"), namespace)
    return namespace[name]


def swap(*arrays):
    """Heads first for tokens first, or back."""
    return [a.transpose(1, 2) for a in arrays]


def linear_attention(q, k, v, state):
    function = naive("linear_attn", "naive_recurrent_linear_attn")
    return function(q, k, v, initial_state=state, output_final_state=True)


def linear_attention_normalized(q, k, v, state):
    function = naive("linear_attn", "naive_recurrent_linear_attn")
    initial = state[..., :-1], state[..., -1][:, None]
    o, (s, z) = function(q, k, v, initial_state=initial, normalize=True, output_final_state=True)
    return o, torch.cat([s, z[:, 0, ..., None]], dim=-1)


def retention(q, k, v):
    return swap(naive("retention", "naive_retention")(*swap(q, k, v)))


def simple_gla(q, k, v, g, state):
    return naive("simple_gla", "naive_recurrent_simple_gla")(q, k, v, g, initial_state=state)


def gated_linear_attention(q, k, v, g, state):
    return naive("gla", "naive_recurrent_gla")(q, k, v, g, initial_state=state, output_final_state=True)


def hgrn2(q, v, g, state):
    """As in fla's layer, but with scale 1."""
    return gated_linear_attention(q * K**0.5, 1 - g.exp(), v, g, state)


def hgrn(x, g, state):
    return naive("hgrn", "naive_recurrent_hgrn")(x, g, initial_state=state, output_final_state=True)


def delta_rule(q, k, v, beta, state):
    o, state = naive("delta_rule", "delta_rule_recurrence")(*swap(q, k, v, beta), initial_state=state)
    return *swap(o), state


def gated_delta_rule(q, k, v, g, beta, state):
    function = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    return function(q, k, v, beta, g, initial_state=state, output_final_state=True)


def kimi_delta_attention(q, k, v, g, beta, state):
    function = naive("kda", "naive_recurrent_kda")
    return function(q, k, v, g, beta, initial_state=state, output_final_state=True)


def gated_delta_product(q, k, v, g, beta, state):
    function = naive("gated_delta_product", "naive_recurrent_gated_delta_product")
    k, v, beta = (a.flatten(1, 2) for a in (k, v, beta))
    return function(q, k, v, g, beta, K**-0.5, initial_state=state, num_householder=STEPS)


def gated_delta_net_2(q, k, v, g, b, w, state):
    function = naive("gdn2", "naive_recurrent_gdn2")
    return function(q, k, v, g, b, w, initial_state=state, output_final_state=True)


def comba(q, k, v, p, g, beta, state):
    """In chunks: the recurrent function reads the state behind its decay, which the paper and the kernels do not."""
    function = naive("comba", "naive_chunk_comba")
    return function(q, k, v, p, g, beta, initial_state=state, output_final_state=True)


def dplr(q, k, v, a, b, g, state):
    function = naive("generalized_delta_rule/dplr", "dplr_recurrence")
    o, state = function(*swap(q, k, v, a, b, g), initial_state=state)
    return *swap(o), state


def rwkv7(r, w, k, v, a, b, state):
    return dplr(r * K**0.5, k, v, a, b, w, state)


def kda_gate(a, a_log, dt_bias):
    return (cut_out("kda/gate.py", "naive_kda_gate")(a, a_log, dt_bias.flatten()),)


def kda_lowerbound_gate(a, a_log, dt_bias):
    return (cut_out("kda/gate.py", "naive_kda_lowerbound_gate")(a, a_log, dt_bias.flatten()),)


def gdn_gate(a, a_log, dt_bias):
    return (cut_out("gated_delta_rule/gate.py", "naive_gdn_gate")(a, a_log, dt_bias),)


def convolution(x, weight):
    padded = torch.nn.functional.pad(x.mT, (WIDTH - 1, 0))
    return (torch.nn.functional.conv1d(padded, weight.mT[:, None], groups=weight.shape[1]).mT,)


QK = {"q": unit(B, T, H, K), "k": unit(B, T, H, K)}
VALUES = {"v": normal(B, T, H, V), "state": normal(B, H, K, V)}
BETA = {"beta": uniform(0, 1, B, T, H)}
LOW_RANK = {"a": lambda rng: -0.8 * unit(B, T, H, K)(rng), "b": unit(B, T, H, K)}
PER_HEAD = {"g": per_strength(uniform(-0.2, 0, B, T, H))}
PER_CHANNEL = {"g": per_strength(uniform(-0.2, 0, B, T, H, K))}
GATE = {"a_log": normal(H)}

# function: its inputs and decays
CASES = {
    linear_attention: (QK | VALUES,),
    linear_attention_normalized: (
        {"q": uniform(0.1, 1, B, T, H, K), "k": uniform(0.1, 1, B, T, H, K), "v": VALUES["v"]}
        | {"state": uniform(0.1, 1, B, H, K, V + 1)},
    ),
    retention: (QK | {"v": VALUES["v"]},),
    simple_gla: (QK | VALUES, PER_HEAD),
    gated_linear_attention: (QK | VALUES, PER_CHANNEL),
    hgrn2: ({"q": QK["q"]} | VALUES, PER_CHANNEL),
    hgrn: ({"x": normal(B, T, V), "state": normal(B, V)}, {"g": per_strength(uniform(-0.2, 0, B, T, V))}),
    delta_rule: (QK | VALUES | BETA,),
    gated_delta_rule: (QK | VALUES | BETA, PER_HEAD),
    kimi_delta_attention: (QK | VALUES | BETA, PER_CHANNEL),
    gated_delta_product: (
        {"q": QK["q"], "k": unit(B, T, STEPS, H, K), "v": normal(B, T, STEPS, H, V)}
        | {"beta": uniform(0, 1, B, T, STEPS, H), "state": VALUES["state"]},
        PER_HEAD,
    ),
    gated_delta_net_2: (
        QK | VALUES | {"b": uniform(0, 1, B, T, H, K), "w": uniform(0, 1, B, T, H, V)},
        PER_CHANNEL,
    ),
    comba: (QK | VALUES | BETA | {"p": unit(B, T, H, K)}, PER_HEAD),
    dplr: (QK | VALUES | LOW_RANK, PER_CHANNEL),
    rwkv7: ({"r": QK["q"], "k": QK["k"]} | VALUES | LOW_RANK, {"w": PER_CHANNEL["g"]}),
    kda_gate: (GATE | {"a": normal(B, T, H, K), "dt_bias": normal(H, K)},),
    kda_lowerbound_gate: (GATE | {"a": normal(B, T, H, K), "dt_bias": normal(H, K)},),
    gdn_gate: (GATE | {"a": normal(B, T, H), "dt_bias": normal(H)},),
    convolution: ({"x": normal(B, T, V), "weight": normal(WIDTH, V)},),
}


def main():
    recordings = {function.__name__: record(function, *kinds) for function, kinds in CASES.items()}
    save(Path(__file__).with_name("fla_recurrences.npz"), recordings, "torch", "fla-core")


if __name__ == "__main__":
    main()

"""Every recurrence against other people's code: outputs, final states and all gradients, as recorded in tests/golden.

A file is written by make_<file>.py; recording.py says how its arrays are named. No recording is of `state_space`, whose
equations are compared in test_recurrences.py.
"""

import functools

import jax
import numpy as np
import pytest
from recordings import recordings

from jaxmem.layers.gated_delta_net import log_decay
from jaxmem.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from jaxmem.recurrences import decay_only, delta, elementwise

RULES = {
    "fla": {
        "linear_attention": decay_only.linear_attention,
        "linear_attention_normalized": functools.partial(decay_only.linear_attention, normalize=True),
        "retention": decay_only.retention,
        "simple_gla": decay_only.simple_gla,
        "gated_linear_attention": decay_only.gated_linear_attention,
        "hgrn2": decay_only.hgrn2,
        "hgrn": elementwise.hgrn,
        "delta_rule": delta.delta_rule,
        "gated_delta_rule": delta.gated_delta_rule,
        "kimi_delta_attention": delta.kimi_delta_attention,
        "gated_delta_product": delta.gated_delta_product,
        "gated_delta_net_2": delta.gated_delta_net_2,
        "comba": delta.comba,
        "dplr": delta.dplr,
        "rwkv7": delta.rwkv7,
    },
    "transformers": {
        "gated_delta_rule": delta.gated_delta_rule,
        "kimi_delta_attention": delta.kimi_delta_attention,
        "state_space_dual": decay_only.state_space_dual,
        "selective_scan": elementwise.selective_scan,
        "lightning_attention": decay_only.lightning_attention,
        "lightning_attention_from_state": decay_only.lightning_attention,
        "rg_lru": elementwise.rg_lru,
        "rg_lru_with_resets": elementwise.rg_lru,
    },
}
GATES = {
    "gdn_gate": log_decay,
    "kda_gate": KimiDeltaAttentionConfig().log_decay,
    "kda_lowerbound_gate": KimiDeltaAttentionConfig(lower_bound=-5.0).log_decay,
}
OTHERS = {
    "fla": {*GATES, "convolution"},
    "transformers": {"lightning_slopes"},
}
ROWS = [pytest.param(source, name, id=f"{source}-{name}") for source, rules in RULES.items() for name in rules]


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(rule, implementation, inputs, constants, weights):
    """What was recorded of rule's (o, state), and the gradients in all inputs of the sum of weights * outputs."""

    def outputs(inputs):
        found = rule(**inputs, **constants, chunk_tokens=16, implementation=implementation)
        return {name: a for name, a in zip(("o", "state"), found, strict=True) if name in weights}

    found, pull = jax.vjp(outputs, inputs)
    return {"outputs": found, "gradients": pull(weights)[0]}


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-6)


def assert_as_recorded(got, recorded, case):
    assert all(got[group].keys() == recorded[group].keys() for group in got)
    errors = {
        f"case {case}: {group} {name}": relative_rms(a, recorded[group][name][case])
        for group, arrays in got.items()
        for name, a in arrays.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not wrong, wrong


@pytest.mark.parametrize(("source", "name"), ROWS)
@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"])
def test_recurrence(source, name, implementation):
    recorded = recordings(f"{source}_recurrences")[name]
    decays, constants = recorded.get("decays", {}), recorded.get("constants", {})
    for case in range(len(recorded["outputs"]["o"])):
        inputs = recorded["inputs"] | {argument: a[case] for argument, a in decays.items()}
        got = outputs_and_gradients(RULES[source][name], implementation, inputs, constants, recorded["weights"])
        assert_as_recorded(got, recorded, case)


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    recorded = recordings("fla_recurrences")[name]
    inputs = recorded["inputs"]
    g, pull = jax.vjp(lambda x: GATES[name]({"decay": x["a"]}, x), inputs)
    got = {"outputs": {"o": g}, "gradients": pull(recorded["weights"]["o"])[0]}
    assert_as_recorded(got, recorded, 0)


def test_lightning_slopes():
    """Those of the MiniMax checkpoints, layer by layer."""
    slopes = recordings("transformers_recurrences")["lightning_slopes"]["outputs"]["slopes"]
    n_layers, n_heads = slopes.shape
    got = [decay_only.lightning_slopes(n_heads, layer, n_layers) for layer in range(n_layers)]
    np.testing.assert_allclose(np.stack(got), slopes, rtol=1e-5)


@pytest.mark.parametrize("source", RULES)
def test_all_that_is_recorded_has_a_test(source):
    """Here, or in tests/layers."""
    assert recordings(f"{source}_recurrences").keys() == RULES[source].keys() | OTHERS[source]

"""Layers with the weights of other people's: outputs and all gradients, as recorded in tests/golden.

The mappings are how weights are exchanged: public names and shapes (those of Hugging Face transformers) to jaxmem's, by
splitting, reshaping and transposing. Gradients take the same way. make_transformers_layers.py writes the recordings.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from recordings import recordings

from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.griffin import GriffinConfig
from jaxmem.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from jaxmem.layers.linear_attention import LightningAttentionConfig
from jaxmem.layers.mamba import Mamba2Config, MambaConfig


def into(weight, *shape):
    """[H*K, D] of a projection into heads: [D, H, K]."""
    return np.moveaxis(weight.reshape(*shape, weight.shape[-1]), -1, 0)


def out_of(weight, *shape):
    """[D, H*V] of a projection out of heads: [H, V, D]."""
    return weight.T.reshape(*shape, -1)


def filters(weight, *shape):
    """[H*K, 1, W] of a convolution: [W, H, K]."""
    return np.moveaxis(weight.reshape(*shape, -1), -1, 0)


def parts(array, *sizes, axis=0):
    return np.split(array, np.cumsum(sizes)[:-1], axis)


def gated_delta_net(c, p):
    """Qwen3-Next: the projections are by key head, each with what the heads it serves need; the filters are not."""
    g, h, k, v = c.key_heads, c.n_heads, c.key_dim, c.value_dim
    several = h // g
    by_key_head = lambda name: p[name].reshape(g, -1, p[name].shape[-1])
    query, key, value, gate = parts(by_key_head("in_proj_qkvz.weight"), k, k, several * v, several * v, axis=1)
    write, decay = parts(by_key_head("in_proj_ba.weight"), several, several, axis=1)
    weight = {"query": into(query, g, k), "key": into(key, g, k), "value": into(value, h, v)}
    weight |= {"write": into(write, h), "decay": into(decay, h)}
    query, key, value = parts(p["conv1d.weight"], g * k, g * k, h * v)
    return {
        "projections": {"weight": weight},
        "taps": {"query": filters(query, g, k), "key": filters(key, g, k), "value": filters(value, h, v)},
        "parameters": {"a_log": p["A_log"], "dt_bias": p["dt_bias"]},
        "output": {
            "gate": into(gate, h, v),
            "norm": p["norm.weight"],
            "out": out_of(p["out_proj.weight"], h, v),
        },
    }


def kimi_delta_attention(c, p):
    """Kimi-Linear."""
    h, k, v = c.state_shape
    weight = {"query": into(p["q_proj.weight"], h, k), "key": into(p["k_proj.weight"], h, k)}
    weight |= {"value": into(p["v_proj.weight"], h, v), "write": into(p["b_proj.weight"], h)}
    weight |= {"decay": into(p["forget_gate.f_b_proj.weight"], h, k)}
    query, key, value = parts(p["conv1d.weight"], h * k, h * k, h * v)
    return {
        "projections": {"weight": weight, "down": {"decay": p["forget_gate.f_a_proj.weight"].T}},
        "taps": {"query": filters(query, h, k), "key": filters(key, h, k), "value": filters(value, h, v)},
        "parameters": {
            "a_log": p["forget_gate.A_log"].reshape(h),
            "dt_bias": p["forget_gate.dt_bias"].reshape(h, k),
        },
        "output": {
            "gate_down": p["g_a_proj.weight"].T,
            "gate": into(p["g_b_proj.weight"], h, v),
            "norm": p["o_norm.weight"],
            "out": out_of(p["o_proj.weight"], h, v),
        },
    }


def mamba(c, p):
    channels = c.n_channels
    input, gate = parts(p["in_proj.weight"], channels, channels)
    dt_down, b, c_ = parts(p["x_proj.weight"].T, c.rank, c.n_states, c.n_states, axis=1)
    return {
        "projections": {"weight": {"input": input.T}},
        "taps": {"input": filters(p["conv1d.weight"], channels)},
        "parameters": {
            "input_bias": p["conv1d.bias"],
            "dt_down": dt_down,
            "dt_up": p["dt_proj.weight"].T,
            "dt_bias": p["dt_proj.bias"],
            "b": b,
            "c": c_,
            "a_log": p["A_log"],
            "d": p["D"],
        },
        "output": {"gate": into(gate, channels, 1), "out": out_of(p["out_proj.weight"], channels, 1)},
    }


def mamba2(c, p):
    g, h, k, v = c.key_heads, c.n_heads, c.key_dim, c.value_dim
    shapes = {"input": (h, v), "b": (g, k), "c": (g, k)}
    widths = [a * b for a, b in shapes.values()]
    named = lambda arrays: zip(shapes.items(), arrays, strict=True)
    gate, *inputs, dt = parts(p["in_proj.weight"], h * v, *widths, h)
    weight = {name: into(a, *shape) for (name, shape), a in named(inputs)}
    taps = {name: filters(a, *shape) for (name, shape), a in named(parts(p["conv1d.weight"], *widths))}
    biases = {f"{name}_bias": a.reshape(shape) for (name, shape), a in named(parts(p["conv1d.bias"], *widths))}
    return {
        "projections": {"weight": weight | {"dt": into(dt, h)}},
        "taps": taps,
        "parameters": biases | {"a_log": p["A_log"], "dt_bias": p["dt_bias"], "d": p["D"]},
        "output": {
            "gate": into(gate, h, v),
            "norm": p["norm.weight"].reshape(h, v),
            "out": out_of(p["out_proj.weight"], h, v),
        },
    }


def griffin(c, p):
    """RecurrentGemma."""
    heads = c.n_heads, c.head_dim
    channels = c.n_heads * c.head_dim, 1
    return {
        "projections": {
            "weight": {"input": into(p["linear_x.weight"], *heads)},
            "bias": {"input": p["linear_x.bias"].reshape(heads)},
        },
        "taps": {"input": filters(p["conv_1d.weight"], *heads)},
        "parameters": {
            "input_bias": p["conv_1d.bias"].reshape(heads),
            "recurrence": p["rg_lru.recurrent_gate_weight"],
            "recurrence_bias": p["rg_lru.recurrent_gate_bias"],
            "admission": p["rg_lru.input_gate_weight"],
            "admission_bias": p["rg_lru.input_gate_bias"],
            "lam": p["rg_lru.recurrent_param"].reshape(heads),
        },
        "output": {
            "gate": into(p["linear_y.weight"], *channels),
            "gate_bias": p["linear_y.bias"].reshape(channels),
            "out": out_of(p["linear_out.weight"], *channels),
            "out_bias": p["linear_out.bias"],
        },
    }


def lightning_attention(c, p):
    """MiniMax: the projections are by head."""
    h, k, v = c.state_shape
    query, key, value = parts(p["qkv_proj.weight"].reshape(h, k + k + v, -1), k, k, v, axis=1)
    return {
        "projections": {"weight": {"query": into(query, h, k), "key": into(key, h, k), "value": into(value, h, v)}},
        "output": {
            "gate": into(p["output_gate.weight"], h, v),
            "norm": p["norm.weight"].reshape(h, v),
            "out": out_of(p["out_proj.weight"], h, v),
        },
    }


DELTA = {"n_heads": 4, "n_key_heads": 2, "key_dim": 4, "value_dim": 6, "chunk_tokens": 8}
KIMI = {"n_heads": 3, "key_dim": 4, "value_dim": 4, "chunk_tokens": 8}
MAMBA2 = {"n_heads": 4, "key_dim": 3, "value_dim": 8, "chunk_tokens": 8}
# recording: what it is of, sizes as recorded and the rest as by default, and its weights in it
LAYERS = {
    "gated_delta_net": (GatedDeltaNetConfig(**DELTA), gated_delta_net),
    "kimi_delta_attention": (KimiDeltaAttentionConfig(**KIMI, gate_bias=False), kimi_delta_attention),
    "mamba": (MambaConfig(n_channels=32, n_states=3, dt_rank=2, chunk_tokens=8), mamba),
    "mamba2": (Mamba2Config(**MAMBA2, n_key_heads=2), mamba2),
    "mamba2_one_group": (Mamba2Config(**MAMBA2), mamba2),
    "griffin": (GriffinConfig(n_heads=4, head_dim=6, chunk_tokens=8), griffin),
    "lightning_attention": (LightningAttentionConfig(**KIMI, layer=1, n_layers=4), lightning_attention),
}
SLOW = {"mamba2_one_group"}


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, p, x, weight):
    y, pull = jax.vjp(f, p, x)
    return y, pull(weight)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAYERS])
def test_layer_with_public_weights(name):
    (config, mapping), recorded = LAYERS[name], recordings("transformers_layers")[name]
    public, gradients = dict(recorded["inputs"]), {key: a[0] for key, a in recorded["gradients"].items()}
    x, d_x = public.pop("x"), gradients.pop("x")
    parameters = mapping(config, public)
    graph, own = nnx.split(jax.eval_shape(lambda: config.make(x.shape[-1], rngs=nnx.Rngs(0))))
    shapes = lambda tree: {key: a.shape for key, a in leaves(tree).items()}
    assert shapes(parameters) == shapes(nnx.to_pure_dict(own))
    assert sum(a.size for a in leaves(parameters).values()) == sum(a.size for a in public.values())

    def layer(parameters, x):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, parameters)))(x)[0]

    y, (d_parameters, d_own_x) = value_and_gradients(layer, parameters, x, recorded["weights"]["o"])
    got = {"y": y, "d_x": d_own_x, "d": d_parameters}
    want = {"y": recorded["outputs"]["o"][0], "d_x": d_x, "d": mapping(config, gradients)}
    errors = jax.tree.map(relative_rms, jax.device_get(got), want)
    wrong = {key: error for key, error in leaves(errors).items() if not error <= 1e-5}
    assert not wrong, wrong


def test_all_that_is_recorded_has_a_test():
    assert recordings("transformers_layers").keys() == LAYERS.keys()

"""The Gated DeltaNet layer against its equations in float64, its gate, its cost and its errors. Its laws: test_laws.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig, log_decay
from jaxmem.layers.recurrent import in_full, make_parameters

B, T, D = 2, 11, 8
CONFIG = GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=6, convolution_width=3, chunk_tokens=8)


def equations(p, x):
    """One row, in the dtype that comes in; p: the layer's parameters as a dict of arrays."""
    unit = lambda a: a / jnp.sqrt(jnp.sum(a**2, -1, keepdims=True) + 1e-6)
    width, key, weight = CONFIG.convolution_width, CONFIG.key_dim, p["projections"]["weight"]

    def convolved(name):
        padded = jnp.pad(jnp.einsum("td,dhk->thk", x, weight[name]), [(width - 1, 0), (0, 0), (0, 0)])
        return jax.nn.silu(sum(p["taps"][name][tap] * padded[tap : tap + len(x)] for tap in range(width)))

    q, k, v = unit(convolved("query")), unit(convolved("key")), convolved("value")
    g = -jnp.exp(p["parameters"]["a_log"]) * jax.nn.softplus(x @ weight["decay"] + p["parameters"]["dt_bias"])
    beta = jax.nn.sigmoid(x @ weight["write"])

    state = jnp.zeros((CONFIG.n_heads, key, CONFIG.value_dim), x.dtype)
    ys = []
    for t in range(len(x)):
        state = jnp.exp(g[t])[:, None, None] * state
        u = beta[t][:, None] * (v[t] - jnp.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t][..., None] * u[:, None]
        o = jnp.einsum("hkv,hk->hv", state, q[t]) * key**-0.5
        o = o / jnp.sqrt(jnp.mean(o**2, -1, keepdims=True) + CONFIG.norm_eps) * p["output"]["norm"]
        o = o * jax.nn.silu(jnp.einsum("d,dhv->hv", x[t], p["output"]["gate"]))
        ys.append(jnp.einsum("hv,hvd->d", o, p["output"]["out"]))
    return jnp.stack(ys)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, p, x, weight):
    y, pull = jax.vjp(f, p, x)
    return y, pull(weight)


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2))


def test_values_and_gradients_against_the_equations():
    graph, state = nnx.split(CONFIG.make(D, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(state)

    def layer(parameters, x):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, parameters)))(x)[0]

    x, weight = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
    got = value_and_gradients(layer, parameters, x, weight)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (parameters, x, weight))
        want = value_and_gradients(jax.vmap(equations, (None, 0)), *exact)
    errors = jax.tree.map(relative_rms, jax.device_get(got), jax.device_get(want))
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_decays_start_between_slow_and_fast():
    """Step sizes in [1e-3, 1e-1] and rates in (0, 16], so that some heads remember long and some forget at once."""
    many = dataclasses.replace(CONFIG, n_heads=512)
    p = jax.jit(lambda: {n: v[...] for n, v in make_parameters(many, D, rngs=nnx.Rngs(0)).items()})()
    step, rate = jax.nn.softplus(p["dt_bias"]), jnp.exp(p["a_log"])
    assert 1e-3 * 0.999 <= step.min() < 2e-3 and 5e-2 < step.max() <= 1e-1 * 1.001
    assert 0 < rate.min() < 0.5 and 15 < rate.max() <= 16 and 7 < rate.mean() < 9
    np.testing.assert_allclose(jax.jit(log_decay)({"decay": jnp.zeros((1, 512))}, p)[0], -rate * step, rtol=1e-5)


def test_decays_are_float32_and_finite_far_out():
    p = {"a_log": jnp.zeros(2), "dt_bias": jnp.zeros(2)}
    decay = jax.jit(lambda a: log_decay(in_full({"decay": a}), p))
    a = jnp.array([[-1e4, 1e4]], jnp.bfloat16)
    g = decay(a)
    assert g.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(g))) and bool(jnp.all(g <= 0))
    d_a = jax.jit(jax.grad(lambda a: jnp.sum(decay(a))))(a.astype(jnp.float32))
    assert bool(jnp.all(jnp.isfinite(d_a)))


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"chunk_tokens": 3},
            "GatedDeltaNetConfig: needs a power of two from 8, a tile of a TPU, as chunk_tokens, got chunk_tokens=3; use 32",
        ),
        ({"convolution_width": 1}, "GatedDeltaNetConfig: needs a convolution over 2 tokens or more, got width=1; 4 is"),
    ],
    ids=["chunk", "width"],
)
def test_errors(change, text):
    with pytest.raises(ValueError, match=text):
        GatedDeltaNetConfig(**change)


def test_mixing_flops_grow_with_the_context_up_to_a_chunk():
    config = GatedDeltaNetConfig(n_heads=3, key_dim=8, value_dim=16, chunk_tokens=64)
    inside = 2 * 64 * (5 * 8 + 4 * 16) + 2 * 64**2
    assert config.mixing_flops(32, 10_000) == 3 * (inside + 6 * 8 * 16)
    assert config.mixing_flops(32, 16) < config.mixing_flops(32, 64) == config.mixing_flops(32, 1024)

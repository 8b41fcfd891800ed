"""Calls of mixers: wrong ones get one sentence, from one place; positions reach what has rotary embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.fast_weight_memory import FastWeightMemoryConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.linear_attention import RetNetConfig
from jaxmem.layers.mamba import MambaConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.layers.short_convolution import ShortConvolutionConfig

B, T, D = 2, 6, 8
DELTA = GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=4, chunk_tokens=8)
RETNET = RetNetConfig(n_heads=2, key_dim=4, value_dim=4, chunk_tokens=8)
MIXERS = {
    "attention": AttentionConfig(2),
    "window": AttentionConfig(2, window=3),
    "convolution": ShortConvolutionConfig(),
    "delta": DELTA,
    "mamba": MambaConfig(n_channels=8, n_states=4, dt_rank=2, chunk_tokens=8),
    "mixture": MixtureOfMemoriesConfig(DELTA),
    "fast-weights": FastWeightMemoryConfig(n_slots=9, top_k=2, key_dim=4, value_dim=4, chunk_tokens=5),
}
OTHER = {name: "convolution" if name != "convolution" else "delta" for name in MIXERS}
"""A layer whose state is of another type."""

X = np.zeros((B, T, D), np.float32)
IDS = np.ones((B, T), np.int32)
# the call of a layer with its state and another's, and what the error says
WRONG = {
    "rank": (lambda layer, state, _: layer(X[0]), r"needs x \[B T D\] .* D = d_model = 8, got x of shape \(6, 8\)"),
    "width": (lambda layer, state, _: layer(X[..., 1:]), r"got x of shape \(2, 6, 7\) and dtype float32; pass hidden"),
    "integers": (lambda layer, state, _: layer(X.astype(int)), r"needs x .* of floats .* dtype int64"),
    "no array": (lambda layer, state, _: layer("x"), "got x of type str"),
    "no x": (lambda layer, state, _: layer(None), "got x of type NoneType"),
    "ids as state": (
        lambda layer, state, _: layer(X, IDS),
        r"needs a state of its own, .* got state of shape \(2, 6\)",
    ),
    "x as state": (lambda layer, state, _: layer(X, (X,)), "got state of type tuple; pass what init_state"),
    "another layer's state": (
        lambda layer, state, other: layer(X, other),
        "needs a state of its own, .* got state of type",
    ),
    "fewer rows": (lambda layer, state, _: layer(X[:1], state), "needs the state of a batch of 1 rows .*, got state"),
    "more rows": (lambda layer, state, _: layer(np.tile(X, (2, 1, 1)), state), "of a batch of 4 rows .* instead of"),
    "ids' length": (lambda layer, state, _: layer(X, segment_ids=IDS[:, 1:]), r"segment_ids .* got .* \(2, 5\)"),
    "ids' rows": (lambda layer, state, _: layer(X, state, segment_ids=IDS[0]), r"needs segment_ids \[B T\] .* \(6,\)"),
    "ids of floats": (
        lambda layer, state, _: layer(X, segment_ids=X[..., 0]),
        "integers .* dtype float32; pass an int32",
    ),
    "a mask as ids": (lambda layer, state, _: layer(X, segment_ids=IDS > 0), "needs segment_ids .* dtype bool"),
    "a list of ids": (lambda layer, state, _: layer(X, segment_ids=[[1] * T] * B), "got segment_ids of type list"),
    "positions' shape": (lambda layer, state, _: layer(X, positions=IDS[:, 0]), r"needs positions \[B T\] .* \(2,\)"),
    "positions of floats": (lambda layer, state, _: layer(X, positions=X[..., 0]), "needs positions .* dtype float32"),
    "no capacity": (
        lambda layer, state, _: layer.init_state(1, capacity=0),
        "needs capacity >= 1, got capacity=0; pass",
    ),
    "half a capacity": (
        lambda layer, state, _: layer.init_state(1, capacity=1.5),
        "needs capacity >= 1, got capacity=1.5",
    ),
    "a negative batch": (lambda layer, state, _: layer.init_state(-1, capacity=4), "needs batch >= 0, got batch=-1"),
    "no batch": (lambda layer, state, _: layer.init_state(None, capacity=4), "needs batch >= 0, got batch=None"),
    "x as batch": (lambda layer, state, _: layer.init_state(X, capacity=4), "needs batch >= 0, got batch of shape"),
    "dtype": (lambda layer, state, _: layer.init_state(1, capacity=4, dtype=jnp.int32), "needs a dtype of floats"),
    "rngs of a number": (
        lambda layer, state, _: layer.config.make(D, rngs=0),
        "needs rngs to be an nnx.Rngs, .* got rngs=0",
    ),
    "rngs of a key": (
        lambda layer, state, _: layer.config.make(D, rngs=jax.random.key(0)),
        r"needs rngs to be an nnx.Rngs, .* got rngs of type \w+; pass nnx.Rngs\(0\)",
    ),
    "rngs without parameters": (
        lambda layer, state, _: layer.config.make(D, rngs=nnx.Rngs(dropout=0)),
        "needs rngs to be an nnx.Rngs, .* got one without a stream 'params' or 'default'; pass",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MIXERS)
def test_wrong_calls_get_one_sentence(name):
    layer, other = (nnx.eval_shape(lambda c=MIXERS[n]: c.make(D, rngs=nnx.Rngs(0))) for n in (name, OTHER[name]))
    states = [layer.init_state(B, capacity=T) for layer in (layer, other)]
    for what, (call, text) in WRONG.items():
        with pytest.raises(ValueError, match=text) as raised:
            jax.eval_shape(lambda call=call: call(layer, *states))
        sentence = str(raised.value).split("\n")[0]
        assert sentence.count("; ") == 1 and len(sentence) < 400, (what, sentence)


@pytest.mark.usefixtures("unchecked")
def test_a_state_of_another_width_is_refused():
    layer, wider = (ShortConvolutionConfig().make(d, rngs=nnx.Rngs(0)) for d in (D, 2 * D))
    with pytest.raises(ValueError, match=r"got state.history of shape \(2, 3, 16\) instead of \(2, 3, 8\); pass what"):
        layer(X, wider.init_state(B))


@pytest.mark.parametrize("config", [RETNET, MixtureOfMemoriesConfig(RETNET), AttentionConfig(2, window=3)], ids=str)
def test_positions_reach_rotary_embeddings_of_the_layers_own(config):
    """Rotary embeddings know differences only: moved positions change nothing, stretched ones do."""
    layer = jax.jit(lambda: config.make(D, rngs=nnx.Rngs(0)))()
    x = jax.random.normal(jax.random.key(0), (B, 2 * T, D))
    ids = jnp.array([[1] * 2 * T, [1] * 5 + [2] * (2 * T - 5)])
    index = jnp.broadcast_to(jnp.arange(2 * T), (B, 2 * T))
    call = jax.jit(lambda positions: layer(x, segment_ids=ids, positions=positions)[0])
    in_order, moved, stretched = call(index), call(index + 1000), call(3 * index)
    np.testing.assert_allclose(moved, in_order, rtol=1e-4, atol=1e-5)
    assert np.abs(stretched - in_order).max() > 1e-2
    if not isinstance(config, MixtureOfMemoriesConfig):  # whose memories count their own tokens
        np.testing.assert_allclose(layer(x, segment_ids=ids)[0], in_order, rtol=1e-4, atol=1e-5)

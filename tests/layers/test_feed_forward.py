"""SwiGLU against numpy, its gradient in time, on a mesh, in blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.feed_forward import SwiGLU
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh


def test_against_numpy():
    layer = SwiGLU(8, 24, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (layer.gate, layer.up, layer.down))
    gated, x64 = np.asarray(x, np.float64) @ gate, np.asarray(x, np.float64)
    wanted = (gated / (1 + np.exp(-gated)) * (x64 @ up)) @ down
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), wanted, rtol=1e-5, atol=1e-5)


def test_computes_in_the_dtype_of_x():
    assert SwiGLU(8, 24, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_sharded_equals_unsharded():
    x = jax.random.normal(jax.random.key(0), (8, 3, 8))

    def value_and_gradients(layer, x):
        return nnx.value_and_grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer)

    wanted = nnx.jit(value_and_gradients)(SwiGLU(8, 24, rngs=nnx.Rngs(0)), x)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        layer = SwiGLU(8, 24, rngs=nnx.Rngs(0))
        got = nnx.jit(value_and_gradients)(layer, constrain(x, "batch", "time", "embed"))
        assert got[1]["down"][...].sharding.is_equivalent_to(layer.down[...].sharding, 2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [None, MeshConfig(data=2, seq=2, model=2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("block_tokens", [3, 4, 100])
def test_blocks_of_tokens_change_nothing(config, block_tokens):
    x = jax.random.normal(jax.random.key(1), (2, 24, 8))

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(block_tokens):
        layer = SwiGLU(8, 16, rngs=nnx.Rngs(0), block_tokens=block_tokens)
        y, pull = jax.vjp(lambda layer, x: layer(x), layer, constrain(x, "batch", "time", "embed"))
        return y, pull(jnp.sin(y))

    with use_mesh(None if config is None else make_mesh(config)):
        got, want = jax.device_get((values_and_gradients(block_tokens), values_and_gradients(None)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_blocks_need_less_memory():
    n_tokens, width = 4096, 256

    def temporaries(block_tokens):
        layer = nnx.eval_shape(lambda: SwiGLU(16, width, rngs=nnx.Rngs(0), block_tokens=block_tokens))
        loss = lambda layer, x: jnp.sum(layer(x) ** 2)
        x = jax.ShapeDtypeStruct((1, n_tokens, 16), jnp.float32)
        return jax.jit(jax.grad(loss, (0, 1))).lower(layer, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(256) < temporaries(None) / 4

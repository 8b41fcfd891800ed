"""Norms against numpy, at zero, in bf16, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.norm import LayerNorm, RMSNorm, l2_normalize
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh


def inputs(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (8, 3, 16), dtype)


def rms_norm(dtype=jnp.float32):
    norm = RMSNorm(16, rngs=nnx.Rngs(0))
    norm.scale[...] = constrain(jnp.linspace(0.5, 2.0, 16), None)
    return norm


def layer_norm():
    norm = LayerNorm(16, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2.0, 16), jnp.full(16, 0.25)
    return norm


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)], ids=["fp32", "bf16"])
def test_against_numpy(dtype, tolerance):
    x = inputs(dtype)
    x64 = np.asarray(x, np.float64)
    got = jax.jit(rms_norm())(x), jax.jit(l2_normalize)(x), jax.jit(layer_norm())(x)
    wanted = (
        x64 / np.sqrt(np.mean(x64**2, -1, keepdims=True) + 1e-6) * np.linspace(0.5, 2.0, 16),
        x64 / np.sqrt(np.sum(x64**2, -1, keepdims=True) + 1e-6),
        (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2.0, 16)
        + 0.25,
    )
    for y, z in zip(got, wanted, strict=True):
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), z, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [RMSNorm(16, rngs=nnx.Rngs(0)), l2_normalize], ids=["rms", "l2"])
def test_zero_in_zero_out_with_slope_one_over_root_eps(function):
    y, dx = jax.jit(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(jnp.zeros((1, 1, 16)))
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_allclose(dx, 1e3, rtol=1e-5)


def test_sharded_equals_unsharded():
    def gradients(norm, x):
        return nnx.grad(lambda norm: jnp.sum(jnp.sin(norm(x))))(norm)["scale"][...]

    wanted = nnx.jit(gradients)(RMSNorm(16, rngs=nnx.Rngs(0)), inputs())
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        got = nnx.jit(gradients)(RMSNorm(16, rngs=nnx.Rngs(0)), constrain(inputs(), "batch", "time", "embed"))
        assert jax.typeof(got).sharding.spec == jax.P("fsdp")
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)

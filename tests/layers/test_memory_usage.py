"""Usage of a memory's slots: by hand, in batches, without padding, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.memory_usage import divergence_from_uniform, share_used, slot_weights, weights_by_rank
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.word_experts import WordExpertsConfig
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh

B, T, H, K, M = 8, 6, 2, 3, 25


def reads():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (B, T, H, K))
    return jnp.asarray(ids), jnp.asarray(rng.random((B, T, H, K), np.float32)), jnp.asarray(rng.random((B, T)) < 0.7)


def by_hand(ids, weights, real):
    z = np.zeros(M)
    for place in np.ndindex(B, T):
        if real[place]:
            np.add.at(z, np.asarray(ids[place]), np.asarray(weights[place]))
    return z


def test_weights_add_up_over_batches_without_padding():
    ids, weights, real = reads()
    count = jax.jit(slot_weights, static_argnums=2)
    whole = count(ids, weights, M, real)
    np.testing.assert_allclose(whole, by_hand(ids, weights, real), rtol=1e-5)
    parts = sum(count(ids[rows], weights[rows], M, real[rows]) for rows in (slice(0, 4), slice(4, 8)))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(count(ids, weights, M).sum(), weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, seq=2, model=2)], ids=["data seq model"])
def test_sharded_equals_unsharded(mesh):
    ids, weights, real = reads()
    with use_mesh(make_mesh(mesh)):
        place = lambda a: constrain(a, *("batch", "time", "heads", None)[: a.ndim])
        got = jax.jit(lambda *a: slot_weights(a[0], a[1], M, a[2]))(*map(place, (ids, weights, real)))
    np.testing.assert_allclose(got, by_hand(ids, weights, real), rtol=1e-5)


def test_the_two_numbers_of_layers_by_hand():
    z = jnp.array([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]])
    np.testing.assert_allclose(share_used(z), [1, 0.25, 0.5])
    np.testing.assert_allclose(divergence_from_uniform(z), np.log([1, 4, 2]), atol=1e-6)


def test_of_a_layer():
    config = MemoryConfig(ProductKeysConfig(n_slots=25, n_heads=2, top_k=3, key_dim=4))
    layer = config.make(8, rngs=nnx.Rngs(0))
    ids, weights = jax.jit(lambda layer, x: layer.choose(x))(layer, jax.random.normal(jax.random.key(0), (2, 7, 8)))
    assert ids.shape == (2, 7, 2, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    z = slot_weights(ids, weights, 25)
    assert share_used(z) == len(np.unique(ids)) / 25


def test_weights_count_without_sign_and_no_slot_not_at_all():
    ids, weights = jnp.array([[[[0, 1], [-1, 1]]]]), jnp.array([[[[-2.0, 1.0], [5.0, -1.0]]]])
    np.testing.assert_array_equal(slot_weights(ids, weights, 3), [2, 2, 0])


def test_weights_by_rank_by_hand():
    z = jnp.array([[1.0, 5.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_array_equal(weights_by_rank(z, (1, 2, 4)), [[2.5, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, seq=2, model=2)], ids=["one device", "data seq model"])
def test_word_experts_count_their_tokens(mesh):
    layer = WordExpertsConfig(n_experts=4, d_expert=3, routing=(3, 1, 1, 0, 2, 3)).make(8, rngs=nnx.Rngs(0))
    words = np.random.default_rng(0).integers(-1, 8, (B, T))
    real = np.random.default_rng(1).random((B, T)) < 0.7
    x = np.zeros((B, T, 8), np.float32)
    with use_mesh(mesh and make_mesh(mesh)):
        place = lambda a: constrain(jnp.asarray(a), *("batch", "time", None)[: a.ndim])
        got = jax.jit(lambda *a: layer.use(*a))(*map(place, (x, words, real)))
    routed = np.array([3, 1, 1, 0, 2, 3, -1, -1])[words]
    np.testing.assert_array_equal(got, [np.sum(real & (words >= 0) & (routed == expert)) for expert in range(4)])

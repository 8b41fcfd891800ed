"""Embedding: rows, exact gradients in bf16, errors, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.embedding import Embedding, lookup
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_looks_up_rows_in_the_given_dtype(dtype):
    embedding = Embedding(100, 8, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 99, 7], [7, 7, 1]])
    y = nnx.jit(lambda module, ids: module(ids, dtype))(embedding, ids)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, embedding.table[...].astype(dtype)[ids])


def test_the_gradient_counts_every_hit_also_in_bf16():
    ids = jnp.full((4, 1024), 3)
    table = jnp.zeros((64, 2))
    total = jax.jit(jax.grad(lambda table: lookup(table, ids, jnp.bfloat16).sum(dtype=jnp.float32)))(table)
    wanted = np.zeros((64, 2))
    wanted[3] = 4096
    np.testing.assert_array_equal(total, wanted)


def test_ids_without_a_row_give_zeros_and_no_gradient_under_jit():
    table, ids = jnp.ones((64, 2)), jnp.array([[-1, 64, 5, 1000]])
    y, pullback = jax.vjp(jax.jit(lambda table: lookup(table, ids, jnp.float32)), table)
    np.testing.assert_array_equal(y[0, :, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(np.flatnonzero(pullback(jnp.ones_like(y))[0][:, 0]), [5])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint32, np.int64])
def test_ids_of_any_integer_type(dtype):
    """256 is 0 in eight bits: every id would be outside the vocabulary."""
    embedding = Embedding(256, 4, rngs=nnx.Rngs(0))
    ids = np.array([[0, 7, 127]], dtype)
    want = embedding(jnp.asarray(ids, jnp.int32))
    np.testing.assert_array_equal(embedding(ids), want)
    np.testing.assert_array_equal(jax.jit(embedding)(ids), want)


def test_under_jit_ids_that_are_no_tokens_give_nan_and_no_gradient():
    """Those of the table's unused rows too."""
    embedding, ids = Embedding(50, 2, rngs=nnx.Rngs(0)), jnp.array([[-1, 50, 49, 1000]])
    call = jax.jit(lambda embedding, ids: embedding(ids))
    y, pullback = jax.vjp(lambda embedding: call(embedding, ids), embedding)
    assert np.isnan(y[0, :, 0]).tolist() == [True, True, False, True]
    np.testing.assert_array_equal(np.flatnonzero(pullback(jnp.ones_like(y))[0].table[...][:, 0]), [49])


@pytest.mark.parametrize("ids", [[[0, 100]], [[-1, 5]]], ids=str)
def test_concrete_ids_out_of_range_raise(ids):
    with pytest.raises(ValueError, match=r"embedding: needs token ids in 0\.\.99, got ids=.*; check"):
        Embedding(100, 8, rngs=nnx.Rngs(0))(jnp.array(ids))


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, model=2), MeshConfig(data=1, model=8)], ids=str)
def test_sharded_equals_unsharded(mesh):
    ids = jax.random.randint(jax.random.key(0), (8, 6), 0, 100)
    dy = jax.random.normal(jax.random.key(1), (8, 6, 8))

    def value_and_gradient(embedding, ids, dy):
        y, pullback = jax.vjp(lambda table: lookup(table, ids, jnp.float32), embedding.table[...])
        return y, pullback(dy)[0]

    wanted = nnx.jit(value_and_gradient)(Embedding(100, 8, rngs=nnx.Rngs(0)), ids, dy)
    with use_mesh(make_mesh(mesh)):
        embedding = Embedding(100, 8, rngs=nnx.Rngs(0))
        placed = constrain(ids, "batch", "time"), constrain(dy, "batch", "time", "embed")
        got = nnx.jit(value_and_gradient)(embedding, *placed)
        assert got[1].sharding.is_equivalent_to(embedding.table[...].sharding, 2)
        np.testing.assert_array_equal(got[0], embedding(placed[0]))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

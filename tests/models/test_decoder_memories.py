"""Memory layers in a decoder: in the place of feed-forwards or beside them, with one table for all or one each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.config import from_json, to_json
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.models.accounting import account, count_parameters
from jaxmem.models.decoder import DecoderConfig

KEYS = ProductKeysConfig(n_slots=16, n_heads=2, top_k=3, key_dim=8)
OWN = MemoryConfig(KEYS)
SHARED = MemoryConfig(KEYS, output="swilu", shared_table=True, placement="beside")


def config(*memories, **options) -> DecoderConfig:
    attention = AttentionConfig(n_heads=2)
    return DecoderConfig(16, 24, (attention, attention), repeats=2, vocab_size=64, memories=memories, **options)


PLACES = {"in place": (OWN, None), "beside, shared": (SHARED, SHARED), "both": (OWN, SHARED)}


def shapes(c):
    return nnx.eval_shape(lambda: c.make(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PLACES)
def test_memories_stand_where_they_are_asked_for(name):
    c = config(*PLACES[name])
    model = shapes(c)
    for block, memory in zip(model.blocks, PLACES[name], strict=True):
        assert (block.memory is None) == (memory is None)
        assert (block.ffn is None) == (memory is OWN)
    assert (model.table is None) == (name == "in place")
    assert from_json(to_json(c)) == c


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "both" else pytest.mark.slow) for n in PLACES])
def test_a_decoder_learns_in_its_tables(name):
    """Every parameter has a gradient, only slots that were read among the rows; remat changes nothing."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 5)))

    def gradients(c):
        graph, params = nnx.split(c.make(rngs=nnx.Rngs(0)))
        loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(tokens)[0]))
        return jax.jit(jax.grad(loss))(params)

    c = config(*PLACES[name])
    found = gradients(c)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))
    again = gradients(dataclasses.replace(c, remat="block"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_future_token_changes_nothing_before_it():
    model = config(OWN, SHARED).make(rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 6))
    other = tokens.copy()
    other[0, 4] = (tokens[0, 4] + 1) % 64
    run = jax.jit(lambda model, tokens: model(tokens)[0])
    a, b = run(model, jnp.asarray(tokens)), run(model, jnp.asarray(other))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.all(a[:, 4] != b[:, 4])


@pytest.mark.parametrize("name", PLACES)
def test_what_they_cost(name):
    """Tables are parameters that cost the FLOPs of the rows that are read."""
    c = config(*PLACES[name])
    cost, without = account(c, 32), account(dataclasses.replace(c, memories=()), 32)
    assert cost.n_parameters == count_parameters(shapes(c))
    n_tables = {"in place": 2, "beside, shared": 1, "both": 3}[name]
    assert cost.parameters["memory tables"] == n_tables * 16 * 16
    bigger = dataclasses.replace(KEYS, n_slots=64)
    larger = config(*(None if m is None else dataclasses.replace(m, keys=bigger) for m in PLACES[name]))
    more = account(larger, 32)
    n_layers = 2 * sum(m is not None for m in PLACES[name])
    assert more.forward_flops - cost.forward_flops == n_layers * 2 * 2 * 8 * (8 - 4), "sub-keys alone: 2 heads, K = 8"
    assert "feed-forward" in without.parameters


def test_errors():
    with pytest.raises(
        ValueError, match="needs one entry of memories per mixer of the pattern, got 1 for 2; write None"
    ):
        config(OWN)
    with pytest.raises(
        ValueError, match=r"needs memories that are a MemoryConfig or None, got memories=\('pkm', None\)"
    ):
        config("pkm", None)
    smaller = dataclasses.replace(SHARED, value_dim=8)
    with pytest.raises(
        ValueError, match="needs memories with a shared table to have the same slots, value_dim and kind"
    ):
        config(SHARED, smaller)

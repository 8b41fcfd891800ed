"""Sizes of 1: a config with one head, channel, step or memory works, or says at once in a sentence what it needs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_laws import MIXERS, D

from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig, GatedDeltaProductConfig

CHUNK = {"chunk_tokens": 8}


def sizes(config):
    """The fields of a config, and of the one inside it, that count something: (path, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{path}", number) for path, number in sizes(value))
        elif isinstance(value, int) and not isinstance(value, bool) and field.name not in ("layer", "n_layers"):
            yield field.name, value


def with_one(config, path):
    """The config with a 1 at that path, or the sentence of its refusal."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(config, **{head: with_one(getattr(config, head), rest) if rest else 1})


def trace(config):
    """Shapes and dtypes of a call on some tokens, and of one on a single token behind it."""

    def run(x, ids):
        layer = config.make(D, rngs=nnx.Rngs(0))
        y, state = layer(x, layer.init_state(2, capacity=6), segment_ids=ids)
        return y, layer(x[:, :1], state, segment_ids=ids[:, -1:])[0]

    shapes = jax.ShapeDtypeStruct((2, 5, D), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    many, one = jax.eval_shape(run, *shapes)
    assert (many.shape, one.shape) == ((2, 5, D), (2, 1, D))


def sizes_of_one(config, paths):
    """Sets them to 1 one behind the other, leaving out what is refused; traces what comes out."""
    for path in paths:
        try:
            config = with_one(config, path)
            jax.eval_shape(lambda config=config: config.make(D, rngs=nnx.Rngs(0)))
        except ValueError as error:
            assert "needs" in str(error) and "got" in str(error) and ";" in str(error), f"{path}: {error}"
            return
    trace(config)


@pytest.mark.parametrize("name", MIXERS)
def test_all_sizes_are_one(name):
    config = MIXERS[name][0]
    for path, value in sizes(config):
        if value != 1 and not path.endswith(("chunk_tokens", "n_channels")):
            try:
                smaller = with_one(config, path)
                jax.eval_shape(lambda smaller=smaller: smaller.make(D, rngs=nnx.Rngs(0)))
            except ValueError as error:
                assert "needs" in str(error) and "got" in str(error) and ";" in str(error), f"{path}: {error}"
            else:
                config = smaller
    trace(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_one_size_is_one(name):
    for path, value in sizes(MIXERS[name][0]):
        if value != 1:
            sizes_of_one(MIXERS[name][0], [path])


@pytest.mark.slow
def test_one_householder_step_is_the_gated_delta_rule():
    """In values, with one head, one key and one value channel too."""
    x = np.random.default_rng(0).normal(size=(2, 11, D)).astype(np.float32)
    for size in ({"n_heads": 2, "key_dim": 4, "value_dim": 6}, {"n_heads": 1, "key_dim": 1, "value_dim": 1}):
        product = GatedDeltaProductConfig(**size, **CHUNK, n_householder=1).make(D, rngs=nnx.Rngs(0))
        rule = GatedDeltaNetConfig(**size, **CHUNK).make(D, rngs=nnx.Rngs(1))
        theirs = jax.tree.leaves(nnx.to_pure_dict(nnx.state(product)))
        state = nnx.state(rule)
        ours, structure = jax.tree.flatten(state)
        assert [a.size for a in ours] == [a.size for a in theirs]
        nnx.update(rule, structure.unflatten([b.reshape(a.shape) for a, b in zip(ours, theirs, strict=True)]))
        run = jax.jit(lambda layer, x: layer(x)[0])
        np.testing.assert_allclose(run(product, x), run(rule, x), rtol=1e-5, atol=1e-6)

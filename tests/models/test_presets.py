"""Presets: the sizes they are named after, shapes that build, and a quickstart that runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmem.models.accounting import count_parameters
from jaxmem.models.presets import PRESETS, preset

MILLIONS = {"quickstart": 1.06, "mom-125m": 160, "mom-340m": 512, "mom-1.3b": 1330}
"""Parameters of each preset, as the docstring of `jaxmem.models.presets` says and explains."""


def test_every_preset_is_measured_here():
    assert MILLIONS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_has_its_parameters(name):
    config = preset(name)
    model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
    assert count_parameters(model) == pytest.approx(1e6 * MILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_forward_and_decodes(name):
    config = preset(name)
    model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    x, state = jax.eval_shape(lambda model, tokens: model(tokens, model.init_state(2, capacity=128)), model, tokens)
    assert x.shape == (2, 128, config.d_model) and x.dtype == config.dtype
    same = jax.eval_shape(lambda model, token, state: model(token, state)[1], model, tokens.update(shape=(2, 1)), state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), same) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


@pytest.mark.slow
def test_the_quickstart_starts_by_guessing_every_byte():
    config = preset("quickstart")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 129), dtype=np.int32)

    @jax.jit
    def loss(tokens):
        model = config.make(rngs=nnx.Rngs(0))
        logits = model.logits(model(tokens[:, :-1])[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    assert float(loss(tokens)) == pytest.approx(np.log(256), rel=0.02)


def test_an_unknown_name():
    with pytest.raises(ValueError) as error:
        preset("mom-350m")
    assert str(error.value) == (
        "preset: needs one of quickstart, mom-125m, mom-340m, mom-1.3b, got 'mom-350m'; "
        "did you mean mom-340m or mom-125m?"
    )
    with pytest.raises(ValueError, match="got 'zzz'; or name an experiment file, which ends in .py"):
        preset("zzz")

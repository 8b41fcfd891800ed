"""`jax_enable_x64`: float32 in, float32 out, whatever the flag, for every mixer of the laws; integers stay int32.

Tracing alone finds what raises and what is widened; values are compared besides. Variants are among the slow proofs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_laws import CONTINUED, MIXERS, B, D, T, every_mixer, floats, make, normal_like, rows, run, sample, whole
from training import tiny, tiny_memory

from jaxmem.layers.cross_entropy import chunked_cross_entropy
from jaxmem.models.sampling import SamplingConfig
from jaxmem.models.sampling import sample as draw
from jaxmem.training.evaluation import make_eval_step
from jaxmem.training.step import Shifted, init_state, make_train_step

FULL = (pytest.mark.slow, pytest.mark.full)


def traced(config, dtype=jnp.float32):
    """Shapes and dtypes of parameters, of a call's outputs, the state behind them and all gradients."""
    layer, state = jax.eval_shape(lambda: make(config))
    graph, parameters = nnx.split(layer)
    cast = lambda a: jax.ShapeDtypeStruct(a.shape, dtype) if a.dtype == jnp.float32 else a
    parameters, state = jax.tree.map(cast, (parameters, state))
    x, ids = jax.ShapeDtypeStruct((B, T, D), dtype), jax.ShapeDtypeStruct((B, T), jnp.int32)
    found = jax.eval_shape(lambda *a: run(whole, graph, *a), parameters, x, state, ids, (x, floats(state)))
    return parameters, found


def types(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in paths}


@every_mixer
def test_types_do_not_depend_on_the_flag(name):
    want = types(traced(MIXERS[name][0]))
    with jax.enable_x64(True):
        got = types(traced(MIXERS[name][0]))
    assert got == want


IN_FLOAT32 = ("attention", "window", "fast-weights")
"""Whatever goes in."""


@pytest.mark.parametrize("name", rows(name for name in MIXERS if name not in IN_FLOAT32))
@pytest.mark.parametrize("n_tokens", [1, T])
def test_float64_goes_through(name, n_tokens):
    """With parameters as they are, in fp32, from no state and from that of a call in fp32."""
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((B, n_tokens, D), jnp.float64)
        layer, state = jax.eval_shape(lambda: make(MIXERS[name][0]))
        for before in (None, state):
            y, after = jax.eval_shape(lambda layer, x, state: layer(x, state), layer, x, before)
            kept = [after.memory if hasattr(after, "memory") else after.memories] if hasattr(after, "last") else []
            assert y.dtype == jnp.float64 and all(a.dtype in (jnp.float64, jnp.complex128) for a in kept)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [tiny.config, tiny_memory.config])
def test_steps_of_training_do_not_depend_on_the_flag(tiny):
    def step():
        config = tiny()
        tokens = jax.ShapeDtypeStruct((config.accumulate, 4, config.data.context_tokens), jnp.int32)
        state = jax.eval_shape(lambda: init_state(config))
        batch = Shifted(*[tokens] * 5)
        rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
        evaluation = jax.eval_shape(make_eval_step(config.model), state.params, rows)
        return types((state, jax.eval_shape(make_train_step(config), state, batch), evaluation))

    want = step()
    with jax.enable_x64(True):
        assert step() == want


@pytest.mark.parametrize("name", ["delta", *(pytest.param(n, marks=FULL) for n in MIXERS if n != "delta")])
def test_values_do_not_depend_on_the_flag(name):
    mixer = sample(name)
    want = mixer(ids=CONTINUED)
    with jax.enable_x64(True):
        got = mixer(ids=CONTINUED)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        size = max(np.sqrt(np.mean(np.abs(b) ** 2)), 1e-6) if b.size else 1.0
        assert a.dtype == b.dtype and np.sqrt(np.mean(np.abs(a - b) ** 2)) <= 1e-6 * size, jax.tree_util.keystr(path)


@pytest.mark.usefixtures("unchecked")
def test_losses_and_samples_do_not_depend_on_the_flag():
    x, table = normal_like(0, (np.zeros((2, 5, 8), np.float32), np.zeros((16, 8), np.float32)))
    targets = np.arange(10, dtype=np.int32).reshape(2, 5)

    def both():
        loss = lambda x, table: chunked_cross_entropy(x, table, targets, np.ones((2, 5), np.float32)).loss_sum
        tokens = draw(x[:, 0] @ table.T, jax.random.key(0), SamplingConfig(temperature=0.5))
        greedy = draw(x[:, 0] @ table.T, jax.random.key(0), SamplingConfig(temperature=0.0))
        return types((jax.value_and_grad(loss, (0, 1))(x, table), tokens, greedy))

    want = both()
    with jax.enable_x64(True):
        assert both() == want

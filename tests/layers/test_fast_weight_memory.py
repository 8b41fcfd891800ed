"""The fast-weight memory as a layer: against chunks of single documents in a Python loop, in every split, on a mesh.

Its laws as a mixer are in tests/test_laws.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.config import from_json, to_json
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.fast_weight_memory import FastWeightMemoryConfig, fwpkm
from jaxmem.layers.fast_weight_table import Pairs, read, write
from jaxmem.models.accounting import account, count_parameters
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh

B, T, D, C = 2, 14, 8, 4
CONFIG = FastWeightMemoryConfig(n_slots=9, top_k=2, key_dim=4, value_dim=6, chunk_tokens=C)
CONFIGS = {
    "idw": CONFIG,
    "dot, mean": FastWeightMemoryConfig(9, 2, 4, 6, chunk_tokens=3, score="dot", step="mean", learning_rate=0.7),
    "every token": FastWeightMemoryConfig(9, 2, 4, 6, chunk_tokens=1, key_learning_rate=0.3),
}
IDS = np.array([[1] * 9 + [2] * 2 + [3] * 3, [1] * 2 + [2] * 10 + [0] * 2], np.int32)


marks = lambda name: {"idw": (), "every token": (pytest.mark.slow, pytest.mark.full)}.get(name, pytest.mark.slow)
every_config = pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in CONFIGS])


@functools.cache
def draw(config):
    layer = config.make(D, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    layer = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), layer)
    return layer, rng.normal(size=(B, T, D)).astype(np.float32)


call = jax.jit(lambda layer, x, state, ids: layer(x, state, segment_ids=ids))


@jax.jit
def written_out(layer, x):
    """Row by row, document by document, chunk by chunk; [B T D] of the layer's outputs."""
    c, y = layer.config, jnp.zeros_like(x)
    for row in range(B):
        for document in range(1, 4):
            (places,) = np.nonzero(IDS[row] == document)
            if len(places):
                y = y.at[row, places].set(of_document(c, layer, x[row, places]))
    return y


def of_document(c, layer, x):
    q = jnp.einsum("td,dpk->tpk", x, layer.query[...])
    q = q.reshape(len(x), -1)
    q = q * jax.lax.rsqrt(jnp.mean(q**2, axis=-1, keepdims=True) + 1e-6) * layer.query_norm.scale[...]
    q = q.reshape(1, len(x), 2, -1)
    v = x @ layer.value[...]
    v = (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-5)
    g = jax.nn.sigmoid(x @ layer.gate[...] + layer.gate_bias[...])
    keys, values = layer.keys[...][None], jnp.zeros((1, c.n_slots, c.value_dim))
    found = []
    for start in range(0, len(x), c.chunk_tokens):
        stop = start + c.chunk_tokens
        found.append(read(q[:, start:stop], keys, values, c.rates)[0])
        if stop <= len(x):
            pairs = slice(max(start, 1) - 1, stop - 1), slice(max(start, 1), stop)
            pairs = Pairs(q[:, pairs[0]], g[None, pairs[0]], v[None, pairs[1]])
            step, values = write(pairs, jnp.ones(pairs.gate.shape, bool), keys, values, c.rates)
            keys = keys + step
    o = g[:, None] * jnp.concatenate(found) + (1 - g[:, None]) * v
    o = o * jax.lax.rsqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6) * layer.out_norm.scale[...]
    return o @ layer.out[...]


def assert_close(got, want, tolerance=2e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 0.5)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def with_gradients(function, *arguments):
    weight = jnp.cos(jnp.arange(B * T * D)).reshape(B, T, D) * (IDS != 0)[..., None]
    y, pull = jax.vjp(function, *arguments)
    return y, pull(weight)


@pytest.mark.slow
@every_config
def test_the_layer_is_its_chunks_written_out(name):
    layer, x = draw(CONFIGS[name])
    got = jax.jit(lambda layer, x: with_gradients(lambda layer, x: layer(x, segment_ids=jnp.asarray(IDS))[0], layer, x))
    want = jax.jit(lambda layer, x: with_gradients(written_out, layer, x))
    assert_close(got(layer, x), want(layer, x))


@every_config
def test_split_anywhere_is_whole(name):
    layer, x = draw(CONFIGS[name])
    y, state = call(layer, x, None, IDS)
    ys, pieces = [], None
    for start, stop in ((0, 1), (1, 7), (7, 8), (8, T)):
        new, pieces = call(layer, x[:, start:stop], pieces, IDS[:, start:stop])
        ys.append(new)
    assert_close((jnp.concatenate(ys, axis=1), pieces), (y, state))


def test_steps_are_the_whole():
    layer, x = draw(CONFIG)

    @jax.jit
    def steps(layer, x):
        def step(state, token):
            y, state = layer(token[0][:, None], state, segment_ids=token[1][:, None])
            return state, y[:, 0]

        state, y = jax.lax.scan(step, layer.init_state(B), (x.swapaxes(0, 1), IDS.T))
        return y.swapaxes(0, 1), state

    assert_close(steps(layer, x), call(layer, x, None, IDS))


def test_the_future_is_not_seen():
    layer, x = draw(CONFIG)
    gradient = jax.jit(
        jax.grad(lambda x, now: jnp.sum(jnp.where(jnp.arange(T) < now, jnp.sum(layer(x)[0] ** 2, -1), 0)))
    )
    for now in (C, C + 1, T - 1):
        d_x = np.asarray(gradient(x, now))
        assert not np.any(d_x[:, now:]) and np.all(np.any(d_x[:, :now] != 0, axis=-1))
        changed = np.where((np.arange(T) < now)[:, None], x, -x)
        np.testing.assert_array_equal(
            call(layer, changed, None, None)[0][:, :now], call(layer, x, None, None)[0][:, :now]
        )


def test_a_document_starts_with_an_empty_table():
    layer, x = draw(CONFIG)
    _, state = call(layer, x, None, jnp.ones((B, T), jnp.int32))
    assert np.any(state.values) and np.any(state.moved)
    _, state = call(layer, x[:, :1], state, jnp.full((B, 1), 2, jnp.int32))
    assert not np.any(state.values) and not np.any(state.moved)


def test_what_was_written_is_read():
    """The same 64 tokens again and again: their queries find what followed them, the better the more often."""
    config = FastWeightMemoryConfig(n_slots=32**2, top_k=4, key_dim=32, value_dim=32, chunk_tokens=16)
    layer = config.make(32, rngs=nnx.Rngs(0))
    tokens = jnp.tile(jax.random.normal(jax.random.key(1), (1, 64, 32)), (1, 4, 1))
    layer.gate_bias[...] = jnp.full(1, 20.0)  # the gate is open: o is what is read
    layer.out_norm.scale[...] = jnp.ones(32)
    layer.out[...] = jnp.eye(32)
    read = np.asarray(jax.jit(lambda layer, x: layer(x)[0])(layer, tokens))[0]
    v = np.asarray(tokens[0] @ layer.value[...])
    v = (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True)
    similarity = np.mean(read[:-1] * v[1:], axis=-1)[:252].reshape(-1, 63)
    once, last = similarity[1].mean(), similarity[-1].mean()
    assert once > 0.5 and last > once


@pytest.mark.slow
def test_rows_over_devices_are_rows_on_one():
    layer, x = draw(CONFIG)
    x = np.concatenate([x, x[::-1] + 1])
    ids = np.concatenate([IDS, IDS[::-1]])

    @jax.jit
    def run(layer, x, ids):
        (y, state), pull = jax.vjp(lambda layer, x: layer(x, segment_ids=ids), layer, x)
        zeros = lambda a: np.zeros(a.shape, jax.dtypes.float0) if a.dtype == jnp.int32 else jnp.zeros_like(a)
        return y, state, pull((jnp.cos(y), jax.tree.map(zeros, state)))

    want = run(layer, x, ids)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        got = run(
            layer, constrain(jnp.asarray(x), "batch", "time", "embed"), constrain(jnp.asarray(ids), "batch", "time")
        )
    assert_close(jax.device_get(got), want)


def test_a_mesh_that_splits_the_sequence_is_refused():
    read = lambda: CONFIG.make(D, rngs=nnx.Rngs(0))(constrain(jnp.zeros((1, 8, D)), "batch", "time", "embed"))
    with (
        use_mesh(make_mesh(MeshConfig(data=1, seq=8))),
        pytest.raises(
            NotImplementedError, match="fast-weight memory: needs whole sequences on a device, .* got seq=8; use"
        ),
    ):
        jax.eval_shape(read)


def test_in_a_decoder():
    c = DecoderConfig(D, 16, (AttentionConfig(n_heads=2), CONFIG), repeats=2, vocab_size=64)
    assert from_json(to_json(c)) == c
    cost = account(c, T)
    model = nnx.eval_shape(lambda: c.make(rngs=nnx.Rngs(0)))
    assert cost.n_parameters == count_parameters(model)
    half = 2 * 3 * 2
    assert cost.parameters["fast weight memory"] == 2 * (D * 4 + D * 6 + D + 1 + 4 + half + 6 + 6 * D)
    numbers = 9 * 6 + half + C * (4 + 1 + 6) + 4 + 1
    assert cost.state_bytes["fast weight memory"] == 2 * 4 * (numbers + 2)
    x, state = jax.eval_shape(lambda model: model(jnp.zeros((1, T), jnp.int32)), model)
    assert x.shape == (1, T, D) and state[1].values.shape == (2, 1, 9, 6)


def test_flops_are_those_of_reads_and_steps():
    assert CONFIG.mixing_flops(D, C - 1) == 0, "the first chunk reads nothing"
    values, scores, keys = 2 * 2 * 6, 2 * 3 * 4, 2 * 2 * 4
    assert CONFIG.mixing_flops(D, C) == scores + 2 * values + keys
    assert CONFIG.mixing_flops(D, 10**6 * C) == scores + 3 * values + keys - 1  # the first chunk, rounded


@pytest.mark.parametrize(
    "options, words",
    [
        ({"key_dim": 3}, "needs an even key_dim, got key_dim=3; each half"),
        ({"n_slots": 10}, "needs n_slots to be n to the power of n_parts=2 and below 2^31, got n_slots=10"),
        ({"n_slots": 4}, "needs 1 <= top_k <= n_slots, got top_k=8 of n_slots=4"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_configs_in_one_sentence(options, words, unchecked):
    with pytest.raises(ValueError) as error:
        FastWeightMemoryConfig(**options)
    assert words in str(error.value)
    assert fwpkm().n_sub_keys == 512

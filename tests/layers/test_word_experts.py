"""Word experts: against one small feed-forward per expert written out, every gradient, and who reads what."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.memory_table import MemoryTable
from jaxmem.layers.word_experts import WordExpertsConfig, balanced_routing, mowe
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh

B, T, D, E, F, WORDS = 4, 6, 8, 5, 3, 11
ROUTING = (4, 0, 0, 3, 1, 1, 4, 2, 0, 3, 2)
CONFIGS = {
    "modulo": WordExpertsConfig(E, F),
    "routing": WordExpertsConfig(E, F, expert="gelu", routing=ROUTING, shared_table=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(config):
    rng = np.random.default_rng(0)
    layer = config.make(D, rngs=nnx.Rngs(0))
    table = config.make_table(D, rngs=nnx.Rngs(1)) if config.shared_table else None
    x, weight = rng.normal(size=(2, B, T, D)).astype(np.float32)
    return layer, table, x, rng.integers(0, WORDS, (B, T)).astype(np.int32), weight


@jax.jit
def value_and_gradients(layer, table, x, words, weight):
    x, weight = (constrain(a, "batch", "time", "embed") for a in (x, weight))
    words = constrain(words, "batch", "time")
    y, pull = jax.vjp(lambda layer, table, x: layer(x, words, table), layer, table, x)
    return y, pull(weight)


@jax.jit
def written_out(layer, table, x, words, weight):
    """Every expert on every token, and then the one that the word has."""
    config = layer.config

    def call(layer, table, x):
        table = layer.table if table is None else table
        w1, w2 = (a[...].reshape(E, F, D) for a in (table.inputs, table.values))
        act = jax.nn.relu if config.expert == "relu" else lambda h: h * jax.scipy.stats.norm.cdf(h)
        each = jnp.einsum("btef,efd->bted", act(jnp.einsum("btd,efd->btef", x, w1)), w2)
        expert = words % E if config.routing is None else jnp.array(config.routing)[words]
        return jnp.take_along_axis(each, expert[..., None, None], axis=2)[:, :, 0]

    y, pull = jax.vjp(call, layer, table, x)
    return y, pull(weight)


def assert_close(got, want):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@every_config
def test_the_layer_is_a_feed_forward_per_word(config):
    assert_close(value_and_gradients(*draw(config)), written_out(*draw(config)))


@every_config
def test_experts_that_no_word_has_have_no_gradient(config):
    layer, table, x, words, weight = draw(config)
    _, (d_layer, d_table, _) = value_and_gradients(layer, table, x, np.full_like(words, 3), weight)
    gradient = np.asarray((d_table or d_layer.table).values[...]).reshape(E, -1)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), np.arange(E) == 3)
    assert int(layer.experts(jnp.int32(3))) == 3


@every_config
def test_a_token_acts_on_itself_alone(config):
    layer, table, x, words, weight = draw(config)
    here = np.arange(B * T).reshape(B, T) == 7
    y, (*_, dx) = value_and_gradients(layer, table, x, words, weight * here[..., None])
    other = value_and_gradients(layer, table, x + here[..., None], np.where(here, (words + 1) % WORDS, words), weight)[
        0
    ]
    np.testing.assert_array_equal(other[~here], y[~here])
    assert not np.any(np.asarray(dx)[~here])


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("routing", MeshConfig(data=2, fsdp=2, model=2)),
        pytest.param("modulo", MeshConfig(data=2, seq=2), marks=pytest.mark.slow),
    ],
    ids=["data fsdp model", "data seq"],
)
def test_sharded_equals_unsharded(name, mesh):
    config = CONFIGS[name]
    layer, table, x, words, weight = draw(config)
    want = value_and_gradients(layer, table, x, words, weight)
    with use_mesh(make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)])):
        layer, table, *_ = draw(config)
        got = value_and_gradients(layer, table, x, words, weight)
    assert_close(jax.device_get(got), want)


def test_computes_in_the_dtype_of_x_and_knows_its_rows():
    config = mowe()
    layer = nnx.eval_shape(lambda: config.make(1024, rngs=nnx.Rngs(0)))
    x, words = jax.ShapeDtypeStruct((1, 2, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    y = jax.eval_shape(lambda layer, x, words: layer(x, words), layer, x, words)
    assert y.dtype == jnp.bfloat16 and y.shape == x.shape
    assert layer.table.values.shape == layer.table.inputs.shape == (config.n_slots, 1024)
    assert config.numbers_read(1024) * config.n_experts == 2 * layer.table.values.size


def test_words_that_the_routing_does_not_have_read_nothing_under_jit():
    layer, table, x, words, _ = draw(CONFIGS["routing"])
    words[0, 0], words[1, 1] = WORDS, -1
    y = jax.jit(lambda layer, x, words, table: layer(x, words, table))(layer, x, words, table)
    unknown = (words < 0) | (words >= WORDS)
    np.testing.assert_array_equal(~np.any(np.asarray(y) != 0, axis=-1), unknown)
    with pytest.raises(ValueError, match="needs ids in 0..14, the rows of the table, got -1"):
        layer(jnp.asarray(x), jnp.asarray(words), table)


def test_balanced_routing_evens_out_the_work():
    counts = (1000 / np.arange(1, 201)).astype(int)
    routing = balanced_routing(counts, 8)
    work = np.bincount(routing, weights=counts, minlength=8)
    assert work[routing[0]] == counts[0], "the most frequent word has an expert to itself"
    others = np.delete(work, routing[0])
    assert others.max() - others.min() <= 5
    assert WordExpertsConfig(8, 2, routing=routing).routing == routing


@pytest.mark.parametrize(
    "options, words",
    [
        ({"d_expert": 2**17}, "below 2^31, got n_experts=32768, d_expert=131072; change one of them"),
        ({"routing": (0, 32768)}, "needs routing to name experts 0..32767, got routing=(0, 32768) as its least"),
        ({"routing": ()}, "got routing=no entry"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_configs_in_one_sentence(options, words, unchecked):
    with pytest.raises(ValueError) as error:
        WordExpertsConfig(**options)
    assert str(error.value).startswith("word experts: needs ") and words in str(error.value)


def test_bad_tables_in_one_sentence(unchecked):
    config = CONFIGS["modulo"]
    own, shared = (dataclasses.replace(config, shared_table=s).make(D, rngs=nnx.Rngs(0)) for s in (False, True))
    x, ids, table = jnp.zeros((1, 1, D)), jnp.zeros((1, 1), jnp.int32), MemoryTable(E, D, D, rngs=nnx.Rngs(0))
    words = "word experts: needs a table in the call if and only if shared_table=True, got "
    with pytest.raises(ValueError, match=words + "one with shared_table=False; make one with config.make_table"):
        own(x, ids, table)
    with pytest.raises(ValueError, match=words + "none with shared_table=True"):
        shared(x, ids)
    with pytest.raises(
        ValueError, match=r"needs a table with \(n_slots, value_dim, d_input\)=\(15, 8, 8\), got \(5, 8, 8\)"
    ):
        shared(x, ids, table)

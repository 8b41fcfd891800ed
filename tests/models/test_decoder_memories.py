"""Memory layers in a decoder: in the place of feed-forwards or beside them, with one table for all or one each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.config import from_json, to_json
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.word_experts import WordExperts, WordExpertsConfig
from jaxmem.models.accounting import account, count_parameters
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh

KEYS = ProductKeysConfig(n_slots=16, n_heads=2, top_k=3, key_dim=8)
OWN = MemoryConfig(KEYS)
SHARED = MemoryConfig(KEYS, output="swilu", shared_table=True, placement="beside")


def config(*memories, **options) -> DecoderConfig:
    attention = AttentionConfig(n_heads=2)
    return DecoderConfig(16, 24, (attention, attention), repeats=2, vocab_size=64, memories=memories, **options)


PLACES = {"in place": (OWN, None), "beside, shared": (SHARED, SHARED), "both": (OWN, SHARED)}
WORDS = WordExpertsConfig(n_experts=16, d_expert=3, shared_table=True, placement="beside")
OWN_WORDS = WordExpertsConfig(n_experts=4, d_expert=3, expert="gelu", routing=(3, 1, 2, 0) * 16)


def shapes(c):
    return nnx.eval_shape(lambda: c.make(rngs=nnx.Rngs(0)))


@functools.cache
def make(c):
    return jax.jit(lambda: c.make(rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("name", PLACES)
def test_memories_stand_where_they_are_asked_for(name):
    c = config(*PLACES[name])
    model = shapes(c)
    for block, memory in zip(model.blocks, PLACES[name], strict=True):
        assert (block.memory is None) == (memory is None)
        assert (block.ffn is None) == (memory is OWN)
    assert (model.table is None) == (name == "in place")
    assert from_json(to_json(c)) == c


def test_a_future_token_changes_nothing_before_it():
    model = make(config(OWN, SHARED))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 6))
    other = tokens.copy()
    other[0, 4] = (tokens[0, 4] + 1) % 64
    run = jax.jit(lambda model, tokens: model(tokens)[0])
    a, b = run(model, jnp.asarray(tokens)), run(model, jnp.asarray(other))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.all(a[:, 4] != b[:, 4])


on_meshes = pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(), id="data", marks=(pytest.mark.slow, pytest.mark.full)),
        pytest.param(MeshConfig(data=2, fsdp=2, model=2), id="data fsdp model", marks=pytest.mark.slow),
    ],
)
PADDED = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0]])
WEIGHT = jnp.cos(jnp.arange(16.0))


def draw_tokens(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 64, PADDED.shape, np.int32))


def assert_close(got, want, tolerance=1e-5):
    """Relative root mean square of every array."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@jax.jit
def values_and_gradients(model, tokens, weight):
    """Of the weighted outputs of real tokens."""

    def loss(model):
        x = model(tokens, segment_ids=PADDED)[0]
        return jnp.sum(jnp.where(PADDED[..., None] != 0, weight * x, 0)), x

    return jax.grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "both" else pytest.mark.slow) for n in PLACES])
def test_every_parameter_has_a_gradient(name):
    gradients, _ = values_and_gradients(make(config(*PLACES[name])), draw_tokens(0), WEIGHT)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


def test_padding_is_neutral():
    """What stands in the place of padding changes no real token, and no slot that only padding reads has a gradient."""
    model, tokens = make(config(OWN, SHARED)), draw_tokens(0)
    other = jnp.where(PADDED == 0, draw_tokens(1), tokens)
    (a, x), (b, y) = (values_and_gradients(model, these, WEIGHT) for these in (tokens, other))
    np.testing.assert_array_equal(x[PADDED != 0], y[PADDED != 0])
    assert_close(a, b)


@pytest.mark.slow
def test_word_experts_read_by_token():
    """In the place of a feed-forward and beside it: in a call, in steps, behind padding."""
    c = config(OWN_WORDS, WORDS)
    model, tokens = make(c), draw_tokens(0)
    assert from_json(to_json(c)) == c and model.blocks[0].ffn is None and model.blocks[1].ffn is not None
    gradients, x = values_and_gradients(model, tokens, WEIGHT)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))
    read = np.isin(np.arange(16), np.unique(tokens[PADDED != 0]) % 16)
    of_expert = np.any(np.asarray(gradients.table.values[...]).reshape(16, -1) != 0, axis=-1)
    np.testing.assert_array_equal(of_expert, read)

    other = jnp.where(PADDED == 0, draw_tokens(1), tokens)
    np.testing.assert_array_equal(x[PADDED != 0], values_and_gradients(model, other, WEIGHT)[1][PADDED != 0])

    @jax.jit
    def steps(model, tokens):
        step = lambda state, token: (lambda y, state: (state, y))(*model(token[:, None], state))
        return jax.lax.scan(step, model.init_state(2, capacity=6), tokens.T)[1][:, :, 0].swapaxes(0, 1)

    assert_close(steps(model, tokens), jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens))


def test_no_tokens_use_nothing():
    c = config(OWN, WORDS)
    uses = jax.eval_shape(lambda model: model.with_memory_use(draw_tokens(0)[:, :0])[2], shapes(c))
    want = jax.eval_shape(lambda model: model.with_memory_use(draw_tokens(0))[2], shapes(c))
    assert uses == want and [use.shape for use in uses] == [(2, 16), (2, 16)]


def test_what_word_experts_cost():
    c = config(OWN_WORDS, WORDS)
    cost = account(c, 32)
    assert cost.n_parameters == count_parameters(shapes(c))
    assert cost.parameters["memory tables"] == 2 * (2 * 4 * 3 * 16) + 2 * 16 * 3 * 16
    assert cost.table_numbers_read == 2 * 2 * (2 * 3 * 16)
    without = account(dataclasses.replace(c, memories=(dataclasses.replace(OWN_WORDS, d_expert=1), None)), 32)
    assert cost.forward_flops - without.forward_flops == 2 * 2 * (2 * (3 - 1) * 16 + 2 * 3 * 16)


@on_meshes
def test_word_experts_sharded_are_unsharded(mesh):
    c, tokens = config(OWN_WORDS, WORDS), jnp.concatenate([draw_tokens(seed) for seed in range(4)])

    @jax.jit
    def run(tokens):
        grad = jax.grad(lambda model: (jnp.sum(jnp.sin(x := model(tokens)[0])), x), has_aux=True)
        return grad(c.make(rngs=nnx.Rngs(0)))

    want = jax.device_get(run(tokens))
    with use_mesh(make_mesh(mesh)):
        assert_close(jax.device_get(run(constrain(tokens, "batch", "time"))), want)


@pytest.mark.slow
def test_the_scan_is_the_loop_maps_over_rows_and_computes_again():
    c = config(OWN, SHARED)
    model, tokens = make(c), draw_tokens(0)

    def loop(model, tokens):
        x = model.embedding(tokens)
        for repeat in range(c.repeats):
            for stack in model.blocks:
                block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stack)
                x = x + block.mixer(block.mixer_norm(x))[0]
                h = block.ffn_norm(x)
                x = x + (0 if block.ffn is None else block.ffn(h))
                x = x + block.memory(h, model.table if block.memory.config.shared_table else None)
        return model.norm(x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(call, model):
        return jax.grad(lambda model: (jnp.sum(jnp.sin(x := call(model, tokens))), x), has_aux=True)(model)

    want = run(loop, model)
    rows = lambda model, tokens: jax.vmap(lambda row: model(row[None])[0][0])(tokens)
    graph = nnx.graphdef(make(dataclasses.replace(c, remat="block")))
    again = lambda model, tokens: nnx.merge(graph, nnx.state(model))(tokens)[0]
    for call in (lambda model, tokens: model(tokens)[0], rows, again):
        assert_close(run(call, model), want)


@on_meshes
def test_sharded_equals_unsharded(mesh):
    c, tokens = config(OWN, SHARED), jnp.concatenate([draw_tokens(seed) for seed in range(4)])

    @jax.jit
    def run(tokens):
        model = c.make(rngs=nnx.Rngs(0))
        grad = jax.grad(lambda model: (jnp.sum(jnp.sin(x := model(tokens)[0])), x), has_aux=True)
        return grad(model)

    want = jax.device_get(run(tokens))
    with use_mesh(make_mesh(mesh)):
        got = jax.device_get(run(constrain(tokens, "batch", "time")))
    assert_close(got, want)


def test_active_parameters_are_all_but_the_rows_that_are_not_read():
    keys = dataclasses.replace(KEYS, n_slots=1024)
    own = MemoryConfig(keys, expert="gelu")
    shared = dataclasses.replace(SHARED, keys=keys)
    cost = account(config(own, shared), 32)
    tables = 2 * 1024 * 2 * 16 + 1024 * 16  # experts' in both repeats, and the shared one
    read = 2 * 6 * 2 * 16 + 2 * 6 * 16  # 2 layers each, 2 heads of 3 rows
    assert cost.parameters["memory tables"] == tables
    assert cost.n_active_parameters == cost.n_parameters - tables + read
    tiny = account(config(OWN, None), 32)
    assert tiny.n_active_parameters < tiny.n_parameters
    without = account(config(), 32)
    assert without.n_active_parameters == without.n_parameters


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
        ValueError,
        match=r"needs memories that are a MemoryConfig, a WordExpertsConfig or None, got memories=\('pkm', None\)",
    ):
        config("pkm", None)
    smaller = dataclasses.replace(SHARED, value_dim=8)
    with pytest.raises(
        ValueError, match="needs memories with a shared table to have the same slots, value_dim, heads and kind"
    ):
        config(SHARED, smaller)
    with pytest.raises(
        ValueError, match=r"needs word experts with a routing of every token, got 4 entries for vocab_size=64; add"
    ):
        config(dataclasses.replace(OWN_WORDS, routing=(0, 1, 2, 3)), None)


@pytest.mark.parametrize(
    "memories",
    [
        pytest.param((OWN, None), id="own", marks=pytest.mark.slow),
        pytest.param((SHARED, OWN_WORDS), id="shared, words", marks=pytest.mark.slow),
    ],
)
def test_the_use_of_memories_is_that_of_their_choices_without_padding(memories):
    c = config(*memories)
    model, tokens = make(c), draw_tokens(0)
    x, _, uses = jax.jit(lambda model: model.with_memory_use(tokens, segment_ids=PADDED))(model)

    @jax.jit
    def choices(model):
        x, chosen = model.embedding(tokens), []
        for repeat in range(c.repeats):
            for stack in model.blocks:
                block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stack)
                x = x + block.mixer(block.mixer_norm(x), segment_ids=PADDED)[0]
                h = block.ffn_norm(x)
                x = x + (0 if block.ffn is None else block.ffn(h))
                if isinstance(block.memory, WordExperts):
                    chosen.append((block.memory.experts(tokens)[..., None], jnp.ones((*tokens.shape, 1))))
                    x = x + block.memory(h, tokens)
                elif block.memory is not None:
                    chosen.append(block.memory.choose(h))
                    x = x + block.memory(h, model.table if block.memory.config.shared_table else None)
        return model.norm(x), chosen

    again, chosen = choices(model)
    assert_close(x, again)
    assert_close(x, jax.jit(lambda model: model(tokens, segment_ids=PADDED)[0])(model))
    places = [place for place, memory in enumerate(memories) if memory is not None]
    assert [use is not None for use in uses] == [place in places for place in range(len(memories))]
    real, kept = np.asarray(PADDED) != 0, iter(chosen)
    for repeat in range(c.repeats):
        for place in places:
            want = np.zeros(uses[place].shape[1])
            np.add.at(want, *(np.asarray(a)[real].reshape(-1) for a in next(kept)))
            np.testing.assert_allclose(uses[place][repeat], want, rtol=1e-4, atol=1e-6)

"""Product keys: the search with pruning is the search through all keys, in scores, ids and gradients."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.product_keys import ProductKeys, ProductKeysConfig, product_top_k, square, staircase

QUICK = [(16, 2, 32), (7, 3, 10)]
SIZES = [*QUICK, (16, 2, 8), (5, 2, 25), (64, 2, 8), (3, 3, 27), (4, 4, 12), (2, 5, 3), (9, 2, 1)]
every_size = pytest.mark.parametrize(
    "n, parts, k", [pytest.param(*size, marks=() if size in QUICK else pytest.mark.slow) for size in SIZES]
)
search = jax.jit(product_top_k, static_argnums=(1, 2))


def draw(n, parts, seed=0, rows=20):
    return np.random.default_rng(seed).normal(size=(rows, parts, n)).astype(np.float32)


@every_size
def test_the_best_of_all_keys_written_out(n, parts, k):
    """Whole keys, made one by one, against the query: no sub-scores, no codebooks."""
    rng = np.random.default_rng(1)
    q, codebooks = rng.normal(size=(6, parts, 4)), rng.normal(size=(parts, n, 4))
    keys = np.stack([np.concatenate(rows) for rows in itertools.product(*codebooks)])
    scores = q.reshape(6, -1) @ keys.T
    ids = np.argsort(-scores, axis=-1)[:, :k]
    got = search(np.einsum("rpk,pnk->rpn", q, codebooks).astype(np.float32), k)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_allclose(got.scores, np.take_along_axis(scores, ids, -1), rtol=1e-5, atol=1e-5)


@every_size
def test_every_search_finds_the_same_to_the_last_bit(n, parts, k):
    want = search(draw(n, parts), k, "reference")
    for way in ("staircase", "square"):
        got = search(draw(n, parts), k, way)
        np.testing.assert_array_equal(got.scores, want.scores)
        np.testing.assert_array_equal(got.ids, want.ids)


@pytest.mark.parametrize("n, parts, k", [(8, 2, 12), pytest.param(4, 3, 20, marks=pytest.mark.slow)])
def test_equal_scores_rank_the_lower_id_first(n, parts, k):
    scores = np.random.default_rng(2).integers(-1, 2, (50, parts, n)).astype(np.float32)
    sums = functools.reduce(lambda a, b: (a[:, :, None] + b[:, None]).reshape(50, -1), scores.swapaxes(0, 1))
    want = np.argsort(-sums, axis=-1, kind="stable")[:, :k]
    for way in ("staircase", "square", "reference"):
        np.testing.assert_array_equal(search(scores, k, way).ids, want)


def test_rounding_never_costs_a_score():
    """Large and small parts: sums that differ round to one number, so ids may differ, scores may not."""
    scores = draw(16, 2, rows=500) * np.array([1.0, 1e-7], np.float32)[:, None]
    np.testing.assert_array_equal(search(scores, 8).scores, search(scores, 8, "reference").scores)


@every_size
def test_gradients_are_those_of_the_search_through_all(n, parts, k):
    weight = np.random.default_rng(3).normal(size=(20, k)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(scores, way):
        return jax.grad(lambda scores: jnp.sum(weight * jnp.sin(product_top_k(scores, k, way).scores)))(scores)

    np.testing.assert_allclose(
        gradient(draw(n, parts), "staircase"), gradient(draw(n, parts), "reference"), rtol=1e-5, atol=1e-6
    )


def test_gradients_by_hand():
    scores = jnp.array([[1.0, 2.0, 0.0], [0.0, 30.0, 20.0]])
    weight = jnp.array([1.0, 10.0, 100.0])  # of the slots (1, 1), (0, 1), (2, 1)
    got = jax.jit(jax.grad(lambda scores: jnp.sum(weight * product_top_k(scores, 3).scores)))(scores)
    np.testing.assert_array_equal(got, [[10, 1, 100], [0, 111, 0]])


@every_size
def test_the_staircase_has_the_places_whose_betters_are_fewer_than_k(n, parts, k):
    places = {tuple(row) for row in staircase(k, n, parts).tolist()}
    every = itertools.product(range(n), repeat=parts)
    assert places == {p for p in every if math.prod(a + 1 for a in p) <= k}
    assert places <= {tuple(row) for row in square(k, n, parts).tolist()}


@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_scores_of_the_layer_by_hand(kind):
    config = ProductKeysConfig(25, n_heads=3, top_k=4, key_dim=8, query_norm=kind, key_norm=kind)
    keys = ProductKeys(config, 6, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(keys)
    state = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), state)
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    keys = nnx.merge(graph, state)

    def normed(a, norm):
        if kind == "none":
            return a
        a = a - (a.mean(-1, keepdims=True) if kind == "layer" else 0)
        a = a / np.sqrt((a**2).mean(-1, keepdims=True) + norm.eps) * norm.scale[...]
        return a + (norm.bias[...] if kind == "layer" else 0)

    q = normed(np.einsum("btd,dhpk->bthpk", x, keys.query[...]) + keys.bias[...], keys.query_norm)
    want = np.einsum("bthpk,hpnk->bthpn", q, normed(np.asarray(keys.keys[...]), keys.key_norm))
    np.testing.assert_allclose(jax.jit(lambda keys, x: keys(x))(keys, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"n_slots": 10},
            "needs n_slots to be n to the power of n_parts=2 and below 2^31, got n_slots=10; take 3**2=9",
        ),
        ({"n_slots": 27, "n_parts": 4}, "got n_slots=27; take 2**4=16"),
        ({"n_slots": 50_000**2}, "below 2^31, got n_slots=2500000000"),
        ({"n_slots": 4, "top_k": 5}, "needs 1 <= top_k <= n_slots, got top_k=5 of n_slots=4; read fewer slots"),
        (
            {"key_dim": 16, "n_parts": 3, "n_slots": 27, "top_k": 2},
            "key_dim divisible by n_parts, got key_dim=16",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_configs_in_one_sentence(options, words, unchecked):
    with pytest.raises(ValueError) as error:
        ProductKeysConfig(**options)
    assert str(error.value).startswith("product keys: needs ") and words in str(error.value)


def test_bad_arguments_in_one_sentence(unchecked):
    with pytest.raises(ValueError, match="product keys: needs 1 <= top_k <= n_slots, got top_k=10 of n_slots=9; read"):
        product_top_k(jnp.zeros((2, 3)), 10)
    with pytest.raises(
        ValueError, match="product keys: needs search to be one of staircase, square, reference, got 'x'"
    ):
        product_top_k(jnp.zeros((2, 3)), 2, "x")

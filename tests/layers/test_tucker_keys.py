"""Keys scored through a Tucker core: against whole slots written out, with cores of every rank, in scores and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.tucker_keys import (
    TuckerKeysConfig,
    leading_singular_vectors,
    rank_penalty,
    second_singular_values,
    tucker_top_k,
)

N, K, R, ROWS = 9, 3, 2, 40
CORES = {
    "rank 1": np.outer([0.6, 0.8], [2.0, -1.0]),
    "rank 2": np.array([[1.0, -0.4], [0.3, 0.7]]),
    "zero": np.zeros((2, 2)),
}
search = jax.jit(tucker_top_k, static_argnums=(1, 2))


def draw(core, positive=False, seed=0):
    """Sub-scores [rows, 2, R, N] and the planes that `tucker_top_k` reads, made as the layer makes them."""
    s = np.random.default_rng(seed).normal(size=(ROWS, 2, R, N)).astype(np.float32)
    core = jnp.asarray(core, jnp.float32)
    u, v = leading_singular_vectors(core)
    if positive:  # along u and v
        for part, vector in enumerate((u, v)):
            along = np.einsum("brn,r->bn", s[:, part], vector)
            s[:, part] += np.asarray(vector)[:, None] * (np.abs(along) - along)[:, None]
    return s, planes_of(jnp.asarray(s), core)


def planes_of(s, core):
    u, v = leading_singular_vectors(core)
    chosen_by = [jnp.einsum("brn,r->bn", s[:, part], vector)[:, None] for part, vector in enumerate((u, v))]
    return jnp.concatenate([*chosen_by, jnp.einsum("brn,rq->bqn", s[:, 0], core), s[:, 1]], axis=1)


def every_slot(s, core):
    """The scores of all slots, from the equation, in fp64."""
    return np.einsum("bri,rq,bqj->bij", s[:, 0], core, s[:, 1], dtype=np.float64).reshape(ROWS, -1)


def assert_best_of(scores, got):
    want = np.argsort(-scores, axis=-1, kind="stable")[:, :K]
    np.testing.assert_array_equal(got.ids, want)
    np.testing.assert_allclose(got.scores, np.take_along_axis(scores, want, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rank 1", "rank 2"])
def test_the_search_through_all_is_the_equation(name):
    s, planes = draw(CORES[name])
    assert_best_of(every_slot(s, CORES[name]), search(planes, K, "reference"))


def test_with_a_core_of_rank_1_the_signed_search_is_exact():
    s, planes = draw(CORES["rank 1"])
    assert_best_of(every_slot(s, CORES["rank 1"]), search(planes, K, "signed"))


def test_with_a_core_of_rank_1_and_positive_sub_scores_the_published_search_is_exact():
    s, planes = draw(CORES["rank 1"], positive=True)
    assert_best_of(every_slot(s, CORES["rank 1"]), search(planes, K, "square"))


@pytest.mark.parametrize("way", ["square", "signed"])
def test_any_core_scores_the_pairs_of_candidates_exactly(way):
    s, planes = draw(CORES["rank 2"])
    scores = every_slot(s, CORES["rank 2"]).reshape(ROWS, N, N)
    for row in range(ROWS):
        orders = [np.argsort(-np.asarray(planes[row, part])) for part in (0, 1)]
        candidates = [np.r_[order[:K], order[-K:]] if way == "signed" else order[:K] for order in orders]
        allowed = np.full((N, N), -np.inf)
        allowed[np.ix_(*candidates)] = scores[row][np.ix_(*candidates)]
        scores[row] = allowed
    assert_best_of(scores.reshape(ROWS, -1), search(planes, K, way))


def test_more_candidates_than_sub_keys_are_all():
    _, planes = draw(CORES["rank 2"])
    np.testing.assert_array_equal(search(planes, N, "signed").ids, search(planes, N, "reference").ids)
    assert all(len(set(row)) == N for row in np.asarray(search(planes, N, "signed").ids).tolist())


@pytest.mark.parametrize("way", ["square", "signed", "reference"])
def test_gradients_are_those_of_the_chosen_slots_written_out(way):
    core = jnp.asarray(CORES["rank 2"], jnp.float32)
    s, planes = draw(core)
    weight = np.random.default_rng(1).normal(size=(ROWS, K)).astype(np.float32)
    first, second = jnp.divmod(search(planes, K, way).ids, N)

    @jax.jit
    def got(s, core):
        return jnp.sum(weight * jnp.sin(tucker_top_k(planes_of(s, core), K, way).scores))

    def want(s, core):
        pick = lambda part, ids: jnp.take_along_axis(s[:, part], ids[:, None], axis=-1)
        return jnp.sum(weight * jnp.sin(jnp.einsum("brk,rq,bqk->bk", pick(0, first), core, pick(1, second))))

    for a, b in zip(jax.grad(got, (0, 1))(s, core), jax.grad(want, (0, 1))(s, core), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_singular_vectors_are_those_of_the_best_approximation_and_have_no_gradient(rank):
    cores = jnp.asarray(np.random.default_rng(0).normal(size=(50, rank, rank)), jnp.float32)
    u, v = jax.jit(leading_singular_vectors)(cores)
    sigma = np.linalg.svd(cores, compute_uv=False)[:, 0]
    np.testing.assert_allclose(np.einsum("hr,hrq,hq->h", u, cores, v), sigma, rtol=1e-5)
    np.testing.assert_allclose([np.linalg.norm(a, axis=-1) for a in (u, v)], np.ones((2, 50)), rtol=1e-5)
    assert np.all(np.sum(u + v, axis=-1) >= 0)
    assert not np.any(jax.grad(lambda core: sum(map(jnp.sum, leading_singular_vectors(core))))(cores[0]))
    assert all(np.all(np.asarray(vector) > 0) for vector in jax.jit(leading_singular_vectors)(jnp.abs(cores)))


@pytest.mark.parametrize("rank", [2, 3])
def test_the_penalty_and_its_gradient(rank):
    cores = np.random.default_rng(0).normal(size=(4, rank, rank))
    sigma = np.linalg.svd(cores, compute_uv=False)[:, 1:]
    single, penalty = jnp.asarray(cores, jnp.float32), jax.jit(rank_penalty)
    np.testing.assert_allclose(penalty(single), np.mean(np.maximum(sigma - 0.15, 0) ** 2), rtol=1e-4)

    def of_numpy(cores):
        return np.mean(np.maximum(np.linalg.svd(cores, compute_uv=False)[:, 1:] - 0.15, 0) ** 2)

    got, step = jax.jit(jax.grad(penalty))(single), 1e-5
    for place in np.ndindex(*cores.shape):
        moved = np.stack([cores, cores])
        moved[(slice(None), *place)] += step, -step
        np.testing.assert_allclose(got[place], (of_numpy(moved[0]) - of_numpy(moved[1])) / (2 * step), atol=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_equal_singular_values_are_found(rank):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(rank, rank)))[0]
    core = jnp.asarray(2 * rotation, jnp.float32)
    np.testing.assert_allclose(second_singular_values(core), 2 * np.ones(rank - 1), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(rank_penalty)(core)))


@pytest.mark.parametrize("core", [np.eye(2), np.zeros((2, 2)), CORES["rank 1"]], ids=["equal", "zero", "rank 1"])
def test_the_gradient_of_the_penalty_is_finite_where_singular_values_meet(core):
    core = jnp.asarray(core, jnp.float32)
    for loss in (rank_penalty, lambda core: jnp.sum(second_singular_values(core))):
        assert np.all(np.isfinite(jax.grad(loss)(core)))
    assert rank_penalty(jnp.ones((3, 1, 1))) == 0


@pytest.mark.parametrize("name", CORES)
def test_gradients_of_a_layer_are_finite_for_every_core(name):
    keys = TuckerKeysConfig(n_slots=N**2, n_heads=2, top_k=K, key_dim=8).make(6, rngs=nnx.Rngs(0))
    keys.core[...] = jnp.broadcast_to(jnp.asarray(CORES[name], jnp.float32), (2, 2, 2))
    x = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda keys, x: jnp.sum(jnp.sin(keys.choose(keys(x)).scores)), (0, 1)))(keys, x)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
    if name == "rank 2":
        assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


def test_planes_are_the_equation():
    """Every sub-score by hand, through both norms."""
    config = TuckerKeysConfig(n_slots=9, n_heads=2, top_k=3, key_dim=8, core_rank=3)
    keys = config.make(6, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    keys = jax.tree.map(lambda p: p + 0.5 * rng.normal(size=p.shape).astype(np.float32), keys)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)

    def normed(a, norm):
        a = a - a.mean(-1, keepdims=True)
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + norm.eps) * norm.scale[...] + norm.bias[...]

    q = normed(np.einsum("btd,dhpk->bthpk", x, keys.query[...]) + keys.bias[...], keys.query_norm)
    s = np.einsum("bthpk,hpnrk->bthprn", q, normed(np.asarray(keys.keys[...]), keys.key_norm))
    u, v = leading_singular_vectors(keys.core[...])
    of_core = np.einsum("bthrn,hrq->bthqn", s[:, :, :, 0], keys.core[...])
    by_u, by_v = (np.einsum("bthrn,hr->bthn", s[:, :, :, p], w)[:, :, :, None] for p, w in enumerate((u, v)))
    want = np.concatenate([by_u, by_v, of_core, s[:, :, :, 1]], axis=3)
    got = jax.jit(lambda keys, x: keys(x))(keys, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    scores = np.einsum("bthri,hrq,bthqj->bthij", s[:, :, :, 0], keys.core[...], s[:, :, :, 1]).reshape(2, 5, 2, -1)
    exact = functools.partial(tucker_top_k, k=3, search="reference")
    np.testing.assert_array_equal(exact(got).ids, np.argsort(-scores, axis=-1, kind="stable")[..., :3])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_parts": 3, "n_slots": 27, "key_dim": 6, "top_k": 2}, "needs n_parts=2, got n_parts=3; change it"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_configs_in_one_sentence(options, words, unchecked):
    with pytest.raises(ValueError) as error:
        TuckerKeysConfig(**options)
    assert str(error.value).startswith("tucker keys: needs ") and words in str(error.value)

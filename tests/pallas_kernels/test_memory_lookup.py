"""Lookups in a table: against plain JAX in fp32, gradients of gradients, many hits, ids of no row, and memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import relative_rms

from jaxmem.pallas_kernels import memory_lookup
from jaxmem.pallas_kernels.memory_lookup import bag, dots, sum_rows

M, V, K = 13, 6, 5


def draw(*batch, dtype=jnp.float32, seed=0):
    """A table, ids with many repetitions, weights, and a vector per token."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)
    ids = jnp.asarray(np.minimum(rng.integers(0, M, (*batch, K)), rng.integers(0, M, (*batch, K))))
    return normal(M, V, dtype=dtype), ids, normal(*batch, K), normal(*batch, V)


def plain(values, ids, weights):
    return jnp.einsum("...k,...kv->...v", weights, values[ids].astype(jnp.float32), precision="highest")


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and relative_rms(a, b) < tolerance


@pytest.fixture(params=["few numbers", "many"])
def chunks(request, monkeypatch):
    """Chunks of two tokens, or of all."""
    if request.param == "few numbers":
        monkeypatch.setattr(memory_lookup, "CHUNK_NUMBERS", 2 * K * V)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("batch", [(7,), (2, 3), ()], ids=str)
def test_a_bag_and_its_gradients(batch, implementation, chunks):
    values, ids, weights, dy = draw(*batch)

    def run(f):
        y, pull = jax.vjp(lambda values, weights: f(values, ids, weights), values, weights)
        return y, pull(dy)

    got = jax.jit(lambda: run(functools.partial(bag, implementation=implementation)))()
    close(got, jax.jit(lambda: run(plain))())


@pytest.mark.parametrize("of", ["bag", "dots", "sum_rows"])
def test_gradients_of_gradients(of, chunks):
    """Second derivatives of each of the three, which are those of plain JAX."""
    values, ids, weights, y = draw(7)
    ours = {
        "bag": lambda v, w, y: bag(v, ids, w),
        "dots": lambda v, w, y: dots(v, ids, y),
        "sum_rows": lambda v, w, y: sum_rows(ids, w, y, M),
    }[of]
    theirs = {
        "bag": lambda v, w, y: plain(v, ids, w),
        "dots": lambda v, w, y: jnp.einsum("tv,tkv->tk", y, v[ids], precision="highest"),
        "sum_rows": lambda v, w, y: jnp.zeros((M, V)).at[ids].add(w[..., None] * y[:, None]),
    }[of]

    def first_and_second(f):
        loss = lambda *arrays: jnp.sum(jnp.sin(f(*arrays)))
        first = jax.grad(loss, (0, 1, 2))
        bent = lambda *arrays: sum(jnp.sum(jnp.cos(g) * g) for g in first(*arrays))
        return first(values, weights, y), jax.grad(bent, (0, 1, 2))(values, weights, y)

    got, want = jax.jit(lambda: first_and_second(ours))(), jax.jit(lambda: first_and_second(theirs))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_many_hits_in_bf16_all_count():
    """JAX's own gradient of a gather stops at 256."""
    values, ids, weights = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((1024, 4), jnp.int32), jnp.ones((1024, 4))
    gradient = jax.jit(jax.grad(lambda values: jnp.sum(bag(values, ids, weights))))(values)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(np.float32), [[0, 0, 0], [4096, 4096, 4096]])


def test_bf16_tables_are_read_exactly():
    values, ids, weights, _ = draw(7, dtype=jnp.bfloat16)
    close(jax.jit(bag)(values, ids, weights), plain(values, ids, weights), 1e-6)


def test_ids_of_no_row_read_nothing_and_get_no_gradient(chunks):
    values, ids, weights, dy = draw(7)
    wrong = ids.at[2, 1].set(-1).at[3, 0].set(M).at[4, 4].set(2**30)
    is_row = wrong == ids

    def run(ids, weights):
        y, pull = jax.vjp(lambda values, weights: bag(values, ids, weights), values, weights)
        return y, pull(dy)

    y, (d_values, d_weights) = jax.jit(run)(wrong, weights)
    want_y, (want_values, want_weights) = jax.jit(run)(ids, weights * is_row)
    close((y, d_values, d_weights), (want_y, want_values, want_weights * is_row))


def test_nothing_to_read():
    for shape in ((0, 3), (3, 0)):
        ids, weights = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
        y, pull = jax.vjp(lambda v, w, ids=ids: bag(v, ids, w), jnp.ones((2, 4)), weights)
        np.testing.assert_array_equal(y, np.zeros((shape[0], 4)))
        d_values, d_weights = pull(y + 1)
        assert d_weights.shape == shape and not np.any(d_values)


def test_composes_with_vmap_scan_and_remat():
    values, ids, weights, _ = draw(3, 4)
    loss = lambda f: lambda values, weights: jnp.sum(jnp.sin(f(values, weights)))
    ways = {
        "whole": lambda v, w: bag(v, ids, w),
        "vmap": lambda v, w: jax.vmap(bag, (None, 0, 0))(v, ids, w),
        "scan": lambda v, w: jax.lax.scan(lambda c, x: (c, bag(v, *x)), 0, (ids, w))[1],
        "remat": jax.checkpoint(lambda v, w: bag(v, ids, w)),
    }
    found = [jax.jit(jax.value_and_grad(loss(f), (0, 1)))(values, weights) for f in ways.values()]
    for a, b in itertools.pairwise(found):
        close(a, b)


def test_no_array_of_all_rows_that_are_read():
    tokens, k, width, n_rows = 2048, 32, 128, 1024
    shape = jax.ShapeDtypeStruct
    arrays = shape((n_rows, width), jnp.float32), shape((tokens, k), jnp.int32), shape((tokens, k), jnp.float32)
    step = jax.grad(lambda values, ids, weights: jnp.sum(bag(values, ids, weights) ** 2), (0, 2))
    temporaries = jax.jit(step).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.3 * 4 * tokens * k * width


def test_errors():
    values, ids, weights, y = draw(7)
    with pytest.raises(
        ValueError, match=r"bag: needs ids in 0..12, the rows of the table, got 0..13; under jit such ids"
    ):
        bag(values, ids.at[0, 0].set(M).at[1, 1].set(0), weights)
    with pytest.raises(ValueError, match=r"bag: needs as many ids as weights .*, got ids=\(7, 5\) for \(7, 4\)"):
        bag(values, ids, weights[:, :4])
    with pytest.raises(ValueError, match=r"dots: needs as many ids as weights .*, got ids=\(7, 5\) for \(6, 5\)"):
        dots(values, ids, y[:6])
    for f in (lambda **o: bag(values, ids, weights, **o), lambda **o: sum_rows(ids, weights, y, M, **o)):
        with pytest.raises(
            ValueError,
            match="needs implementation to be one of reference, xla, pallas_tpu, pallas_gpu, got 'fast'; change it",
        ):
            f(implementation="fast")

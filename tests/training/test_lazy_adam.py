"""Lazy Adam: the dense one where all rows are read, other rows left alone, and a cost that does not know the table's size."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.pallas_kernels.memory_lookup import RowGradient, bag, row_gradient
from jaxmem.training.adam import scale_by_adam
from jaxmem.training.lazy_adam import apply_rows, lazy_adam, sparse_adam

M, V = 7, 3


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"clip_norm": 0.5}], ids=str)
def test_it_is_adam_where_all_rows_are_read(options):
    schedule = lambda step: 0.1 / (1 + step)
    chain = [optax.clip_by_global_norm(0.5)] if "clip_norm" in options else []
    dense = optax.chain(
        *chain,
        scale_by_adam(0.9, 0.999, 1e-8),
        optax.add_decayed_weights(options.get("weight_decay", 0.0)),
        optax.scale_by_learning_rate(schedule),
    )
    lazy = lazy_adam(schedule, **options)

    @jax.jit
    def run(tables):
        ours, theirs = (tables, lazy.init(tables)), (tables, dense.init(tables))
        for step in range(3):
            gradients = jax.tree.map(lambda x, step=step: jnp.cos(x + step), tables)
            rows = lambda g: RowGradient(jnp.arange(M + 1), jnp.pad(g, ((0, 1), (0, 0))), jnp.ones(M + 1, jnp.int32))
            updates, state = lazy.update(jax.tree.map(rows, gradients), ours[1], ours[0])
            ours = apply_rows(ours[0], updates), state
            updates, state = dense.update(gradients, theirs[1], theirs[0])
            theirs = optax.apply_updates(theirs[0], updates), state
        return ours[0], theirs[0]

    ours, theirs = run({"a": draw(0, M, V), "b": draw(1, M, V)})
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-6, atol=1e-7)


def test_rows_that_are_not_read_stay_as_they_are():
    table, lazy = draw(0, M, V), lazy_adam(0.1, weight_decay=0.1)
    state = lazy.init(table)
    step = jax.jit(lambda table, state, g: lazy.update(g, state, table))
    for rows in ([1, 4], [1, M]):
        updates, state = step(table, state, RowGradient(jnp.array(rows), draw(1, 2, V), jnp.ones(2, jnp.int32)))
        table = apply_rows(table, updates)
    moved = np.any(np.asarray(table) != np.asarray(draw(0, M, V)), axis=1)
    np.testing.assert_array_equal(moved, [False, True, False, False, True, False, False])
    np.testing.assert_array_equal(np.any(np.asarray(state.nu) != 0, axis=1), moved)


def test_the_gradient_of_rows_is_that_of_the_table():
    values, weights, dy = draw(0, M, V), draw(1, 5, 4), draw(2, 5, V)
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 4, (5, 4))).at[0, 0].set(-1).at[1, 1].set(M)

    @jax.jit
    def both(ids, weights, dy):
        (dense,) = jax.vjp(lambda values: bag(values, ids, weights), values)[1](dy)
        return dense, row_gradient(ids, weights, dy, M, 6)

    dense, rows = both(ids, weights, dy)
    n = int((rows.rows < M).sum())
    assert np.all(np.diff(rows.rows[:n]) > 0) and not np.any(rows.sums[n:]) and not np.any(rows.counts[n:])
    np.testing.assert_allclose(jnp.zeros((M, V)).at[rows.rows].add(rows.sums, mode="drop"), dense, rtol=2e-6, atol=1e-6)
    assert rows.counts.sum() == 18


def test_no_gradient_is_lost_unseen():
    found = jax.jit(lambda ids: row_gradient(ids, jnp.ones((3, 2)), jnp.ones((3, V)), M, 2))
    assert np.all(np.isfinite(found(jnp.array([[1, 2], [1, 2], [2, 2]])).sums))
    assert np.all(np.isnan(found(jnp.array([[1, 2], [1, 3], [2, 2]])).sums))


def test_a_step_costs_what_it_reads():
    """FLOPs and bytes beyond the donated tables are the same for a table 64 times as large."""
    lazy = lazy_adam(0.1)

    def compiled(n_rows):
        def step(table, state, ids, weights, dy):
            gradient = row_gradient(ids, weights, dy, n_rows, 64)
            updates, state = lazy.update(gradient, state, table)
            return apply_rows(table, updates), state

        table, tokens = jax.ShapeDtypeStruct((n_rows, 16), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
        state, ids = jax.eval_shape(lazy.init, table), jax.ShapeDtypeStruct((8, 8), jnp.int32)
        dy = jax.ShapeDtypeStruct((8, 16), jnp.float32)
        return jax.jit(step, donate_argnums=(0, 1)).lower(table, state, ids, tokens, dy).compile()

    small, large = compiled(2**10), compiled(2**16)
    assert small.memory_analysis().temp_size_in_bytes == large.memory_analysis().temp_size_in_bytes
    assert large.memory_analysis().alias_size_in_bytes > 3 * 2**16 * 16 * 4
    assert small.cost_analysis()["flops"] == large.cost_analysis()["flops"]


def test_errors():
    with pytest.raises(ValueError, match="row_gradient: needs size >= 1, got size=0; pass the most rows"):
        row_gradient(jnp.zeros((1, 1), int), jnp.ones((1, 1)), jnp.ones((1, V)), M, 0)
    lazy = lazy_adam(0.1, weight_decay=0.1)
    gradient = RowGradient(jnp.array([0]), jnp.ones((1, V)), jnp.array([1]))
    with pytest.raises(ValueError, match="lazy_adam: needs the tables for weight_decay, got none"):
        lazy.update(gradient, lazy.init(jnp.zeros((M, V))))


def test_sparse_adam_is_torchs():
    """tests/golden/make_sparse_adam.py."""
    recorded = np.load(Path(__file__).parents[1] / "golden" / "sparse_adam.npz")
    optimizer = sparse_adam(0.05, 0.8, 0.97, 1e-2)
    step = jax.jit(lambda table, state, g: optimizer.update(g, state, table))
    table = jnp.asarray(recorded["table"])
    state = optimizer.init(table)
    for rows, sums, want in zip(recorded["rows"], recorded["sums"], recorded["tables"], strict=True):
        gradient = RowGradient(jnp.asarray(rows), jnp.asarray(sums), jnp.ones(rows.shape, jnp.int32))
        updates, state = step(table, state, gradient)
        table = apply_rows(table, updates)
        np.testing.assert_allclose(table, want, rtol=1e-6, atol=1e-7)

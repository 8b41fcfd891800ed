"""Reading and writing a fast-weight table: against all slots written out, and nested gradients of the losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.layers.fast_weight_table import Pairs, Rates, addressing_loss, read, sub_scores, write

B, C, N, HALF, V, K = 2, 7, 4, 3, 5, 3
RATES = {
    "idw": Rates(K, "idw", 1e-2, values=0.7, keys=0.5),
    "dot": Rates(K, "dot", 1e-2, values=0.7, keys=0.5),
}
every_score = pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
VALID = jnp.array([[True] * C, [False, True, True, False, True, True, False]])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    pairs = Pairs(normal(B, C, 2, HALF), jax.nn.sigmoid(normal(B, C)), normal(B, C, V))
    return pairs, normal(B, 2, N, HALF), normal(B, N * N, V)


def weights_of_every_slot(query, keys, rates):
    """[B C M]: 0 for all slots but the best k."""
    if rates.score == "dot":
        scores = jnp.einsum("btpk,bpnk->btpn", query, keys)
    else:
        squares = jnp.sum((query[:, :, :, None] - keys[:, None]) ** 2, axis=-1)
        scores = -jnp.log(rates.eps + squares)
    every = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).reshape(B, C, N * N)
    worst = jax.lax.top_k(every, K)[0][..., -1:]
    return jax.nn.softmax(jnp.where(every >= worst, every, -jnp.inf), axis=-1)


def read_written_out(query, keys, values, rates):
    return jnp.einsum("btm,bmv->btv", weights_of_every_slot(query, keys, rates), values)


def write_written_out(pairs, keys, values, rates):
    """The step by gradients of the losses, which the outer gradient differentiates again."""

    def loss(values):
        error = jnp.sum((read_written_out(pairs.query, keys, values, rates) - pairs.target) ** 2, axis=-1)
        return jnp.sum(jnp.where(VALID, pairs.gate * error / 2, 0))

    def addressing(keys):
        return jnp.sum(addressing_loss(sub_scores(pairs.query, keys, rates.score, rates.eps), VALID, K))

    n_reads = jnp.sum((weights_of_every_slot(pairs.query, keys, rates) > 0) & VALID[..., None], axis=1)
    step = rates.values / jnp.maximum(n_reads, 1)[..., None]
    return -rates.keys * jax.grad(addressing)(keys), values - step * jax.grad(loss)(values)


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2)) < tolerance


def with_gradients(function):
    """A function's outputs, and the gradients of a fixed weighting of them in all arguments."""

    @jax.jit
    def call(*arguments):
        outputs, pull = jax.vjp(function, *arguments)
        leaves, structure = jax.tree.flatten(outputs)
        weights = [jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in leaves]
        return outputs, pull(structure.unflatten(weights))

    return call


@every_score
def test_reading_is_the_equation(rates):
    pairs, keys, values = draw()
    got, want = (with_gradients(functools.partial(f, rates=rates)) for f in (read, read_written_out))
    assert_close(got(pairs.query, keys, values), want(pairs.query, keys, values))


@every_score
def test_writing_is_a_step_of_gradient_descent_and_so_is_its_gradient(rates):
    pairs, keys, values = draw()
    got = with_gradients(lambda pairs, keys, values: write(pairs, VALID, keys, values, rates))
    want = with_gradients(lambda pairs, keys, values: write_written_out(pairs, keys, values, rates))
    assert_close(got(pairs, keys, values), want(pairs, keys, values), 3e-5)


def test_usage_is_that_of_sub_keys_counted():
    pairs, keys, _ = draw()
    scores = sub_scores(pairs.query, keys, "idw", 1e-2)
    for row in range(B):
        want = 0
        for part in range(2):
            usage = np.zeros(N)
            for t in np.flatnonzero(VALID[row]):
                s = np.asarray(scores[row, t, part], np.float64)
                best = np.argsort(-s)[:K]
                usage[best] += np.exp(s[best]) / np.sum(np.exp(s[best]))
            usage /= usage.sum()
            want += np.sum(usage * np.log(np.where(usage > 0, usage, 1)))
        np.testing.assert_allclose(addressing_loss(scores, VALID, K)[row], want, rtol=1e-5)


def test_a_step_on_the_addressing_loss_lowers_it():
    pairs, keys, values = draw()
    rates = RATES["idw"]._replace(keys=0.05)
    loss = lambda keys: addressing_loss(sub_scores(pairs.query, keys, "idw", rates.eps), VALID, K)
    moved = keys + write(pairs, VALID, keys, values, rates)[0]
    assert np.all(loss(moved) < loss(keys))


def test_a_slot_read_with_its_whole_weight_is_written_wholly():
    pairs, keys, values = draw()
    one = RATES["idw"]._replace(top_k=1, values=1.0)
    pairs, valid = pairs._replace(gate=jnp.ones((B, C))), jnp.zeros((B, C), bool).at[:, 2].set(True)
    written = write(pairs, valid, keys, values, one)[1]
    np.testing.assert_allclose(read(pairs.query, keys, written, one)[:, 2], pairs.target[:, 2], rtol=1e-4, atol=1e-5)
    assert np.sum(np.any(np.asarray(written != values), axis=-1)) == B, "one slot of each row"


def test_pairs_that_are_not_valid_write_nothing():
    pairs, keys, values = draw()
    key_step, written = write(pairs, jnp.zeros((B, C), bool), keys, values, RATES["idw"])
    assert not np.any(key_step)
    np.testing.assert_array_equal(written, values)


def test_a_query_on_a_sub_key_has_finite_gradients():
    pairs, keys, values = draw()
    query = pairs.query.at[:, 0].set(keys[:, :, 0]).at[:, 1].set(0)
    at_zero = keys.at[:, :, 1].set(0)

    def loss(query, keys, values):
        outputs = write(pairs._replace(query=query), VALID, keys, values, RATES["idw"])
        return sum(jnp.sum(jnp.sin(a)) for a in outputs)

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(query, at_zero, values):
        assert np.all(np.isfinite(gradient))

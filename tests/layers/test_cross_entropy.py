"""Chunked cross-entropy against optax on stored logits: values, gradients, memory, padding, meshes."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.layers.cross_entropy import chunked_cross_entropy, token_nats
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh

B, T, D, VOCAB = 4, 6, 16, 64


def batch(dtype=jnp.float32, n_rows=VOCAB, vocab_size=VOCAB):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D), dtype),
        jax.random.normal(keys[1], (n_rows, D)),
        jax.random.randint(keys[2], (B, T), 0, vocab_size),
        jax.random.uniform(keys[3], (B, T)),
    )


def mean_loss(x, table, targets, weights, **options):
    out = chunked_cross_entropy(x, table, targets, weights, **options)
    return out.loss_sum / out.weight_sum


def oracle_loss(x, table, targets, weights, *, vocab_size=VOCAB, z_loss=0.0):
    logits = jnp.einsum("btd,vd->btv", x, table[:vocab_size], precision="highest")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    nats = nats + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(weights * nats) / jnp.sum(weights)


def value_and_gradients(loss, *args, **options):
    x, table, targets, weights = args
    function = jax.value_and_grad(lambda x, table, weights: loss(x, table, targets, weights, **options), (0, 1, 2))
    return jax.jit(function)(x, table, weights)


def assert_close(got, wanted, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 24, 1000], ids="chunk={}".format)
def test_equals_optax_for_any_chunk_size(chunk_tokens):
    got = value_and_gradients(mean_loss, *batch(), chunk_tokens=chunk_tokens)
    assert_close(got, value_and_gradients(oracle_loss, *batch()))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_rows_after_the_vocabulary_have_no_probability_and_no_gradient(z_loss):
    args = batch(n_rows=64, vocab_size=50)
    got = value_and_gradients(mean_loss, *args, vocab_size=50, z_loss=z_loss, chunk_tokens=7)
    assert_close(got, value_and_gradients(oracle_loss, *args, vocab_size=50, z_loss=z_loss))
    assert not np.any(got[1][1][50:])


def test_token_nats_are_the_terms_of_the_sum():
    x, table, targets, weights = batch()
    nats = jax.jit(lambda *args: token_nats(*args, chunk_tokens=5))(x, table, targets)
    out = chunked_cross_entropy(x, table, targets, weights, chunk_tokens=5)
    assert nats.shape == (B, T) and nats.dtype == jnp.float32
    assert_close((jnp.sum(weights * nats), jnp.sum(weights)), (out.nats_sum, out.weight_sum))


def test_without_weight_everything_is_zero_whatever_the_targets():
    x, table, targets, weights = batch()
    ignored = jnp.where(targets % 2 == 0, -100, VOCAB + 7)

    def loss_sum(x, table):
        return chunked_cross_entropy(x, table, ignored, 0 * weights).loss_sum

    value, gradients = jax.jit(jax.value_and_grad(loss_sum, (0, 1)))(x, table)
    assert value == 0 and not any(np.any(g) for g in gradients)


@pytest.mark.usefixtures("unchecked")
def test_one_integer_target_per_token():
    x, table, targets, weights = batch()
    for wrong, got in ((targets[:, 1:], "int32"), (targets.astype(jnp.float32), "float32")):
        message = f"needs one integer target and one weight per token of x, .* got targets of shape .* and dtype {got}"
        with pytest.raises(ValueError, match=message):
            chunked_cross_entropy(x, table, wrong, weights)
        with pytest.raises(ValueError, match=message):
            token_nats(x, table, wrong)
    with pytest.raises(ValueError, match="weights of shape"):
        chunked_cross_entropy(x, table, targets, weights[:1, 1:])


@pytest.mark.usefixtures("unchecked")
def test_targets_of_eight_bits():
    x, table = jnp.ones((1, 3, 4)), jnp.arange(256 * 4, dtype=jnp.float32).reshape(256, 4) / 1000
    nats = [token_nats(x, table, np.array([[0, 7, 255]], dtype)) for dtype in (np.uint8, np.int32)]
    np.testing.assert_array_equal(*nats)


def test_a_target_outside_the_vocabulary_that_counts_is_loud():
    """It raises where values are known; under jit the sums are NaN. One of no weight changes nothing, gradients included."""
    x, table, targets, weights = batch()
    loss = jax.jit(jax.value_and_grad(lambda *args: chunked_cross_entropy(*args, vocab_size=50).loss_sum, (0, 1, 3)))
    targets, weights = targets % 50, weights.at[0, 0].set(0)
    for wrong in (-1, 50, VOCAB + 7):
        with pytest.raises(ValueError, match=rf"cross-entropy: needs targets in 0\.\.49, .*, got {wrong}; give"):
            chunked_cross_entropy(x, table, targets.at[1, 2].set(wrong), weights, vocab_size=50)
        with pytest.raises(ValueError, match=rf"needs targets in 0\.\.49, .*, got {wrong}; give"):
            token_nats(x, table, targets.at[1, 2].set(wrong), vocab_size=50)
        assert np.isnan(loss(x, table, targets.at[1, 2].set(wrong), weights)[0])
        value, gradients = loss(x, table, targets.at[0, 0].set(wrong), weights)
        want, of_tokens = loss(x, table, targets, weights)
        assert_close((value, *gradients[:2], gradients[2][1:]), (want, *of_tokens[:2], of_tokens[2][1:]))
        nats = jax.jit(lambda *args: token_nats(*args, vocab_size=50))(x, table, targets.at[1, 2].set(wrong))
        assert np.argwhere(np.isnan(nats)).tolist() == [[1, 2]]


def test_huge_logits_stay_finite():
    x, table, targets, weights = batch()
    value, gradients = value_and_gradients(mean_loss, 1e4 * x, table, targets, weights)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


def test_bf16_inputs_accumulate_the_tables_gradient_in_fp32():
    n_tokens = 4096
    x, targets = jnp.ones((1, n_tokens, 1), jnp.bfloat16), jnp.zeros((1, n_tokens), jnp.int32)

    def loss_sum(table):
        return token_nats(x, table, targets, chunk_tokens=1).sum()

    gradient = jax.jit(jax.grad(loss_sum))(jnp.zeros((2, 1)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[:, 0], [-n_tokens / 2, n_tokens / 2])


def test_bf16_is_near_fp32():
    x, table, targets, weights = batch(jnp.bfloat16)
    got = value_and_gradients(mean_loss, x, table, targets, weights)
    assert got[1][0].dtype == jnp.bfloat16 and got[1][1].dtype == jnp.float32
    wanted = value_and_gradients(oracle_loss, x.astype(jnp.float32), table, targets, weights)
    assert_close(jax.tree.map(lambda a: np.asarray(a, np.float32), got), wanted, tolerance=3e-2)


def array_sizes(jaxpr):
    """The number of elements of every array that a jaxpr makes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def test_no_array_of_all_logits_exists():
    x, table, targets, weights = batch()
    x, targets, weights = (jnp.repeat(array, 16, axis=1) for array in (x, targets, weights))
    n_logits = targets.size * VOCAB

    def largest(loss):
        function = jax.grad(lambda x, table: loss(x, table, targets, weights), (0, 1))
        elements = max(array_sizes(jax.make_jaxpr(function)(x, table).jaxpr))
        return elements, jax.jit(function).lower(x, table).compile().memory_analysis().temp_size_in_bytes

    elements, temporary_bytes = largest(oracle_loss)
    assert elements >= n_logits and temporary_bytes >= 4 * n_logits
    elements, temporary_bytes = largest(lambda *args: mean_loss(*args, chunk_tokens=16))
    assert elements <= max(x.size, table.size, 16 * VOCAB) and temporary_bytes < 4 * n_logits


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, model=2), MeshConfig(data=1, fsdp=1, model=8)], ids=str
)
def test_sharded_equals_unsharded(mesh):
    x, table, targets, weights = batch(vocab_size=50)
    x, targets, weights = (jnp.concatenate([a, a]) for a in (x, targets, weights))
    options = dict(vocab_size=50, z_loss=0.1, chunk_tokens=5)
    wanted = value_and_gradients(mean_loss, x, table, targets, weights, **options)

    with use_mesh(make_mesh(mesh)):
        table = jax.reshard(table, jax.P("model", "fsdp"))
        x, targets = constrain(x, "batch", "time", "embed"), constrain(targets, "batch", "time")
        got = value_and_gradients(mean_loss, x, table, targets, constrain(weights, "batch", "time"), **options)
        assert got[1][1].sharding.is_equivalent_to(table.sharding, 2)
    assert_close(jax.device_get(got), jax.device_get(wanted))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vocab_size=65), r"needs vocab_size in 1\.\.64, the rows of the table, got vocab_size=65; pass"),
        (dict(vocab_size=0), r"got vocab_size=0"),
        (dict(chunk_tokens=0), r"needs chunk_tokens >= 1, got chunk_tokens=0; pass"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(*batch(), **options)

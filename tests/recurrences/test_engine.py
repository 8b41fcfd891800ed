"""The engine on the gated delta rule: any chunk size, any mixture of gates, several memories, linear memory; its parts."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core import jaxprs_in_params

from jaxmem.recurrences.chunk_decays import scalar_in_chunk, vector_in_chunk
from jaxmem.recurrences.delta import gated_delta_rule, gated_delta_streams
from jaxmem.recurrences.engine import chunks
from jaxmem.recurrences.products import add_up, dot, widen
from jaxmem.recurrences.triangular import unit_lower_inverse

B, T, H, K, V = 2, 37, 2, 8, 12


def recurrence(q, k, v, g, beta, state):
    """The equations of the module docstring, as they stand there, in the dtype that comes in."""

    def step(state, token):
        q, k, v, g, beta = token
        state = jnp.exp(g)[..., None, None] * state
        u = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k))
        state = state + jnp.einsum("bhk,bhv->bhkv", k, u)
        return state, q.shape[-1] ** -0.5 * jnp.einsum("bhkv,bhk->bhv", state, q)

    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v, g, beta)))
    return jnp.moveaxis(o, 0, 1), state


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(rule, inputs, weight):
    """rule(*inputs), and the gradients in all of them of the sum of weight * outputs."""
    outputs, pull = jax.vjp(rule, *inputs)
    return outputs, pull(weight)


def in_float64(inputs, weight):
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (inputs, weight))
        return jax.device_get(outputs_and_gradients(recurrence, *arrays))


@functools.cache
def implementation(name, chunk_tokens=64):
    return functools.partial(gated_delta_rule, implementation=name, chunk_tokens=chunk_tokens)


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-6)


def assert_close(got, want, tolerance=1e-5, floor=0.0):
    """Relative RMS, of arrays whose own RMS is below `floor` relative to that."""
    names = ("o", "state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_state")
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = relative_rms(a, b) * min(1.0, np.sqrt(np.mean(np.square(b))) / floor if floor else 1.0)
        assert error <= tolerance, f"{name}: relative RMS {error}"


def make_inputs(seed=0, n_tokens=T, strength=1.0):
    """(q, k, v, g, beta, state) with keys of length 1, and weights of (o, state)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in normal(2, B, n_tokens, H, K))
    g = (-strength * rng.exponential(0.2, (B, n_tokens, H))).astype(np.float32)
    beta = rng.uniform(size=(B, n_tokens, H)).astype(np.float32)
    inputs = q, k, normal(B, n_tokens, H, V), g, beta, normal(B, H, K, V)
    return inputs, (normal(B, n_tokens, H, V), normal(B, H, K, V))


BOTH = pytest.mark.parametrize("rule", [implementation("reference"), implementation("xla", 16)], ids=["steps", "xla"])


@pytest.mark.parametrize("n_tokens, chunk_tokens", [(1, 16), (5, 8), (16, 16), (37, 8), (70, 64), (330, 16)])
def test_chunks_are_the_recurrence(n_tokens, chunk_tokens):
    sample = make_inputs(n_tokens=n_tokens)
    got = outputs_and_gradients(implementation("xla", chunk_tokens), *sample)
    assert_close(got, in_float64(*sample))


@BOTH
def test_write_strength_one_replaces_and_zero_does_nothing(rule):
    (q, k, v, g, beta, state), weight = make_inputs(3)
    for value in (0.0, 1.0):
        inputs = q, k, v, g, np.full_like(beta, value), state
        got = outputs_and_gradients(rule, inputs, weight)
        assert_close(got, in_float64(inputs, weight))
        if value == 1.0:
            read = jnp.einsum("bhkv,bhk->bhv", got[0][1], k[:, -1])
            np.testing.assert_allclose(read, v[:, -1], atol=1e-5)
    idle = q, k, v, np.zeros_like(g), np.zeros_like(beta), state
    np.testing.assert_array_equal(jax.jit(rule)(*idle)[1], state)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    strength=st.sampled_from([0.0, 0.1, 1.0, 40.0, 1e3]),
    resets=hnp.arrays(bool, (B, T, H)),
    writes=hnp.arrays(np.int8, (B, T, H), elements=st.integers(0, 2)),
    same_keys=st.booleans(),
)
def test_any_mixture_of_gates(seed, strength, resets, writes, same_keys):
    """The floor: where one key is written over again and again, what decayed is replaced, and d_g, a sum of terms of
    order 1, cancels to nothing but their rounding."""
    (q, k, v, g, beta, state), weight = make_inputs(seed, strength=strength)
    k = np.broadcast_to(k[:, :1], k.shape) if same_keys else k
    g = np.where(resets, -np.inf, g).astype(np.float32)
    beta = np.choose(writes, (beta, np.zeros_like(beta), np.ones_like(beta)))
    inputs = q, k, v, g, beta, state
    got = outputs_and_gradients(implementation("xla", 16), inputs, weight)
    assert_close(got, in_float64(inputs, weight), floor=0.1)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 128])
def test_inverse_against_numpy(size):
    rng = np.random.default_rng(size)
    a, cotangent = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    a = np.tril(a / max(size, 8) ** 0.5, -1)
    want = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    got, (got_d_a,) = outputs_and_gradients(unit_lower_inverse, (a,), cotangent)
    d_a = -np.tril(want.mT @ cotangent.astype(np.float64) @ want.mT, -1)
    assert relative_rms(got, want) < 1e-6 and relative_rms(got_d_a, d_a) < 2e-6


def test_inverse_for_one_key_written_again_and_again():
    """Every key the same and beta = 1: powers of A reach binomials of 10^17 at C = 64, the inverse only 1 and -1."""
    size = 64
    got = jax.jit(unit_lower_inverse)(jnp.tril(jnp.ones((size, size)), -1))
    np.testing.assert_array_equal(got, np.eye(size) - np.eye(size, k=-1))


def test_decays_in_a_chunk_are_sums_of_what_lies_between():
    """Of one channel; a vector of equal channels gives the same, and both whatever the infinities."""
    size, rng = 16, np.random.default_rng(0)
    g = np.where(rng.random((2, size)) < 0.2, -np.inf, -rng.exponential(size=(2, size))).astype(np.float32)
    want = np.array(
        [[[np.exp(row[j + 1 : i + 1].sum()) * (j <= i) for j in range(size)] for i in range(size)] for row in g]
    )
    ones = jnp.ones((2, size, 3))
    scalar = jax.jit(scalar_in_chunk)(g)
    vector = jax.jit(vector_in_chunk)(g[..., None] * ones)
    for decays, columns in ((scalar, 3), (vector, 3)):
        ((got,),) = decays.overlaps([ones], [ones])
        np.testing.assert_allclose(got, columns * want, rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(decays.from_start(ones)[..., 0], np.exp(np.cumsum(g, -1)), rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(decays.to_end(ones)[..., 0, :], want[:, -1], rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(np.squeeze(decays.through[:, :1], (1, 2)), np.exp(g.sum(-1)), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sums_and_broadcasts_that_are_products(axis):
    x, weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    np.testing.assert_allclose(add_up(x, axis), np.sum(x, axis), rtol=1e-6, atol=1e-6)
    wide, pull = jax.vjp(lambda row: widen(row, x.shape[axis], axis), jnp.sum(x, axis))
    np.testing.assert_array_equal(wide, np.broadcast_to(np.sum(x, axis, keepdims=True), x.shape))
    np.testing.assert_allclose(pull(weight)[0], np.sum(weight, axis), rtol=1e-6, atol=1e-6)


PRODUCTS = {
    "...ck,...kv->...cv": ((2, 3, 4, 5), (2, 3, 5, 6)),
    "...kc,...cv->...kv": ((2, 5, 4), (2, 4, 6)),
    "...k,...kv->...v": ((2, 1, 5), (2, 3, 5, 6)),
    "...hk,hkv->...hv": ((7, 2, 3, 5), (3, 5, 6)),
    "k,k...->...": ((4,), (4, 5, 6)),
    "tbk,tbkvh->tbvh": ((2, 3, 4), (2, 3, 4, 1, 5)),
}


@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_products_have_the_gradients_of_einsum(subscripts):
    """Those of real factors of complex products too."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in PRODUCTS[subscripts])
    for factors in ((a, b), (a, b + 1j * b[::-1])):
        loss = lambda product, *factors: jnp.sum(jnp.sin(jnp.abs(product(subscripts, *factors))))
        got, want = (
            jax.grad(loss, argnums=(1, 2))(product, *map(jnp.asarray, factors)) for product in (dot, jnp.einsum)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)


def test_chunks_of_several_memories_are_folded_each_into_its_own():
    """Row 0 visits memories 0 1 0 2, row 1 visits 2 2 2 0; nobody visits memory 3."""
    (q, k, v, g, beta, _), _ = make_inputs(n_tokens=32)
    x, visits = (q, k, v, g, beta), np.array([[0, 1, 0, 2], [2, 2, 2, 0]])
    memories = np.random.default_rng(5).normal(size=(B, 4, H, K, V)).astype(np.float32)
    make = lambda x: gated_delta_streams(*x, scale=1.0)
    o, after = jax.jit(functools.partial(chunks, make))(x, memories, visits)
    rule = jax.jit(functools.partial(implementation("reference"), scale=1.0))
    want, o_want = memories.copy(), np.zeros_like(v)
    for row in range(B):
        for n, memory in enumerate(visits[row]):
            tokens = slice(8 * n, 8 * n + 8)
            of_row = [a[row : row + 1, tokens] for a in (q, k, v, g, beta)]
            o_n, state = rule(*of_row, want[row : row + 1, memory])
            o_want[row, tokens], want[row, memory] = o_n[0], state[0]
    assert relative_rms(o, o_want) < 1e-6 and relative_rms(after, want) < 1e-6
    np.testing.assert_array_equal(after[:, 3], memories[:, 3])


def test_default_arguments():
    """No state is an empty one, the scale is K^-0.5, and o is of the dtype of v with a state in fp32."""
    (*inputs, state), _ = make_inputs()
    o, after = jax.jit(gated_delta_rule)(*inputs)
    for name in ("reference", "xla"):
        want = jax.jit(functools.partial(implementation(name), scale=K**-0.5))(*inputs, jnp.zeros_like(state))
        assert max(map(relative_rms, (o, after), want)) < 1e-6
    o, after = jax.eval_shape(gated_delta_rule, *(a.astype(jnp.bfloat16) for a in inputs))
    assert (o.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)


def sizes(jaxpr):
    """Shapes of all arrays in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_memory_is_linear_in_tokens():
    n_tokens, chunk_tokens = 512, 16
    (inputs, weight) = make_inputs(n_tokens=n_tokens)
    rule = implementation("xla", chunk_tokens)
    jaxpr = jax.make_jaxpr(lambda inputs, weight: jax.vjp(rule, *inputs)[1](weight))(inputs, weight)
    largest = max(int(np.prod(shape)) for shape in sizes(jaxpr.jaxpr))
    assert 0 < largest <= B * H * n_tokens * max(2 * chunk_tokens, K + V)  # less than n_tokens^2 for each head


def changed(**arrays):
    inputs = dict(zip(("q", "k", "v", "g", "beta", "state"), make_inputs(n_tokens=3)[0], strict=True))
    return inputs | arrays


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            {"chunk_tokens": 48},
            "needs a power of two from 8, a tile of a TPU, as chunk_tokens, got chunk_tokens=48; use 32",
        ),
        ({"chunk_tokens": 4}, "got chunk_tokens=4"),
        ({"implementation": "mosaic"}, "needs implementation 'reference', 'xla' or None, got implementation='mosaic'"),
        (
            {"k": np.zeros((B, 3, H, K + 1))},
            r"needs k \[B T G K\] with K = 8 as in q \[B T G K\], got k of shape \(2, 3, 2, 9\)",
        ),
        ({"v": np.zeros((B, 4, H, V))}, r"needs v \[B T H V\] with T = 3 as in q"),
        (
            {"v": np.zeros((B, 3, 3, V))},
            r"needs a number of heads H that is a multiple of the key heads G, got H=3 and G=2",
        ),
        ({"g": np.zeros((B, 3, H, K))}, r"needs g \[B T H\], got g of shape \(2, 3, 2, 8\); reshape it"),
        ({"beta": np.zeros((B, 3, 1))}, r"needs beta \[B T H\] with H = 2 as in v"),
        ({"g": np.full((B, 3, H), 0.5)}, "needs log-decays g <= 0, got g up to 0.5; pass natural logarithms"),
        (
            {"state": np.zeros((B, H, V, K))},
            r"needs an initial state \[B H K V\] of shape \(2, 2, 8, 12\), got .*\(2, 2, 12, 8\)",
        ),
        ({"segment_ids": np.ones((B, 4), int)}, r"needs segment_ids \[B T\] of shape \(2, 3\), got \(2, 4\)"),
        (
            {"segment_ids": np.array([[1, 1, 2], [0, 2, 1]])},
            r"needs segment_ids above 0 .* got segment_ids=\[0, 2, 1\] in row 1",
        ),
        ({"segment_ids": np.array([[1, 0, 2], [2, 2, 0]])}, r"got segment_ids=\[1, 0, 2\] in row 0; move padding"),
    ],
    ids=[
        "chunk",
        "small chunk",
        "implementation",
        "k",
        "v",
        "heads",
        "g",
        "beta",
        "decay",
        "state",
        "ids",
        "in front",
        "gap",
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        gated_delta_rule(**changed(**arguments))


def test_what_segment_ids_are_called_does_not_matter_and_padding_in_front_is_loud():
    """Ids that fall and come back are those of new documents; under jit, o and the final state of a row whose padding stands
    in front of a token are NaN, and other rows as they were."""
    arguments = jax.tree.map(jnp.asarray, changed())
    run = jax.jit(lambda ids: gated_delta_rule(**arguments, segment_ids=ids, chunk_tokens=8))
    again, numbered = (np.array([ids, [5, 5, 0]]) for ids in ([3, 2**24, 3], [1, 2, 3]))
    jax.tree.map(np.testing.assert_array_equal, run(again), run(numbered))
    for wrong in ([0, 1, 1], [1, 0, 1], [1, 1, -1]):
        for got, want in zip(run(np.array([wrong, [5, 5, 0]])), run(numbered), strict=True):
            assert np.all(np.isnan(got[0]))
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("rows, n_tokens", [(B, 0), (0, 3)], ids=["no tokens", "no rows"])
def test_calls_on_nothing(rows, n_tokens):
    cut = lambda name, a: a[:rows] if name == "state" else a[:rows, :n_tokens]
    arguments = {name: jnp.asarray(cut(name, a)) for name, a in changed().items()}
    for options in ({}, {"segment_ids": jnp.ones((rows, n_tokens), jnp.int32)}):
        o, state = gated_delta_rule(**arguments, **options)
        assert o.shape == (rows, n_tokens, H, V)
        np.testing.assert_array_equal(state, arguments["state"])

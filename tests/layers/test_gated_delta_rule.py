"""The gated delta rule: both implementations against float64, other people's code, and the edges of its gates."""

import functools
import pathlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core import jaxprs_in_params

from jaxmem.layers.gated_delta_rule import Inputs, chunks, decays, gated_delta_rule, unit_lower_inverse

B, T, H, K, V = 2, 37, 2, 8, 12
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "gated_delta_rule.npz"
program = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


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


@functools.partial(program, static_argnums=0)
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


@pytest.mark.parametrize("n_tokens, chunk_tokens", [(1, 16), (5, 1), (16, 16), (37, 2), (70, 64), (130, 32)])
def test_chunks_are_the_recurrence(n_tokens, chunk_tokens):
    sample = make_inputs(n_tokens=n_tokens)
    got = outputs_and_gradients(implementation("xla", chunk_tokens), *sample)
    assert_close(got, in_float64(*sample))


@BOTH
@pytest.mark.parametrize("strength", [0.0, 1.0, 40.0, 1e4])
def test_gradients_survive_any_decay(rule, strength):
    """d_g above all, where sums formed as differences of running sums lose all digits but four."""
    sample = make_inputs(1, strength=strength)
    assert_close(outputs_and_gradients(rule, *sample), in_float64(*sample), tolerance=2e-6)


RESETS = {
    "first": np.arange(T) == 0,
    "last": np.arange(T) == T - 1,
    "starts": np.isin(np.arange(T), (5, 16, 17, 31)),
    "everywhere": np.ones(T, bool),
}


@BOTH
@pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)
def test_minus_infinity_forgets_everything(rule, resets):
    (q, k, v, g, beta, state), weight = make_inputs(2)
    g = np.where(resets[:, None], -np.inf, g).astype(np.float32)
    got = outputs_and_gradients(rule, (q, k, v, g, beta, state), weight)
    assert_close(got, in_float64((q, k, v, g, beta, state), weight))
    assert not np.any(np.where(resets[:, None], got[1][3], 0))
    of_state = np.zeros_like(weight[0]), weight[1]
    _, (*d_inputs, d_state) = outputs_and_gradients(rule, (q, k, v, g, beta, state), of_state)
    assert not np.any(d_state) and all(not np.any(a[:, : np.flatnonzero(resets)[-1]]) for a in d_inputs)


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
    np.testing.assert_array_equal(program(rule)(*idle)[1], state)


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


def golden(case):
    with np.load(GOLDEN) as file:
        return {name.split("/")[1]: file[name] for name in file.files if name.startswith(f"{case}/")}


@BOTH
@pytest.mark.parametrize("case", ["usual", "strong", "none"])
def test_against_flash_linear_attention(rule, case):
    """Recorded by tests/golden/make_gated_delta_rule.py."""
    found = golden(f"rule_{case}")
    names = "q", "k", "v", "g", "beta", "state"
    got = outputs_and_gradients(
        rule, tuple(found[name] for name in names), (found["weight_of_o"], found["weight_of_final_state"])
    )
    want = (found["o"], found["final_state"]), tuple(found[f"d_{name}"] for name in names)
    assert_close(got, want)


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


def test_decays_are_sums_of_what_lies_between():
    g = np.log(np.array([0.5, 0.0, 0.25, 0.5]), where=np.arange(4) != 1, out=np.full(4, -np.inf)).astype(np.float32)
    lower, before, through, after = jax.jit(decays)(g)
    want = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.25, 1, 0], [0, 0.125, 0.5, 1]]
    np.testing.assert_allclose(lower, want, rtol=1e-6)
    np.testing.assert_allclose(before, [0.5, 0, 0, 0], rtol=1e-6)
    assert through == 0
    np.testing.assert_allclose(after, [0, 0.125, 0.5, 1], rtol=1e-6)


def test_chunks_of_several_memories_are_folded_each_into_its_own():
    """Row 0 visits memories 0 1 0 2, row 1 visits 2 2 2 0; nobody visits memory 3."""
    (q, k, v, g, beta, _), _ = make_inputs(n_tokens=32)
    x, visits = Inputs(q, k, v, g, beta), np.array([[0, 1, 0, 2], [2, 2, 2, 0]])
    memories = np.random.default_rng(5).normal(size=(B, 4, H, K, V)).astype(np.float32)
    o, after = program(chunks)(x, memories, visits)
    rule = program(functools.partial(implementation("reference"), scale=1.0))
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
    o, after = program(gated_delta_rule)(*inputs)
    for name in ("reference", "xla"):
        want = program(functools.partial(implementation(name), scale=K**-0.5))(*inputs, jnp.zeros_like(state))
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
            "gated_delta_rule: needs a power of two as chunk_tokens, got chunk_tokens=48; use 32, 64",
        ),
        ({"chunk_tokens": 0}, "got chunk_tokens=0"),
        ({"implementation": "mosaic"}, "needs implementation 'reference', 'xla' or None, got implementation='mosaic'"),
        (
            {"k": np.zeros((B, 3, H, K + 1))},
            r"needs k of shape \(2, 3, 2, 8\) beside q of shape .*, got \(2, 3, 2, 9\)",
        ),
        ({"v": np.zeros((B, 4, H, V))}, r"needs v of shape \(2, 3, 2, 12\)"),
        ({"g": np.zeros((B, 3, H, K))}, r"needs g of shape \(2, 3, 2\)"),
        ({"beta": np.zeros((B, 3, 1))}, r"needs beta of shape \(2, 3, 2\)"),
        ({"state": np.zeros((B, H, V, K))}, r"needs state of shape \(2, 2, 8, 12\) .*, got \(2, 2, 12, 8\)"),
    ],
    ids=["chunk", "empty chunk", "implementation", "k", "v", "g", "beta", "state"],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        gated_delta_rule(**changed(**arguments))

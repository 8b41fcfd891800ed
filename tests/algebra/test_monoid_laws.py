"""The laws that the four algebras share, in values and in gradients, on one table of all of them.

Every case takes the same tokens twice: cut into pieces that are folded, and whole, through an oracle that knows no
monoid and runs in float64. `absent` says which tokens are missing: masked keys, full resets, rows that are not there,
padding. It covers nothing missing, some tokens, whole pieces, and everything.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmem.algebra import affine, softmax, suffix, topk

ROWS, PIECES, TOKENS, K, V, WIDTH, BEST = 2, 5, 3, 3, 4, 4, 4
PER_TOKEN, PER_PIECE = (ROWS, PIECES, TOKENS), (ROWS, PIECES, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    algebra: ModuleType
    sample: Callable  # rng, absent [R N C], strength -> (learned, given): dicts of float32 and of other arrays
    pieces: Callable  # learned, given -> elements stacked on axis 1, [R N ...]
    whole: Callable  # learned, given -> the element of everything, by the oracle
    identity: tuple  # [R ...]
    exact: bool = False

    def folded(self, learned, given):
        return self.algebra.fold(self.pieces(learned, given), axis=1)


def sample_softmax(rng, absent, strength):
    learned = {"scores": strength * rng.normal(size=PER_TOKEN), "values": rng.normal(size=(*PER_TOKEN, V))}
    return learned, {"mask": ~absent}


def pieces_softmax(learned, given):
    return softmax.partial(learned["scores"], learned["values"], given["mask"])


def whole_softmax(learned, given):
    scores = jnp.where(given["mask"], learned["scores"], -jnp.inf).reshape(ROWS, -1)
    some = jnp.any(given["mask"], axis=(1, 2))[:, None]
    scores = jnp.where(some, scores, 0)  # a row without keys is replaced, here and below, before it can make a NaN
    o = jnp.sum(jax.nn.softmax(scores)[..., None] * learned["values"].reshape(ROWS, -1, V), axis=1)
    lse = jax.nn.logsumexp(scores, axis=1)
    return softmax.Partial(jnp.where(some, o, 0), jnp.where(some[:, 0], lse, -jnp.inf))


def sample_affine(kind, rng, absent, strength):
    absent = absent[:, :, 0]
    if kind is affine.Scalar:
        m = np.where(absent, -np.inf, -strength * rng.exponential(size=(ROWS, PIECES)))
    elif kind is affine.Vector:
        forgotten = absent[..., None] & (rng.uniform(size=(ROWS, PIECES, K)) < 0.7)
        m = np.where(forgotten, -np.inf, -strength * rng.exponential(size=(ROWS, PIECES, K)))
    else:
        decay = np.exp(-0.1 * strength * rng.exponential(size=(ROWS, PIECES, 1, 1)))
        k = rng.normal(size=(ROWS, PIECES, K, 1))
        k /= np.linalg.norm(k, axis=-2, keepdims=True)
        delta_rule = np.eye(K) - rng.uniform(0, 2, size=decay.shape) * k * np.swapaxes(k, -1, -2)
        m = np.where(absent[..., None, None], 0, decay * delta_rule)
    return {"M": m, "B": rng.normal(size=(ROWS, PIECES, K, V))}, {}


def pieces_affine(kind, learned, given):
    return affine.Segment(kind(learned["M"]), learned["B"])


def whole_affine(kind, learned, given):
    """M and B, read off the recurrence S_t = M_t S_{t-1} + B_t run from S = [1 | 0]."""
    m = learned["M"]
    matrices = {
        affine.Scalar: lambda: jnp.exp(m)[..., None, None] * jnp.eye(K),
        affine.Vector: lambda: jnp.exp(m)[..., None] * jnp.eye(K),
        affine.Matrix: lambda: m,
    }[kind]()
    state = jnp.broadcast_to(jnp.concatenate([jnp.eye(K), jnp.zeros((K, V))], axis=1), (ROWS, K, K + V))
    for t in range(PIECES):
        state = matrices[:, t] @ state
        state = state.at[..., K:].add(learned["B"][:, t])
    return affine.Segment(affine.Matrix(state[..., :K]), state[..., K:])


def sample_topk(rng, absent, strength):
    scores = rng.integers(-2, 3, size=PER_TOKEN).astype(float)  # few values: many ties
    ids = rng.permuted(np.broadcast_to(np.arange(PIECES * TOKENS), (ROWS, PIECES * TOKENS)), axis=1).reshape(PER_TOKEN)
    return {"scores": np.where(absent, -np.inf, scores)}, {"ids": ids}


def pieces_topk(learned, given):
    return topk.top_k(learned["scores"], given["ids"], BEST)


def whole_topk(learned, given):
    scores, ids = learned["scores"].reshape(ROWS, -1), given["ids"].reshape(ROWS, -1)
    order = jnp.lexsort((ids, -scores), axis=-1)[:, :BEST]
    scores = jnp.take_along_axis(scores, order, axis=1)
    return topk.TopK(scores, jnp.where(scores == -jnp.inf, -1, jnp.take_along_axis(ids, order, axis=1)))


def sample_suffix(rng, absent, strength):
    return {"items": rng.normal(size=(*PER_TOKEN, V))}, {"length": np.sum(~absent, axis=-1)}


def pieces_suffix(learned, given):
    return suffix.suffix_of(learned["items"], WIDTH, given["length"])


def whole_suffix(learned, given):
    """Row by row, by slicing lists."""
    items, count = [], []
    for row, lengths in zip(learned["items"], np.asarray(given["length"]), strict=True):
        kept = [row[n, t] for n, length in enumerate(lengths) for t in range(length)][-WIDTH:]
        items.append(jnp.stack([jnp.zeros(V, row.dtype)] * (WIDTH - len(kept)) + kept))
        count.append(len(kept))
    return suffix.Suffix(jnp.stack(items), jnp.array(count))


def affine_case(kind):
    functions = (functools.partial(f, kind) for f in (sample_affine, pieces_affine, whole_affine))
    return Case(affine, *functions, affine.identity(kind, (ROWS, K, V)))


CASES = {
    "softmax": Case(softmax, sample_softmax, pieces_softmax, whole_softmax, softmax.identity((ROWS, V))),
    "affine-scalar": affine_case(affine.Scalar),
    "affine-vector": affine_case(affine.Vector),
    "affine-matrix": affine_case(affine.Matrix),
    "topk": Case(topk, sample_topk, pieces_topk, whole_topk, topk.identity((ROWS, BEST)), exact=True),
    "suffix": Case(suffix, sample_suffix, pieces_suffix, whole_suffix, suffix.identity((ROWS, WIDTH, V)), exact=True),
}
SMALLEST = 1e-30  # below it fp32 gradients through strong decays underflow
every_algebra = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

tokens = given(
    seed=st.integers(0, 2**32 - 1),
    absent=st.one_of(*(hnp.arrays(bool, shape) for shape in (PER_TOKEN, PER_PIECE, (ROWS, 1, 1), (1, 1, 1)))),
    strength=st.sampled_from([1.0, 40.0]),
)
examples = settings(max_examples=25, deadline=None, derandomize=True)


def drawn(case, seed, absent, strength):
    learned, given = case.sample(np.random.default_rng(seed), np.broadcast_to(absent, PER_TOKEN), strength)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), learned), jax.tree.map(jnp.asarray, given)


jit = functools.cache(jax.jit)


def piece(elements, n):
    return jax.tree.map(lambda x: x[:, n], elements)


def assert_same(actual, expected, exact=True):
    """Leaves equal, or within 1e-5 relative RMS with infinities in the same places; NaN is never right."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(map(np.asarray, jax.tree.leaves(actual)), map(np.asarray, jax.tree.leaves(expected)), strict=True):
        assert x.shape == y.shape
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        if exact or not np.issubdtype(y.dtype, np.floating):
            np.testing.assert_array_equal(x[finite], y[finite])
            assert not np.isnan(x).any()
        else:
            assert np.linalg.norm(x[finite] - y[finite]) <= 1e-5 * np.linalg.norm(y[finite]) + SMALLEST


@every_algebra
@examples
@tokens
def test_identity_is_neutral_on_both_sides(case, seed, absent, strength):
    element = piece(jit(case.pieces)(*drawn(case, seed, absent, strength)), 0)
    combine = jit(case.algebra.combine)
    assert_same(combine(case.identity, element), element)
    assert_same(combine(element, case.identity), element)


@every_algebra
@examples
@tokens
def test_combine_is_associative(case, seed, absent, strength):
    elements = jit(case.pieces)(*drawn(case, seed, absent, strength))
    a, b, c = (piece(elements, n) for n in range(3))
    combine = jit(case.algebra.combine)
    assert_same(combine(combine(a, b), c), combine(a, combine(b, c)), case.exact)


@pytest.mark.parametrize("case", [CASES["softmax"], CASES["topk"]], ids=["softmax", "topk"])
@examples
@tokens
def test_unordered_algebras_commute(case, seed, absent, strength):
    elements = jit(case.pieces)(*drawn(case, seed, absent, strength))
    combine = jit(case.algebra.combine)
    a, b = piece(elements, 0), piece(elements, 1)
    assert_same(combine(a, b), combine(b, a), case.exact)


@every_algebra
@examples
@tokens
def test_fold_is_combine_from_first_to_last(case, seed, absent, strength):
    learned, given = drawn(case, seed, absent, strength)
    elements = jit(case.pieces)(learned, given)
    one_by_one = functools.reduce(jit(case.algebra.combine), [piece(elements, n) for n in range(PIECES)])
    assert_same(jit(case.folded)(learned, given), one_by_one, case.exact)


@functools.cache
def outputs_and_gradients(function, compiled=True):
    """Of sum(w * outputs) with fixed w over what is finite, so that every output has its own cotangent."""

    def loss(learned, given):
        outputs = function(learned, given)
        rng, total = np.random.default_rng(0), 0.0
        for x in jax.tree.leaves(outputs):
            if jnp.issubdtype(x.dtype, jnp.floating):
                total += jnp.sum(rng.normal(size=x.shape).astype(np.float32) * jnp.where(jnp.isfinite(x), x, 0))
        return total, outputs

    gradients = jax.grad(loss, has_aux=True)
    return jax.jit(gradients) if compiled else gradients


@functools.cache
def folded_as_oracle(name):
    """The fold, with a decay written as the matrix that it stands for, as the oracle has it."""
    case = CASES[name]

    def folded(learned, given):
        element = case.folded(learned, given)
        if case.algebra is not affine:
            return element
        one = jnp.broadcast_to(jnp.eye(K), (ROWS, K, K))
        return affine.Segment(affine.Matrix(element.M.times(one)), element.B)

    return folded


@pytest.mark.parametrize("name", CASES)
@examples
@tokens
def test_fold_and_its_gradients_match_the_oracle(name, seed, absent, strength):
    case = CASES[name]
    learned, given = drawn(case, seed, absent, strength)
    gradients, outputs = outputs_and_gradients(folded_as_oracle(name))(learned, given)
    with jax.enable_x64(True):
        oracle = outputs_and_gradients(case.whole, compiled=case.algebra is not suffix)
        true_gradients, true_outputs = oracle(jax.tree.map(lambda x: x.astype(jnp.float64), learned), given)
    assert_same(outputs, true_outputs, case.exact)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(true_gradients))
    assert_same(gradients, true_gradients, case.exact)


@every_algebra
def test_vmap_and_negative_axes_agree_with_batching(case):
    learned, given = drawn(case, 7, np.zeros(PER_TOKEN, bool), 1.0)
    elements, expected = jit(case.pieces)(learned, given), jit(case.folded)(learned, given)
    assert_same(jax.jit(jax.vmap(case.algebra.fold))(elements), expected, case.exact)
    assert_same(case.algebra.fold(elements, axis=-1), expected, case.exact)
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        case.algebra.fold(elements, axis=2)


@every_algebra
def test_fold_of_none_is_the_identity(case):
    none = jax.tree.map(lambda x: x[None][:0], case.identity)
    assert_same(case.algebra.fold(none), case.identity)


@every_algebra
def test_associative_scan_takes_combine(case):
    elements = jit(case.pieces)(*drawn(case, 7, np.zeros(PER_TOKEN, bool), 1.0))
    prefixes = jax.jit(lambda x: jax.lax.associative_scan(case.algebra.combine, x, axis=1))(elements)
    first_three = jax.tree.map(lambda x: x[:, :3], elements)
    assert_same(piece(prefixes, 2), case.algebra.fold(first_three, axis=1), case.exact)

"""The short convolution: against torch, against a loop over documents, and its state."""

import functools
import pathlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxmem.layers.short_convolution import convolve, last_items, short_convolution

B, T, CHANNELS, WIDTH = 2, 9, 3, 4
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "fla_recurrences.npz"


@jax.jit
def outputs_and_gradients(x, weight, history, document, weight_of_outputs):
    outputs, pull = jax.vjp(lambda *args: short_convolution(*args, document), x, weight, history)
    return outputs, pull(weight_of_outputs)


def test_against_torch():
    """Recorded by tests/golden/make_fla_recurrences.py."""
    with np.load(GOLDEN) as file:
        x, weight, w = (file[f"convolution/{name}"] for name in ("inputs/x", "inputs/weight", "weights/o"))
        y, d_x, d_weight = (file[f"convolution/{name}"][0] for name in ("outputs/o", "gradients/x", "gradients/weight"))
    rows, _, channels = x.shape
    history = np.zeros((rows, len(weight) - 1, channels), np.float32)
    ones = np.ones(x.shape[:2], np.int32)
    got, d = outputs_and_gradients(x, weight, history, ones, (w, history))
    for a, b in ((got[0], y), (d[0], d_x), (d[1], d_weight)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def by_hand(x, weight, history, segment, history_segment):
    """One row, token by token: (y, history) in float64, as functions linear in x and history."""
    seen = [(history_segment, item) for item in history]
    ys = []
    for now, item in zip(segment, x, strict=True):
        seen.append((now, item))
        last = seen[-len(weight) :]
        ys.append(sum(w * item for w, (there, item) in zip(weight, last, strict=True) if there == now))
        if now == 0:
            seen.pop()
    latest = seen[-1][0]
    kept = seen[len(seen) - (len(weight) - 1) :]
    return np.array(ys), np.array([item if there == latest else 0 * item for there, item in kept])


@st.composite
def documents(draw):
    """Documents of a row whose history is of the first, padded at the end."""
    steps = draw(hnp.arrays(np.int32, T, elements=st.sampled_from([0, 0, 1])))
    length = draw(st.integers(0, T))
    return np.where(np.arange(T) < length, 1 + np.cumsum(steps), 0).astype(np.int32)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(documents(), min_size=B, max_size=B), st.integers(0, 2**16))
def test_against_a_loop_over_tokens(segment, seed):
    """The map is linear in inputs and in weights; so <w, f(x)> = <f'(w), x> proves its gradients."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, weight, history = normal(B, T, CHANNELS), normal(WIDTH, CHANNELS), normal(B, WIDTH - 1, CHANNELS)
    segment = np.stack(segment)
    w = normal(B, T, CHANNELS), normal(B, WIDTH - 1, CHANNELS)
    got, (d_x, d_weight, d_history) = outputs_and_gradients(x, weight, history, segment, w)
    want = [by_hand(x[b], weight, history[b], segment[b], 1) for b in range(B)]
    want = [np.stack(part) for part in zip(*want, strict=True)]
    real = (segment != 0)[..., None]
    np.testing.assert_allclose(np.where(real, got[0], 0), np.where(real, want[0], 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])

    inner = lambda *pairs: sum(np.sum(np.float64(a) * np.float64(b)) for a, b in pairs)
    outputs = inner(*zip(w, got, strict=True))
    np.testing.assert_allclose(inner((d_x, x), (d_history, history)), outputs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(inner((d_weight, weight)), inner((w[0], got[0])), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_last_items_of_the_document_only():
    """Of the last token: its own document's W - 1 predecessors, in x and in history."""
    document = jnp.array([[1, 1, 2, 2, 2]])
    x, history, weight = jnp.ones((1, 5, 1)), jnp.ones((1, WIDTH - 1, 1)), jnp.ones((WIDTH, 1))

    def token(t):
        y = lambda x, history: short_convolution(x, weight, history, document)[0][0, t, 0]
        d_x, d_history = jax.jit(jax.grad(y, (0, 1)))(x, history)
        return d_x[0, :, 0].tolist(), d_history[0, :, 0].tolist()

    assert token(1) == ([1, 1, 0, 0, 0], [0, 1, 1])
    assert token(4) == ([0, 0, 1, 1, 1], [0, 0, 0])


def test_sums_in_fp32_and_keeps_dtypes():
    items = jnp.array([256.0, 1.0, 1.0, 1.0], jnp.bfloat16)[None, :, None]
    ones = jnp.ones((1, 4), jnp.int32)
    y = jax.jit(convolve)(items, ones, jnp.ones((4, 1)))
    assert y.dtype == jnp.bfloat16 and float(y[0, 0, 0]) == 260.0  # one by one in bf16 it stays 256
    history = jnp.zeros((1, 3, 1), jnp.float32)
    shapes = jax.eval_shape(short_convolution, items, jnp.ones((4, 1)), history, ones)
    assert [a.dtype for a in shapes] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("end, items, segment", [(3, [0, 1, 2], 1), (5, [0, 3, 4], 2), (6, [3, 4, 5], 2)])
def test_last_items(end, items, segment):
    x, ids = jnp.arange(6.0)[None, :, None], jnp.array([[1, 1, 1, 2, 2, 2]])
    got, last = jax.jit(functools.partial(last_items, width=4))(x, ids, jnp.array([end]))
    assert (got[0, :, 0].tolist(), last.tolist()) == (items, [segment])

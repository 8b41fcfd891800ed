"""What tests of training steps share: a batch of packed documents, the state before the first step, closeness of states."""

from functools import cache

import jax
import numpy as np

from jaxmem.training.step import init_state, shifted

B, T, VOCAB = 8, 16, 64


def make_batch(seed=0, parts=1):
    """Packed documents and padding: a whole row of it, and tails."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, VOCAB, (B, T + 1), dtype=np.int32)
    lengths = numbers.integers(2, T, (B, 2)).cumsum(axis=1)
    segments = 1 + np.sum(np.arange(T + 1) >= lengths[..., None], axis=1, dtype=np.int32)
    segments[-3:] *= np.arange(T + 1) < np.array([T - 4, 3, 0])[:, None]
    return tuple(x.reshape(parts, -1, T + 1) for x in (tokens, segments))


def as_batch(tokens, segments):
    """A token stands for as many bytes as its number."""
    return shifted({"tokens": tokens, "segment_ids": segments, "bytes": np.where(segments, tokens, 0)})


@cache
def fresh(config):
    """The state before the first step, on the host, so that any mesh may take it."""
    return jax.device_get(jax.jit(lambda: init_state(config))())


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30)


def relative_errors(got, want):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    return {jax.tree_util.keystr(path): relative_rms(a, b) for (path, a), (_, b) in zip(got, want, strict=True)}


def assert_close(got, want, tolerance=1e-5, rounding=None):
    """Relative RMS of every array below tolerance, or three times what rounding moves it by where that is more."""
    errors = relative_errors(got, want)
    bounds = {name: max(tolerance, 3 * rounding[name] if rounding else 0.0) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / bounds[name])
    assert errors[worst] < bounds[worst], f"{worst}: {errors[worst]:.1e}, bound {bounds[worst]:.1e}"

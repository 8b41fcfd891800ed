"""The TPU's kernels on fake devices, with races detected: values and gradients against the blocks of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import B, assert_close, make, on_fake_tpu, races_found, values_and_gradients

from jaxmem.pallas_kernels.block_spans import sees_all, spans, visible
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.flash_attention_tpu import Stream
from jaxmem.pallas_kernels.masks import Mask, Place

T = 300
"""Two whole blocks of 128 and one that is filled up."""
CASES = {
    "causal packed grouped": {
        "mask": "causal",
        "rows": "packed",
        "heads": (4, 2),
        "widths": (8, 16),
        "blocks": (128, 128),
    },
    "window padded": {"mask": "window 150", "rows": "padded", "heads": (2, 2), "blocks": (256, 128)},
    "chunks": {"mask": "chunks of 130", "rows": "one document", "heads": (2, 1), "blocks": (128, 256)},
    "prefix capped": {"mask": "prefix", "rows": "packed", "heads": (2, 2), "soft_cap": 2.0, "blocks": (128, 128)},
    "prefix in a window": {"mask": "prefix in 9", "rows": "packed", "heads": (2, 1), "blocks": (128, 128)},
    "dropout": {"mask": "causal", "rows": "packed", "heads": (4, 2), "rate": 0.3, "blocks": (128, 128)},
    "full with sinks": {"mask": "full", "rows": "padded", "heads": (2, 2), "sinks": True, "blocks": (128, 128)},
}
MASKS = {"window 150": Mask(window=150), "chunks of 130": Mask(chunk=130)}


def case(mask, **changes):
    arrays, options, cotangents = make("causal" if mask in MASKS else mask, n_tokens=T, **changes)
    return arrays, options | {"mask": MASKS.get(mask, options["mask"])}, cotangents


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "causal packed grouped" else pytest.mark.slow) for n in CASES]
)
def test_kernels_are_the_blocks_of_xla(name):
    arguments = case(**CASES[name])
    with on_fake_tpu(dma_execution_mode="on_wait"):
        got = jax.device_get(values_and_gradients(*arguments, implementation="pallas_tpu"))
    assert not races_found()
    assert_close(got, values_and_gradients(*arguments, implementation="xla"), 5e-6)


@pytest.mark.slow
def test_bf16_accumulates_in_fp32():
    arrays, options, cotangents = case("causal", rows="packed", heads=(2, 1), blocks=(128, 128), dtype=jnp.bfloat16)
    with on_fake_tpu(dma_execution_mode="on_wait"):
        got = jax.device_get(values_and_gradients(arrays, options, cotangents, implementation="pallas_tpu"))
    full = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want = values_and_gradients(full, options, cotangents, implementation="reference")
    assert got["o"].dtype == got["lse"].dtype == np.float32
    assert_close({"lse": got["lse"]}, {"lse": want["lse"]}, 2.0**-9)  # the scaled query is rounded once
    assert_close(got, want, 2.0**-7)  # and so are weights and cotangents


@pytest.mark.parametrize("mask", ["causal", "window 150", "chunks of 130", "full"])
@pytest.mark.parametrize("rows", ["one document", "packed", "padded"])
def test_only_pairs_that_all_see_each_other_are_not_masked(mask, rows):
    _, options, _ = case(mask, rows=rows)
    mask, size = options["mask"], 12
    blocks = lambda place: Place(*(np.asarray(x).reshape(B, -1, size) for x in place[:2]))
    q, k = blocks(options["q_place"]), blocks(options["k_place"])
    q = q._replace(segment=np.where(q.segment == 0, -1, q.segment))
    q_span, k_span = spans(mask, jax.tree.map(jnp.asarray, q), jax.tree.map(jnp.asarray, k))
    pair = lambda x, axis: jax.tree.map(lambda a: jnp.expand_dims(a, axis), x)
    all_see = sees_all(mask, pair(q_span, 2), pair(k_span, 1))
    rows_of_q = jax.tree.map(lambda x: jnp.asarray(x)[:, :, None, None, :], q)
    columns_of_k = jax.tree.map(lambda x: jnp.asarray(x)[:, None, :, :, None], k)
    seen = np.asarray(visible(mask, rows_of_q, columns_of_k))  # [B N M C_k C_q]
    assert not np.any(np.asarray(all_see) & ~seen.all(axis=(-1, -2)))
    if rows == "one document":
        np.testing.assert_array_equal(all_see, seen.all(axis=(-1, -2)))
    m = np.arange(k.index.shape[1])
    within = (m >= np.asarray(q_span.first)[..., None]) & (m < np.asarray(q_span.end)[..., None])
    assert not np.any(seen.any(axis=(-1, -2)) & ~within)
    n = np.arange(q.index.shape[1])
    within = (n >= np.asarray(k_span.first)[..., None]) & (n < np.asarray(k_span.end)[..., None])
    assert not np.any(seen.any(axis=(-1, -2)) & ~within.swapaxes(1, 2))


def test_the_detector_finds_a_stream_that_does_not_wait(monkeypatch):
    """A control: copies that are made at once give the right numbers, and the race is found all the same."""
    monkeypatch.setattr(Stream, "wait", lambda self, n, slot: None)
    arguments = case("causal", heads=(1, 1), blocks=(128, 128))
    with on_fake_tpu(dma_execution_mode="eager"):
        got = jax.device_get(values_and_gradients(*arguments, implementation="pallas_tpu"))
    assert_close(got, values_and_gradients(*arguments, implementation="xla"), 5e-6)
    assert races_found()


ERRORS = {
    "relative": ({"relative": 5}, r"with relative positions, got 'pallas_tpu'; use 'xla'"),
    "block": (
        {"blocks": (100, 128)},
        r"with blocks that 128 does not divide, such as 100 x 128, got 'pallas_tpu'; use 'xla'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, text = ERRORS[name]
    arrays, options, _ = case("causal", **changes)
    with pytest.raises(NotImplementedError, match=text):
        flash_attention(**arrays, **options, implementation="pallas_tpu")

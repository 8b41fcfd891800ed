"""Decoding with a maximum known before: both kernels without their devices, against the equation."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import TRITON, assert_close, lowered_for_a_gpu, on_fake_tpu, races_found, relative_rms

from jaxmem.pallas_kernels import decode_attention_gpu, decode_attention_tpu
from jaxmem.pallas_kernels.decode_attention import unified_max_attention, unified_sums
from jaxmem.pallas_kernels.decode_sums import CUT, UNSEEN, WHOLE, block_kinds, finish
from jaxmem.pallas_kernels.flash_attention import flash_attention, prepare
from jaxmem.pallas_kernels.masks import Mask, Place, sees

B, S, NOW = 3, 300, 250
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 60": Mask(window=60),
    "chunks of 70": Mask(chunk=70),
    "prefix": Mask(),
    "prefix in 60": Mask(window=60),
}
CASES = {
    "grouped": {"mask": "window 60", "heads": (4, 2), "n_tokens": 2},
    "causal": {},
    "full, all heads share keys": {"mask": "full", "heads": (4, 1), "n_tokens": 3},
    "every head its own": {"mask": "chunks of 70", "heads": (4, 4)},
    "8 kv heads": {"mask": "window 60", "heads": (16, 8), "n_tokens": 2},
    "3 kv heads": {"heads": (6, 3), "n_tokens": 5},
    "narrow": {"mask": "window 60", "widths": (24, 16), "n_tokens": 2},
    "odd widths": {"widths": (192, 128), "heads": (4, 2)},
    "prefix": {"mask": "prefix", "n_tokens": 2},
    "prefix in a window": {"mask": "prefix in 60", "heads": (8, 4)},
    "whole blocks": {"n_keys": 256, "mask": "full"},
    "short": {"n_keys": 20, "mask": "full"},
    "default blocks": {"n_keys": 600, "block": None},
    "bf16": {"dtype": jnp.bfloat16, "heads": (8, 2), "n_tokens": 2},
}


@pytest.fixture(params=["pallas_tpu", "pallas_gpu"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(decode_attention_tpu, "CORES", {"cpu": 2})
    interpreted = functools.partial(decode_attention_gpu.sums, interpret=True)
    monkeypatch.setattr(decode_attention_gpu, "sums", interpreted)
    return request.param


def places(mask: str, n_tokens: int, n_keys: int):
    """A ring cache: rows begin anywhere, some slots are empty; row 1 sees nothing; row 2 has documents."""
    index = (jnp.arange(n_keys) + 77 * jnp.arange(B)[:, None]) % n_keys
    segment = jnp.stack([index[0] > 4, 0 * index[1], 1 + (index[2] >= min(n_keys // 2, 100))]).astype(jnp.int32)
    here = Place(jnp.full((B, n_tokens), NOW) + jnp.arange(n_tokens), jnp.tile(jnp.array([[1], [1], [2]]), n_tokens))
    return here, Place(index, segment, index % 11 < 4 if mask.startswith("prefix") else None)


def case(
    mask="causal", heads=(2, 2), widths=(128, 128), n_tokens=1, n_keys=S, block=32, dtype=jnp.float32, maximum=2.0,
    implementation="pallas_gpu",
):  # fmt: skip
    """Arrays, with no number in blocks that no query sees; options."""
    size = block if block is None or implementation == "pallas_gpu" else 128
    here, there = places(mask, n_tokens, n_keys)
    shapes = (B, n_tokens, heads[0], widths[0]), (B, n_keys, heads[1], widths[0]), (B, n_keys, heads[1], widths[1])
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    if size is not None:
        kinds = jnp.repeat(block_kinds(MASKS[mask], here, there, size), size, axis=1)[:, :n_keys, None, None]
        k, v = (jnp.where(kinds == UNSEEN, jnp.nan, x) for x in (k, v))
    return (q, k, v), {"mask": MASKS[mask], "q_place": here, "k_place": there}, {"block_k": size, "maximum": maximum}


def as_dict(partial):
    return dict(zip(("o", "lse"), jax.device_get(partial), strict=True))


def run(attend, arrays, implementation):
    with on_fake_tpu(dma_execution_mode="on_wait") if implementation == "pallas_tpu" else contextlib.nullcontext():
        found = jax.device_get(jax.jit(attend)(*arrays))
    assert not (implementation == "pallas_tpu" and races_found())
    return found


def equation(arrays, options):
    exact = [jnp.where(jnp.isnan(x), 0, x.astype(jnp.float32)) for x in arrays]  # of blocks that no query sees
    return as_dict(flash_attention(*exact, **options, implementation="reference"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "grouped" else pytest.mark.slow) for n in CASES])
def test_kernels_compute_the_equation(name, implementation):
    arrays, options, more = case(**CASES[name], implementation=implementation)
    *prepared, _, static = prepare(*arrays, **options, block_k=more["block_k"], implementation=implementation)
    maximum = jnp.full(arrays[0].shape[:3], more["maximum"])
    attend = lambda *qkv: finish(unified_sums(*qkv, *prepared, maximum, static), maximum)
    got, want = as_dict(run(attend, arrays, implementation)), equation(arrays, options)
    if arrays[0].dtype == jnp.bfloat16:
        assert_close({"o": got["o"]}, {"o": want["o"]}, 2.0**-7)  # weights are rounded to bf16
        assert_close({"lse": got["lse"]}, {"lse": want["lse"]}, 1e-5)  # their sum is not
    else:
        assert_close(got, want, 1e-5)
    assert np.all(got["o"][1] == 0) and np.all(got["lse"][1] == -np.inf)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    arrays, options, more = case(**CASES[name])
    attend = functools.partial(unified_max_attention, **options, **more, implementation="pallas_gpu")
    got, served = jax.jit(attend)(*arrays)
    assert served
    assert_close(as_dict(got), equation(arrays, options), 1e-5 if arrays[0].dtype == jnp.float32 else 2.0**-6)


@pytest.mark.slow
@pytest.mark.parametrize("maximum, serves", [(2.0, True), (-100.0, False), (100.0, False), (float("nan"), False)])
def test_a_maximum_that_does_not_serve(maximum, serves, implementation):
    """A traced one."""
    arrays, options, more = case(heads=(4, 2), n_tokens=2, mask="window 60", implementation=implementation)
    attend = functools.partial(unified_max_attention, **options, block_k=more["block_k"], implementation=implementation)
    got, served = run(lambda *x: attend(*x[:3], maximum=x[3]), (*arrays, maximum), implementation)
    assert bool(served) is serves
    assert_close(as_dict(got), equation(arrays, options), 1e-5)


@pytest.mark.parametrize("mask", [pytest.param(m, marks=() if "window" in m else pytest.mark.slow) for m in MASKS])
def test_kinds_of_blocks(mask):
    size = 20
    here, there = places(mask, 2, S)
    kinds = np.asarray(block_kinds(MASKS[mask], here, there, size))
    seen = np.asarray(sees(MASKS[mask], here, there)).reshape(B, 2, -1, size)
    assert np.all(seen.all(axis=(1, 3))[kinds == WHOLE])
    assert not np.any(seen.any(axis=(1, 3))[kinds == UNSEEN])
    assert set(np.unique(kinds)) <= {WHOLE, CUT, UNSEEN}
    assert np.all(kinds[1] == UNSEEN) and np.any(kinds == WHOLE)


@pytest.mark.parametrize("maximum", [2.0, pytest.param(100.0, marks=pytest.mark.slow)])
def test_gradients_are_those_of_xla(maximum):
    arrays, options, _ = case(heads=(4, 2), widths=(8, 6), n_keys=40, block=None)

    def gradients(attend):
        loss = lambda *qkv: (
            jnp.sum(jnp.sin((found := attend(*qkv)).o)) + jnp.sum(jnp.where(found.o[..., 0] == 0, 0, found.lse))
        )
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    options |= {"mask": MASKS["full"]}
    got = gradients(
        lambda *qkv: unified_max_attention(*qkv, **options, maximum=maximum, implementation="pallas_gpu")[0]
    )
    want = gradients(functools.partial(flash_attention, **options, implementation="reference"))
    assert max(map(relative_rms, got, want)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "prefix in a window", "odd widths", "bf16", "default blocks"])
@pytest.mark.parametrize("chosen", ["pallas_gpu", None])
def test_lowers_to_triton_for_cuda(name, chosen):
    arrays, options, more = case(**CASES[name])
    attend = jax.jit(functools.partial(unified_max_attention, **options, **more, implementation=chosen))
    text = lowered_for_a_gpu(attend, *arrays)
    assert text.count(TRITON) == 2 and "decode_attention" in text


ERRORS = {
    "unknown": (
        ValueError,
        "reference",
        {},
        r"implementation to be one of xla, pallas_tpu, pallas_gpu, got implementation='reference'",
    ),
    "rows of a TPU": (
        NotImplementedError,
        "pallas_tpu",
        {"n_tokens": 300},
        r"at most 512 queries times heads with 'pallas_tpu', got 600; use 'xla'",
    ),
    "blocks of a TPU": (
        NotImplementedError,
        "pallas_tpu",
        {"block": 100},
        r"blocks that 128 divides with 'pallas_tpu', got block_k=100; use 'xla'",
    ),
    "rows of a GPU": (
        NotImplementedError,
        "pallas_gpu",
        {"n_tokens": 129},
        r"at most 128 queries of a kv head with 'pallas_gpu', got 129; use 'xla'",
    ),
    "blocks of a GPU": (
        NotImplementedError,
        "pallas_gpu",
        {"block": 24},
        r"blocks of a power of two from 16 keys with 'pallas_gpu', got block_k=24; use 'xla'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, implementation, changes, text = ERRORS[name]
    n_tokens = changes.get("n_tokens", 1)
    here, there = places("full", n_tokens, 200)
    q, cache = jnp.zeros((B, n_tokens, 2, 128)), jnp.zeros((B, 200, 2, 128))
    with pytest.raises(error, match="unified_max_attention: needs " + text):
        unified_max_attention(
            q, cache, cache, q_place=here, k_place=there, maximum=0.0, block_k=changes.get("block"),
            implementation=implementation,
        )  # fmt: skip

"""The GPU's kernels without a GPU: interpreted, against the blocks of XLA; lowered to Triton for every option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    OPTIONS,
    TRITON,
    against_the_equation,
    assert_close,
    lowered_for_a_gpu,
    make,
    name_of,
    pairwise,
)

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels import flash_attention_gpu, flash_attention_xla
from jaxmem.pallas_kernels.attention_scores import filled
from jaxmem.pallas_kernels.block_spans import visits
from jaxmem.pallas_kernels.flash_attention import flash_attention, prepare
from jaxmem.pallas_kernels.masks import Mask, sees

T = 70
"""Whole blocks of 16 and 32, and one that is filled up."""
CASES = {
    "causal packed grouped": {"rows": "packed", "heads": (4, 2), "widths": (24, 16), "blocks": (16, 32)},
    "full padded, all heads share keys": {"mask": "full", "rows": "padded", "heads": (4, 1), "blocks": (32, 16)},
    "window padded dropout": {"mask": "window 9", "rows": "padded", "rate": 0.3, "blocks": (16, 16)},
    "both ways capped": {"mask": "both ways 5", "soft_cap": 2.0, "heads": (2, 2), "blocks": (32, 32)},
    "chunks dropout": {"mask": "chunks of 7", "rows": "packed", "rate": 0.3, "widths": (16, 40), "blocks": (32, 16)},
    "prefix": {"mask": "prefix", "rows": "packed", "blocks": (16, 32)},
    "prefix and window": {"mask": "prefix", "within": Mask(window=11), "rows": "packed", "blocks": (32, 16)},
    "prefix and chunk": {"mask": "prefix", "within": Mask(chunk=13), "soft_cap": 2.0, "blocks": (16, 16)},
    "default blocks": {"rows": "packed", "rate": 0.3, "blocks": (None, None)},
}


def values_and_gradients(of, arrays, options, cotangents, order=slice(None), **call):
    """What a module's two functions compute; `order` of the keys."""
    place = jax.tree.map(lambda x: x[:, order], options["k_place"])
    arrays = arrays | {name: arrays[name][:, order] for name in "kv"}
    *prepared, static = prepare(**arrays, **options | {"k_place": place})

    @jax.jit
    def run(q, k, v, prepared, cotangents):
        result = of.forward(q, k, v, *prepared, static, **call)
        found = of.gradients(q, k, v, *prepared, result, Partial(*cotangents), static, **call)
        return dict(zip(("o", "lse", "d_q", "d_k", "d_v"), (*result, *found[:3]), strict=True))

    return jax.device_get(run(*(arrays[name] for name in "qkv"), prepared, cotangents))


def case(within=None, **changes):
    arrays, options, cotangents = make(**{"n_tokens": T} | changes)
    return arrays, options if within is None else options | {"mask": within}, cotangents


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "causal packed grouped" else pytest.mark.slow) for n in CASES]
)
def test_kernels_are_the_blocks_of_xla(name):
    arguments = case(**CASES[name])
    got = values_and_gradients(flash_attention_gpu, *arguments, interpret=True)
    assert_close(got, values_and_gradients(flash_attention_xla, *arguments), 5e-6)


@pytest.mark.parametrize("mask", ["causal", "window 9", "chunks of 7", "full", "prefix"])
@pytest.mark.parametrize("rows", ["one document", "packed", "padded"])
def test_blocks_are_visited_where_something_is_seen_and_not_masked_only_where_all_is(mask, rows):
    _, options, _ = make(mask=mask, rows=rows, n_tokens=T)
    q, k = (jax.tree.map(lambda x: filled(x, 8, axis=1), options[side]) for side in ("q_place", "k_place"))
    seen = np.asarray(sees(options["mask"], q, k)).reshape(2, 9, 8, 9, 8)
    some, whole = seen.any((2, 4)), seen.all((2, 4))
    q = q._replace(segment=jnp.where(q.segment == 0, -1, q.segment))
    blocks = lambda place: jax.tree.map(lambda x: x.reshape(2, 9, 8), place)
    for found, axes in zip(visits(options["mask"], blocks(q), blocks(k)), ((0, 1, 2), (0, 2, 1)), strict=True):
        first, start, stop, end = (np.asarray(x)[..., None] for x in found)
        block = np.arange(9)
        visited, unmasked = (block >= first) & (block < end), (block >= start) & (block < stop)
        assert not np.any(some.transpose(axes) & ~visited)
        assert not np.any(unmasked & ~whole.transpose(axes))
        assert np.all((first <= start) & (start <= stop) & (stop <= end))
        if rows == "one document" and mask == "causal":
            np.testing.assert_array_equal(unmasked, whole.transpose(axes))  # the run is as long as it can be


@pytest.mark.slow
def test_keys_may_stand_in_any_order():
    arguments = case(mask="window 9", rows="packed", rate=0.3, blocks=(16, 16))
    order = jax.random.permutation(jax.random.key(1), T)
    back = jnp.argsort(order)
    want = values_and_gradients(flash_attention_gpu, *arguments, interpret=True)
    got = values_and_gradients(flash_attention_gpu, *arguments, order=order, interpret=True)
    assert_close(got | {name: got[name][:, back] for name in ("d_k", "d_v")}, want, 2e-6)


@pytest.mark.slow
def test_rows_that_see_nothing():
    arguments = case(rows="padded", blocks=(32, 32))
    got = values_and_gradients(flash_attention_gpu, *arguments, interpret=True)
    nowhere = np.asarray(arguments[1]["q_place"].segment == 0)
    assert np.all(got["lse"][nowhere] == -np.inf)
    for name in ("o", "d_q", "d_k", "d_v"):
        assert np.all(got[name][nowhere] == 0), name


@pytest.mark.slow
def test_bf16_products_accumulate_in_fp32():
    arguments = case(rows="packed", dtype=jnp.bfloat16, blocks=(16, 32))
    got = values_and_gradients(flash_attention_gpu, *arguments, interpret=True)
    want = values_and_gradients(flash_attention_xla, *arguments)
    assert {x.dtype for x in got.values()} == {np.dtype("float32")}
    assert_close({"lse": got["lse"]}, {"lse": want["lse"]}, 1e-5)  # exact products of bf16, sums in fp32
    assert_close(got, want, 2.0**-8)  # weights and their gradients are rounded once to bf16


LOWERED = {
    "causal": {},
    "full packed": {"mask": "full", "rows": "packed", "heads": (4, 1), "soft_cap": 2.0},
    "window dropout": {"mask": "window 9", "rate": 0.3},
    "prefix in pieces": {"mask": "prefix", "widths": (192, 128)},
    "odd widths": {"mask": "chunks of 7", "widths": (80, 96), "n_tokens": 300},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("implementation", ["pallas_gpu", None])
@pytest.mark.parametrize("name", LOWERED)
def test_lowers_to_triton_for_cuda(name, implementation, dtype):
    """Forward and backward by the operation itself; None picks these kernels for CUDA."""
    arrays, options, _ = make(
        **{"widths": (64, 64), "dtype": dtype, "blocks": (None, None), "n_tokens": 256} | LOWERED[name]
    )

    def loss(arrays):
        o, lse = flash_attention(**arrays, **options, implementation=implementation)
        return jnp.sum(o) + jnp.sum(lse)

    text = lowered_for_a_gpu(jax.jit(jax.value_and_grad(loss)), arrays)
    assert text.count(TRITON) == 3
    for kernel in ("forward", "dq", "dkv"):
        assert f"flash_attention_{kernel}" in text


ERRORS = {
    "relative": ({"relative": 5}, r"with relative positions, got 'pallas_gpu'; use 'xla'"),
    "block": (
        {"blocks": (96, 64)},
        r"with blocks that are no powers of two from 16, such as 96 x 64, got 'pallas_gpu'; use 'xla'",
    ),
    "small block": ({"blocks": (8, 64)}, r"with blocks that are no powers of two from 16, such as 8 x 64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, text = ERRORS[name]
    arrays, options, _ = case(**changes)
    with pytest.raises(NotImplementedError, match="flash_attention: needs an implementation " + text):
        flash_attention(**arrays, **options, implementation="pallas_gpu")


ON_GPU = pairwise(
    {name: OPTIONS[name] for name in ("mask", "rows", "heads", "soft_cap", "sinks", "rate")}
    | {"widths": [(64, 64), (128, 128), (192, 128), (80, 96)]},
    lambda case: True,
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=name_of)
def test_on_a_gpu(case):
    against_the_equation(case, jnp.bfloat16, "pallas_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU[::4], ids=name_of)
def test_on_a_gpu_in_fp32(case):
    against_the_equation(case | {"widths": (64, 64)}, jnp.float32, "pallas_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(256, 256), (512, 512)])
def test_wide_heads_on_a_gpu(widths):
    against_the_equation({"widths": widths, "rows": "packed"}, jnp.bfloat16, "pallas_gpu")

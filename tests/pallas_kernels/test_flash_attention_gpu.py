"""The GPU's kernels without a GPU: interpreted, against the blocks of XLA; lowered to Triton for every option."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_close, make

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels import flash_attention_gpu, flash_attention_xla
from jaxmem.pallas_kernels.flash_attention import flash_attention, prepare
from jaxmem.pallas_kernels.masks import Mask

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

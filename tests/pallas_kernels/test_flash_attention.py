"""Attention in blocks against the equation for every pair of options, the equation against jax.nn, and what both promise."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    OPTIONS,
    ROWS,
    B,
    T,
    assert_close,
    make,
    pairwise,
    params,
    relative_rms,
    values_and_gradients,
)

from jaxmem.pallas_kernels.flash_attention import dropout, flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place, extent, may_see, sees


@pytest.mark.parametrize("case", params(pairwise(OPTIONS), quick=4))
def test_blocks_match_the_equation(case):
    case = make(**case)
    want = values_and_gradients(*case, implementation="reference")
    assert_close(values_and_gradients(*case, implementation="xla"), want, 5e-6)


def test_strong_logits():
    """Forty times the usual size: the softmax is nearly one-hot and exp would overflow without the running maximum."""
    case = make(rows="packed", size=40.0)
    assert_close(values_and_gradients(*case), values_and_gradients(*case, implementation="reference"), 1e-5)


def test_bf16_products_accumulate_in_fp32():
    arrays, options, cotangents = make(rows="packed", dtype=jnp.bfloat16)
    full = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want = values_and_gradients(full, options, cotangents, implementation="reference")
    got = values_and_gradients(arrays, options, cotangents)
    assert got["o"].dtype == got["lse"].dtype == jnp.float32
    assert got["d_q"].dtype == got["d_k"].dtype == got["d_v"].dtype == jnp.bfloat16
    assert_close({"lse": got["lse"]}, {"lse": want["lse"]}, 1e-5)  # exact products of bf16, sums in fp32
    assert_close(got, want, 2.0**-8)  # weights and cotangents are rounded once to bf16


@pytest.mark.parametrize("mask", ["causal", "window 9", "full"])
def test_the_equation_matches_jax_nn(mask):
    arrays, options, (do, _) = make(mask, rows="packed", widths=(8, 8))
    segment = options["q_place"].segment
    same = (segment[:, :, None] == segment[:, None, :])[:, None]
    rule = MASKS[mask]

    @jax.jit
    def theirs(arrays):
        past = None if rule.window is None else (rule.window - 1, 0)
        q, k, v = (arrays[name] for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=rule.causal, local_window_size=past)

    o, pull = jax.vjp(theirs, arrays)
    want = {"o": o} | {f"d_{name}": d for name, d in pull(do)[0].items()}
    zero = jnp.zeros(do.shape[:-1])
    assert_close(values_and_gradients(arrays, options, (do, zero), implementation="reference"), want, 2e-6)


@pytest.mark.parametrize("name", ["full", "causal", "packed"])
def test_blocks_match_the_ringattention_package(name):
    """Values and gradients that it found on a ring of two devices, by tests/golden/make_ringattention.py."""
    golden = np.load(Path(__file__).parent.parent / "golden" / "ringattention.npz")
    index = jnp.broadcast_to(jnp.arange(golden["q"].shape[1]), golden["q"].shape[:2])
    place = Place(index, jnp.asarray(golden["segments"]) if name == "packed" else jnp.ones_like(index))
    options = {"mask": Mask(causal=name != "full"), "q_place": place, "k_place": place, "dropped": None}
    options |= {"block_q": 16, "block_k": 24}
    cotangents = jnp.asarray(golden["do"]), jnp.zeros(golden["do"].shape[:-1])
    got = values_and_gradients({x: jnp.asarray(golden[x]) for x in "qkv"}, options, cotangents, implementation="xla")
    want = {"o": "o", "d_q": "dq", "d_k": "dk", "d_v": "dv"}
    assert_close(got, {ours: golden[f"{name}/{theirs}"] for ours, theirs in want.items()}, 2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_past_does_not_depend_on_the_future(implementation):
    arrays, options, _ = make(relative=5, soft_cap=3.0, sinks=True)
    now = 17
    attend = jax.jit(
        lambda q, k, v: flash_attention(**(arrays | {"q": q, "k": k, "v": v}), **options, implementation=implementation)
    )

    def past(q, k, v):
        o, lse = attend(q, k, v)
        return jnp.sum(jnp.sin(o[:, :now])) + jnp.sum(lse[:, :now])

    qkv = tuple(arrays[name] for name in "qkv")
    for name, gradient in zip("qkv", jax.grad(past, (0, 1, 2))(*qkv), strict=True):
        assert np.all(np.asarray(gradient[:, now:]) == 0), name
        assert np.all(np.any(np.asarray(gradient[:, : now - 1]) != 0, axis=(2, 3))), name
    for got, want in zip(attend(*(x.at[:, now:].add(3.0) for x in qkv)), attend(*qkv), strict=True):
        np.testing.assert_array_equal(got[:, :now], want[:, :now])


def test_rows_that_see_nothing():
    arrays, options, cotangents = make(rows="padded")
    for implementation in ("reference", "xla"):
        got = values_and_gradients(arrays, options, cotangents, implementation=implementation)
        nowhere = np.asarray(options["q_place"].segment == 0)
        assert np.all(np.asarray(got["lse"])[nowhere] == -np.inf)
        for name in ("o", "d_q", "d_k", "d_v"):
            assert np.all(np.asarray(got[name])[nowhere] == 0), name


def test_keys_may_stand_in_any_order():
    arrays, options, cotangents = make("window 9", rows="packed", rate=0.3, relative=5)
    order = jax.random.permutation(jax.random.key(1), T)
    back = jnp.argsort(order)
    shuffled = arrays | {name: arrays[name][:, order] for name in "kv"}
    place = jax.tree.map(lambda x: x[:, order], options["k_place"])
    want = values_and_gradients(arrays, options, cotangents)
    got = values_and_gradients(shuffled, options | {"k_place": place}, cotangents)
    assert_close(got | {name: got[name][:, back] for name in ("d_k", "d_v")}, want, 2e-6)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    n_tokens, rate = 512, 0.2
    q, k, v = (jnp.zeros((1, n_tokens, 2, 4)), jnp.zeros((1, n_tokens, 2, 4)), jnp.ones((1, n_tokens, 2, 1)))
    seeds = dropout(jax.random.key(0), rate, 1, 2)
    o = jax.jit(lambda q, k, v: flash_attention(q, k, v, Mask(causal=False), dropped=seeds).o)(q, k, v)
    kept = np.asarray(o[0, :, :, 0]) * (1 - rate)  # the share of keys that each query and head has kept
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / kept.size / n_tokens)
    assert 0.8 < kept.std() / np.sqrt(rate * (1 - rate) / n_tokens) < 1.2
    assert abs(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1]) < 4 / np.sqrt(n_tokens)


def test_composes_with_vmap_scan_and_remat():
    arrays, options, _ = make(rows="packed")

    def loss(q):
        attend = jax.checkpoint(lambda q: flash_attention(q, arrays["k"], arrays["v"], **options).o)
        return jnp.sum(jnp.sin(attend(q)))

    stack = jnp.stack([arrays["q"], 2 * arrays["q"]])
    gradient = jax.grad(loss)
    together = jax.jit(jax.vmap(gradient))(stack)
    _, in_turn = jax.jit(lambda stack: jax.lax.scan(lambda _, q: (None, gradient(q)), None, stack))(stack)
    assert relative_rms(together, in_turn) < 1e-6


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_block_is_passed_over_only_if_nothing_in_it_is_seen(mask, rows):
    _, options, _ = make(mask, rows)
    size = 6
    q, k = (
        jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -T % size))).reshape(B, -1, size), options[name])
        for name in ("q_place", "k_place")
    )
    n_blocks = q.index.shape[1]
    pairs = jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None], k)
    seen = sees(
        MASKS[mask], *(jax.tree.map(lambda x: jnp.broadcast_to(x, (B, n_blocks, n_blocks, size)), p) for p in pairs)
    )
    some = np.asarray(jnp.any(seen, axis=(-1, -2)))
    maybe = np.asarray(may_see(MASKS[mask], *map(extent, pairs)))
    assert not np.any(some & ~maybe)
    if rows == "one document" and not mask.startswith("prefix"):
        np.testing.assert_array_equal(maybe, some)


@pytest.mark.parametrize("n_distances", [None, 2048])
def test_never_builds_query_time_by_key_time(n_distances):
    """Nor query time by distance, with a relative position for every distance."""
    n_tokens, heads = 2048, 2
    arrays = dict.fromkeys("qkv", jax.ShapeDtypeStruct((1, n_tokens, heads, 16), jnp.float32))
    if n_distances is not None:
        arrays["relative"] = jax.ShapeDtypeStruct((heads, n_distances, 16), jnp.float32)

    def loss(arrays):
        o, lse = flash_attention(**arrays, block_q=64, block_k=64)
        return jnp.sum(o) + jnp.sum(lse)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(arrays).compile()
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[(\d+(?:,\d+)*)\]", compiled.as_text())]
    assert max(np.prod(shape) for shape in shapes) < n_tokens**2 // 8
    assert compiled.memory_analysis().temp_size_in_bytes < heads * n_tokens**2 * 4 // 4


ERRORS = {
    "k": ({"k": jnp.ones((B, T, 2, 9))}, r"needs k of shape \[B, S, G, K\], got q=.*; B and K are those of q"),
    "v": ({"v": jnp.ones((B, T, 4, 6))}, r"needs v of shape \[B, S, G, V\], got q=.*; B, S and G are those of k"),
    "heads": ({"q": jnp.ones((B, T, 3, 8))}, r"needs H divisible by G, got H=3, G=2; change the number of heads"),
    "place": (
        {"q_place": Place(jnp.ones((B, T - 1), int), jnp.ones((B, T), int))},
        r"needs q_place.index of shape \(2, 37\), got q_place.index=\(2, 36\); pass one number per token of q",
    ),
    "block": ({"block_k": 0}, r"needs block_k >= 1, got block_k=0"),
    "cap": ({"soft_cap": 0.0}, r"needs soft_cap > 0, got soft_cap=0.0; None is no cap"),
    "sinks": ({"sinks": jnp.ones(2)}, r"needs sinks of shape \(4,\), got sinks=\(2,\); pass one per query head"),
    "relative": ({"relative": jnp.ones((2, 3, 8))}, r"needs relative of shape \[4, L, 8\], got relative=\(2, 3, 8\)"),
    "ahead": (
        {"relative": jnp.ones((4, 3, 8)), "mask": Mask(causal=False)},
        r"needs a causal mask with relative positions, got Mask\(.*; they have no distances ahead",
    ),
    "implementation": (
        {"implementation": "cuda"},
        r"needs implementation to be one of reference, xla, .*, got .*'cuda'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.usefixtures("unchecked")
def test_errors(name):
    change, text = ERRORS[name]
    arrays, options, _ = make()
    with pytest.raises(ValueError, match="flash_attention: " + text):
        flash_attention(**arrays | options | change)

"""Blockwise attention against the equation, the equation against jax.nn, and the promises of both."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.layers.blockwise_attention import Place, _visible_blocks, blockwise_attention

B, T, K, V = 2, 37, 8, 6
ROWS = {
    "one document": [[1] * T, [1] * T],
    "packed": [[1] * 11 + [2] * 5 + [3] * 21, [4] * 36 + [9]],
    "padded": [[1] * 20 + [2] * 3 + [0] * 14, [0] * T],
}


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30)


def make(rows="one document", heads=4, groups=2, size=1.0, dtype=jnp.float32):
    """(q, k, v), the places of their tokens, and cotangents for o and lse."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = size * jax.random.normal(keys[0], (B, T, heads, K), dtype)
    k = jax.random.normal(keys[1], (B, T, groups, K), dtype)
    v = jax.random.normal(keys[2], (B, T, groups, V), dtype)
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    segment = jnp.array(ROWS[rows])
    place = {"q_index": index, "k_index": index, "q_segment": segment, "k_segment": segment}
    return (q, k, v), place, (jax.random.normal(keys[3], (B, T, heads, V)), jax.random.normal(keys[4], (B, T, heads)))


@partial(jax.jit, static_argnames=("window", "block_q", "block_k", "implementation"))
def values_and_gradients(inputs, place, cotangents, **options):
    """{o, lse, dq, dk, dv}."""
    (o, lse), pull = jax.vjp(lambda *x: tuple(blockwise_attention(*x, **place, **options)), *inputs)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *pull(cotangents)), strict=True))


def assert_close(got, want, tolerance):
    for name in want:
        finite = np.isfinite(np.asarray(want[name], np.float32))
        np.testing.assert_array_equal(np.isfinite(np.asarray(got[name], np.float32)), finite, err_msg=name)
        error = relative_rms(jnp.where(finite, got[name], 0), jnp.where(finite, want[name], 0))
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("blocks", [(8, 12), (128, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 9], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_match_the_equation(rows, window, blocks):
    case = make(rows)
    want = values_and_gradients(*case, window=window, implementation="reference")
    got = values_and_gradients(*case, window=window, block_q=blocks[0], block_k=blocks[1], implementation="xla")
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (6, 2)], ids=str)
def test_grouped_queries(heads, groups):
    case = make("packed", heads, groups)
    want = values_and_gradients(*case, implementation="reference")
    assert_close(values_and_gradients(*case, block_q=8, block_k=12), want, 2e-6)


def test_strong_logits():
    """Forty times the usual size: the softmax is nearly one-hot and exp would overflow without the running maximum."""
    case = make("packed", size=40.0)
    want = values_and_gradients(*case, implementation="reference")
    assert_close(values_and_gradients(*case, block_q=8, block_k=8), want, 1e-5)


def test_bf16_products_accumulate_in_fp32():
    inputs, place, cotangents = make("packed", dtype=jnp.bfloat16)
    want = values_and_gradients([x.astype(jnp.float32) for x in inputs], place, cotangents, implementation="reference")
    got = values_and_gradients(inputs, place, cotangents, block_q=8, block_k=8)
    assert got["o"].dtype == got["lse"].dtype == jnp.float32
    assert got["dq"].dtype == got["dk"].dtype == got["dv"].dtype == jnp.bfloat16
    assert_close({"lse": got["lse"]}, {"lse": want["lse"]}, 1e-5)  # exact products of bf16, sums in fp32
    assert_close(got, want, 2.0**-8)  # weights and cotangents are rounded once to bf16


@pytest.mark.parametrize("window", [None, 9], ids=lambda w: f"window {w}")
def test_the_equation_matches_jax_nn(window):
    inputs, place, (do, _) = make("packed")
    segment = place["q_segment"]
    same = (segment[:, :, None] == segment[:, None, :])[:, None]

    @jax.jit
    def theirs(q, k, v):
        past = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, local_window_size=past)

    v = jnp.pad(inputs[2], ((0, 0),) * 3 + ((0, K - V),))  # theirs needs V = K
    inputs, do = (*inputs[:2], v), jnp.pad(do, ((0, 0),) * 3 + ((0, K - V),))
    o, pull = jax.vjp(theirs, *inputs)
    want = dict(zip(("o", "dq", "dk", "dv"), (o, *pull(do)), strict=True))
    zero = jnp.zeros(do.shape[:-1])
    assert_close(values_and_gradients(inputs, place, (do, zero), window=window, implementation="reference"), want, 2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_past_does_not_depend_on_the_future(implementation):
    (q, k, v), place, _ = make()
    now = 17
    attend = jax.jit(lambda *x: blockwise_attention(*x, **place, block_q=8, block_k=8, implementation=implementation))

    def past(q, k, v):
        o, lse = attend(q, k, v)
        return jnp.sum(jnp.sin(o[:, :now])) + jnp.sum(lse[:, :now])

    for name, gradient in zip("qkv", jax.grad(past, (0, 1, 2))(q, k, v), strict=True):
        assert np.all(np.asarray(gradient[:, now:]) == 0), name
        assert np.all(np.any(np.asarray(gradient[:, : now - 1]) != 0, axis=(2, 3))), name
    for got, want in zip(attend(*(x.at[:, now:].add(3.0) for x in (q, k, v))), attend(q, k, v), strict=True):
        np.testing.assert_array_equal(got[:, :now], want[:, :now])


def test_rows_that_see_nothing():
    inputs, place, cotangents = make("padded")
    for implementation in ("reference", "xla"):
        got = values_and_gradients(inputs, place, cotangents, block_q=8, block_k=8, implementation=implementation)
        nowhere = np.asarray(place["q_segment"] == 0)
        assert np.all(np.asarray(got["lse"])[nowhere] == -np.inf)
        for name in ("o", "dq", "dk", "dv"):
            assert np.all(np.asarray(got[name])[nowhere] == 0), name


def test_keys_may_stand_in_any_order():
    (q, k, v), place, cotangents = make("packed")
    order = jax.random.permutation(jax.random.key(1), T)
    shuffled = dict(place, k_index=place["k_index"][:, order], k_segment=place["k_segment"][:, order])
    want = values_and_gradients((q, k, v), place, cotangents, window=9, block_q=8, block_k=8)
    got = values_and_gradients((q, k[:, order], v[:, order]), shuffled, cotangents, window=9, block_q=8, block_k=8)
    back = jnp.argsort(order)
    assert_close(dict(got, dk=got["dk"][:, back], dv=got["dv"][:, back]), want, 2e-6)


def test_composes_with_vmap_scan_and_remat():
    (q, k, v), place, _ = make("packed")

    def loss(q):
        attend = jax.checkpoint(lambda q: blockwise_attention(q, k, v, **place, block_q=16, block_k=16).o)
        return jnp.sum(jnp.sin(attend(q)))

    stack = jnp.stack([q, 2 * q])
    gradient = jax.grad(loss)
    together = jax.jit(jax.vmap(gradient))(stack)
    _, in_turn = jax.jit(lambda stack: jax.lax.scan(lambda _, q: (None, gradient(q)), None, stack))(stack)
    assert relative_rms(together, in_turn) < 1e-6


def test_visits_only_blocks_with_something_to_see():
    n_blocks, size = 8, 16
    index = jnp.arange(n_blocks * size).reshape(n_blocks, 1, size)
    one, two = jnp.ones_like(index), jnp.where(index < n_blocks * size // 2, 1, 2)

    def visits(segment, window):
        return _visible_blocks(Place(index, segment), Place(index, segment), window)[1].tolist()

    assert visits(one, None) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert visits(one, size) == [1, 2, 2, 2, 2, 2, 2, 2]
    assert visits(one, 1) == [1] * 8
    assert visits(two, None) == [1, 2, 3, 4, 1, 2, 3, 4]
    assert visits(jnp.zeros_like(one), None) == [0] * 8


def test_never_builds_query_time_by_key_time():
    n_tokens, heads = 2048, 2
    x = jax.ShapeDtypeStruct((1, n_tokens, heads, 16), jnp.float32)
    row = jax.ShapeDtypeStruct((1, n_tokens), jnp.int32)

    def loss(q, k, v, index, segment):
        place = {"q_index": index, "k_index": index, "q_segment": segment, "k_segment": segment}
        o, lse = blockwise_attention(q, k, v, **place)
        return jnp.sum(o) + jnp.sum(lse)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x, row, row).compile()
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[(\d+(?:,\d+)*)\]", compiled.as_text())]
    assert max(np.prod(shape) for shape in shapes) < n_tokens**2 // 8
    assert compiled.memory_analysis().temp_size_in_bytes < heads * n_tokens**2 * 4 // 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": jnp.ones((B, T, 2, K + 1))}, r"needs k of shape \[B, S, G, K\], got q=.*; B and K are those of q"),
        ({"v": jnp.ones((B, T, 4, V))}, r"needs v of shape \[B, S, G, V\], got q=.*; B, S and G are those of k"),
        ({"q": jnp.ones((B, T, 3, K))}, r"needs H divisible by G, got H=3, G=2; change the number of heads"),
        (
            {"q_index": jnp.ones((B, T - 1), int)},
            r"needs q_index to be integers of shape \(2, 37\), got q_index=int32",
        ),
        (
            {"k_segment": jnp.ones((B, 3), int)},
            r"needs k_segment to be integers of shape \(2, 37\), got .*per token of k",
        ),
        ({"window": 0}, r"needs window >= 1, got window=0; change it or leave it out"),
        ({"block_k": 0}, r"needs block_k >= 1, got block_k=0"),
        ({"implementation": "cuda"}, r"needs implementation 'reference', 'xla' or None, got implementation='cuda'"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_errors(change, text):
    (q, k, v), place, _ = make()
    arguments = dict(q=q, k=k, v=v, **place) | change
    with pytest.raises(ValueError, match="blockwise_attention: " + text):
        blockwise_attention(**arguments)

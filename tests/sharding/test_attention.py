"""Attention over a split sequence against one device: every scheme, layout and option, with all gradients."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    OPTIONS,
    assert_close,
    make,
    on_fake_tpu,
    pairwise,
    params,
    possible,
    races_found,
    values_and_gradients,
)

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.sharding import MeshConfig, constrain, local, make_mesh, named_sharding, use_mesh
from jaxmem.sharding.attention import Scheme, sharded_attention
from jaxmem.sharding.folds import sequence_axis
from jaxmem.sharding.layouts import lay_out, own_tokens, restore

T = 64
HEADS, TOKENS = ("batch", "time", None, None), ("batch", "time")
SCHEMES = {
    "ring": Scheme("ring"),
    "all_gather": Scheme("all_gather"),
    "halo": Scheme("halo"),
    "ring of 2s": Scheme("ring", ulysses=2),
    "ring of 4s": Scheme("ring", ulysses=4),
    "all_gather of 2s": Scheme("all_gather", ulysses=2),
    "halo of 2s": Scheme("halo", ulysses=2),
    "ulysses": Scheme(ulysses=8),
}


def can(case):
    by_halo = case["layout"] == "contiguous" and case["mask"] in ("window 1", "window 9", "chunks of 7")
    return possible(case) and (by_halo or not case["scheme"].startswith("halo"))


CASES = pairwise(
    OPTIONS
    | {"scheme": list(SCHEMES), "layout": ["contiguous", "zigzag", "striped"], "heads": [(8, 8), (8, 1), (8, 2)]},
    can,
)


def on_mesh(scheme, layout):
    """`flash_attention` for whole arrays, computed by the devices of the mesh in force."""

    def attend(q, k, v, *, mask, q_place, k_place, sinks=None, relative=None, dropped=None, **static):
        def of_device(q, k, v, q_place, k_place, sinks, relative, seeds):
            dropout = None if seeds is None else dataclasses.replace(dropped, seeds=seeds)
            return sharded_attention(
                q, k, v, mask, q_place=q_place, k_place=k_place, sinks=sinks, relative=relative, dropped=dropout,
                axis=sequence_axis(), scheme=scheme, **static,
            )  # fmt: skip

        heads, tokens = (lambda x: lay_out(x, layout, *HEADS)), (lambda x: lay_out(x, layout, *TOKENS))
        q_place, k_place = jax.tree.map(tokens, (q_place, k_place))
        seeds = None if dropped is None else constrain(dropped.seeds, "batch", None)
        arguments = (heads(q), heads(k), heads(v), q_place, k_place, sinks, relative, seeds)
        axes = (HEADS,) * 3 + (jax.tree.map(lambda _: TOKENS, q_place), jax.tree.map(lambda _: TOKENS, k_place))
        axes += tuple(
            None if x is None else whole for x, whole in zip(arguments[5:], ((None,), (None,) * 3, ("batch", None)))
        )
        o, lse = local(of_device, axes, Partial(HEADS, HEADS[:3]))(*arguments)
        return Partial(restore(o, layout, *HEADS), restore(lse, layout, *HEADS[:3]))

    return attend


def on_devices(n, order=slice(None)):
    return use_mesh(make_mesh(MeshConfig(data=1, seq=n), np.array(jax.devices()[:n])[order].tolist()))


def check(case, scheme, layout, n, order=slice(None), tolerance=5e-6):
    want = values_and_gradients(*case)
    with on_devices(n, order):
        got = jax.device_get(values_and_gradients(*case, attend=on_mesh(scheme, layout)))
    assert_close(got, want, tolerance)
    return got


@pytest.mark.parametrize("case", params(CASES, quick=10))
def test_eight_devices_are_one(case):
    case = dict(case)
    scheme, layout = SCHEMES[case.pop("scheme")], case.pop("layout")
    check(make(**case, n_tokens=T), scheme, layout, n=8)


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout",
    [pytest.param("contiguous", marks=pytest.mark.slow), pytest.param("zigzag", marks=pytest.mark.slow), "striped"],
)
def test_rings_of_any_size(n, layout):
    check(make("causal", "packed", heads=(4, 2), sinks=True, n_tokens=T), Scheme("ring"), layout, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, layout", [("ring", "zigzag"), ("all_gather", "striped"), ("ring of 2s", "contiguous")]
)
def test_the_kernels_of_tpus_on_four_devices(scheme, layout):
    """In interpret mode, with races detected."""
    case = make("causal", "packed", heads=(2, 1), blocks=(128, 128), n_tokens=4 * 128)
    want = values_and_gradients(*case)
    with on_devices(4), on_fake_tpu(dma_execution_mode="on_wait"):
        on_four = on_mesh(SCHEMES[scheme], layout)
        got = jax.device_get(values_and_gradients(*case, attend=on_four, implementation="pallas_tpu"))
    assert not races_found()
    assert_close(got, want, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ulysses", [2, 4])
def test_the_order_of_devices_does_not_matter(ulysses):
    """Not even for rounding."""
    case = make("causal", "packed", heads=(8, 2), n_tokens=T)
    got = [
        check(case, Scheme("ring", ulysses), "striped", 8, order) for order in (slice(None), [3, 0, 7, 5, 1, 6, 2, 4])
    ]
    jax.tree.map(np.testing.assert_array_equal, *got)


def test_the_past_does_not_depend_on_the_future():
    """Across devices too: gradients of exactly 0."""
    (arrays, options, _), now = make("causal", heads=(4, 2), n_tokens=T), 13
    attend = on_mesh(Scheme("ring"), "zigzag")

    @jax.jit
    def gradients(arrays):
        def past(arrays):
            o, lse = attend(**arrays, **options)
            is_past = jnp.arange(T)[:, None] < now
            return jnp.sum(jnp.where(is_past[..., None], jnp.sin(o), 0)) + jnp.sum(jnp.where(is_past, lse, 0))

        return jax.grad(past)(arrays)

    with on_devices(4):
        for name, gradient in jax.device_get(gradients(arrays)).items():
            assert np.all(gradient[:, now:] == 0), name
            assert np.all(np.any(gradient[:, : now - 1] != 0, axis=(2, 3))), name


def compiled(scheme, n, n_tokens, mask, blocks=128):
    """The training step of attention alone, on n devices."""
    x = [jax.ShapeDtypeStruct((1, n_tokens, heads, 16), jnp.float32) for heads in (8, 2, 2)]

    def loss(q, k, v):
        place = Place(*(constrain(jnp.broadcast_to(row, (1, n_tokens)), *TOKENS) for row in (jnp.arange(n_tokens), 1)))
        q, k, v = (constrain(x, *HEADS) for x in (q, k, v))
        attend = lambda q, k, v, place: sharded_attention(
            q,
            k,
            v,
            mask,
            q_place=place,
            k_place=place,
            axis=sequence_axis(),
            scheme=scheme,
            block_q=blocks,
            block_k=blocks,
        )
        axes = (HEADS, HEADS, HEADS, Place(TOKENS, TOKENS))
        o, lse = local(attend, axes, Partial(HEADS, HEADS[:3]))(q, k, v, place)
        return jnp.sum(o**2) + jnp.sum(lse)

    with on_devices(n):
        split = named_sharding(jax.sharding.get_mesh(), *HEADS)
        x = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split) for a in x]
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*x).compile()


def exchanges(program) -> Counter:
    """How often each operation moves an array of keys' size, turns of loops counted."""
    text = program.as_text()
    turns = {body: int(n) for body, n in re.findall(r'body=%([\w.-]+).*?"known_trip_count":\{"n":"(\d+)"', text)}
    kinds = "collective-permute|all-reduce|all-gather|reduce-scatter|all-to-all"
    counted = Counter()
    for computation in text.split("\n\n"):
        name = re.match(r"\s*%?([\w.-]+)", computation)
        for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", computation):
            if re.search(r"f32\[\d+,\d+,\d+,\d+", shapes):
                counted[kind] += turns.get(name[1], 1)
    return counted


@pytest.mark.parametrize("n", [4, 8])
def test_what_a_ring_exchanges(n):
    """Keys and values n - 1 times forward and n - 1 times backward, their gradients as one array n times, nothing else."""
    assert exchanges(compiled(Scheme("ring"), n, 1024, Mask())) == {"collective-permute": 2 * (n - 1) + 2 * (n - 1) + n}


def test_what_the_others_exchange():
    gathered = exchanges(compiled(Scheme("all_gather"), 4, 1024, Mask()))
    forward, backward = {"all-gather": 2}, {"all-gather": 2, "reduce-scatter": 2}
    assert gathered in (backward, Counter(forward) + Counter(backward))  # before jax 0.11, XLA gathers once on a CPU
    halo = exchanges(compiled(Scheme("halo"), 4, 1024, Mask(window=100)))
    assert halo in ({"collective-permute": 4}, {"collective-permute": 6})  # and so it passes keys and values on
    swapped = exchanges(compiled(Scheme(ulysses=2), 2, 1024, Mask()))
    assert set(swapped) == {"all-to-all"} and swapped["all-to-all"] <= 10  # q, k, v, o and lse, and their gradients


@pytest.mark.slow
def test_memory_per_device_does_not_grow_with_devices():
    few, many = (compiled(Scheme("ring"), n, 256 * n, Mask()).memory_analysis().temp_size_in_bytes for n in (4, 8))
    assert many < 1.1 * few


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_layouts_and_back(layout, n):
    n_tokens = 2 * n * n
    x = np.arange(n_tokens)[None] + np.array([[0], [100]])
    with on_devices(n):
        laid = jax.jit(lambda x: lay_out(x, layout, *TOKENS))(x)
        own = local(lambda: own_tokens(layout, 2 * n, sequence_axis(any_layout=True))[None], (), (None, "time"))
        token, back = jax.jit(own)(), jax.jit(lambda x: restore(x, layout, *TOKENS))(laid)
    laid, token, back = jax.device_get((laid, token, back))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(laid, x[:, token[0]])
    pieces = np.split(np.arange(n_tokens), 2 * n)
    want = {
        "contiguous": np.arange(n_tokens),
        "zigzag": np.concatenate([np.concatenate([pieces[d], pieces[-1 - d]]) for d in range(n)]),
        "striped": np.concatenate([np.arange(n_tokens)[d::n] for d in range(n)]),
    }
    if n > 1:
        np.testing.assert_array_equal(laid, x[:, want[layout]])


ERRORS = {
    "heads": (
        Scheme("ring", 4),
        Mask(),
        {"heads": (2, 2)},
        r"needs heads that ulysses=4 divides, got 2 heads .*; use a ring",
    ),
    "devices": (
        Scheme("ring", 3),
        Mask(),
        {},
        r"needs ulysses to divide the 4 devices .* 'seq', got ulysses=3; change it",
    ),
    "halo": (
        Scheme("halo"),
        Mask(),
        {},
        r"needs a causal mask with a window or chunk.* for a halo, got .*; use a ring",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    scheme, mask, changes, text = ERRORS[name]
    arrays, options, _ = make(**changes, n_tokens=T)
    with on_devices(4), pytest.raises(ValueError, match=text):
        on_mesh(scheme, "contiguous")(**arrays, **options | {"mask": mask})


@pytest.mark.usefixtures("unchecked")
def test_errors_of_values():
    text = r"needs a number of tokens that 8 divides, for zigzag over 4 devices, got 20; pad with 4 tokens of segment 0"
    with on_devices(4), pytest.raises(ValueError, match=text):
        lay_out(np.ones((1, 20)), "zigzag", *TOKENS)
    arrays, options, _ = make(n_tokens=T)
    with on_devices(4), pytest.raises(NotImplementedError, match=r"needs an implementation that merges blocks"):
        on_mesh(Scheme(), "contiguous")(**arrays, **options, implementation="reference")

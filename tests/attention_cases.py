"""Cases of attention for all its tests: arrays, options, and which of their combinations are worth running."""

import functools
import itertools
import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.flash_attention import dropout, flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place

TRITON = "__gpu$xla.gpu.triton"
CUDNN = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
"""Calls in programs for GPUs."""

B, T = 2, 37
ROWS = {
    "one document": lambda n: [[1] * n, [1] * n],
    "packed": lambda n: [[1] * 11 + [2] * 5 + [3] * (n - 16), [4] * (n - 1) + [9]],
    "padded": lambda n: [[1] * 20 + [2] * 3 + [0] * (n - 23), [0] * n],
}
MASKS = {
    "full": Mask(causal=False),
    "causal": Mask(),
    "window 1": Mask(window=1),
    "window 9": Mask(window=9),
    "both ways 5": Mask(causal=False, window=5),
    "chunks of 7": Mask(chunk=7),
    "prefix": Mask(),
    "prefix in 9": Mask(window=9),
}
OPTIONS = {
    "mask": list(MASKS),
    "rows": list(ROWS),
    "heads": [(4, 4), (4, 1), (6, 2)],
    "widths": [(8, 8), (8, 6), (12, 8)],
    "soft_cap": [None, 2.0],
    "sinks": [False, True],
    "relative": [None, 5, 64],
    "rate": [None, 0.3],
    "blocks": [(8, 12), (16, 8), (128, 128)],
}


def possible(case: dict) -> bool:
    return case["relative"] is None or case["mask"] not in ("full", "both ways 5", "prefix", "prefix in 9")


def pairwise(options: dict[str, list], possible: Callable[[dict], bool] = possible) -> list[dict]:
    """Cases in which every two values of two options meet that can, greedily from random ones."""
    rng = random.Random(0)
    pairs = lambda case: set(itertools.combinations(case.items(), 2))
    together = lambda a, b: itertools.product(((a, x) for x in options[a]), ((b, y) for y in options[b]))
    draw = lambda first: {name: rng.choice(values) for name, values in options.items()} | dict(first)
    with_pair = lambda pair, n: list(filter(possible, (draw(pair) for _ in range(n))))
    wanted = {pair for names in itertools.combinations(options, 2) for pair in together(*names)}
    wanted = {pair for pair in sorted(wanted, key=str) if with_pair(pair, 100)}
    cases = []
    while wanted:
        cases.append(max(with_pair(min(wanted, key=str), 400), key=lambda case: len(pairs(case) & wanted)))
        wanted -= pairs(cases[-1])
    return cases


def params(cases: list[dict], quick: int) -> list:
    """One in `quick` of them; the others are among the slow proofs, every second of them full."""
    name = lambda case: "-".join(f"{value}" for value in case.values())
    mark = lambda i: () if i % quick == 0 else (pytest.mark.slow, *[pytest.mark.full] * (i % 2))
    return [pytest.param(case, id=name(case), marks=mark(i)) for i, case in enumerate(cases)]


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30)


def make(
    mask="causal", rows="one document", heads=(4, 2), widths=(8, 6), soft_cap=None, sinks=False, relative=None, rate=None,
    blocks=(8, 12), size=1.0, dtype=jnp.float32, n_tokens=T,
):  # fmt: skip
    """Differentiable arrays, options, and cotangents for o and lse."""
    (n_heads, groups), (key, value) = heads, widths
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, dtype)
    tokens = B, n_tokens
    arrays = {
        "q": size * normal(*tokens, n_heads, key),
        "k": normal(*tokens, groups, key),
        "v": normal(*tokens, groups, value),
    }
    cotangents = normal(*tokens, n_heads, value).astype(jnp.float32), normal(*tokens, n_heads).astype(jnp.float32)
    if sinks:
        arrays["sinks"] = normal(n_heads)
    if relative is not None:
        arrays["relative"] = normal(n_heads, relative, key)
    index, segment = jnp.broadcast_to(jnp.arange(n_tokens), tokens), jnp.array(ROWS[rows](n_tokens))
    options = {
        "mask": MASKS[mask],
        "q_place": Place(index, segment),
        "k_place": Place(index, segment, index % 11 < 4 if mask.startswith("prefix") else None),
        "soft_cap": soft_cap,
        "dropped": None if rate is None else dropout(jax.random.key(7), rate, B, n_heads),
        "block_q": blocks[0],
        "block_k": blocks[1],
    }
    return arrays, options, cotangents


def values_and_gradients(arrays, options, cotangents, attend: Callable = flash_attention, **static):
    """{o, lse, d_q, d_k, ...} of `attend`, called as `flash_attention` is."""
    placed = {name: options[name] for name in ("q_place", "k_place", "dropped")}
    attend = functools.partial(
        attend, **{name: value for name, value in options.items() if name not in placed} | static
    )

    @jax.jit
    def run(arrays, placed, cotangents):
        (o, lse), pull = jax.vjp(lambda arrays: attend(**arrays, **placed), arrays)
        return {"o": o, "lse": lse} | {f"d_{name}": d for name, d in pull(Partial(*cotangents))[0].items()}

    return run(arrays, placed, cotangents)


def assert_close(got, want, tolerance):
    for name in want:
        finite = np.isfinite(np.asarray(want[name], np.float32))
        np.testing.assert_array_equal(np.isfinite(np.asarray(got[name], np.float32)), finite, err_msg=name)
        error = relative_rms(jnp.where(finite, got[name], 0), jnp.where(finite, want[name], 0))
        assert error < tolerance, f"{name}: {error}"


def name_of(case: dict) -> str:
    return " ".join(map(str, case.values()))


def against_the_equation(case: dict, dtype, implementation: str | None, n_tokens: int = 300, **changes):
    """The operation with all its gradients, compiled and run, against fp32 on the same device."""
    arrays, options, cotangents = make(**case, dtype=dtype, n_tokens=n_tokens, blocks=(None, None))
    options |= changes
    got = values_and_gradients(arrays, options, cotangents, implementation=implementation)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = values_and_gradients(exact, options, cotangents, implementation="reference")
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 2.0**-6)


def on_fake_tpu(**parameters):
    """Runs the kernels of TPUs on CPU devices, with races detected."""
    pltpu.reset_tpu_interpret_mode_state()
    parameters = {"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "raise"} | parameters
    if (
        "on_race" in pltpu.InterpretParams.__dataclass_fields__
    ):  # from jax 0.11 on: as before, `races_found` tells of them
        parameters = {"on_race": "warn"} | parameters
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**parameters))


def lowered_for_a_gpu(f, *arrays) -> str:
    """The program of a jitted function for an NVIDIA GPU that is not here; newer versions of Triton ask a mesh for it."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON, *CUDNN)]
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        return jax.export.export(f, platforms=["cuda"], disabled_checks=checks)(*arrays).mlir_module()


def races_found() -> bool:
    """By the kernels that ran last."""
    return interpret_pallas_call.races.races_found

"""Kernels that read tables, without their devices: gradients of any order, races, ids of no row, and what is moved."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import on_fake_tpu, races_found, relative_rms
from jax.experimental.pallas import tpu as pltpu

from jaxmem.pallas_kernels import memory_lookup_gpu, memory_lookup_tpu
from jaxmem.pallas_kernels.memory_lookup import bag, dots, row_gradient, sum_rows

M, T, K = 33, 11, 13
NAMES = ("pallas_tpu", "pallas_gpu")


@pytest.fixture(params=NAMES)
def implementation(request, monkeypatch):
    """With the kernel on CPU devices; those of TPUs with races detected, and none found."""
    for name in ("bag", "dots", "add_sorted"):
        interpreted = functools.partial(getattr(memory_lookup_gpu, name), interpret=True)
        monkeypatch.setattr(memory_lookup_gpu, name, interpreted)
    with on_fake_tpu() if request.param == "pallas_tpu" else contextlib.nullcontext():
        yield request.param
        assert request.param == "pallas_gpu" or not races_found()


def draw(width=128, dtype=jnp.float32):
    """A table, ids of which some are no row's, weights, and a vector per token."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)
    ids = jnp.asarray(rng.integers(-1, M + 1, (T, K)), jnp.int32)
    return normal(M, width, dtype=dtype), ids, normal(T, K), normal(T, width)


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and relative_rms(a, b) < tolerance


def all_of(implementation, values, ids, weights, y):
    """Each operation, its gradients, and theirs."""
    of = functools.partial
    functions = (
        of(lambda v, w, y: bag(v, ids, w, implementation=implementation)),
        of(lambda v, w, y: dots(v, ids, y, implementation=implementation)),
        of(lambda v, w, y: sum_rows(ids, w, y, M, implementation=implementation)),
    )

    def first(f, *arrays):
        return jax.grad(lambda *arrays: jnp.sum(jnp.sin(f(*arrays))), (0, 1, 2))(*arrays)

    def second(f, *arrays):
        bent = lambda *arrays: sum(jnp.sum(jnp.cos(g.astype(jnp.float32))) for g in first(f, *arrays))
        return jax.grad(bent, (0, 1, 2))(*arrays)

    return [(f(values, weights, y), first(f, values, weights, y), second(f, values, weights, y)) for f in functions]


def test_reads_and_the_gradient_of_weights_are_the_equations(implementation):
    def run(name):
        def both(values, ids, weights, y):
            read, pull = jax.vjp(lambda weights: bag(values, ids, weights, implementation=name), weights)
            return read, pull(y)

        return jax.jit(both)(*draw())

    assert_close(run(implementation), run("reference"))


@pytest.mark.slow
def test_all_and_their_gradients_are_the_equations(implementation):
    values, ids, weights, y = draw()
    run = lambda name: jax.jit(functools.partial(all_of, name))(values, ids, weights, y)
    assert_close(run(implementation), run("reference"))


@pytest.mark.parametrize("width, dtype", [(24, jnp.float32), (300, jnp.bfloat16), (256, jnp.float16)])
def test_gpus_read_any_width_and_16_bits(width, dtype, monkeypatch):
    for name in ("bag", "dots"):
        interpreted = functools.partial(getattr(memory_lookup_gpu, name), interpret=True)
        monkeypatch.setattr(memory_lookup_gpu, name, interpreted)
    values, ids, weights, y = draw(width, dtype)
    run = lambda name: jax.jit(
        lambda v, i, w, y: (bag(v, i, w, implementation=name), dots(v, i, y, implementation=name))
    )(values, ids, weights, y)
    assert_close(run("pallas_gpu"), run("reference"))


def test_gradients_of_rows_by_the_kernel(monkeypatch):
    """As in programs for GPUs."""
    _, ids, weights, y = draw(20)
    run = lambda: jax.jit(lambda i, w, y: row_gradient(i, w, y, M, M))(ids, weights, y)
    want = run()
    kernel = functools.partial(memory_lookup_gpu.add_sorted, interpret=True)
    monkeypatch.setattr("jaxmem.pallas_kernels.memory_lookup._add_sorted", kernel)
    jax.clear_caches()
    assert_close(run(), want)


@pytest.mark.parametrize("name", [None, "pallas_gpu"])  # TPUs' interpreter has no loops around kernels
def test_under_vmap(name, monkeypatch):
    """Stacked tables are read one after the other."""
    monkeypatch.setattr(memory_lookup_gpu, "bag", functools.partial(memory_lookup_gpu.bag, interpret=True))
    values, ids, weights, _ = draw(256)
    stack = lambda x: jnp.stack([x, x[::-1]])
    got = jax.jit(jax.vmap(functools.partial(bag, implementation=name)))(stack(values), stack(ids), stack(weights))
    assert_close(got[0], jax.jit(bag)(values, ids, weights))


def test_a_copy_for_each_row_and_no_other(monkeypatch):
    """Counted as they start; with ids, weights and results 1.2 times the rows' bytes at most."""
    started = []

    class Counted:
        def __init__(self, source, target, arrived):
            self.copy = make(source, target, arrived)
            self.n_bytes = int(np.prod(source.shape)) * source.dtype.itemsize

        def start(self):
            jax.debug.callback(lambda: started.append(self.n_bytes))
            self.copy.start()

        def wait(self):
            self.copy.wait()

    make = pltpu.make_async_copy
    monkeypatch.setattr(memory_lookup_tpu.pltpu, "make_async_copy", Counted)
    values, ids, weights, _ = draw()
    with on_fake_tpu(detect_races=False):
        jax.block_until_ready(jax.jit(memory_lookup_tpu.bag)(values, ids, weights))
        jax.effects_barrier()
    n_real = int(np.sum((ids >= 0) & (ids < M)))
    assert 0 < n_real < ids.size and sum(started) == n_real * 128 * 4 and len(started) == n_real
    for width, k in ((256, 32), (1024, 128)):
        assert memory_lookup_tpu.moved_bytes(4096, k, width, 4096 * k) < 1.2 * 4096 * k * width * 4


def test_a_kernel_that_does_not_wait_is_caught(monkeypatch):
    """A standing control of the detector."""

    class Hasty:
        def __init__(self, *arguments):
            self.copy = pltpu_copy(*arguments)

        def start(self):
            self.copy.start()

        def wait(self):
            pass

    pltpu_copy = pltpu.make_async_copy
    monkeypatch.setattr(memory_lookup_tpu.pltpu, "make_async_copy", Hasty)
    values, ids, weights, _ = draw()
    with on_fake_tpu(dma_execution_mode="eager"):
        jax.block_until_ready(jax.jit(memory_lookup_tpu.bag)(values, ids, weights))
        assert races_found()


def test_errors():
    values, ids, weights, y = draw(24)
    with pytest.raises(
        NotImplementedError, match="bag: pallas_tpu needs rows of a multiple of 128 numbers, got V=24; use"
    ):
        bag(values, ids, weights, implementation="pallas_tpu")
    values, ids, weights, y = draw(128, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="dots: pallas_tpu needs tables of fp32, got values of bfloat16; use"):
        dots(values, ids, y, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="bag: pallas_gpu needs tables of float32, bfloat16 or float16, got"):
        bag(values.astype(jnp.float8_e4m3fn), ids, weights, implementation="pallas_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [128, 300])
def test_on_a_gpu(width, dtype):
    values, ids, weights, y = draw(width, dtype)
    run = lambda name: jax.jit(functools.partial(all_of, name))(values, ids, weights, y)
    got = run(None)
    assert_close(got, run("reference"), 1e-5 if dtype == jnp.float32 else 1e-2)
    for a, b in zip(jax.tree.leaves(run(None)), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)

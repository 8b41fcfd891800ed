"""Tables over devices: reads, gradients and gradients of rows are those of one device, and the table does not move."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.pallas_kernels import memory_lookup
from jaxmem.planning.replica_groups import is_alone
from jaxmem.sharding import MeshConfig, constrain, make_mesh, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.sharding.tables import CHOICES, TABLE, X, bag, dots, gradient_of_rows

B, T, H, K, M, V = 4, 4, 2, 3, 16, 8

ROWS = {
    "rows over data": MeshConfig(data=4, table_rows=("data",)),
    "rows over fsdp, seq": MeshConfig(data=1, fsdp=2, seq=2, table_rows=("fsdp", "seq"), table_columns=()),
    "rows over seq, data": MeshConfig(data=2, seq=4, table_rows=("seq", "data"), table_columns=()),
    "rows over model": MeshConfig(data=2, model=2, table_rows=("model",)),
}
COLUMNS = {
    "columns over fsdp": MeshConfig(data=2, fsdp=2, seq=2),
    "columns over data, fsdp": MeshConfig(data=2, fsdp=2, model=2, table_columns=("data", "fsdp")),
    "columns over seq, fsdp": MeshConfig(data=2, fsdp=2, seq=2, table_columns=("seq", "fsdp")),
    "columns over model": MeshConfig(data=2, model=2, table_columns=("model",)),
    "whole tables": MeshConfig(data=2, fsdp=2, model=2, table_columns=()),
}
BOTH = {
    "rows over data, columns over fsdp": MeshConfig(data=2, fsdp=2, seq=2, table_rows=("data",)),
    "rows over fsdp, columns over data": MeshConfig(data=2, fsdp=2, table_rows=("fsdp",), table_columns=("data",)),
    "rows over seq, columns over model": MeshConfig(
        data=2, seq=2, model=2, table_rows=("seq",), table_columns=("model",)
    ),
    "rows over model, columns over fsdp, seq": MeshConfig(
        data=1, fsdp=2, seq=2, model=2, table_rows=("model",), table_columns=("fsdp", "seq")
    ),
}
MESHES = ROWS | COLUMNS | BOTH
QUICK = ("rows over data, columns over fsdp",)
every_mesh = pytest.mark.parametrize(
    "mesh", [pytest.param(m, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, m in MESHES.items()]
)


def draw():
    rng = np.random.default_rng(0)
    values, y = rng.normal(size=(M, V)).astype(np.float32), rng.normal(size=(B, T, V)).astype(np.float32)
    ids = rng.integers(-1, M + 1, (B, T, H, K), dtype=np.int32)  # -1 and M are no row's
    return values, ids, rng.normal(size=ids.shape).astype(np.float32), y


def on(config):
    return use_mesh(make_mesh(config, jax.devices()[: math.prod(config.sizes)]), rules_of(config))


def one_device():
    """Reads and gradients from the operations of one device."""
    values, ids, weights, y = draw()
    flat = lambda x: x.reshape(B, T, H * K)

    @jax.jit
    def run(values, ids, weights, y):
        out, pull = jax.vjp(lambda v, w: memory_lookup.bag(v, flat(ids), flat(w)), values, weights)
        d, pull_d = jax.vjp(lambda v, y: memory_lookup.dots(v, flat(ids), y).reshape(ids.shape), values, y)
        return out, pull(y), d, pull_d(weights)

    return run(values, ids, weights, y)


@jax.jit
def run(values, ids, weights, y):
    values, ids, weights = constrain(values, *TABLE), constrain(ids, *CHOICES), constrain(weights, *CHOICES)
    y = constrain(y, *X)
    out, pull = jax.vjp(lambda v, w: bag(v, ids, w), values, weights)
    d, pull_d = jax.vjp(lambda v, y: dots(v, ids, y), values, y)
    return out, pull(y), d, pull_d(weights)


@pytest.fixture(scope="module")
def want():
    return jax.device_get(one_device())


@every_mesh
def test_reads_and_gradients_are_those_of_one_device(mesh, want):
    with on(mesh):
        got = jax.device_get(run(*draw()))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_mesh
def test_gradients_of_rows_are_the_tables_gradient(mesh, want):
    """Of two layers' reads at once, one of which is the other's with every weight twice."""
    _, ids, weights, y = draw()

    @jax.jit
    def find(ids, weights, y):
        twice = lambda x, factor: jnp.stack([x, factor * x])
        ids, weights, y = (constrain(a, None, *axes) for a, axes in zip(
            (twice(ids, 1), twice(weights, 2), twice(y, 1)), (CHOICES, CHOICES, X), strict=True))  # fmt: skip
        return gradient_of_rows(ids, weights, y, M, M)

    with on(mesh):
        rows, sums, counts = jax.device_get(find(ids, weights, y))
    n = math.prod(getattr(mesh, axis) for axis in mesh.table_rows)
    dense, hits, own = np.zeros((M, V), np.float32), np.zeros(M, int), M // n
    for owner, (r, s, c) in enumerate(zip(*(np.split(a, n) for a in (rows, sums, counts)), strict=True)):
        real = r < own
        assert np.all(np.diff(r[real]) > 0) and not np.any(s[~real])
        dense[own * owner + r[real]], hits[own * owner + r[real]] = s[real], c[real]
    np.testing.assert_allclose(dense, 3 * want[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hits, 2 * np.bincount(ids[(ids >= 0) & (ids < M)], minlength=M))


EXCHANGES = {
    "rows over data": {"all-gather": 2, "reduce-scatter": 1},
    "columns over fsdp": {"all-gather": 2, "all-to-all": 1},
    "rows over data, columns over fsdp": {"all-gather": 4, "reduce-scatter": 1, "all-to-all": 1},
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_what_is_exchanged(name):
    """Ids and weights go to each kind of owner and outputs come home; nothing as large as the table is exchanged."""
    with on(MESHES[name]):

        @jax.jit
        def read(values, ids, weights):
            values, ids, weights = constrain(values, *TABLE), constrain(ids, *CHOICES), constrain(weights, *CHOICES)
            return bag(values, ids, weights)

        values, ids, weights, _ = draw()
        given = (values, TABLE), (ids, CHOICES), (weights, CHOICES)
        places = [constrain(jnp.asarray(x), *axes) for x, axes in given]
        text = read.lower(*places).compile().as_text()
    pattern = r"= .*? (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    kinds = [kind for line in text.splitlines() if not is_alone(line) for kind in re.findall(pattern, line)]
    assert {kind: kinds.count(kind) for kind in kinds} == EXCHANGES[name], kinds


def test_errors():
    with pytest.raises(
        ValueError, match=r"mesh: needs tables split over axes of data, fsdp, .* got table_rows=\('rows',\)"
    ):
        MeshConfig(table_rows=("rows",))
    with pytest.raises(
        ValueError, match="each by rows or by columns, got table_rows=.'fsdp',., table_columns=.'fsdp',.; change"
    ):
        MeshConfig(table_rows=("fsdp",))
    with (
        on(MeshConfig(data=4, table_rows=("data",))),
        pytest.raises(ValueError, match="needs 'slots' divisible by the 4 devices of mesh axes data, got slots=18"),
    ):
        constrain(jnp.zeros((18, 8)), *TABLE)

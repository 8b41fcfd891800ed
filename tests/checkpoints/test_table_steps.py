"""Checkpoints of tables: the rows touched and no others, on any mesh, through kills at any moment."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.checkpoints.reading import CheckpointError
from jaxmem.checkpoints.table_rows import CHUNK_BYTES, RowArray
from jaxmem.checkpoints.table_steps import load_table, none_touched, save_touched, touch
from jaxmem.checkpoints.table_store import TableStore
from jaxmem.pallas_kernels.memory_lookup import row_gradient
from jaxmem.training.lazy_adam import LazyAdamState, apply_rows, lazy_adam

M, V = 4096, 16
KILLS = int(os.environ.get("JAXMEM_KILLS", "12"))
LIKE = {name: jax.ShapeDtypeStruct((M, V), jnp.float32) for name in ("values", "mu", "nu")}
OPTIMIZER = lazy_adam(0.1)


def new(directory) -> TableStore:
    return TableStore.create(directory, M, {"values": RowArray(V, stddev=0.25), "mu": RowArray(V), "nu": RowArray(V)})


@jax.jit
def train_step(tables, count, touched, step):
    """One of lazy Adam, for rows and gradients that are functions of the step."""
    key = jax.random.key(step)
    ids, weights = jax.random.randint(key, (8, 4), 0, M), jnp.ones((8, 4))
    gradient = row_gradient(ids, weights, jax.random.normal(key, (8, V)), M, 32)
    state = LazyAdamState(count, tables["mu"], tables["nu"])
    updates, state = OPTIMIZER.update(gradient, state)
    values = apply_rows(tables["values"], updates)
    return {"values": values, "mu": state.mu, "nu": state.nu}, state.count, touch(touched, gradient.rows)


def trained(tables, first: int, last: int, store: TableStore | None = None, every: int = 5, **options):
    """Steps first + 1 .. last, each `every` of them saved."""
    touched, count = none_touched(M), jnp.int32(first)
    for step in range(first + 1, last + 1):
        tables, count, touched = train_step(tables, count, touched, step)
        if store and step % every == 0:
            save_touched(store, step, tables, touched, **options)
            touched = none_touched(M)
    return tables


def assert_same(found, expected):
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_run_goes_on_from_any_step_as_if_never_stopped(tmp_path):
    store = new(tmp_path / "table")
    start = load_table(store, None, LIKE)
    whole = trained(start, 0, 20, store)
    for step in (5, 15, 20):
        assert_same(load_table(store, step, LIKE), trained(start, 0, step))
    store = TableStore(tmp_path / "table")
    store.rewind(10)
    assert_same(trained(load_table(store, 10, LIKE), 10, 20, store), whole)
    assert store.steps() == [5, 10, 15, 20]
    assert_same(load_table(store, None, LIKE), whole)


def test_a_save_writes_the_touched_rows_whatever_the_table(tmp_path):
    written = {}
    for n_rows in (10**4, 10**6):
        store = TableStore.create(tmp_path / str(n_rows), n_rows, {"values": RowArray(1024, "bfloat16")})
        table = np.broadcast_to(np.ones(1024, jnp.bfloat16), (n_rows, 1024))
        table = jnp.asarray(table) if n_rows == 10**4 else table
        for n in (20, 80):
            rows = np.random.default_rng(n).permutation(n_rows)[:n]
            before = store.info().disk_bytes
            assert save_touched(store, n, {"values": table}, touch(none_touched(n_rows), rows)) == n
            written[n_rows, n] = store.info().disk_bytes - before
    for n in (20, 80):
        assert 1 <= written[10**4, n] / (n * CHUNK_BYTES) < 1.25, written
        assert 0.9 < written[10**6, n] / written[10**4, n] < 1.1, written


def test_touched_rows_are_those_of_gradients():
    gradient = row_gradient(jnp.array([[3, 9, 3]]), jnp.ones((1, 3)), jnp.ones((1, 2)), 10, 5)
    assert np.flatnonzero(touch(none_touched(10), gradient.rows)).tolist() == [3, 9]
    assert np.flatnonzero(touch(none_touched(10), jnp.array([-1, 10, 0]))).tolist() == [0]


@pytest.mark.parametrize("rows", [jnp.array([True, False, True]), jnp.array([1.0])])
def test_touched_rows_are_numbers(rows):
    with pytest.raises(
        ValueError, match="needs the numbers of touched rows as integers, got (bool|float32); for a mask"
    ):
        touch(none_touched(3), rows)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_from_any_mesh_to_any_mesh(axis_type, tmp_path):
    mesh = lambda *shape: jax.make_mesh(shape, ("fsdp", "model"), axis_types=(axis_type,) * 2)
    placed = lambda mesh, spec: {
        n: jax.ShapeDtypeStruct((M, V), x.dtype, sharding=NamedSharding(mesh, spec)) for n, x in LIKE.items()
    }
    store = new(tmp_path / "table")
    tables = load_table(store, None, LIKE)
    on_mesh = {n: jax.device_put(x, NamedSharding(mesh(4, 2), P("fsdp", "model"))) for n, x in tables.items()}
    changed, _, touched = train_step(tables, jnp.int32(0), none_touched(M), 1)
    on_mesh = {n: jax.device_put(x, on_mesh[n].sharding) for n, x in changed.items()}
    save_touched(store, 1, on_mesh, touched)
    for shape, spec in [((2, 4), P("model", "fsdp")), ((8, 1), P(None, "fsdp")), ((2, 4), P("fsdp")), ((8, 1), P())]:
        like = placed(mesh(*shape), spec)
        found = load_table(store, 1, like)
        assert all(found[n].sharding.is_equivalent_to(like[n].sharding, 2) for n in like)
        assert_same(found, changed)


def test_each_device_reads_its_rows_alone(tmp_path, monkeypatch):
    store, read = new(tmp_path / "table"), []
    monkeypatch.setattr(
        store,
        "read",
        lambda name, rows, columns, step: read.append((rows, columns)) or np.zeros((M // 4, V // 2), np.float32),
    )
    sharding = NamedSharding(jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2), P("a", "b"))
    load_table(store, None, {"mu": jax.ShapeDtypeStruct((M, V), jnp.float32, sharding=sharding)})
    assert sorted((r.start, r.stop, c.start, c.stop) for r, c in read) == [
        (i * M // 4, (i + 1) * M // 4, j * V // 2, (j + 1) * V // 2) for i in range(4) for j in range(2)
    ]


def test_the_last_steps_are_kept(tmp_path):
    store = new(tmp_path / "table")
    trained(load_table(store, None, LIKE), 0, 20, store, every=2, keep_last=3)
    assert TableStore(store.directory).steps() == [16, 18, 20]


@pytest.mark.parametrize(
    "tables, touched, step, keep_last, message",
    [
        ({"values": jnp.zeros((M, V + 1))}, M, 6, None, r"needs values as stored, float32\[rows, 16\], got values=float32\["),
        ({"values": jnp.zeros((M, V), jnp.bfloat16)}, M, 6, None, r"got values=bfloat16\[4096, 16\]; change it, or make "),
        ({"values": jnp.zeros((9, V))}, 9, 6, None, "needs as many rows as stored, 4096, got n_rows=9; grow the smaller"),
        ({"values": jnp.zeros((M, V))}, 9, 6, None, r"needs touched for its 4096 rows, got \(9,\); use none_touched"),
        ({"values": jnp.zeros((M, V))}, M, 5, None, "needs a step after 5, the last saved, got step=5; rewind first"),
        ({"values": jnp.zeros((M, V))}, M, 6, 0, "needs keep_last of at least 1, got keep_last=0; raise it"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_written(tables, touched, step, keep_last, message, tmp_path):
    store = new(tmp_path / "table")
    trained(load_table(store, None, LIKE), 0, 5, store)
    with pytest.raises(ValueError, match=message):
        save_touched(store, step, tables, none_touched(touched), keep_last)
    assert store.steps() == [5]
    with pytest.raises(ValueError, match="needs mu as stored"):
        load_table(store, 5, {"mu": jax.ShapeDtypeStruct((M, 8), jnp.float32)})
    with pytest.raises(ValueError, match="needs the 4096 rows that it has at that step, got 64 of mu"):
        load_table(store, 5, {"mu": jax.ShapeDtypeStruct((64, V), jnp.float32)})


# Kills

SAVES_UNTIL_KILLED = """
    import sys
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxmem.checkpoints import TableStore, load_table, none_touched, save_touched, touch

    M, V = 4096, 16
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
    like = jax.ShapeDtypeStruct((M, V), np.float32, sharding=NamedSharding(mesh, P("fsdp", "model")))
    store = TableStore(sys.argv[1])
    step = store.steps()[-1]
    store.rewind(step)
    tables = load_table(store, step, {name: like for name in ("values", "mu", "nu")})
    put = jax.jit(lambda table, rows, new: table.at[rows].set(new))
    while True:
        step += 1
        rows = np.random.default_rng(step).permutation(M)[:300]
        new = np.random.default_rng(step).normal(size=(300, V)).astype(np.float32)
        tables = {name: put(table, rows, new) for name, table in tables.items()}
        print(step, flush=True)
        save_touched(store, step, tables, touch(none_touched(M), rows), keep_last=2)
        print("saved", flush=True)
"""


def expected_at(start: np.ndarray, step: int) -> np.ndarray:
    table = start.copy()
    for at in range(1, step + 1):
        rows = np.random.default_rng(at).permutation(M)[:300]
        table[rows] = np.random.default_rng(at).normal(size=(300, V))
    return table


def killed(directory, n_kills: int, seed: int) -> tuple[int, int]:
    """Kills, checking that all steps are whole, on another mesh too; how often the step in hand was not there, and was."""
    store = new(directory)
    store.write([], {}, step=0)
    start = {name: store.read(name, slice(None)) for name in LIKE}
    moment, outcomes = random.Random(seed), [0, 0]
    for _ in range(n_kills):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES_UNTIL_KILLED), str(directory)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = store.steps()[-1]
        first = child.stdout.readline()
        assert first and int(first) == before + 1, child.stderr.read()
        passed = [child.stdout.readline() for _ in range(2 * moment.randrange(3))]  # whole saves first
        time.sleep(moment.uniform(0, moment.choice((0.1, 0.4))))
        child.send_signal(signal.SIGKILL)
        printed, errors = child.communicate()
        assert errors == ""
        store = TableStore(directory)
        last = store.steps()[-1]
        words = "".join((first, *passed, printed)).split()
        begun = max(int(word) for word in words if word != "saved")
        assert last in ((begun,) if words[-1] == "saved" else (begun - 1, begun))
        outcomes[last == begun] += words[-1] != "saved"
        for name in LIKE:
            for step in store.steps():
                np.testing.assert_array_equal(store.read(name, slice(None), step=step), expected_at(start[name], step))
            np.testing.assert_array_equal(store.read(name, slice(None)), expected_at(start[name], last))
        mesh = jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
        other = jax.ShapeDtypeStruct((M, V), jnp.float32, sharding=NamedSharding(mesh, P("model", "fsdp")))
        found = load_table(store, last, {"mu": other})["mu"]
        assert found.sharding.is_equivalent_to(other.sharding, 2)
        np.testing.assert_array_equal(found, expected_at(start["mu"], last))
    store.keep([last])
    store.compact()
    for name in LIKE:
        np.testing.assert_array_equal(store.read(name, slice(None), step=last), expected_at(start[name], last))
    return tuple(outcomes)


@pytest.mark.slow
def test_kill_9_in_a_save_leaves_the_step_before_or_the_whole_step(tmp_path):
    killed(tmp_path / "table", 3, 0)


@pytest.mark.slow
def test_a_storm_of_kill_9(tmp_path):
    """JAXMEM_KILLS=40 is the full proof."""
    before, after = killed(tmp_path / "table", KILLS, 1)
    print(
        f"\n{KILLS} kills: {before} in a save that then never was, {after} behind its commit; all that was kept is whole"
    )


@pytest.mark.parametrize("write", ["commit", "rewind"])
def test_what_a_killed_write_of_the_manifest_leaves_is_no_part_of_the_next(write, tmp_path):
    store = new(tmp_path / "table")
    for step in (1, 2):
        store.write([step], {"mu": np.full((1, V), step, np.float32)}, step)
    (store.directory / "manifest.ocdbt.__lock").write_bytes(b"x" * 5000)
    if write == "commit":
        store.write([3], {"mu": np.full((1, V), 3, np.float32)}, 3)
    else:
        store.rewind(1)
    assert TableStore(store.directory).read("mu", [1, 2, 3])[:, 0].tolist() == (
        [1, 2, 3] if write == "commit" else [1, 0, 0]
    )


def test_a_damaged_step_is_told_and_the_step_before_goes_on(tmp_path):
    store = new(tmp_path / "table")
    start = load_table(store, None, LIKE)
    trained(start, 0, 10, store)
    newest = max((store.directory / "d").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[100] ^= 1
    newest.write_bytes(content)
    store = TableStore(store.directory)
    with pytest.raises(CheckpointError, match=r"is damaged: needs \w+ of rows \d+\.\.\d+ as written, got Digest"):
        load_table(store, 10, LIKE)
    store.rewind(5)
    assert_same(load_table(store, 5, LIKE), trained(start, 0, 5))
    assert_same(trained(load_table(store, 5, LIKE), 5, 10, store), trained(start, 0, 10))

"""Runs that write the rows of tables that changed: every bit comes back, after kills and onto other meshes, for few bytes."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.checkpoints import TableStore, complete_steps
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.training.experiment import load_experiment
from jaxmem.training.loop import train
from jaxmem.training.placement import on_devices
from jaxmem.training.run import load_run
from jaxmem.training.step import init_state
from jaxmem.training.table_checkpoints import TableCheckpoints

pytestmark = pytest.mark.slow

TINY = Path(__file__).with_name("tiny_memory.py")
CONFIG = load_experiment(TINY)
KILLS = int(os.environ.get("JAXMEM_KILLS", "3"))


@pytest.fixture(scope="module")
def runs(work):
    """Two runs to the end: with tables written whole, and with their touched rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        whole = dataclasses.replace(CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, tables="whole"))
        train(whole, work / "whole_tables")
        train(CONFIG, work / "touched_tables")
        yield work


def parameters(run_dir, step=None):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(load_run(run_dir, step).model)
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys() and sum("table" in name for name in found) >= 3
    assert not [name for name in found if found[name].tobytes() != expected[name].tobytes()]


def test_tables_written_by_rows_are_those_written_whole(runs):
    for step in complete_steps(runs / "touched_tables" / "checkpoints"):
        assert_same(parameters(runs / "touched_tables", step), parameters(runs / "whole_tables", step))


def test_a_checkpoint_writes_the_rows_that_changed(runs):
    """The first writes all; two steps later at most the rows that these read are other ones."""
    stores = {path.name: TableStore(path) for path in (runs / "touched_tables" / "tables").iterdir()}
    assert sorted(stores) == [
        *(f"blocks.0.memory.table.{kind}.{layer}" for kind in ("inputs", "values") for layer in (0, 1)),
        "table.values",
    ]
    store = stores["blocks.0.memory.table.values.0"]
    *_, before, last = store.steps()
    changed = [np.any(store.read("nu", slice(0, 64**2), step=s) != 0, axis=1) for s in (before, last)]
    assert 0 < changed[0].sum() <= changed[1].sum() < 64**2 / 2
    at = lambda step: np.any(store.read("values", slice(0, 64**2), step=step) != store.read("values", slice(0, 64**2), step=before), axis=1)  # fmt: skip  # noqa: E501
    assert 0 < at(last).sum() <= 2 * 8 * 32 * 2 * 2, "steps x rows x tokens x heads x k"


@pytest.mark.parametrize("asked", [False, True], ids=["killed", "asked"])
def test_a_run_goes_on_from_an_older_checkpoint(runs, asked, capsys):
    """As after a kill whose save of the tables was done and whose checkpoint was not, or with --from-step."""
    run_dir = runs / f"went_back_{asked}"
    shutil.copytree(runs / "touched_tables", run_dir)
    *_, before, last = complete_steps(run_dir / "checkpoints")
    if not asked:
        shutil.rmtree(run_dir / "checkpoints" / str(last))
    (run_dir / "report.html").unlink()
    train(CONFIG, run_dir, resume=True, from_step=before if asked else None)
    assert_same(parameters(run_dir), parameters(runs / "whole_tables"))
    assert before in TableStore(run_dir / "tables" / "table.values").steps()
    said = f"checkpoints of steps [{last}], without the rows of their memory tables, which are rewound"
    assert (said in " ".join(capsys.readouterr().out.split())) is asked


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=2, table_rows=("data",)), id="rows"),
        pytest.param(MeshConfig(data=1, fsdp=2, model=2), id="columns", marks=pytest.mark.full),
    ],
)
def test_tables_come_back_on_another_mesh(runs, mesh):
    mesh_here = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.model])
    folder = runs / f"mesh_{mesh.data}"
    shutil.copytree(runs / "touched_tables" / "tables", folder)
    tables = TableCheckpoints(folder, CONFIG)
    with use_mesh(mesh_here, rules_of(mesh)):
        abstract = on_devices(jax.eval_shape(lambda: init_state(CONFIG)), mesh_here)
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tables.rest(abstract))
        zeros["step"] = np.int32(CONFIG.steps)
        state = tables.restore(zeros, abstract)
        for found, want in zip(
            jax.tree.leaves(state.opt_state[1].mu), jax.tree.leaves(abstract.opt_state[1].mu), strict=True
        ):
            assert found.sharding.is_equivalent_to(want.sharding, found.ndim)
            assert np.any(found)
        moved = state._replace(step=np.int32(CONFIG.steps + 2))
        lazy = moved.opt_state[1]
        fifth = lambda rows: jax.device_put(np.arange(rows.shape[-1]) == 5 | np.zeros(rows.shape, bool), rows.sharding)
        touched = jax.tree.map(fifth, lazy.touched)
        tables.save(moved._replace(opt_state=(moved.opt_state[0], lazy._replace(touched=touched))), [CONFIG.steps])
    expected = parameters(runs / "whole_tables")
    name = next(name for name in expected if name.endswith("table.values.value") and "blocks" not in name)
    store = TableStore(folder / "table.values")
    np.testing.assert_array_equal(store.read("values", slice(0, 32**2)), expected[name])
    assert store.steps() == [CONFIG.steps, CONFIG.steps + 2]


def test_errors(runs):
    dense = dataclasses.replace(CONFIG.optimizer, tables=dataclasses.replace(CONFIG.optimizer.tables, update="dense"))
    with pytest.raises(ValueError, match="needs checkpoint.tables='whole' where every row changes at every step, got"):
        dataclasses.replace(CONFIG, optimizer=dense)
    run_dir = runs / "lost"
    shutil.copytree(runs / "touched_tables", run_dir)
    shutil.rmtree(run_dir / "tables" / "table.values")
    with pytest.raises(
        ValueError, match=r"table .*lost/tables/table.values: needs a directory made by TableStore.create or"
    ):
        load_run(run_dir)


def test_kill_9_loses_no_row(work):
    """In turn while tables are written, between them and their checkpoint, and at any moment; on one device."""
    names = ("JAX_", "XLA_", "TF_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache_of_tables"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }

    def start(out):
        command = [sys.executable, "-m", "jaxmem.cli", "train", str(TINY), "--out", out, "--resume"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=work, env=environment, text=True, **pipes)

    def finish(out):
        process = start(out)
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")

    finish("uninterrupted")
    chance, run_dir = random.Random(KILLS), work / "killed_tables"
    commits = lambda: sum(
        (path / "d").exists() and len(list((path / "d").iterdir())) for path in run_dir.glob("tables/*")
    )
    for kill in range(KILLS):
        process, before = start(run_dir.name), commits()
        wanted = before + chance.randrange(1, 8)
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end and commits() < wanted:
            time.sleep(0.002)
        time.sleep((0, 0.01, chance.random())[kill % 3])
        process.kill()
        process.communicate()
    finish(run_dir.name)
    assert_same(parameters(run_dir), parameters(work / "uninterrupted"))

"""Checkpoints come back bit for bit, on any mesh, and survive kills, full disks and damaged files."""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmem.checkpoints import (
    CheckpointConfig,
    CheckpointError,
    CheckpointStore,
    best_step,
    complete_steps,
    load_checkpoint,
    read_run_config,
    reading,
)
from jaxmem.checkpoints.integrity import CHECKSUMS

RUN_CONFIG = {"model": {"vocab": 256, "width": 128}, "seed": 0}
OPTIMIZERS = {
    "clipped_adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))),
    "muon": optax.contrib.muon(1e-3),
}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(16, 8, rngs=rngs)
        dtypes = (jnp.float32, jnp.bfloat16)
        self.blocks = nnx.List([nnx.Linear(8, 8, param_dtype=dtype, rngs=rngs) for dtype in dtypes])


def trained(optimizer: optax.GradientTransformation):
    """Parameters and optimizer state after two updates, so that nothing in them is zero by accident."""
    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    opt_state = optimizer.init(params)
    for seed in range(2):
        grads = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape, p.dtype), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(2)}


def arrays(step: int, n_floats: int = 300_000):
    """Random bits, which do not compress, and the step in every array."""
    bits = np.random.default_rng(step).normal(size=(2, n_floats // 2)).astype(np.float32)
    return {"params": {"table": jnp.asarray(bits), "bias": jnp.full(7, step, jnp.bfloat16)}, "step": jnp.int32(step)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_store(directory, **config):
    return CheckpointStore(directory, CheckpointConfig(**config), RUN_CONFIG)


def saved(directory, *steps):
    with open_store(directory, keep_last=9) as store:
        for step in steps:
            store.save(step, arrays(step), {"position": 64 * step})
    return directory


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("two"), 1, 2)


# Round trips


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_real_training_states_return_bit_for_bit(name, tmp_path):
    state = trained(OPTIMIZERS[name])
    data_state = {"epoch": 1, "shuffle": [3, 1, 2], "reader": {"file": "a.txt", "offset": 2**40}}
    with open_store(tmp_path) as store:
        store.save(2, state, data_state)
        restored = store.restore(abstract(state))
    assert_same(restored.tree, state)
    assert (restored.step, restored.data_state, restored.run_config) == (2, data_state, RUN_CONFIG)
    assert restored.notes == []
    assert read_run_config(tmp_path) == RUN_CONFIG


def test_what_happens_after_save_returns_is_not_saved(tmp_path):
    tree, position, counts = arrays(1, 4_000_000), {"position": 64}, np.arange(1_000_000, dtype=np.int32)
    expected = jax.tree.map(np.array, {**tree, "counts": counts})
    with open_store(tmp_path) as store:
        store.save(1, {**tree, "counts": counts}, position)
        tree = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)(tree)
        jax.block_until_ready(tree)
        position["position"], counts[:] = -1, -1
        restored = store.restore(abstract(expected))
    assert_same(restored.tree, expected)
    assert restored.data_state == {"position": 64}


def test_leaving_the_context_completes_the_save_even_in_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_store(tmp_path) as store:
        store.save(1, arrays(1), {})
        raise KeyboardInterrupt
    assert_same(load_checkpoint(tmp_path, abstract(arrays(1))).tree, arrays(1))


def test_relative_directory_and_parts_of_the_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("run/checkpoints", 3)
    params = {"params": arrays(3)["params"]}
    assert_same(load_checkpoint("run/checkpoints", abstract(params)).tree, params)


SAVES_ON_ONE_MESH_AND_LOADS_ON_OTHERS = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxmem.checkpoints import CheckpointConfig, CheckpointStore, load_checkpoint

    def sharding(shape, spec):
        return NamedSharding(jax.make_mesh(shape, ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2), spec)

    table = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    with CheckpointStore(sys.argv[1], CheckpointConfig(), {}) as store:
        store.save(1, {"table": jax.device_put(table, sharding((4, 2), P("fsdp", "model")))}, {})
    for spec in (P("model", "fsdp"), P(None, ("fsdp", "model")), P()):
        asked = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=sharding((2, 4), spec))
        found = load_checkpoint(sys.argv[1], {"table": asked}).tree["table"]
        assert found.sharding.is_equivalent_to(asked.sharding, 2), found.sharding
        np.testing.assert_array_equal(found, table)
"""


def test_any_mesh_to_any_mesh(tmp_path):
    eight = "--xla_force_host_platform_device_count=8"
    run_child(SAVES_ON_ONE_MESH_AND_LOADS_ON_OTHERS, tmp_path, XLA_FLAGS=eight)
    found = load_checkpoint(tmp_path, {"table": jax.ShapeDtypeStruct((16, 24), jnp.float32)}).tree["table"]
    assert found.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(found, np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32))


# What is kept


def test_keeps_the_last_and_the_best_over_a_restart(tmp_path):
    tree = {"x": jnp.zeros(3)}
    metrics = [5.0, 1.0, float("nan"), 2.0, None, 4.0, 3.0]
    for half in (range(4), range(4, 7)):
        with open_store(tmp_path, keep_last=2, keep_best=2) as store:
            for step in half:
                store.save(step, tree, {}, metrics[step])
    assert complete_steps(tmp_path) == [1, 3, 5, 6]
    assert best_step(tmp_path) == 1
    with open_store(tmp_path, keep_last=1, keep_best=0) as store:
        store.save(7, tree, {})
    assert complete_steps(tmp_path) == [7]
    assert best_step(tmp_path) is None


def test_reading_leaves_a_save_in_progress_alone_and_opening_removes_leftovers(tmp_path):
    unfinished = saved(tmp_path, 1) / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_text("written")
    assert load_checkpoint(tmp_path, abstract(arrays(1))).step == 1
    assert unfinished.exists()
    saved(tmp_path, 2)
    assert not unfinished.exists() and complete_steps(tmp_path) == [1, 2]


# Damage


def delete(path: pathlib.Path):
    path.unlink()


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit])
def test_damage_to_any_file_is_found_and_said(damage, two_checkpoints, tmp_path):
    newest = two_checkpoints / "2"
    files = [path.relative_to(newest) for path in newest.glob("*/**/*") if path.is_file()]
    files = [file for file in files if file != pathlib.Path(CHECKSUMS, "commit_success.txt")]
    assert len(files) > 10
    for i, file in enumerate(files):
        directory = shutil.copytree(two_checkpoints, tmp_path / str(i))
        damage(directory / "2" / file)
        restored = load_checkpoint(directory, abstract(arrays(1)))
        assert restored.step == 1, f"{file} was damaged and not noticed"
        assert_same(restored.tree, arrays(1))
        (note,) = restored.notes
        assert "checkpoint 2 is damaged" in note and (file.parts[0] == CHECKSUMS or str(file) in note)


def test_a_run_goes_on_from_the_older_checkpoint_and_saves_the_damaged_step_again(two_checkpoints, tmp_path):
    directory = shutil.copytree(two_checkpoints, tmp_path / "run")
    truncate(directory / "2" / "run_config" / "run_config.json")
    with open_store(directory) as store:
        restored = store.restore(abstract(arrays(1)))
        assert (restored.step, restored.data_state, len(restored.notes)) == (1, {"position": 64}, 1)
        store.save(2, arrays(2), {})
        assert store.restore(abstract(arrays(2))).notes == []
    assert (directory / "2.damaged").is_dir() and complete_steps(directory) == [1, 2]


def test_checkpoints_whose_folders_changed_names_are_told(two_checkpoints, tmp_path):
    directory = shutil.copytree(two_checkpoints, tmp_path / "run")
    for before, after in (("1", "0"), ("2", "1"), ("0", "2")):
        (directory / before).rename(directory / after)
    message = (
        "checkpoint 2 is damaged: its folder holds that of step 1, renamed; checkpoint 1 is .* holds that of step 2"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory, abstract(arrays(1)))
    for step in "12":  # as jaxmem 0.1 wrote them
        file = directory / step / CHECKSUMS / f"{CHECKSUMS}.json"
        file.write_text(json.dumps(json.loads(file.read_text())["files"]))
    assert load_checkpoint(directory, abstract(arrays(1))).step == 2


@pytest.mark.parametrize("moment", ["_load", "check_files", "read_json"])
def test_what_a_run_drops_while_it_is_read_is_read_again(moment, two_checkpoints, tmp_path, monkeypatch):
    """A run that keeps one checkpoint: the next appears, and then the one that was chosen goes, at any moment."""
    directory, dropped = shutil.copytree(two_checkpoints, tmp_path / "run"), []
    (directory / "2").rename(tmp_path / "next")
    method = getattr(reading, moment)

    def drop(*arguments, **options):
        if (moment != "read_json" or arguments[1] == "data_state") and not dropped:
            (tmp_path / "next").rename(directory / "2")
            dropped.append((directory / "1").rename(tmp_path / "gone"))
        return method(*arguments, **options)

    monkeypatch.setattr(reading, moment, drop)
    restored = load_checkpoint(directory, abstract(arrays(1)))
    assert (restored.step, restored.notes) == (2, []) and dropped
    assert_same(restored.tree, arrays(2))
    assert read_run_config(directory) == RUN_CONFIG


READS_BESIDE = """
    import sys, jax, jax.numpy as jnp
    from jaxmem.checkpoints import CheckpointConfig, CheckpointStore
    with CheckpointStore(sys.argv[1], CheckpointConfig(keep_last=1, keep_best=0), {}) as store:
        for step in range(1, 10_000):
            store.save(step, {"step": jnp.int32(step), "rows": jnp.full((4, 500), step)}, {})
            print(step, flush=True)
"""


# in a process of its own: reads that orbax has given up complain when they are collected, which may be in another test
LOADS = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jaxmem.checkpoints import load_checkpoint
    asked, steps = {"step": jax.ShapeDtypeStruct((), jnp.int32), "rows": jax.ShapeDtypeStruct((4, 500), jnp.int32)}, set()
    for _ in range(322):
        restored = load_checkpoint(sys.argv[1], asked)
        assert restored.notes == [] and np.all(restored.tree["rows"] == restored.step)
        steps.add(restored.step)
    print(len(steps))
"""


@pytest.mark.slow
def test_loads_beside_a_run_that_keeps_one_checkpoint(tmp_path):
    child = start_child(READS_BESIDE, tmp_path)
    while not complete_steps(tmp_path):
        time.sleep(0.01)
    loads = start_child(LOADS, tmp_path)
    n_steps, errors = loads.communicate()
    child.kill()
    child.communicate()
    assert loads.returncode == 0, errors
    assert int(n_steps) > 10


def test_an_unreadable_metric_does_not_stop_a_run(two_checkpoints, tmp_path):
    directory = shutil.copytree(two_checkpoints, tmp_path / "run")
    truncate(directory / "2" / "metric" / "metric.json")
    with open_store(directory) as store:
        assert store.restore(abstract(arrays(1))).step == 1


def test_without_any_intact_checkpoint_everything_is_left_where_it_is(two_checkpoints, tmp_path):
    directory = shutil.copytree(two_checkpoints, tmp_path / "run")
    for step in "12":
        flip_a_bit(directory / step / "data_state" / "data_state.json")
    message = "needs an intact checkpoint, got checkpoint 2 is damaged: .*; checkpoint 1 is damaged"
    with open_store(directory) as store, pytest.raises(CheckpointError, match=message):
        store.restore(abstract(arrays(1)))
    assert complete_steps(directory) == [1, 2]
    with pytest.raises(CheckpointError, match="needs an intact checkpoint, got none; wait for the first"):
        load_checkpoint(tmp_path / "nowhere", abstract(arrays(1)))


# Another model


def test_another_vocabulary_is_named_and_never_passed_over(two_checkpoints):
    other = abstract(arrays(1))
    other["params"]["table"] = jax.ShapeDtypeStruct((2, 512), jnp.float32)
    config = {"model": {"vocab": 512, "width": 128}, "seed": 0}
    with CheckpointStore(two_checkpoints, CheckpointConfig(), config) as store, pytest.raises(ValueError) as error:
        store.restore(other)
    assert "2: needs the arrays of this model" in str(error.value)
    assert "params/table: checkpoint float32[2, 150000], model float32[2, 512]" in str(error.value)
    assert "the configurations differ in model.vocab: checkpoint 256, now 512" in str(error.value)
    assert "width" not in str(error.value)


def test_an_optimiser_that_keeps_other_moments_is_told_with_what_can_be_done(two_checkpoints):
    """As of a run from before what the optimiser takes for a matrix changed: the parameters are the same."""
    other = abstract(arrays(1)) | {"opt_state": {"mu": {"router": jax.ShapeDtypeStruct((4, 2), jnp.float32)}}}
    with pytest.raises(ValueError) as error:
        load_checkpoint(two_checkpoints, other)
    assert str(error.value).endswith(
        "2: needs an optimiser that keeps of each parameter what is saved of it, got another: opt_state/mu/router: "
        "checkpoint has none, model float32[4, 2]; its parameters fit and can be used, but a run goes on with the version "
        "of jaxmem and the optimizer that it began with only; use these, or start a new run"
    )
    assert load_checkpoint(two_checkpoints, {"params": other["params"]}).step == 2


def test_missing_extra_and_retyped_arrays_are_named(two_checkpoints):
    other = {"params": {"bias": jax.ShapeDtypeStruct((7,), jnp.float32), "new": jax.ShapeDtypeStruct((), jnp.int8)}}
    with pytest.raises(ValueError) as error:
        load_checkpoint(two_checkpoints, other)
    for line in (
        "params/bias: checkpoint bfloat16[7], model float32[7]",
        "params/new: checkpoint has none, model int8[]",
        "params/table: checkpoint float32[2, 150000], model has none",
    ):
        assert line in str(error.value)
    assert "step" not in str(error.value)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.save(2, arrays(2), {}), ValueError, "needs a step that is not saved yet, got step=2"),
        (lambda s: s.save(3, {"a": {"b": 1.5}}, {}), ValueError, "jax restores exactly, got a/b=1.5; "),
        (lambda s: s.save(3, {"n": np.arange(3)}, {}), ValueError, "jax restores exactly, got n=int64; "),
        (lambda s: s.save(3, {"key": jax.random.key(0)}, {}), ValueError, "jax.random.key_data"),
        (lambda s: s.save(3, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}), ValueError, "got a/b twice"),
        (lambda s: s.save(3, {}, {"data": object()}), TypeError, "not JSON serializable"),
        (lambda s: s.restore({}, step=7), ValueError, r"needs one of the steps \[1, 2\], got step=7"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(call, error, message, two_checkpoints):
    with open_store(two_checkpoints) as store, pytest.raises(error, match=message):
        call(store)
    assert complete_steps(two_checkpoints) == [1, 2]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="needs a directory that can be written, got "):
        open_store(tmp_path / "file" / "checkpoints")


# Full disks and kills


# Orbax closes its event loop at the first failed write, and the others then have nobody to tell.
failing_writes = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Writes beyond this size fail as they do on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@failing_writes
def test_a_full_disk_is_told_and_the_previous_checkpoint_stays(tmp_path):
    with open_store(tmp_path, keep_last=1, keep_best=0) as store:
        store.save(1, arrays(1), {})
        store.wait()
        for room in (1 << 19, 10):  # not enough for the arrays; not even enough for the metadata
            with largest_file(room), pytest.raises(CheckpointError) as error:
                store.save(2, arrays(2), {})
                store.wait()
            assert str(error.value).startswith(f"checkpoint 2: needs to be written to {tmp_path}, got ")
            assert "too large" in str(error.value) and "\n" not in str(error.value)
            assert "checkpoint 1 is intact; make room" in str(error.value)
            assert_same(store.restore(abstract(arrays(1))).tree, arrays(1))
        store.save(2, arrays(2), {})
        assert_same(store.restore(abstract(arrays(2))).tree, arrays(2))
    assert os.listdir(tmp_path) == ["2"]


@failing_writes
def test_a_full_disk_is_told_by_the_next_save_and_at_the_end(tmp_path):
    with largest_file(1 << 19):
        store = open_store(tmp_path)
        store.save(1, arrays(1), {})
        with pytest.raises(CheckpointError, match=r"checkpoint 1: .* there is no earlier checkpoint"):
            store.save(2, arrays(2), {})
        store.save(3, arrays(3), {})
        with pytest.raises(CheckpointError, match="checkpoint 3: "):
            store.close()


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "retired" / "0" / "arrays").mkdir(parents=True)  # a kill between orbax's rename and the deletion
    with open_store(tmp_path, keep_last=1, keep_best=0) as store:
        assert os.listdir(tmp_path) == ["1"]
        store.save(2, arrays(2), {})
        store.save(3, arrays(3), {})
        assert not (tmp_path / "1").exists(), "the next save frees the space of what the last one replaced"
    assert os.listdir(tmp_path) == ["3"]


SAVES_UNTIL_KILLED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jaxmem.checkpoints import CheckpointConfig, CheckpointStore

    def tree(step):
        rows = np.random.default_rng(step).normal(size=(4, 250_000)).astype(np.float32)
        rows[:, 0] = step
        return {"rows": [jnp.asarray(row) for row in rows], "step": jnp.int32(step)}

    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
    with CheckpointStore(sys.argv[1], CheckpointConfig(keep_last=2), {}) as store:
        step = 0
        if store.steps():
            restored = store.restore(asked)
            step = restored.step
            assert restored.notes == [] and restored.data_state == {"position": step}, restored
            for found, expected in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(tree(step)), strict=True):
                np.testing.assert_array_equal(found, expected)
        for step in range(step + 1, step + int(sys.argv[2])):
            store.save(step, tree(step), {"position": step})
            if step % 3 == 0:
                store.wait()
            print(step, flush=True)
    assert len(store.steps()) == 2, store.steps()
"""


def test_kill_9_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path):
    moment = random.Random(0)
    newest = 0
    for _ in range(5):
        child = start_child(SAVES_UNTIL_KILLED, tmp_path, "1000")
        first = child.stdout.readline()
        assert first, child.stderr.read()
        assert int(first) == newest + 1
        time.sleep(moment.uniform(0.2, 0.8))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        newest = max(complete_steps(tmp_path), default=newest)  # on a busy machine the first save may not be done
    run_child(SAVES_UNTIL_KILLED, tmp_path, "4")
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, (newest + 2, newest + 3)))


def start_child(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_child(code: str, *arguments: object, **environment: str) -> None:
    child = start_child(code, *arguments, **environment)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert errors == "", "a run without trouble prints nothing"

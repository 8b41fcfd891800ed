"""A run on a mesh of eight devices, with accumulation: what it leaves, what resuming changes (nothing), what stops it."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizer_kinds import save_tokenizer

from jaxmem.checkpoints import CheckpointConfig, CheckpointStore, best_step, complete_steps, load_checkpoint
from jaxmem.config import from_json, to_json
from jaxmem.models.tokenizer import load_tokenizer
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh
from jaxmem.training import loop
from jaxmem.training.data import heldout_files
from jaxmem.training.identity import data_identity
from jaxmem.training.loop import Outcome, train
from jaxmem.training.metrics import read_metrics
from jaxmem.training.not_finite import NotFinite
from jaxmem.training.run import load_run
from jaxmem.training.step import init_state

SAVED = (3, 6, 8)


def abstract(config):
    return jax.eval_shape(lambda: init_state(config))._asdict()


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compiled):
    """Runs of one config share their compiled functions."""


def change_leaves(tree, *words, value):
    """Fills the arrays whose path has all the words."""
    n_changed = 0

    def change(path, leaf):
        nonlocal n_changed
        here = all(word in jax.tree_util.keystr(path) for word in words)
        n_changed += here
        return leaf * 0 + value if here else leaf

    changed = jax.tree_util.tree_map_with_path(change, tree)
    assert n_changed
    return changed


def assert_same_values(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# What a run leaves


def test_the_folder_of_a_run(whole, config):
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.html", "code"}
    assert from_json(json.loads((whole / "config.json").read_text())) == config
    assert complete_steps(whole / "checkpoints") == list(SAVED)
    page = (whole / "report.html").read_text()
    assert "gzip" in page and page.rstrip().endswith("</html>")


def test_one_line_per_step_in_order(whole, config):
    lines = read_metrics(whole)
    expected = []
    for step in range(1, 9):
        expected += [("train", step)] + [("eval", step)] * (step in SAVED)
    assert [(line["kind"], line["step"]) for line in lines] == [*expected, ("final", 8)]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.1
    held_out = [line for line in lines if line["kind"] == "eval"]
    assert [line["n_bytes"] <= config.eval_bytes for line in held_out] == [True, True, False], "the last takes all"
    assert lines[-1]["bits_per_byte"] == held_out[-1]["bits_per_byte"]
    assert {result["program"] for result in lines[-1]["compression"]} >= {"gzip -9", "xz -9"}


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_best_evaluation_and_is_kept(whole, config, killed_after):
    held_out = {line["step"]: line["bits_per_byte"] for line in read_metrics(whole) if line["kind"] == "eval"}
    assert best_step(whole / "checkpoints") == min(held_out, key=held_out.get)
    run_dir = killed_after(6)
    (run_dir / "checkpoints" / "3" / "metric" / "metric.json").write_text('{"metric": 0.5}')
    sums = run_dir / "checkpoints" / "3" / "checksums" / "checksums.json"
    sums.write_text(json.dumps({k: v for k, v in json.loads(sums.read_text()).items() if "metric.json" not in k}))
    train(dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=3, keep_last=1)), run_dir, resume=True)
    assert complete_steps(run_dir / "checkpoints") == [3, 8]
    assert best_step(run_dir / "checkpoints") == 3


def test_the_model_of_any_checkpoint_can_be_loaded(whole, config):
    loaded = load_run(whole, 6)
    saved = load_checkpoint(whole / "checkpoints", {"params": abstract(config)["params"]}, 6).tree["params"]
    assert (loaded.step, loaded.config, loaded.notes) == (6, config, [])
    assert_same_values(nnx.state(loaded.model, nnx.Param), saved)
    assert load_run(whole).step == 8


# Resuming


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), *SAVED])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(step, config, whole, killed_after, compare, capsys):
    run_dir = killed_after(step)
    assert train(config, run_dir, resume=True) == Outcome(8, stopped=False)
    compare(config, run_dir, whole)
    said = f"resumed from the checkpoint of step {step}" if step else f"no checkpoint in {run_dir} to resume from"
    assert said in capsys.readouterr().out


def test_a_truncated_checkpoint_is_passed_over_and_named(config, whole, killed_after, compare, capsys):
    run_dir = killed_after(6)
    largest = max((run_dir / "checkpoints" / "6" / "arrays").glob("**/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert load_run(run_dir).step == 3
    train(config, run_dir, resume=True)
    out = capsys.readouterr().out
    assert "passed over: checkpoint 6 is damaged: arrays/" in out and "resumed from the checkpoint of step 3" in out
    shutil.rmtree(run_dir / "checkpoints" / "6.damaged")
    compare(config, run_dir, whole)


@pytest.mark.parametrize(
    "elsewhere",
    [
        pytest.param(MeshConfig(data=4, model=2), id="another mesh", marks=pytest.mark.slow),
        pytest.param(None, id="one device", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_elsewhere(elsewhere, config, whole, killed_after, monkeypatch):
    """The same values are restored; sums in another order then differ by rounding."""
    run_dir = killed_after(6)
    if elsewhere is None:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        other, mesh = dataclasses.replace(config, mesh=MeshConfig()), None
    else:
        other = dataclasses.replace(config, mesh=elsewhere)
        mesh = make_mesh(other.mesh)
    with use_mesh(mesh), CheckpointStore(run_dir / "checkpoints", other.checkpoint, to_json(other)) as store:
        state, _, _ = loop._Run(other, load_tokenizer("bytes"), mesh, run_dir).start(store)
    devices = {len(leaf.devices()) for leaf in jax.tree.leaves(state)}
    assert devices == {1 if mesh is None else 8}
    saved = load_checkpoint(whole / "checkpoints", abstract(config), 6).tree
    assert_same_values(state._asdict(), saved)

    train(other, run_dir, resume=True)
    found, expected = (load_checkpoint(path / "checkpoints", abstract(config), 8) for path in (run_dir, whole))
    assert found.data_state == expected.data_state
    for a, b in zip(jax.tree.leaves(found.tree["params"]), jax.tree.leaves(expected.tree["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    losses = [[line["loss"] for line in read_metrics(path) if line["kind"] == "train"] for path in (run_dir, whole)]
    assert losses[0][:6] == losses[1][:6]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: {"seed": 1}, r"got another: seed: checkpoint 0, now 1; use the same experiment"),
        (
            lambda c: {"model": dataclasses.replace(c.model, vocab_size=512)},
            r"got another: model.vocab_size: checkpoint 256, now 512; use",
        ),
        (
            lambda c: {"model": dataclasses.replace(c.model, pattern=c.model.pattern[::-1])},
            r"got another: model.pattern.0.type: checkpoint '.*', now '.*; use",
        ),
        (lambda c: {"steps": 7}, r"needs at least the 8 steps that the checkpoint has made, got steps=7; raise"),
    ],
    ids=["seed", "vocabulary", "model", "steps"],
)
def test_another_config_is_named_and_nothing_is_touched(change, message, config, whole, tmp_path):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, **change(config)), run_dir, resume=True)
    for path in whole.rglob("*"):
        assert path.is_dir() or (run_dir / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name


def test_other_data_are_noticed(config, killed_after, save_again, tmp_path):
    run_dir = killed_after(6)
    copy = shutil.copytree(config.data.train[0], tmp_path / "text")
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(copy),)))
    save_again(elsewhere, run_dir, 6)
    with open(copy / "00.txt", "a") as file:
        file.write(" more")
    with pytest.raises(ValueError, match="needs the training data that the checkpoint of step 6 was made with"):
        train(elsewhere, run_dir, resume=True)


def test_other_heldout_text_of_the_same_size_is_noticed(config, killed_after, save_again, tmp_path):
    run_dir = killed_after(6)
    copy = shutil.copytree(config.data.train[0], tmp_path / "text")
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(copy),)))
    save_again(moved, run_dir, 6)
    name, text = heldout_files(moved.data)[0]
    (copy / name).write_bytes(text.swapcase())
    with pytest.raises(
        ValueError, match="needs the held-out data that the checkpoint of step 6 was made with, got other"
    ):
        train(moved, run_dir, resume=True)


def test_text_that_changes_while_a_run_reads_it_is_named(config, killed_after, monkeypatch, capsys):
    files = sorted(Path(config.data.train[0]).iterdir())
    before = {path: path.read_bytes() for path in files[::2]}

    def identify_and_change(*arguments):
        identity = data_identity(*arguments)
        for path in before:
            path.write_bytes(before[path].swapcase())
        return identity

    monkeypatch.setattr(loop, "data_identity", identify_and_change)
    try:
        train(config, killed_after(6), resume=True)
    finally:
        for path in before:
            path.write_bytes(before[path])
    printed = capsys.readouterr().out
    assert "some text cannot be read again, or is not the same: " in printed
    assert "some text could not be read again, or was not the same, and was left out: " in printed


@pytest.mark.slow
def test_without_held_out_text_and_with_a_tokenizer_that_disappears(config, tmp_path, capsys):
    """One run of both: it is trained without evaluation, and its folder has all that it takes to generate and go on."""
    path = tmp_path / "given" / "tokenizer.json"
    path.parent.mkdir()
    texts = [file.read_text() for file in Path(config.data.train[0]).iterdir()]
    save_tokenizer("metaspace", path, texts)
    data = dataclasses.replace(config.data, tokenizer=str(path), heldout_fraction=0.0)
    config = dataclasses.replace(config, data=data, steps=2, checkpoint=CheckpointConfig(every_steps=1))
    run_dir = tmp_path / "run"
    train(config, run_dir)
    printed = capsys.readouterr().out
    assert "held-out data: none, so there is no evaluation" in printed and "no held-out text: nothing was" in printed
    lines = read_metrics(run_dir)
    assert [line["kind"] for line in lines] == ["train", "train", "final"] and "bits_per_byte" not in lines[-1]
    assert (run_dir / "report.html").exists()
    assert (run_dir / "tokenizer.json").read_bytes() == path.read_bytes()

    kept = json.loads(path.read_text())
    vocab = kept["model"]["vocab"]
    a, b = sorted(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(kept))
    with pytest.raises(
        ValueError, match=r"resume: needs the tokenizer of the run in .* with other contents than its copy"
    ):
        train(config, run_dir, resume=True)
    shutil.copy(run_dir / "tokenizer.json", tmp_path)
    shutil.copy(path, run_dir)
    with pytest.raises(ValueError, match="needs the tokenizer that the model was trained with, got other contents in"):
        load_run(run_dir)
    shutil.copy(tmp_path / "tokenizer.json", run_dir)
    path.unlink()
    assert load_run(run_dir).tokenizer.content == (run_dir / "tokenizer.json").read_bytes()
    train(dataclasses.replace(config, sample_tokens=0), run_dir, resume=True)


# Starting


def test_a_folder_with_a_run_is_not_overwritten(config, whole):
    with pytest.raises(ValueError, match=r"needs a new folder for a new run, got .*; add --resume"):
        train(config, whole)


@pytest.mark.parametrize(
    "mesh, message",
    [
        (MeshConfig(data=8), "needs 'batch' divisible by the 8 devices of mesh axes dataxfsdp, got batch=4"),
        (MeshConfig(data=2, model=4), "needs '.*' divisible by the 4 devices of mesh axes model, got .*=2 in"),
        (MeshConfig(data=3), "needs data x fsdp x seq x model = 8 devices, got {'data': 3"),
    ],
    ids=["batch", "heads", "devices"],
)
def test_a_mesh_that_does_not_fit_is_told_and_leaves_the_folder_free(mesh, message, config, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, mesh=mesh), tmp_path / "run")


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(config, killed_after, save_again):
    run_dir = killed_after(6)
    ruin = functools.partial(change_leaves, value=np.nan)
    save_again(config, run_dir, 6, lambda tree: ruin(tree, "params", "blocks", "ffn_norm", "scale"))
    with pytest.raises(NotFinite) as error:
        train(config, run_dir, resume=True)
    message = str(error.value)
    assert message.startswith("step 7: needs a finite loss, gradients and updates, got loss=nan")
    assert "not finite: the parameters of blocks/0/ffn_norm, blocks/1/ffn_norm; the step was not made" in message
    command = f"jaxmem train EXPERIMENT.py --out {run_dir} --resume --optimizer.learning-rate 0.005"
    assert f"to go on from step 6 with half the rate (or lower optimizer.clip_norm): {command}; if" in message
    assert message.endswith("if its state has diverged already, --from-step 3 goes back further")
    assert complete_steps(run_dir / "checkpoints") == [3, 6]
    lines = read_metrics(run_dir)
    assert (lines[-1]["kind"], lines[-1]["step"]) == ("train", 7) and math.isnan(lines[-1]["loss"])


def test_an_update_that_overflows_is_not_made_nor_saved(config, whole, killed_after, compare, save_again):
    """Finite gradients, but Adam's mean is huge and its mean square is 0: one step more would save infinities."""
    run_dir = killed_after(6)

    def ruin(tree):
        tree = change_leaves(tree, "opt_state", "mu", "embedding", value=1e38)
        return change_leaves(tree, "opt_state", "nu", "embedding", value=0.0)

    save_again(config, run_dir, 6, ruin)
    with pytest.raises(NotFinite, match=r"step 7: .*not finite: the updates of embedding; the step was not made"):
        train(config, run_dir, resume=True)
    assert complete_steps(run_dir / "checkpoints") == [3, 6]
    shutil.rmtree(run_dir / "checkpoints" / "6")
    train(config, run_dir, resume=True)
    compare(config, run_dir, whole)

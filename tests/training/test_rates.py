"""Learning rates across a resume with other steps: by hand, as they are told, and in runs that are interrupted again."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.config import to_json
from jaxmem.training import loop
from jaxmem.training.experiment import load_experiment
from jaxmem.training.loop import train
from jaxmem.training.metrics import read_metrics
from jaxmem.training.optimizer import OptimizerConfig, make_schedule, rate_of
from jaxmem.training.rates import continued, describe, resumed

TINY = Path(__file__).with_name("tiny.py")
COSINE = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
WSD = dataclasses.replace(COSINE, schedule="wsd", decay_fraction=0.4)
CONSTANT = dataclasses.replace(COSINE, schedule="constant")


def go_on(config, steps, until_now, step):
    """The config of a run that is resumed to `continue`."""
    return continued(dataclasses.replace(config, on_new_steps="continue"), steps, config, until_now, step)


# By hand


@pytest.mark.parametrize(
    "config, steps, until_now, step, wanted",
    [
        (COSINE, 200, 100, 100, {100: rate_of(COSINE, 100, 99), 200: 0.1}),
        (COSINE, 155, 100, 55, {55: 0.5657, 105: (0.5657 + 0.1) / 2, 155: 0.1, 200: 0.1}),
        (COSINE, 60, 100, 55, {55: 0.5657, 60: 0.1}),
        (WSD, 200, 100, 50, {50: 1.0, 119: 1.0, 120: 1.0, 160: 0.55, 200: 0.1}),
        (WSD, 200, 100, 80, {80: 0.5725, 120: 0.5725, 160: (0.5725 + 0.1) / 2, 200: 0.1}),
        (WSD, 85, 100, 80, {80: 0.5725, 85: 0.1}),
        (CONSTANT, 200, 100, 50, {50: 1.0, 199: 1.0}),
    ],
    ids=[
        "cosine that has ended",
        "cosine half way",
        "shorter cosine",
        "wsd before",
        "wsd in",
        "shorter wsd",
        "constant",
    ],
)
def test_a_continued_schedule_by_hand(config, steps, until_now, step, wanted):
    before, config = config, go_on(config, steps, until_now, step)
    assert config.continued == (step, rate_of(before, until_now, step - 1))
    rates = jax.jit(jax.vmap(make_schedule(config, steps)))(np.arange(201))
    for at, rate in wanted.items():
        np.testing.assert_allclose(rates[at], rate, rtol=2e-4, err_msg=f"{at=}")
    for at in range(0, 201, 20):
        np.testing.assert_allclose(rates[at], rate_of(config, steps, at), rtol=1e-5)


@pytest.mark.parametrize("config", [COSINE, WSD], ids=["cosine", "wsd"])
def test_a_run_continued_twice_never_goes_up_again(config):
    once = go_on(config, 200, 100, 100)
    twice = go_on(once, 400, 200, 150)
    rates = [rate_of(config, 100, step) for step in range(100)]
    rates += [rate_of(once, 200, step) for step in range(100, 150)]
    rates += [rate_of(twice, 400, step) for step in range(150, 401)]
    assert max(b / a for a, b in zip(rates[10:], rates[11:], strict=False)) <= 1 + 1e-12, "after warm-up"
    assert rates[400] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "steps, step, on_new_steps, before, wanted",
    [
        (100, 60, "continue", None, None),
        (100, 60, "restate", (50, 0.3), (50, 0.3)),
        (200, 60, "restate", (50, 0.3), None),
        (200, 100, "continue", (50, 0.1), (100, 0.1)),
        (200, 5, "continue", None, None),
    ],
    ids=["the same", "the same again", "restated", "continued again", "in warm-up"],
)
def test_which_continuation_is_kept(steps, step, on_new_steps, before, wanted):
    saved = dataclasses.replace(COSINE, continued=before)
    now = dataclasses.replace(COSINE, on_new_steps=on_new_steps)
    assert continued(now, steps, saved, 100, step).continued == wanted


def test_a_rate_that_was_lowered_lowers_a_continued_schedule_alike():
    config = go_on(COSINE, 200, 100, 50)
    lower = dataclasses.replace(config, learning_rate=0.5)
    assert rate_of(lower, 200, 150) == pytest.approx(rate_of(config, 200, 150) / 2)
    both = continued(dataclasses.replace(lower, continued=None), 200, COSINE, 100, 50)
    assert both == lower and "0.322 in step 51, 0.5 times as high: it goes on" in describe(both, 200, COSINE, 100, 50)


# As it is told


@pytest.mark.parametrize(
    "config, steps, step, said",
    [
        (
            COSINE,
            200,
            100,
            "0.1 in step 100, the last one made, and 0.587 in step 101, 5.9 times as high: the schedule is that of a run of "
            "200 steps now, not 100, and falls to 0.1 at the end; --optimizer.on-new-steps continue goes on from the rate "
            "reached instead, and stays at 0.1 to the end",
        ),
        (
            WSD,
            200,
            100,
            "0.123 in step 100, the last one made, and 1 in step 101, 8.2 times as high: the schedule is that of a run of "
            "200 steps now, not 100, and falls to 0.1 between step 120 and the end; --optimizer.on-new-steps continue goes "
            "on from the rate reached instead, and falls to 0.1 between step 120 and the end; --from-step takes a checkpoint "
            "of step 60 or before, where the decay had not begun",
        ),
        (
            WSD,
            200,
            50,
            "1 in step 50, the last one made, and 1 in step 51: the schedule is that of a run of 200 steps now, not 100, and "
            "falls to 0.1 between step 120 and the end",
        ),
        (
            dataclasses.replace(WSD, on_new_steps="continue"),
            200,
            80,
            "0.573 in step 80, the last one made, and 0.573 in step 81: it goes on from what was reached, and falls to 0.1 "
            "between step 120 and the end",
        ),
        (
            dataclasses.replace(COSINE, warmup_steps=40),
            200,
            20,
            "0.5 in step 20, the last one made, and 0.525 in step 21: the schedule is that of a run of 200 steps now, not "
            "100, and rises to 1 at step 40",
        ),
        (COSINE, 100, 60, None),
        (COSINE, 100, 100, None),
    ],
    ids=["cosine", "wsd", "wsd before its decay", "continued", "in warm-up", "the same", "the same, ended"],
)
def test_both_rates_are_told_with_what_can_be_chosen(config, steps, step, said):
    before = dataclasses.replace(config, on_new_steps="restate")
    found = describe(continued(config, steps, before, 100, step), steps, before, 100, step)
    assert found == (said and f"learning rate: {said}")


def test_to_continue_with_another_learning_rate_goes_on_from_its_part():
    lower = dataclasses.replace(COSINE, on_new_steps="continue", learning_rate=0.1)
    assert describe(continued(lower, 200, COSINE, 100, 100), 200, COSINE, 100, 100) == (
        "learning rate: 0.1 in step 100, the last one made, and 0.01 in step 101, 0.1 times as high: it goes on from the "
        "part of optimizer.learning_rate that was reached, 0.1, and stays at 0.01 to the end"
    )


def test_another_learning_rate_is_told():
    said = describe(dataclasses.replace(CONSTANT, learning_rate=0.5), 100, CONSTANT, 100, 60)
    assert said == (
        "learning rate: 1 in step 60, the last one made, and 0.5 in step 61, 0.5 times as high: "
        "optimizer.learning_rate or its schedule was changed"
    )


def test_a_checkpoint_of_before_these_fields_is_understood():
    config = dataclasses.replace(load_experiment(TINY), steps=24)
    saved = to_json(dataclasses.replace(config, steps=12))
    del saved["optimizer"]["on_new_steps"], saved["optimizer"]["continued"]
    same, (said,) = resumed(config, saved, 12)
    assert same == config and said.startswith("learning rate: 0.00") and "in step 13" in said


# In runs


@pytest.fixture(scope="module")
def config(work):
    tiny = load_experiment(TINY)
    attention = dataclasses.replace(tiny.model, pattern=tiny.model.pattern[1:])
    return dataclasses.replace(
        tiny,
        model=attention,
        data=dataclasses.replace(tiny.data, train=(str(work / "text"),)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        steps=6,
        accumulate=1,
        checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
        eval_every_steps=50,
    )


def with_steps(config, steps, choice="restate"):
    return dataclasses.replace(
        config, steps=steps, optimizer=dataclasses.replace(config.optimizer, on_new_steps=choice)
    )


@pytest.mark.slow
def test_a_resumed_run_says_its_rates_keeps_the_choice_and_is_exact_when_interrupted_again(
    config, tmp_path, monkeypatch, capsys
):
    make_step = functools.cache(loop.make_train_step)
    monkeypatch.setattr(loop, "make_train_step", lambda config: make_step(with_steps(config, config.steps)))
    monkeypatch.setattr(loop, "make_eval_step", functools.cache(loop.make_eval_step))
    monkeypatch.setattr(loop, "finish", lambda *_: "")
    longer = with_steps(config, 12, "continue")
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    capsys.readouterr()
    train(longer, tmp_path / "whole", resume=True)
    out = " ".join(capsys.readouterr().out.split())
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    said = f"learning rate: {rates[5]:.3g} in step 6, the last one made, and {rates[6]:.3g} in step 7"
    assert f"{said}: it goes on from what was reached, and falls to 0.001 at the end" in out
    assert rates[6] == pytest.approx(rates[5]) and min(rates) == rates[-1]
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["steps"] == 12 and saved["optimizer"]["continued"] == pytest.approx([6, 100 * rates[5]])

    for after in (9, None):  # killed after the save of step 9; then to the end, without the option
        with monkeypatch.context() as patch:
            if after:
                patch.setattr(loop.CheckpointStore, "save", _dies_after(after, loop.CheckpointStore.save))
                with pytest.raises(KeyboardInterrupt):
                    train(longer, tmp_path / "again", resume=True)
            else:
                train(with_steps(config, 12), tmp_path / "again", resume=True)
    lines = [
        {
            line["step"]: (line["loss"], line["learning_rate"])
            for line in read_metrics(folder)
            if line["kind"] == "train"
        }
        for folder in (tmp_path / "whole", tmp_path / "again")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 12


def _dies_after(step, save):
    def save_and_die(store, at, *rest):
        save(store, at, *rest)
        if at == step:
            store.wait()
            raise KeyboardInterrupt

    return save_and_die

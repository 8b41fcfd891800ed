"""The experiment of random facts: what it counts, and that its models cost the same."""

import importlib.util
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models.accounting import account

FILE = Path(__file__).parents[1] / "experiments" / "random_facts.py"


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("random_facts", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bits_of_models_that_know_all_half_and_nothing(experiment):
    of = lambda bits: experiment.stored_bits(jnp.full(10, bits * math.log(2)))
    assert of(0.0) == 80
    assert of(4.0) == pytest.approx(40)
    assert of(8.0) == pytest.approx(0, abs=1e-4) and of(9.0) == 0


@pytest.mark.slow
def test_models_cost_the_same_and_read_as_many_parameters(experiment):
    memory, dense = (account(experiment.models()[name], 2) for name in ("memory", "feed-forward"))
    assert dense.forward_flops == pytest.approx(memory.forward_flops, rel=0.02)
    assert dense.n_active_parameters == pytest.approx(memory.n_active_parameters, rel=0.02)
    assert memory.n_parameters > 20 * dense.n_parameters


def test_facts_follow_from_nothing(experiment):
    facts = experiment.draw_facts(1000, seed=3)
    assert len(np.unique(facts[:, 0] * 256 + facts[:, 1])) == 1000
    assert facts.min() >= 0 and facts.max() == 255
    batch = experiment.as_batch(jnp.asarray(facts[None, :4]))
    np.testing.assert_array_equal(batch.counts, np.broadcast_to([False, True], (1, 4, 2)))
    np.testing.assert_array_equal(batch.targets[0, :, 1], facts[:4, 2])
    with pytest.raises(
        ValueError, match="random facts: needs 1 to 65536 facts, got n=65537; there are so many subjects"
    ):
        experiment.draw_facts(65537, 0)


def test_table_and_plot(experiment, tmp_path):
    models = {name: {"flops": 46000, "parameters": 500000, "read": 1000} for name in ("feed-forward", "memory")}
    results = [
        {"model": name, "facts": n, "seed": seed, "bits": 500.0 * (1 + (name == "memory")) + seed}
        for name in models
        for n in (64, 128)
        for seed in (0, 2)
    ]
    found = {"options": {"facts": [64, 128], "steps": 20}, "models": models, "results": results}
    assert experiment.as_markdown(found).splitlines()[2] == "| 64 | 512 | 501 | 0.50 | 1,001 | 1.00 |"
    experiment.draw_plot(found, tmp_path / "facts.png")
    assert (tmp_path / "facts.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_writes_its_files_and_takes_the_better_rates(experiment, tmp_path, monkeypatch):
    learn = lambda model, n, rates, seed, o: 4.0 * n + 100 * rates[1] + seed
    monkeypatch.setattr(experiment, "learn", learn)
    rates = ((0.01, 0.01), (0.003, 0.03))
    experiment.main(experiment.Options(facts=(64, 128), learning_rates=rates, out=str(tmp_path / "run")))
    found = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert all(result["learning_rates"] == [0.003, 0.03] for result in found["results"])
    assert [trial["bits"] for trial in found["tried"]] == [513, 515] * 2
    assert len(found["results"]) == 2 * 2 * 2
    assert (tmp_path / "run" / "facts.md").read_text() == experiment.as_markdown(found)
    assert (tmp_path / "run" / "facts.png").stat().st_size > 10_000

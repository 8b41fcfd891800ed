"""How memories are used in an evaluation: by hand, without padding, whatever the batches, on a mesh, in a run."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.word_experts import WordExpertsConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, make_mesh, param_spec, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.training.evaluation import evaluate, make_eval_step
from jaxmem.training.experiment import load_experiment
from jaxmem.training.loop import train
from jaxmem.training.memory_use import MemoryUse, memory_use
from jaxmem.training.metrics import MetricsWriter, read_metrics
from jaxmem.training.placement import on_mesh
from jaxmem.training.report import write_report
from jaxmem.training.step import merge, shifted

B, T, VOCAB = 8, 12, 64
KEYS = ProductKeysConfig(n_slots=16, n_heads=2, top_k=2, key_dim=8)
SHARED = MemoryConfig(KEYS, shared_table=True)
WORDS = WordExpertsConfig(n_experts=6, d_expert=2, placement="beside")
MODEL = DecoderConfig(
    16, 16, pattern=4 * (AttentionConfig(2),), repeats=2, vocab_size=VOCAB, memories=(SHARED, None, SHARED, WORDS)
)


def make_batches(n=2, padding=0):
    """Rows of one document each, padded to their ends with a token that is nowhere else."""
    numbers = np.random.default_rng(0)
    for _ in range(n):
        real = np.arange(T + 1) < numbers.integers(2, T + 2, (B, 1))
        tokens = np.where(real, numbers.integers(1, VOCAB, (B, T + 1)), padding)
        tokens, segments = tokens.astype(np.int32), real.astype(np.int32)
        yield {"tokens": tokens, "segment_ids": segments, "bytes": segments}


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(lambda: nnx.state(MODEL.make(rngs=nnx.Rngs(0)), nnx.Param))())


@pytest.fixture(scope="module")
def step(params):
    step = jax.jit(make_eval_step(MODEL))
    return lambda batch: step(params, batch)


@pytest.fixture(scope="module")
def found(step):
    return evaluate(step, make_batches(), MODEL, jnp.asarray).memory_use


def test_numbers_by_hand():
    own, words = np.array([[1.0, 0, 0, 3], [2, 2, 2, 2]]), np.array([[8.0, 0], [4, 4]])
    pattern, keys = 2 * (AttentionConfig(2),), ProductKeysConfig(n_slots=4, n_heads=1, top_k=1, key_dim=8)
    memories = (MemoryConfig(keys, shared_table=True), WordExpertsConfig(n_experts=2, d_expert=3))
    config = DecoderConfig(16, 16, pattern, repeats=2, memories=memories)
    use = memory_use((own, words), config, n_tokens=3)
    assert use.layers == ["0", "1", "2", "3", "shared"] and use.n_slots == [4, 2, 4, 2, 4]
    assert use.share_used == [0.5, 0.5, 1, 1, 1]
    assert use.share_within_reach == [0.75, 1, 0.75, 1, 1], "3 tokens read at most 3 of 4 slots, two layers 6"
    kl = lambda *p: math.log(len(p)) + sum(x * math.log(x) for x in p if x)
    want = [kl(0.25, 0, 0, 0.75), math.log(2), 0, 0, kl(3 / 12, 2 / 12, 2 / 12, 5 / 12)]
    np.testing.assert_allclose(use.kl_from_uniform, want, atol=1e-6)
    assert use.ranks == [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4], [1, 2], [1, 2, 3, 4]]
    np.testing.assert_allclose(use.weight_at_rank[0], [3, 1, 0, 0])
    np.testing.assert_allclose(use.weight_at_rank[4], [5 / 3, 1, 2 / 3, 2 / 3], rtol=1e-3)


def test_an_evaluation_adds_up_what_the_decoder_tells(found, params):
    sums, n_tokens = None, 0
    tell = jax.jit(lambda params, tokens, ids: merge(MODEL, params).with_memory_use(tokens, segment_ids=ids)[2])
    for batch in make_batches():
        ids = batch["segment_ids"][:, :-1]
        uses = [use for use in tell(params, batch["tokens"][:, :-1], ids) if use is not None]
        sums = uses if sums is None else [a + b for a, b in zip(sums, uses, strict=True)]
        n_tokens += np.sum(ids != 0)
    assert_same(found, memory_use(tuple(sums), MODEL, int(n_tokens)))
    assert found.layers == ["0", "2", "3", "4", "6", "7", "shared"]
    for z, heads in zip(sums, (2, 2, 1), strict=True):
        np.testing.assert_allclose(z.sum(axis=1), heads * n_tokens, rtol=1e-5)


def test_padding_does_not_count(found, step):
    def filled():
        for batch in make_batches(padding=9):
            for half in (slice(0, B, 2), slice(1, B, 2)):
                rows = {name: np.zeros_like(array) for name, array in batch.items()}
                for name, array in batch.items():
                    rows[name][: B // 2] = array[half]
                yield rows

    assert_same(evaluate(step, filled(), MODEL, jnp.asarray).memory_use, found)


MESHES = {
    "data fsdp model": MeshConfig(data=2, fsdp=2, model=2),
    "striped seq, tables by rows": MeshConfig(data=2, seq=2, model=2, layout="striped", table_rows=("data",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_finds_the_same(params, found, name):
    mesh = make_mesh(MESHES[name])
    with use_mesh(mesh, rules_of(MESHES[name])):
        step = jax.jit(make_eval_step(MODEL))
        is_param = lambda node: isinstance(node, nnx.Variable)
        place = lambda node: node.replace(jax.device_put(node[...], param_spec(node.axes, node.shape)))
        placed = jax.tree.map(place, params, is_leaf=is_param)
        again = evaluate(lambda batch: step(placed, batch), make_batches(), MODEL, on_mesh(mesh))
        seen = step(placed, jax.tree.map(on_mesh(mesh), shifted(next(make_batches(1)))))
    assert all(z.is_fully_replicated for z in seen.memory_use), "every process has all of it"
    assert_same(again.memory_use, found)


@pytest.mark.slow
def test_models_without_memories_have_no_numbers():
    plain = dataclasses.replace(MODEL, memories=())
    step = jax.jit(make_eval_step(plain))
    params = jax.jit(lambda: nnx.state(plain.make(rngs=nnx.Rngs(0)), nnx.Param))()
    found = evaluate(lambda batch: step(params, batch), make_batches(1), plain, jnp.asarray)
    assert found.memory_use == MemoryUse()


def test_an_evaluation_is_written_and_drawn(step, tmp_path):
    evaluation = evaluate(step, make_batches(), MODEL, jnp.asarray)
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("eval", 4, **dataclasses.asdict(evaluation))
    assert read_metrics(tmp_path)[0]["memory_use"] == dataclasses.asdict(evaluation.memory_use)
    page = write_report(tmp_path).read_text()
    assert "share of slots used" in page and "slot, by rank of use" in page


@pytest.mark.slow
def test_a_run_has_them_at_every_evaluation(work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    tiny = load_experiment(Path(__file__).with_name("tiny.py"))
    model = dataclasses.replace(tiny.model, memories=(None, MemoryConfig(KEYS)))
    mesh = MeshConfig(data=2, fsdp=2, model=2)
    train(dataclasses.replace(tiny, model=model, mesh=mesh, sample_tokens=0), tmp_path / "run")
    evals = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert len(evals) == 3
    for line in evals:
        use = line["memory_use"]
        assert use["layers"] == ["1"] and 0 < use["share_used"][0] <= 1 and use["kl_from_uniform"][0] >= 0
    assert "share of slots used" in (tmp_path / "run" / "report.html").read_text()


def assert_same(got: MemoryUse, want: MemoryUse):
    for name in ("layers", "n_slots", "share_used", "share_within_reach", "ranks"):
        assert getattr(got, name) == getattr(want, name), name
    np.testing.assert_allclose(got.kl_from_uniform, want.kl_from_uniform, atol=1e-5)
    for a, b in zip(got.weight_at_rank, want.weight_at_rank, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)

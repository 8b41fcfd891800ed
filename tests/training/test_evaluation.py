"""Held-out bits per byte against plain numpy, by position, with routers, padding and meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, make_mesh, param_spec, use_mesh
from jaxmem.training.evaluation import EvalStep, evaluate, make_eval_step
from jaxmem.training.placement import on_mesh
from jaxmem.training.step import shifted

B, T, VOCAB = 8, 12, 64
MODEL = DecoderConfig(
    d_model=16,
    d_ffn=16,
    pattern=(MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 4, 4, chunk_tokens=8), n_memories=3), AttentionConfig(2)),
    repeats=2,
    vocab_size=VOCAB,
)


def make_batches(n=2):
    """Packed documents, with padding in tails and in whole rows."""
    numbers = np.random.default_rng(0)
    for _ in range(n):
        lengths = numbers.integers(1, T, (B, 2)).cumsum(axis=1)
        segments = 1 + np.sum(np.arange(T + 1) >= lengths[..., None], axis=1, dtype=np.int32)
        segments[-2:] *= np.arange(T + 1) < np.array([T - 3, 0])[:, None]
        tokens = numbers.integers(0, VOCAB, (B, T + 1), dtype=np.int32)
        text = numbers.integers(
            0, 5, (B, T + 1), dtype=np.int32
        )  # the same token stands for one text here, another there
        text[:, 1:] *= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        text[:, 0] = 0
        yield {"tokens": tokens, "segment_ids": segments, "bytes": text}


def fake_step(batch):
    """A model whose nats are a known function of the target, and NaN where nothing may be read."""
    nats = np.where(batch.counts, 0.5 + batch.targets / 10, np.nan).astype(np.float32)
    return EvalStep(nats, batch, [np.array([[1.0, 2, 3], [0, 0, 0]])])


def by_hand(batches):
    """(position in the document, nats, bytes) of every target, one by one."""
    for batch in batches:
        for tokens, segments, text in zip(batch["tokens"], batch["segment_ids"], batch["bytes"], strict=True):
            position = 0
            for t in range(T):
                position = 0 if t == 0 or segments[t] != segments[t - 1] else position + 1
                if segments[t] == segments[t + 1] != 0:
                    yield position, 0.5 + tokens[t + 1] / 10, text[t + 1]


@pytest.fixture(scope="module")
def found():
    return evaluate(fake_step, make_batches(), MODEL, np.asarray)


def test_bits_per_byte_are_those_of_every_target_one_by_one(found):
    _, nats, text = np.array(list(by_hand(make_batches()))).T
    assert found.n_tokens == len(nats) and found.n_bytes == text.sum()
    assert found.loss == pytest.approx(nats.mean(), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / text.sum(), rel=1e-6)


def test_positions_weigh_to_the_total(found):
    position, nats, text = np.array(list(by_hand(make_batches()))).T
    assert found.position_edges == [0, 1, 2, 4, 8, T]
    bits = 0.0
    edges = zip(found.position_edges, found.position_edges[1:], strict=False)
    for (start, stop), bits_per_byte in zip(edges, found.bits_per_byte_by_position, strict=True):
        here = (position >= start) & (position < stop)
        assert bits_per_byte == pytest.approx(nats[here].sum() / math.log(2) / text[here].sum(), rel=1e-6)
        bits += bits_per_byte * text[here].sum()
    assert bits == pytest.approx(found.bits_per_byte * found.n_bytes)


def test_bytes_of_pieces_without_a_token_count_at_the_beginning():
    """A piece of 7 bytes without a token stands alone in a row, and one of 5 behind the document of another."""
    batch = {
        "tokens": np.array([[1, 0, 0, 0, 0], [1, 9, 9, 1, 0]]),
        "segment_ids": np.array([[1, 0, 0, 0, 0], [1, 1, 1, 2, 0]]),
        "bytes": np.array([[7, 0, 0, 0, 0], [0, 2, 3, 5, 0]]),
    }
    step = lambda batch: EvalStep(np.full((2, 4), math.log(2)), batch, [np.zeros((2, 3))])
    found = evaluate(step, [batch], MODEL, np.asarray)
    assert (found.n_bytes, found.n_tokens) == (17, 2)
    assert found.bits_per_byte == pytest.approx(2 / 17)
    assert found.bits_per_byte_by_position[:2] == pytest.approx([1 / 14, 1 / 3])


def test_router_shares_by_layer(found):
    assert found.router_layers == [0, 2], "layers 1 and 3 are attention"
    np.testing.assert_allclose(found.router_use[0], [1 / 6, 2 / 6, 3 / 6])
    assert found.router_use[1] == [0, 0, 0], "a router that has chosen nothing has no shares"
    assert found.router_top_k == [2, 2] and found.router_balance == [], "probabilities were not told"


@pytest.mark.parametrize(
    "context, edges",
    [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 4, 5])],
)
def test_edges_double_and_end_at_the_context(context, edges):
    ones = np.ones((1, context + 1), int)
    batch = {"tokens": 5 * ones, "segment_ids": ones, "bytes": np.minimum(np.arange(context + 1), 1)[None]}
    step = lambda batch: EvalStep(np.ones((1, context), np.float32), batch, [])
    one = dataclasses.replace(MODEL, pattern=(AttentionConfig(2),))
    found = evaluate(step, [batch], one, np.asarray)
    assert found.position_edges == edges and found.router_use == []
    assert found.bits_per_byte_by_position == pytest.approx([1 / math.log(2)] * (len(edges) - 1))


@pytest.mark.parametrize("batches", [0, 1])
def test_nothing_to_read(batches):
    padding = dict.fromkeys(("tokens", "segment_ids", "bytes"), np.zeros((1, 5), int))
    step = lambda batch: EvalStep(np.ones((1, 4)), batch, [np.zeros((2, 3))])
    with pytest.raises(
        ValueError, match="evaluation: needs held-out text, got none; name heldout files that have text"
    ):
        evaluate(step, [padding] * batches, MODEL, np.asarray)


# With a real model.


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(lambda: nnx.state(MODEL.make(rngs=nnx.Rngs(0)), nnx.Param))())


@pytest.fixture(scope="module")
def eval_step():
    return jax.jit(make_eval_step(MODEL))


@pytest.fixture(scope="module")
def real(params, eval_step):
    return evaluate(lambda *batch: eval_step(params, *batch), make_batches(), MODEL, jnp.asarray)


def test_every_router_has_its_own_load_balancing_loss(params, eval_step):
    """Of all batches together: M sum_m f_m P_m over the tokens of each layer."""
    steps = []

    def step(*batch):
        steps.append(eval_step(params, *batch))
        return steps[-1]

    found = evaluate(step, make_batches(), MODEL, jnp.asarray)
    chosen, probability = (
        sum(np.float64(getattr(step, name)[0]) for step in steps) for name in ("router_use", "router_probability")
    )
    n_tokens = probability.sum(axis=-1)
    np.testing.assert_allclose(chosen.sum(axis=-1), 2 * n_tokens, rtol=1e-6)
    wanted = 3 * np.sum(chosen * probability, axis=-1) / n_tokens**2
    assert wanted.shape == (2,) and np.ptp(wanted) > 1e-4
    np.testing.assert_allclose(found.router_balance, wanted, rtol=1e-5)


def test_router_shares_of_a_real_model_sum_to_one(real):
    assert real.router_layers == [0, 2]
    np.testing.assert_allclose(np.sum(real.router_use, axis=1), 1, rtol=1e-12)
    assert 0.5 < real.loss / math.log(VOCAB) < 2


def test_rows_of_padding_that_fill_a_batch_do_not_count(params, eval_step, real):
    def split():
        for batch in make_batches():
            for half in (slice(0, B, 2), slice(1, B, 2)):
                filled = {name: np.zeros_like(rows) for name, rows in batch.items()}
                for name, rows in batch.items():
                    filled[name][: B // 2] = rows[half]
                filled["tokens"][B // 2 :] = 9
                yield filled

    again = evaluate(lambda *batch: eval_step(params, *batch), split(), MODEL, jnp.asarray)
    assert_same(again, real)


def test_a_mesh_finds_the_same(params, real):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with use_mesh(mesh):
        step = jax.jit(make_eval_step(MODEL))
        is_param = lambda node: isinstance(node, nnx.Variable)
        place = lambda node: node.replace(jax.device_put(node[...], param_spec(node.axes, node.shape)))
        placed = jax.tree.map(place, params, is_leaf=is_param)
        again = evaluate(lambda *batch: step(placed, *batch), make_batches(), MODEL, on_mesh(mesh))
        batch = next(make_batches(1))
        seen = step(placed, jax.tree.map(on_mesh(mesh), shifted(batch)))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(seen)), "every process reads all of it"
    assert_same(again, real)


def assert_same(got, want):
    assert (got.n_tokens, got.n_bytes, got.router_layers) == (want.n_tokens, want.n_bytes, want.router_layers)
    np.testing.assert_array_equal(got.router_use, want.router_use)
    for name in ("loss", "bits_per_byte", "bits_per_byte_by_position"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5), name

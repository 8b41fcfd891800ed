"""Sampling: the tokens that may be drawn against a sort in numpy, and how often they are drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models.sampling import SamplingConfig, sample, truncate

VOCAB = 23
FILTERS = [
    SamplingConfig(temperature, top_k, top_p)
    for temperature in (0.3, 1.0, 2.5)
    for top_k in (None, 1, 5, VOCAB, 99)
    for top_p in (None, 1e-6, 0.3, 0.9, 1.0)
]


def make_logits(seed=0, rows=64, vocab=VOCAB):
    """Rows in turn: distinct logits, many ties, some -inf."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(rows, vocab))
    logits[1::3] = np.round(logits[1::3])
    logits[2::3][rng.random((len(logits[2::3]), vocab)) < 0.4] = -np.inf
    logits[:, 0] = 0.0
    return logits.astype(np.float32)


def oracle(logits, config):
    """The probabilities of one row, in fp64, by walking down the ranking."""
    weight = np.exp((logits.astype(np.float64) - logits.max()) / config.temperature)
    ranking = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: config.top_k]
    total, reached, kept = weight[ranking].sum(), 0.0, []
    for token in ranking:
        if kept and config.top_p is not None and reached >= config.top_p * (1 - 1e-7):
            break
        kept.append(token)
        reached += weight[token] / total
    p = np.zeros(len(logits))
    p[kept] = weight[kept]
    return p / p.sum()


@pytest.mark.parametrize("config", FILTERS, ids=lambda c: f"t{c.temperature}-k{c.top_k}-p{c.top_p}")
def test_the_same_tokens_as_a_walk_down_the_ranking(config):
    logits = make_logits()
    found = jax.nn.softmax(jax.jit(truncate, static_argnames="config")(logits, config=config), axis=-1)
    np.testing.assert_allclose(found, [oracle(row, config) for row in logits], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SamplingConfig(1.0, top_k=2), [1, 2]),
        (SamplingConfig(1.0, top_k=3), [1, 2, 4]),
        (SamplingConfig(1.0, top_p=0.25), [1]),
        (SamplingConfig(1.0, top_p=0.26), [1, 2]),
        (SamplingConfig(1.0, top_k=2, top_p=0.5), [1]),
        (SamplingConfig(1.0, top_k=2, top_p=0.51), [1, 2]),
    ],
)
def test_ties_are_cut_by_id_and_top_p_is_reached_exactly(config, kept):
    logits = jnp.array([[-jnp.inf, 0.0, -0.0, -jnp.inf, 0.0, 0.0]])  # four times a quarter
    assert np.flatnonzero(np.isfinite(truncate(logits, config)[0])).tolist() == kept


def test_greedy_is_top_k_of_one_and_the_limit_of_cold():
    logits = jnp.asarray(make_logits())
    greedy = sample(logits, jax.random.key(0), SamplingConfig(temperature=0.0))
    assert greedy.tolist() == np.argmax(logits, axis=-1).tolist()
    for config in (SamplingConfig(5.0, top_k=1), SamplingConfig(5.0, top_p=1e-6)):
        assert sample(logits, jax.random.key(1), config).tolist() == greedy.tolist()
    distinct = logits[::3]
    cold = sample(distinct, jax.random.key(1), SamplingConfig(temperature=1e-30))
    assert cold.tolist() == greedy[::3].tolist()


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(1.0), SamplingConfig(0.5), SamplingConfig(2.0, top_k=6), SamplingConfig(1.0, None, 0.8)],
    ids=lambda c: f"t{c.temperature}-k{c.top_k}-p{c.top_p}",
)
def test_tokens_are_drawn_as_often_as_they_should(config):
    """Chi-square of 40,000 draws; its standard deviation is sqrt(2 x degrees), and five of them is the bound."""
    n, row = 40_000, make_logits(3, rows=1, vocab=12)[0] / 4
    row[4] = -np.inf
    keys = jax.random.split(jax.random.key(7), 10)
    draw = jax.jit(functools.partial(sample, config=config))
    tokens = np.concatenate([draw(np.tile(row, (n // 10, 1)), key) for key in keys])
    expected = n * oracle(row, config)
    counts = np.bincount(tokens, minlength=row.size)
    assert not counts[expected == 0].any()
    likely = expected > 5
    degrees = likely.sum() - 1
    chi_square = (np.square(counts - expected)[likely] / expected[likely]).sum()
    assert degrees >= 2 and chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_rows_draw_independently_and_keys_repeat():
    logits = jnp.zeros((64, 50))
    config = SamplingConfig(1.0)
    first, again, other = (sample(logits, jax.random.key(seed), config) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) > 20

"""Generation: the text of a model without state, in constant memory, on any mesh and in any pieces."""

import gc
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.models import generation
from jaxmem.models.decoder import DecoderConfig
from jaxmem.models.generation import generate, generate_rows, generate_text, generate_texts, state_bytes
from jaxmem.models.sampling import SamplingConfig
from jaxmem.models.tokenizer import ByteTokenizer
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh

PIECE, VOCAB, CAPACITY = 16, 300, 64
GREEDY, WARM = SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.0)
MIXTURE = MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 8, 8, chunk_tokens=8))
BOUNDED = (MIXTURE, AttentionConfig(2, window=6))
HYBRID = (*BOUNDED, AttentionConfig(2), GatedDeltaNetConfig(2, 8, 8, chunk_tokens=8))


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", PIECE)


@cache
def model(pattern=HYBRID, vocab_size=VOCAB, dtype="float32"):
    """Tiny, with an output head of its own: a tied one repeats its input forever."""
    config = DecoderConfig(16, 32, pattern, vocab_size=vocab_size, dtype=dtype, tie_embeddings=False)
    return config.make(rngs=nnx.Rngs(0))


def prompt(n_tokens, vocab_size=VOCAB):
    return np.random.default_rng(n_tokens).integers(0, vocab_size, n_tokens).tolist()


@cache
def blank():
    """A model that knows nothing: all tokens are equally likely."""
    return jax.tree.map(jnp.zeros_like, model(BOUNDED))


@cache
def whole():
    """The logits of the hybrid for rows of CAPACITY tokens, without state."""
    return jax.jit(lambda tokens: model().logits(model()(tokens)[0]))


@pytest.mark.parametrize(
    "n_tokens", [1, pytest.param(2, marks=pytest.mark.slow), PIECE, PIECE + 1, PIECE + 2, 2 * PIECE + 5]
)
def test_greedy_is_the_argmax_of_forward_passes_without_state(n_tokens):
    ids = prompt(n_tokens)
    for token in generate(model(), ids, max_tokens=12, sampling=GREEDY, capacity=CAPACITY):
        row = np.pad(ids, (0, CAPACITY - len(ids)))[None]  # causal: what stands behind does not matter
        assert token == int(jnp.argmax(whole()(row)[0, len(ids) - 1]))
        ids.append(token)
    assert len(ids) == n_tokens + 12 and len(set(ids[n_tokens:])) > 3


@pytest.mark.slow
def test_the_text_does_not_depend_on_the_pieces_or_on_the_capacity(monkeypatch):
    ids = prompt(40)
    pieces = list(generate(model(), ids, max_tokens=20, sampling=WARM, capacity=CAPACITY))
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 48)
    assert list(generate(model(), ids, max_tokens=20, sampling=WARM)) == pieces


@pytest.mark.parametrize("window", [4, None], ids=["bounded", "growing"])
def test_three_programs_serve_every_prompt(window):
    """One makes the empty state, one reads, one takes steps; a cache that grows has room for prompts of similar lengths."""
    programs = lambda: [f._cache_size() for f in (generation._empty, generation._read, generation._step)]
    fresh = DecoderConfig(8, 8, (AttentionConfig(1, window=window),), vocab_size=VOCAB).make(rngs=nnx.Rngs(1))
    before = programs()
    for n_tokens in (1, 7, PIECE, 3 * PIECE):
        for seed in (0, 1):
            list(generate(fresh, prompt(n_tokens), max_tokens=8, seed=seed))
    assert programs() == [n + 1 for n in before]


def test_the_seed_decides_and_a_longer_text_starts_as_the_shorter():
    text = lambda n, seed, **fields: list(
        generate(model(), prompt(5), max_tokens=n, seed=seed, capacity=CAPACITY, **fields)
    )
    assert text(20, 0, sampling=WARM)[:12] == text(12, 0, sampling=WARM)
    assert text(20, 0, sampling=WARM) != text(20, 1, sampling=WARM)
    assert text(20, 1, sampling=SamplingConfig(5.0, top_k=1)) == text(20, 2, sampling=GREEDY)


def test_several_prompts_at_once_are_each_alone():
    """Of unequal lengths, also over several pieces; the seed of row r is seed + r; a row that has stopped says no more."""
    prompts = [prompt(1), prompt(2 * PIECE + 5), prompt(7), prompt(7)]
    options = {"max_tokens": 12, "sampling": WARM, "capacity": CAPACITY}
    alone = [
        list(generate(model(), row, seed=2**32 - 2 + r - 2**32 * (r > 1), **options)) for r, row in enumerate(prompts)
    ]
    together = generate_rows(model(), prompts, seed=2**32 - 2, **options)
    assert list(map(list, zip(*together, strict=True))) == alone
    assert alone[2] != alone[3] and together.statistics.n_tokens == 48
    stop = alone[1][4]
    rows = list(generate_rows(model(), prompts, seed=2**32 - 2, stop_ids=[stop], **options))
    for r, row in enumerate(zip(*rows, strict=True)):
        end = alone[r].index(stop) if stop in alone[r] else 12
        assert list(row) == alone[r][:end] + [None] * (len(row) - end)


def test_texts_end_before_what_stops_them():
    options = {"max_tokens": 40, "sampling": WARM, "capacity": CAPACITY}
    start = ["memory", "", "né", "a"]
    whole = ["".join(generate_text(model(), ByteTokenizer(), p, seed=r, **options)) for r, p in enumerate(start)]
    assert generate_texts(model(), ByteTokenizer(), start, **options)[0] == whole
    stop = [whole[0][5:7], whole[1][9:10]]
    until = [text[: min(text.find(s) % 1000 for s in stop)] for text in whole]
    texts, statistics = generate_texts(model(), ByteTokenizer(), start, stop=stop, **options)
    assert texts == until != whole and statistics.n_tokens <= 160
    streamed = [
        "".join(generate_text(model(), ByteTokenizer(), p, seed=r, stop=stop, **options)) for r, p in enumerate(start)
    ]
    assert streamed == until


def test_draws_at_successive_indices_differ():
    tokens = list(generate(blank(), [0], max_tokens=200, sampling=WARM))
    assert len(set(tokens)) > 100 and max(tokens.count(token) for token in set(tokens)) < 8


@pytest.mark.parametrize(
    "pattern", [pytest.param(BOUNDED, id="bounded"), pytest.param(HYBRID, id="growing", marks=pytest.mark.slow)]
)
def test_memory_is_constant(pattern):
    tokens = generate(model(pattern), prompt(4), max_tokens=60, sampling=WARM, capacity=CAPACITY)

    def live():
        gc.collect()
        return sorted((a.shape, str(a.dtype)) for a in jax.live_arrays())

    next(tokens), next(tokens)
    before = live()
    for _ in range(50):
        next(tokens)
    assert live() == before


def test_only_allowed_tokens_are_drawn_and_a_stop_token_ends():
    odd = np.arange(VOCAB) % 2 == 1
    tokens = list(generate(blank(), prompt(5), max_tokens=60, sampling=WARM, allowed=odd))
    assert len(set(tokens)) > 30 and all(token % 2 for token in tokens)
    stop = tokens[20]
    stopped = generate(blank(), prompt(5), max_tokens=60, sampling=WARM, allowed=odd, stop_ids=[stop])
    assert list(stopped) == tokens[: tokens.index(stop)]


def test_text_is_of_whole_characters_without_bos_and_ids_that_the_tokenizer_lacks():
    """The blank model would draw each of the 45 forbidden tokens about once in 300."""
    for start in ("", "né"):
        text = generate_text(blank(), ByteTokenizer(), start, max_tokens=300, sampling=WARM)
        pieces = list(text)
        ids = [255, *start.encode()]
        expected = list(generate(blank(), ids, max_tokens=300, sampling=WARM, allowed=np.arange(VOCAB) < 255))
        assert "".join(pieces) == bytes(expected).decode(errors="replace") and all(pieces) and len(pieces) > 100
        assert (text.statistics.prompt_tokens, text.statistics.n_tokens) == (len(ids), 300)


def test_statistics_grow_while_it_runs():
    tokens = generate(model(), prompt(9), max_tokens=5, sampling=WARM, capacity=CAPACITY)
    state = model().init_state(1, capacity=CAPACITY)
    assert tokens.statistics.state_bytes == state_bytes(state) == sum(a.nbytes for a in jax.tree.leaves(state))
    assert (tokens.statistics.prompt_tokens, tokens.statistics.n_tokens, tokens.statistics.tokens_per_s) == (9, 0, 0)
    next(tokens), next(tokens)
    assert tokens.statistics.n_tokens == 2 and tokens.statistics.prefill_s > 0
    assert len(list(tokens)) == 3 and tokens.statistics.tokens_per_s > 0
    assert re.fullmatch(
        r"5 tokens, [\d,.]+ tokens/s; state [\d,]+ bytes; prompt of 9 tokens read in [\d.]+ s", str(tokens.statistics)
    )


@pytest.mark.slow
def test_bfloat16():
    pattern = (MIXTURE, AttentionConfig(2))
    tokens = list(generate(model(pattern, dtype="bfloat16"), prompt(40), max_tokens=20, sampling=WARM))
    assert len(tokens) == 20 and all(0 <= token < VOCAB for token in tokens)
    half, full = (
        generate(model(pattern, dtype=dtype), [0], max_tokens=20).statistics for dtype in ("bfloat16", "float32")
    )
    assert half.state_bytes < full.state_bytes


@pytest.mark.slow
def test_a_mesh_writes_the_same_text():
    """The one row of a batch cannot be split: it stands whole on all devices that share batches."""
    arguments = {"prompt_ids": prompt(20), "max_tokens": 10, "sampling": WARM, "capacity": CAPACITY}
    expected = list(generate(model(), **arguments))
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        tokens = generate(model().config.make(rngs=nnx.Rngs(0)), **arguments)
        text = [next(tokens)]
    assert text + list(tokens) == expected  # also when it is read outside the mesh


def test_a_cache_below_prompt_and_text_is_refused_where_something_grows():
    with pytest.raises(ValueError) as error:
        generate(model(), prompt(30), max_tokens=10, capacity=20)
    assert str(error.value) == (
        "generate: needs a cache for prompt + max_tokens = 30 + 10 = 40 tokens, because the model has full attention, "
        "got capacity=20 (the prompt alone is longer than the cache); raise capacity or leave it out, "
        "shorten the prompt, or lower max_tokens"
    )
    with pytest.raises(ValueError, match=r"30 \+ 10 = 40 .* got capacity=39 \(the text would outgrow it\)"):
        generate(model(), prompt(30), max_tokens=10, capacity=39)
    generate(model(), prompt(30), max_tokens=10, capacity=40)
    ignored, default = (
        generate(model(BOUNDED), prompt(30), max_tokens=9, sampling=WARM, capacity=c) for c in (1, None)
    )
    assert list(ignored) == list(default)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt_ids": []}, r"a prompt of one or more token ids, got prompt_ids of shape \(0,\); start it with"),
        ({"prompt_ids": [1.7, 2]}, r"integers as token ids, got prompt_ids of dtype float64; encode"),
        ({"prompt_ids": [2**32 + 1]}, r"token ids in 0\.\.299, got prompt_ids=4294967297\.\.4294967297; use"),
        ({"prompt_ids": [1, VOCAB]}, r"token ids in 0\.\.299, got prompt_ids=1\.\.300; use the tokenizer"),
        ({"max_tokens": 0}, "max_tokens to be an integer >= 1, got max_tokens=0; "),
        ({"max_tokens": 1.5}, "max_tokens to be an integer >= 1, got max_tokens=1.5; "),
        ({"capacity": "9"}, "capacity to be an integer >= 1 or None, got capacity='9'; "),
        ({"seed": -1}, "seed to be an integer .*, got seed=-1; "),
        ({"allowed": np.zeros(VOCAB, bool)}, r"one or more of 300 tokens .* \(300,\) with 0 True; pass one bool"),
        ({"allowed": np.ones(VOCAB + 1, bool)}, r"one or more of 300 tokens .* \(301,\) with 301 True; pass one bool"),
    ],
    ids=[
        "empty",
        "no-integers",
        "wide-id",
        "unknown-id",
        "no-tokens",
        "half-tokens",
        "text",
        "no-seed",
        "nothing-allowed",
        "other-vocabulary",
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_to_do(arguments, text):
    with pytest.raises(ValueError, match=f"^generate: needs {text}"):
        generate(model(), **{"prompt_ids": [1], "max_tokens": 1} | arguments)


def test_a_tokenizer_that_is_too_large_is_refused():
    with pytest.raises(
        ValueError, match="a tokenizer of at most 60 tokens, the model's vocabulary, got vocab_size=256"
    ):
        generate_text(model(vocab_size=60), ByteTokenizer(), "x", max_tokens=1)


def test_nan_is_an_error_and_no_token():
    broken = jax.tree.map(jnp.copy, model(BOUNDED))
    broken.norm.scale[...] = jnp.full_like(broken.norm.scale[...], jnp.nan)
    with pytest.raises(ValueError, match="logits without NaN, got NaN for the token of index=3; check the model's"):
        list(generate(broken, prompt(3), max_tokens=5, sampling=WARM))

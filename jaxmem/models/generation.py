"""A decoder continues a prompt: the prompt is read in pieces of one size, then every token is one step of its state.

Two programs serve a prompt of any length, or several: one reads PREFILL_TOKENS tokens, filled up with padding, which no
mixer sees; the other takes one token to the next. Both update the state in place, so a long text takes the memory of
a short one. A step is dispatched before the token of the step before is read, so the device does not wait for the host,
and every token can be shown as soon as it is there.

The draw at index i of row r has the key fold_in(seed + r, i): a text depends on model, prompt, sampling and seed only.

Under a mesh the rows stand whole on all devices of the axes that split batches; heads, ffn and vocabulary are split
as ever. So a model too large for one device generates on its training mesh, and a small one should do so without a mesh.

Cost: a step is the model's forward FLOPs for one token, and reads its parameters and state once.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.fields import Count, Seed, check
from jaxmem.models.decoder import Decoder
from jaxmem.models.sampling import SamplingConfig, sample
from jaxmem.models.tokenizer import Tokenizer
from jaxmem.sharding import current_mesh, current_rules, use_mesh
from jaxmem.typing import Array, Bool, Int, Key, PyTree

PREFILL_TOKENS = 128
"""Tokens of a prompt read at once."""
NOT_A_TOKEN = -1
"""What a step gives for logits that hold NaN."""
ENDLESS_TOKENS = 1 << 40
"""More than any window holds."""

_STEPS_BETWEEN_LOOKS = 16
"""For texts to stop at, in several rows at once."""
LEAST_CAPACITY = 256
"""Of a cache that grows, if nobody says another."""

Item = TypeVar("Item")


@dataclasses.dataclass
class Statistics:
    """What a generation has cost so far."""

    prompt_tokens: int
    """BOS included."""
    state_bytes: int
    """Of the whole state, the same from the first token to the last."""
    prefill_s: float = 0.0
    """Seconds to read the prompt, its last token excepted; with compilation, where the program is new."""
    compiled: bool = False
    """Whether the program that reads was new."""
    n_tokens: int = 0
    """Tokens made so far."""
    n_first: int = 0
    """Of them, those of the first step."""
    decode_s: float = 0.0
    """Seconds between the first and the newest token, those included that the reader of the tokens took."""

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token, whose step may have had to be compiled; 0 until there are two."""
        return (self.n_tokens - self.n_first) / self.decode_s if self.n_tokens > self.n_first else 0.0

    def __str__(self) -> str:
        return (
            f"{self.n_tokens:,} tokens, {self.tokens_per_s:,.1f} tokens/s; state {self.state_bytes:,} bytes; "
            f"prompt of {self.prompt_tokens:,} tokens read in {self.prefill_s:.2f} s"
            + (", compilation included" if self.compiled else "")
        )


class Generation(Iterator[Item], Generic[Item]):
    """Token ids, or pieces of text, as they are made; work starts with the first `next` and may be left at any time."""

    def __init__(self, items: Iterator[Item], statistics: Statistics):
        self.statistics = statistics
        self._items = items

    def __next__(self) -> Item:
        return next(self._items)


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    capacity: int | None = None,
    stop_ids: Sequence[int] = (),
    allowed: Bool[np.ndarray, "Vocab"] | None = None,
) -> Generation[int]:
    """The tokens behind a prompt, one after the other.

    Args:
      prompt_ids: the tokens to continue, BOS included; at least one.
      max_tokens: tokens to make, >= 1.
      seed: of the draws.
      capacity: tokens that caches without a window hold; None is prompt + max_tokens, rounded up so that prompts of
        similar lengths share their programs. Models whose state does not grow take no notice of it, and compile once.
      stop_ids: tokens that end the text; the one that does is not among those given out.
      allowed: tokens that may be drawn; None is all.

    Returns: an iterator of token ids with `statistics`.

    Raises: ValueError for prompt_ids, max_tokens or `allowed` that are none of the above; if the model has caches that
    grow and the capacity is below prompt + max_tokens; and, while iterating, if the model's logits hold NaN.

    >>> from flax import nnx
    >>> from jaxmem.layers.attention import AttentionConfig
    >>> from jaxmem.models.decoder import DecoderConfig
    >>> config = DecoderConfig(d_model=8, d_ffn=8, pattern=(AttentionConfig(n_heads=1),))
    >>> tokens = generate(config.make(rngs=nnx.Rngs(0)), [255], max_tokens=3)
    >>> len(list(tokens)), tokens.statistics.prompt_tokens
    (3, 1)
    """
    rows = generate_rows(
        model,
        [prompt_ids],
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        capacity=capacity,
        stop_ids=stop_ids,
        allowed=allowed,
    )
    return Generation((row[0] for row in rows), rows.statistics)


def generate_rows(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    capacity: int | None = None,
    stop_ids: Sequence[int] = (),
    allowed: Bool[np.ndarray, "Vocab"] | None = None,
) -> Generation[list[int | None]]:
    """What stands behind several prompts of any lengths, at once: for every step a list of one token per prompt.

    Row r gets what `generate` makes of its prompt with the seed seed + r, so that equal prompts get texts of their own.

    Args: see `generate`; a row that has met one of stop_ids has None from then on.

    Returns: an iterator of lists; the statistics count the tokens of all rows.

    Raises: as `generate`.

    Cost: a step reads the parameters once for all rows.

    >>> from flax import nnx
    >>> from jaxmem.layers.attention import AttentionConfig
    >>> from jaxmem.models.decoder import DecoderConfig
    >>> model = DecoderConfig(d_model=8, d_ffn=8, pattern=(AttentionConfig(n_heads=1),)).make(rngs=nnx.Rngs(0))
    >>> [len(row) for row in generate_rows(model, [[255], [255, 7, 8]], max_tokens=3)]
    [2, 2, 2]
    """
    max_tokens = check("generate", "max_tokens", max_tokens, Count)
    capacity = check("generate", "capacity", capacity, Count | None)
    seed = check("generate", "seed", seed, Seed)
    rows = [_checked_prompt(prompt, model.config.vocab_size) for prompt in prompts]
    if not rows:
        raise ValueError("generate: needs one or more prompts, got none; pass [[bos_id]] for a text without one")
    allowed = _checked_allowed(allowed, model.config.vocab_size)
    on_mesh = _with_whole_batch()
    capacity = on_mesh(_checked_capacity, model, max(row.size for row in rows), max_tokens, capacity)
    statistics = Statistics(sum(row.size for row in rows), state_bytes(on_mesh(_shapes, model, len(rows), capacity)))

    def steps() -> Iterator[list[int | None]]:
        start_s, n_programs = time.perf_counter(), _read._cache_size()
        state = on_mesh(_empty, model, batch=len(rows), capacity=capacity)
        for piece, segment_ids in _pieces([row[:-1] for row in rows]):
            state = on_mesh(_read, model, state, piece, segment_ids)
        jax.block_until_ready(state)
        statistics.prefill_s, statistics.compiled = time.perf_counter() - start_s, _read._cache_size() > n_programs

        last, index = np.array([row[-1] for row in rows], np.int32), np.array([row.size for row in rows], np.int32)
        keys = jax.vmap(jax.random.key)((seed + np.arange(len(rows))).astype(np.uint32))
        last, index, may, keys = on_mesh(jax.device_put, (last, index, allowed, keys))
        draw = functools.partial(on_mesh, _step, model, sampling=sampling, keys=keys, allowed=may)
        upcoming, index, state = draw(state=state, token=last, index=index)
        is_open = np.ones(len(rows), bool)
        for n_made in range(max_tokens):
            current = upcoming
            if n_made + 1 < max_tokens:
                upcoming, index, state = draw(state=state, token=current, index=index)
            tokens = np.asarray(current)
            now_s = time.perf_counter()
            if n_made == 0:
                start_s = now_s
            statistics.n_tokens, statistics.decode_s = statistics.n_tokens + int(is_open.sum()), now_s - start_s
            statistics.n_first = statistics.n_first or int(is_open.sum())
            for row in np.flatnonzero(is_open & (tokens == NOT_A_TOKEN)):
                raise ValueError(
                    f"generate: needs logits without NaN, got NaN for the token of index={rows[row].size + n_made}; "
                    "check the model's parameters, training may have diverged"
                )
            is_open &= ~np.isin(tokens, np.asarray(stop_ids, np.int64))
            if not is_open.any():
                return
            yield [token if go else None for token, go in zip(tokens.tolist(), is_open.tolist(), strict=True)]

    return Generation(steps(), statistics)


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    capacity: int | None = None,
    stop: Sequence[str] = (),
) -> Generation[str]:
    """The text behind a prompt, in whole characters as they come; an empty prompt starts a document.

    BOS stands before the prompt. Only tokens that stand for text are drawn: not BOS, nor ids that the tokenizer lacks.

    Args:
      stop: texts before the first of which the text ends.
      others: see `generate`.

    Returns: an iterator of str with `statistics`.

    Raises: ValueError as `generate`, for an empty stop, and if the tokenizer has ids that the model lacks.
    """
    allowed, prompt_ids = _text_of(model, tokenizer), _encoded(tokenizer, prompt)
    stop = _checked_stop(stop)
    tokens = generate(
        model,
        prompt_ids,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        capacity=capacity,
        allowed=allowed,
    )
    return Generation(until(tokenizer.stream(tokens, after=prompt_ids), stop), tokens.statistics)


def generate_texts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    capacity: int | None = None,
    stop: Sequence[str] = (),
) -> tuple[list[str], Statistics]:
    """The texts behind several prompts, made at once; text r is that of `generate_text` with the seed seed + r.

    Args, Raises: as `generate_text`.
    """
    if isinstance(prompts, str):
        raise ValueError(f"generate: needs a list of prompts, got the text {prompts[:40]!r}; write [prompt]")
    allowed, encoded = _text_of(model, tokenizer), [_encoded(tokenizer, prompt) for prompt in prompts]
    stop = _checked_stop(stop)
    steps = generate_rows(
        model, encoded, max_tokens=max_tokens, sampling=sampling, seed=seed, capacity=capacity, allowed=allowed
    )
    made: list[list[int]] = [[] for _ in encoded]
    text_of = lambda r: "".join(until(tokenizer.stream(made[r], after=encoded[r]), stop))
    is_stopped = lambda r: len(text_of(r)) < len("".join(tokenizer.stream(made[r], after=encoded[r])))
    for n_made, row in enumerate(steps, start=1):
        for ids, token in zip(made, row, strict=True):
            ids.append(token)
        if stop and n_made % _STEPS_BETWEEN_LOOKS == 0 and all(map(is_stopped, range(len(made)))):
            break
    return [text_of(r) for r in range(len(made))], steps.statistics


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """A text in pieces up to the first of some texts; what may be the beginning of one is held back until that is clear.

    >>> list(until(["ab", "c\\n", "\\nd"], ["\\n\\n"]))
    ['ab', 'c']
    """
    held = ""
    for piece in pieces:
        held += piece
        if ends := [held.index(text) for text in stop if text in held]:
            if end := min(ends):
                yield held[:end]
            return
        begun = max(
            (n for text in stop for n in range(1, min(len(text), len(held) + 1)) if held.endswith(text[:n])), default=0
        )
        if ready := held[: len(held) - begun]:
            yield ready
            held = held[len(ready) :]
    if held:
        yield held


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """With BOS."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]


def _text_of(model: Decoder, tokenizer: Tokenizer) -> Bool[np.ndarray, "Vocab"]:
    """The tokens of the model that stand for text."""
    missing = model.config.vocab_size - tokenizer.vocab_size
    if missing < 0:
        raise ValueError(
            f"generate: needs a tokenizer of at most {model.config.vocab_size} tokens, the model's vocabulary, "
            f"got vocab_size={tokenizer.vocab_size}; use the tokenizer that the model was trained with"
        )
    return np.pad(tokenizer.is_text, (0, missing))


def _checked_stop(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"generate: needs stop to be a list of texts, none of them empty, got {stop!r}; change it")
    return stop


def state_bytes(state: PyTree) -> int:
    """Bytes of a state's arrays, which may be abstract; of sharded ones, on all devices together, copies not counted.

    >>> state_bytes({"memory": jnp.zeros((2, 3)), "length": jnp.zeros(2, jnp.int32)})
    32
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _shapes(model: Decoder, batch: int, capacity: int) -> PyTree:
    """Of the state of so many rows."""
    return jax.eval_shape(lambda: model.init_state(batch, capacity=capacity))


@functools.partial(jax.jit, static_argnames=("batch", "capacity"))
def _empty(model: Decoder, *, batch: int, capacity: int) -> PyTree:
    """The state of rows that have seen nothing."""
    return model.init_state(batch, capacity=capacity)


@functools.partial(jax.jit, donate_argnames="state")
def _read(model: Decoder, state: PyTree, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> PyTree:
    """The state behind a piece of the prompts."""
    return model(tokens, state, segment_ids=segment_ids)[1]


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def _step(
    model: Decoder,
    state: PyTree,
    token: Int[Array, "B"],
    index: Int[Array, "B"],
    *,
    sampling: SamplingConfig,
    keys: Key[Array, "B"],
    allowed: Bool[Array, "Vocab"],
) -> tuple[Int[Array, "B"], Int[Array, "B"], PyTree]:
    """The tokens of this index in each row, drawn behind `token`; the index of the next, and the state."""
    hidden, state = model(token[:, None], state)
    logits = model.logits(hidden)[:, 0]
    draw = lambda logits, key, index: sample(logits[None], jax.random.fold_in(key, index), sampling)[0]
    drawn = jax.vmap(draw)(jnp.where(allowed, logits, -jnp.inf), keys, index)
    drawn = jnp.where(jnp.isnan(logits).any(axis=-1), NOT_A_TOKEN, drawn)
    return drawn, index + 1, state


def _pieces(prompts: list[Int[np.ndarray, "_"]]) -> Iterator[tuple[Int[np.ndarray, "B C"], Int[np.ndarray, "B C"]]]:
    """The prompts in pieces of PREFILL_TOKENS with their segment ids: 1, and 0 for padding."""
    for start in range(0, max(prompt.size for prompt in prompts), PREFILL_TOKENS):
        pieces = [prompt[start : start + PREFILL_TOKENS] for prompt in prompts]
        filled = lambda piece: np.pad(piece, (0, PREFILL_TOKENS - piece.size))
        yield np.stack([filled(p) for p in pieces]), np.stack([filled(np.ones_like(p)) for p in pieces])


def _with_whole_batch() -> Callable[..., PyTree]:
    """Calls functions on the mesh in force now, under its rules, except that a batch is not split."""
    if current_mesh() is None:
        return lambda function, *args, **kwargs: function(*args, **kwargs)
    mesh, rules = jax.sharding.get_mesh(), current_rules()
    rules = dataclasses.replace(rules, activations={**rules.activations, "batch": ()})

    def call(function, *args, **kwargs):
        with use_mesh(mesh, rules):
            return function(*args, **kwargs)

    return call


def _checked_prompt(prompt_ids: Sequence[int], vocab_size: int) -> Int[np.ndarray, "T"]:
    prompt = np.asarray(prompt_ids)
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(
            f"generate: needs a prompt of one or more token ids, got prompt_ids of shape {prompt.shape}; "
            "start it with the tokenizer's bos_id"
        )
    if not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"generate: needs integers as token ids, got prompt_ids of dtype {prompt.dtype}; encode the text first"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"generate: needs token ids in 0..{vocab_size - 1}, got prompt_ids={prompt.min()}..{prompt.max()}; "
            "use the tokenizer that the model was trained with"
        )
    return prompt.astype(np.int32)


def _checked_allowed(allowed: Bool[np.ndarray, "Vocab"] | None, vocab_size: int) -> Bool[np.ndarray, "Vocab"]:
    allowed = np.ones(vocab_size, bool) if allowed is None else np.asarray(allowed, bool)
    if allowed.shape != (vocab_size,) or not allowed.any():
        raise ValueError(
            f"generate: needs one or more of {vocab_size} tokens to be allowed, got allowed of shape {allowed.shape} "
            f"with {allowed.sum()} True; pass one bool per token of the model's vocabulary"
        )
    return allowed


def _checked_capacity(model: Decoder, prompt_tokens: int, max_tokens: int, capacity: int | None) -> int:
    """The tokens that growing caches shall hold: the capacity, if it is enough, or what is needed, rounded up."""
    needed = prompt_tokens + max_tokens
    if _shapes(model, 1, ENDLESS_TOKENS) == _shapes(model, 1, ENDLESS_TOKENS + 1):
        return ENDLESS_TOKENS
    if capacity is None:
        return _rounded_up(needed)
    if capacity < needed:
        longer = (
            "the prompt alone is longer than the cache" if prompt_tokens > capacity else "the text would outgrow it"
        )
        raise ValueError(
            f"generate: needs a cache for prompt + max_tokens = {prompt_tokens} + {max_tokens} = {needed} tokens, because "
            f"the model has full attention, got capacity={capacity} ({longer}); raise capacity or leave it out, "
            "shorten the prompt, or lower max_tokens"
        )
    return capacity


def _rounded_up(n_tokens: int) -> int:
    """To the next of 256, 320, 384, 448, 512, 640, ...: by a quarter at most, and every octave has four.

    >>> [_rounded_up(n) for n in (1, 256, 257, 511, 513, 5000)]
    [256, 256, 320, 512, 640, 5120]
    """
    quarter = max(2 ** ((n_tokens - 1).bit_length() - 3), 64)
    return max(-(-n_tokens // quarter) * quarter, LEAST_CAPACITY)

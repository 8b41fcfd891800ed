"""A decoder from a pattern of blocks: x + mixer(norm(x)), then x + swiglu(norm(x)), the pattern repeated in depth. A memory
layer, or word experts, may stand in the place of a feed-forward, or beside it.

`pattern` holds the mixers of one repeat, so a hybrid is one line: `pattern=3 * (memories,) + (attention,)`. The repeats are
stacked and scanned: a program's size grows with the pattern, not with the depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, Positive, checked
from jaxmem.layers.embedding import ROWS_MULTIPLE, Embedding
from jaxmem.layers.feed_forward import SwiGLU
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.mixer import Mixer, MixerConfig, SequenceMixer, advance, init_cursor, require_per_token, said
from jaxmem.layers.norm import RMSNorm
from jaxmem.layers.word_experts import WordExperts, WordExpertsConfig
from jaxmem.recurrences.documents import ids_in_int32, in_int32, require_padding_behind
from jaxmem.sharding import ROWS, constrain, current_rules, einsum, param
from jaxmem.sharding.kinds import is_memory
from jaxmem.sharding.layouts import lay_out, restore
from jaxmem.showing import Module
from jaxmem.typing import Array, DTypeLike, Float, Int, PyTree

Remat = Literal["nothing", "dots", "block"]
Dtype = Literal["float32", "bfloat16"]
MemoryLike = MemoryConfig | WordExpertsConfig | None


@dataclasses.dataclass(frozen=True)
@checked
class DecoderConfig:
    """A decoder's shape; `make` builds it."""

    d_model: Count
    d_ffn: Count
    """Width inside the SwiGLU."""
    pattern: tuple[Any, ...]
    """Mixer configs of one repeat, first layer first."""
    repeats: Count = 1
    """How often the pattern stands; layers = repeats x len(pattern)."""
    vocab_size: Count = 256
    memories: tuple[Any, ...] = ()
    """Memory layers of one repeat: one `MemoryConfig`, `WordExpertsConfig` or None per mixer of the pattern; empty: none.
    Those with a shared table read one table, the decoder's, in all layers."""
    tie_embeddings: bool = True
    """Use the embedding table as output head."""
    norm_eps: Positive = 1e-6
    remat: Remat = "nothing"
    """What the backward pass computes again: nothing; everything but weight products (dots); whole blocks."""
    ffn_block_tokens: Count | None = None
    """Tokens of a row and device that go through a feed-forward at once, for sequences whose wide activations would not fit;
    None: all."""
    dtype: Dtype = "float32"
    """Of activations; parameters, states and statistics are fp32."""

    def __post_init__(self):
        if not self.pattern or not all(hasattr(mixer, "make") for mixer in self.pattern):
            raise ValueError(
                "DecoderConfig: needs a pattern of one or more mixer configs, "
                f"got pattern={self.pattern!r}; write e.g. 3 * (MixtureOfMemoriesConfig(),) + (AttentionConfig(n_heads=4),)"
            )
        if len(self.memories) not in (0, len(self.pattern)):
            raise ValueError(
                f"DecoderConfig: needs one entry of memories per mixer of the pattern, got {len(self.memories)} for "
                f"{len(self.pattern)}; write None where there is no memory"
            )
        if not all(memory is None or hasattr(memory, "make_table") for memory in self.memories):
            raise ValueError(
                "DecoderConfig: needs memories that are a MemoryConfig, a WordExpertsConfig or None, "
                f"got memories={self.memories!r}; write e.g. (None, memory_plus())"
            )
        sizes = {(*m.table_shape(self.d_model), m.choices[0], type(m).__name__) for m in self.shared_memories}
        if len(sizes) > 1:
            raise ValueError(
                "DecoderConfig: needs memories with a shared table to have the same slots, value_dim, heads and kind, "
                f"got {sorted(sizes, key=str)}; make them alike or give them tables of their own"
            )
        for memory in self.memories:
            n_words = len(getattr(memory, "routing", None) or ()) or self.vocab_size
            if n_words < self.vocab_size:
                raise ValueError(
                    f"DecoderConfig: needs word experts with a routing of every token, got {n_words} entries for "
                    f"vocab_size={self.vocab_size}; add the others or leave routing out"
                )

    @property
    def n_layers(self) -> int:
        return self.repeats * len(self.pattern)

    @property
    def shared_memories(self) -> tuple[Any, ...]:
        """Of one repeat, those that read the decoder's table."""
        return tuple(memory for memory in self.memories if memory is not None and memory.shared_table)

    def make(self, *, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)


class Block(Module):
    """One layer: a mixer and a feed-forward (or memory, or both), each behind a norm and beside a residual."""

    def __init__(self, mixer: MixerConfig, memory: MemoryLike, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.d_model, rngs=rngs, eps=config.norm_eps)
        self.mixer: Mixer = mixer.make(config.d_model, rngs=rngs)
        self.ffn_norm = RMSNorm(config.d_model, rngs=rngs, eps=config.norm_eps)
        self.memory = None if memory is None else memory.make(config.d_model, rngs=rngs)
        alone = memory is not None and memory.placement == "replace"
        swiglu = functools.partial(SwiGLU, config.d_model, config.d_ffn, block_tokens=config.ffn_block_tokens)
        self.ffn = None if alone else swiglu(rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: PyTree, tokens, documents, table, layer, real=None
    ) -> tuple[Array, PyTree, Array | None]:
        """documents: keywords of the mixer; "read" is for those that read documents as ours do."""
        if not isinstance(self.mixer, SequenceMixer):
            documents = {name: value for name, value in documents.items() if name != "read"}
        mixed, state = self.mixer(self.mixer_norm(x), state, **documents)
        x = x + mixed
        h = self.ffn_norm(x)
        if self.ffn is not None:
            x = x + self.ffn(h)
        use = None
        if self.memory is not None:
            words = (tokens,) if isinstance(self.memory, WordExperts) else ()
            x = x + self.memory(h, *words, table if self.memory.config.shared_table else None, layer)
            use = None if real is None else self.memory.use(h, *words, real)
        return x, state, use


class Decoder(Module):
    """Token ids in, hidden vectors out; `head` turns hidden vectors into logits. States go in and out as in a mixer.

    The state is a tuple with one entry per place of the pattern, each a mixer's state stacked over the repeats.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs)
        memories = config.memories or (None,) * len(config.pattern)
        blocks = (_block(*layer, config) for layer in zip(config.pattern, memories, strict=True))
        self.blocks = nnx.List([stack_layers(config.repeats, rngs, block) for block in blocks])
        shared = config.shared_memories
        self.table = shared[0].make_table(config.d_model, rngs=rngs) if shared else None
        self.norm = RMSNorm(config.d_model, rngs=rngs, eps=config.norm_eps)
        if not config.tie_embeddings:
            rows = -(-config.vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE
            init = nnx.initializers.truncated_normal(config.d_model**-0.5)
            self.output = param(rngs, init, (rows, config.d_model), ("vocab", "embed"), ROWS)

    @property
    def head(self) -> Float[Array, "Vocab D"]:
        """One row per token of the vocabulary, padded to a multiple of 64 rows."""
        return (self.embedding.table if self.config.tie_embeddings else self.output)[...]

    def init_state(self, batch: int, *, capacity: int | None = None, dtype: DTypeLike | None = None) -> PyTree:
        """The empty state of `batch` rows; see `Mixer.init_state`."""
        dtype = self.config.dtype if dtype is None else dtype
        return self._empty(lambda mixer: mixer.init_state(batch, capacity=capacity, dtype=dtype))

    def _empty(self, of_mixer: Callable[[Mixer], PyTree]) -> PyTree:
        layers = jnp.arange(self.config.repeats)
        return tuple(jax.vmap(lambda _, b=block: of_mixer(b.mixer))(layers) for block in self.blocks)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: PyTree | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        return self._run(tokens, state, segment_ids, positions)[:2]

    def with_memory_use(
        self,
        tokens: Int[Array, "B T"],
        state: PyTree | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree, tuple[Float[Array, "repeats M"] | None, ...]]:
        """The call, and how its memories were used: of each place of the pattern `Memory.use` over all tokens but padding,
        None where no memory stands. A number per slot and layer on every device; slots are chosen twice."""
        return self._run(tokens, state, segment_ids, positions, with_use=True)

    def _run(self, tokens, state, segment_ids, positions, with_use: bool = False):
        self._require_call(tokens, state, segment_ids, positions)
        if not tokens.size:
            return self._of_nothing(tokens, state, with_use)
        segment_ids = None if segment_ids is None else in_int32("Decoder", segment_ids)
        layout = current_rules().layout
        tokens, segment_ids, positions = (
            None if x is None else lay_out(x, layout, "batch", "time") for x in (tokens, segment_ids, positions)
        )
        if segment_ids is not None:  # what stands in padding need not be a token
            tokens = ids_in_int32(tokens)
            none = (tokens < 0) | (tokens >= self.config.vocab_size)
            tokens = jnp.where(none & (segment_ids == 0), 0, tokens)
        documents = {"segment_ids": segment_ids, "positions": positions}
        if state is None:  # once, and not in every layer
            documents["read"] = advance(init_cursor(tokens.shape[0]), segment_ids, tokens.shape[1])
        x = self.embedding(tokens, jnp.dtype(self.config.dtype))
        states = (None,) * len(self.blocks) if state is None else state

        real = (jnp.ones_like(tokens) if segment_ids is None else segment_ids) != 0 if with_use else None
        with_tables, blocks = _without_tables(tuple(self.blocks))

        def repeat(x: Array, of_layer: PyTree) -> tuple[Array, PyTree]:
            layer, blocks, states = of_layer
            after, uses = [], []
            for block, before in zip(with_tables(blocks), states, strict=True):
                x, new, use = block(x, before, tokens, documents, self.table, layer, real)
                after.append(new), uses.append(use)
            return x, (tuple(after), tuple(uses))

        layers = jnp.arange(self.config.repeats)
        x, (states, uses) = jax.lax.scan(_remat(repeat, self.config.remat), x, (layers, blocks, states))
        return self.norm(restore(x, layout, "batch", "time", "embed")), states, uses

    def _require_call(self, tokens, state, segment_ids, positions) -> None:
        if len(getattr(tokens, "shape", ())) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Decoder: needs tokens [B T] of integers, got tokens {said(tokens)}; pass token ids, one row per sequence"
            )
        for name, array in (("segment_ids", segment_ids), ("positions", positions)):
            if array is not None:
                require_per_token("Decoder", name, array, tokens.shape)
        if segment_ids is not None:
            require_padding_behind("Decoder", segment_ids)
        n = len(self.blocks)
        if state is not None and (type(state) is not tuple or len(state) != n):
            raise ValueError(
                f"Decoder: needs a state with one entry per mixer of the pattern, {n}, got state {said(state)}; "
                "pass what init_state or a call of this decoder returned, and segment_ids and positions by name"
            )

    def _of_nothing(self, tokens, state, with_use: bool):
        """Of no tokens or no rows: hidden vectors of that shape, the state as it was, no use of memories."""
        batch, n_tokens = tokens.shape
        if state is None:
            n = max(n_tokens, 1)
            capacity = lambda mixer: mixer.capacity_for(n) if isinstance(mixer, SequenceMixer) else n
            state = self._empty(lambda m: m.init_state(batch, capacity=capacity(m), dtype=self.config.dtype))
        unused = lambda memory: jnp.zeros((self.config.repeats, memory.config.use_size), jnp.float32)
        uses = tuple(unused(block.memory) if with_use and block.memory is not None else None for block in self.blocks)
        return jnp.zeros((batch, n_tokens, self.config.d_model), self.config.dtype), state, uses

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Vocab"]:
        """fp32 logits of hidden vectors, for a few tokens at a time; training uses `chunked_cross_entropy`."""
        logits = einsum("btd,vd->btv", x.astype(jnp.float32), self.head, ("batch", "time", "vocab"))
        return constrain(logits, "batch", "time", None)[..., : self.config.vocab_size]


def stack_layers(n: int, rngs: nnx.Rngs, make) -> nnx.Module:
    """n modules of one kind as one module whose parameters have a leading dimension n; for `jax.lax.scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), n))


def _without_tables(blocks: PyTree) -> tuple[Callable[[list], PyTree], list]:
    """Stacked blocks as their parameters without memory tables, and the function that makes blocks of one layer's again,
    with the tables of all layers: a scan would copy each layer's."""
    leaves, structure = jax.tree.flatten(blocks, is_leaf=lambda node: isinstance(node, nnx.Variable))
    is_table = [is_memory(leaf) for leaf in leaves]

    def with_tables(of_layer: list) -> PyTree:
        rest = iter(of_layer)
        leaves_and_kinds = zip(leaves, is_table, strict=True)
        return jax.tree.unflatten(structure, [leaf if table else next(rest) for leaf, table in leaves_and_kinds])

    return with_tables, [leaf for leaf, table in zip(leaves, is_table, strict=True) if not table]


def _block(mixer: MixerConfig, memory: MemoryLike, config: DecoderConfig):
    return lambda rngs: Block(mixer, memory, config, rngs=rngs)


def _remat(function, policy: Remat):
    if policy == "nothing":
        return function
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(function, policy=saved, prevent_cse=False)

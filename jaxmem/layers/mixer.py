"""The contract every sequence mixer keeps, and the bookkeeping of documents that all of them share.

A mixer is a module with

    init_state(batch, *, capacity=None, dtype=...) -> State
    __call__(x, state=None, *, segment_ids=None, positions=None) -> (y, State)

State is a NamedTuple of arrays that goes in and comes out and is never stored in the module; `state=None` starts empty,
`T == 1` is decoding. Calling once on a whole sequence or many times on its pieces gives the same outputs and state.

Segment ids say which document a token belongs to: 1, 2, 3, ... never decreasing along a row, and 0 for padding, which
stands at the end of a row (a row may be nothing but padding). Documents do not see each other, padding is neither
seen nor remembered. Without segment ids all tokens continue the document that the state is in.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.sharding import constrain, current_rules, local
from jaxmem.sharding.folds import find_end, from_where, halo, is_first, prefix_fold, sequence_axis, spread
from jaxmem.sharding.layouts import from_contiguous, to_contiguous
from jaxmem.typing import Array, Bool, DTypeLike, Float, Int, PyTree


class Cursor(NamedTuple):
    """Where a state stands in each row."""

    segment: Int[Array, "B"]
    """Segment id of the last token seen; 1 before the first."""
    position: Int[Array, "B"]
    """Tokens of that document seen so far: the position of its next token."""


class Tokens(NamedTuple):
    """What a mixer needs to know of the tokens of one call."""

    segment: Int[Array, "B T"]
    """Segment id; 0 is padding."""
    position: Int[Array, "B T"]
    """Position in the document, counted from 0."""
    starts: Bool[Array, "B T"]
    """True where a document starts, so that whatever was remembered before must be forgotten."""

    @property
    def real(self) -> Bool[Array, "B T"]:
        """True for tokens, False for padding."""
        return self.segment != 0


@runtime_checkable
class Mixer(Protocol):
    """What models ask of a sequence mixer (see the module docstring)."""

    def init_state(self, batch: int, *, capacity: int | None = None, dtype: DTypeLike = jnp.float32) -> PyTree:
        """The empty state of `batch` rows; capacity: tokens that a growing cache must hold; dtype: of what is cached."""
        ...

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: PyTree | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]: ...


@runtime_checkable
class MixerConfig(Protocol):
    """The frozen dataclass that describes a mixer and builds it."""

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer: ...

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token that are not 2 x parameters: what mixing the sequence costs at this context."""
        ...


def init_cursor(batch: int) -> Cursor:
    """The cursor of `batch` rows that have seen nothing."""
    return Cursor(
        constrain(jnp.ones(batch, jnp.int32), "batch"),
        constrain(jnp.zeros(batch, jnp.int32), "batch"),
    )


def advance(cursor: Cursor, segment_ids: Int[Array, "B T"] | None, n_tokens: int) -> tuple[Tokens, Cursor]:
    """Reads the next `n_tokens` of every row: what is known of them, and the cursor behind them.

    >>> tokens, cursor = advance(init_cursor(1), jnp.array([[1, 1, 2, 2, 2, 0]]), 6)
    >>> tokens.position[0, :5].tolist(), cursor.segment.tolist(), cursor.position.tolist()
    ([0, 1, 0, 1, 2], [2], [3])
    """
    if segment_ids is None:
        rows = cursor.segment.shape[0]
        segment_ids = constrain(jnp.broadcast_to(cursor.segment[:, None], (rows, n_tokens)), "batch", "time")
    elif segment_ids.shape[1] != n_tokens:
        raise ValueError(
            f"segment_ids: needs one id per token, got {segment_ids.shape[1]} ids for {n_tokens} tokens; "
            "pass an array of shape [B, T]"
        )
    rows, row = ("batch", "time"), ("batch",)
    return local(_advance, in_axes=(Cursor(row, row), rows), out_axes=(Tokens(rows, rows, rows), Cursor(row, row)))(
        cursor, segment_ids.astype(jnp.int32)
    )


def _advance(cursor: Cursor, segment: Int[Array, "B T"]) -> tuple[Tokens, Cursor]:
    axis, layout = sequence_axis(any_layout=True), current_rules().layout
    cursor, given = spread((cursor, segment), axis)
    segment = to_contiguous(given, layout, axis)
    n_tokens, first = segment.shape[1], is_first(axis)
    before = jnp.where(first, cursor.segment[:, None], halo(segment, 1, axis))
    starts = (segment != jnp.concatenate([before, segment[:, :-1]], axis=1)) & (segment != 0)
    index = jnp.arange(n_tokens, dtype=jnp.int32) + n_tokens * (0 if axis is None else jax.lax.axis_index(axis))
    last_start = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    nothing = jnp.full_like(last_start[:, -1], -1)
    earlier = prefix_fold(jnp.maximum, nothing, last_start[:, -1], axis)
    start = jnp.maximum(last_start, earlier[:, None])
    position = index - start + jnp.where(start < 0, cursor.position[:, None] - 1, 0)

    n_real, holds_end = find_end(segment != 0, axis)
    at_end = lambda x: jnp.take_along_axis(x, jnp.maximum(n_real - 1, 0)[:, None], 1)[:, 0]
    end = Cursor(
        jnp.where(n_real == 0, cursor.segment, at_end(segment)),
        jnp.where(n_real == 0, cursor.position, at_end(position) + 1),
    )
    position, starts = (from_contiguous(x, layout, axis) for x in (position, starts))
    return Tokens(given, position, starts), from_where(end, holds_end, axis)


def place_state(state: PyTree, axes: PyTree) -> PyTree:
    """A state whose arrays are laid out as `axes` say: one tuple of logical axes per array, in the state's structure."""
    return jax.tree.map(lambda names, x: constrain(x, *names), axes, state, is_leaf=lambda node: type(node) is tuple)

"""The contract every sequence mixer keeps, the one place that checks calls, and the bookkeeping of documents.

A mixer is a module with

    init_state(batch, *, capacity=None, dtype=...) -> State
    __call__(x, state=None, *, segment_ids=None, positions=None) -> (y, State)

State is a NamedTuple of arrays that goes in and comes out and is never stored in the module; `state=None` starts empty,
`T == 1` is decoding. Calling once on a whole sequence or many times on its pieces gives the same outputs and state; a piece
may be of no tokens, and a batch of no rows.

Segment ids say which document a token belongs to: ids above 0, a document ends where the id changes, and 0 is padding,
which stands behind the tokens of a row (a row may be nothing but padding). Documents do not see each other, padding is
neither seen nor remembered. Without segment ids all tokens continue the document that the state is in; with them, a call
continues it if its first token has the id of the last token before. Only the cursor knows that id: within a call documents
have numbers, so an id that comes back starts a new document.

Padding in front of a token, or a negative id, raises where values are known. Under jit the row's outputs are NaN then, and so
are all that come later with its state.
"""

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.recurrences.documents import in_int32, known, misplaced, require_padding_behind
from jaxmem.sharding import constrain, current_rules, local
from jaxmem.sharding.folds import find_end, from_where, halo, is_first, prefix_fold, sequence_axis, spread
from jaxmem.sharding.layouts import from_contiguous, to_contiguous
from jaxmem.showing import Module, tree_text
from jaxmem.typing import Array, Bool, DTypeLike, Float, Int, PyTree

BROKEN = -1
"""The cursor's segment in a row that was given ids nothing right can be said of."""


class Cursor(NamedTuple):
    """Where a state stands in each row."""

    segment: Int[Array, "B"]
    """Segment id of the last token seen; 1 before the first; BROKEN for good where padding stood in front of a token."""
    position: Int[Array, "B"]
    """Tokens of that document seen so far: the position of its next token."""

    __repr__ = tree_text


class Tokens(NamedTuple):
    """What a mixer needs to know of the tokens of one call."""

    document: Int[Array, "B T"]
    """Its number in this call: 1 continues the document of the cursor, each start is one more; 0 is padding."""
    position: Int[Array, "B T"]
    """Position in the document, counted from 0."""
    starts: Bool[Array, "B T"]
    """True where a document starts, so that whatever was remembered before must be forgotten."""

    @property
    def real(self) -> Bool[Array, "B T"]:
        """True for tokens, False for padding."""
        return self.document != 0


class Call(NamedTuple):
    """What a mixer is told besides x and its state."""

    tokens: Tokens
    cursor: Cursor
    """Behind the call; that of the state stands before it."""
    positions: Int[Array, "B T"] | None
    """As given by the caller, for what depends on them; None: those in the document."""
    fresh: bool
    """The state is empty, because none was given."""
    one_document: bool
    """Moreover no row has a second document, or padding."""


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


class SequenceMixer(Module):
    """The part of a call that is the same for all mixers: what comes in is checked, documents are read, calls on nothing
    answered, and rows that broke the contract made NaN. A layer has `empty_state` and `mix`.
    """

    state_type: ClassVar[type]
    """The NamedTuple of its state, which has a `cursor`."""

    def __init__(self, config: MixerConfig, d_model: int):
        self.config, self.d_model = config, d_model
        if isinstance(d_model, bool) or not isinstance(d_model, int | np.integer) or d_model < 1:
            raise ValueError(
                f"{self.what}: needs d_model >= 1, the width of x, got d_model={d_model!r}; pass a whole number to make"
            )

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> PyTree:
        """The state of `batch` rows that have seen nothing."""
        raise NotImplementedError

    def mix(self, x: Float[Array, "B T D"], state: PyTree, call: Call) -> tuple[Float[Array, "B T D"], PyTree]:
        """y, whose padding may be anything, and the state behind it, whose cursor need not be set; B, T >= 1."""
        raise NotImplementedError

    def capacity_for(self, n_tokens: int) -> int | None:
        """Of the state of a call without one."""
        return n_tokens

    def capacity_of(self, state: PyTree) -> int | None:
        """What `init_state` was told, for a state of this layer."""
        return None

    @property
    def what(self) -> str:
        """What errors call this layer."""
        return type(self.config).__name__.removesuffix("Config")

    def init_state(self, batch: int, *, capacity: int | None = None, dtype: DTypeLike = jnp.float32) -> PyTree:
        """The empty state.

        Args:
          batch: rows.
          capacity: tokens of the longest document, for a cache that grows; other states take no notice of it.
          dtype: of what is cached; what accumulates is fp32, or float64 with it.

        Raises: ValueError for a negative batch, a capacity below 1, a dtype that is none of floats.
        """
        for name, value, least in (("batch", batch, 0), ("capacity", 1 if capacity is None else capacity, 1)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                got = f"{name} {said(value)}" if hasattr(value, "shape") else f"{name}={value!r}"
                raise ValueError(f"{self.what}: needs {name} >= {least}, got {got}; pass a whole number to init_state")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{self.what}: needs a dtype of floats for its state, got dtype={dtype!r}; use that of x")
        return self.empty_state(batch, capacity, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: PyTree | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        read: tuple[Tokens, Cursor] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """The mixed tokens, 0 for padding, and the state behind them.

        Args:
          x: floats.
          state: what the rows have seen; None is nothing.
          segment_ids: documents, see the module docstring; None continues the document that the state is in.
          positions: of layers that have a position embedding; None counts from the start of each document.
          read: what `advance` says of these tokens, if it is known already, as to a model of many layers.

        Raises: ValueError for another rank, width or dtype, a state that is none of this layer's for this batch, and, where
          values are known, padding in front of a token.
        """
        self._require_call(x, state, segment_ids, positions)
        batch, n_tokens, _ = x.shape
        fresh = state is None
        if fresh:
            state = self.init_state(batch, capacity=self.capacity_for(max(n_tokens, 1)), dtype=x.dtype)
        if not batch or not n_tokens:
            return jnp.zeros_like(x), state
        tokens, cursor = advance(state.cursor, segment_ids, n_tokens, self.what) if read is None else read
        one_document = fresh and segment_ids is None
        y, state = self.mix(x, state, Call(tokens, cursor, positions, fresh, one_document))
        if segment_ids is not None:
            y = jnp.where(tokens.real[..., None], y, 0)
        if not one_document:
            y = jnp.where((cursor.segment == BROKEN)[:, None, None], jnp.nan, y)
        return y.astype(x.dtype), state._replace(cursor=cursor)

    def _require_call(self, x: Array, state: PyTree, segment_ids: Array | None, positions: Array | None) -> None:
        is_3d = len(getattr(x, "shape", ())) == 3
        if not is_3d or x.shape[2] != self.d_model or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{self.what}: needs x [B T D] of floats with D = d_model = {self.d_model}, got x {said(x)}; "
                "pass hidden vectors of this width, one row per sequence"
            )
        batch = x.shape[0]
        for name, array in (("segment_ids", segment_ids), ("positions", positions)):
            if array is not None:
                require_per_token(self.what, name, array, x.shape[:2])
        if state is None:
            return
        if type(state) is not self.state_type:
            raise ValueError(
                f"{self.what}: needs a state of its own, of type {self.state_type.__name__}, got state {said(state)}; pass "
                "what init_state or a call of this layer returned, and segment_ids and positions by name"
            )
        wanted = jax.eval_shape(lambda: self.empty_state(batch, self.capacity_of(state), jnp.float32))
        shapes = lambda tree: [
            (jax.tree_util.keystr(path), jnp.shape(a)) for path, a in jax.tree.leaves_with_path(tree)
        ]
        if (mine := shapes(wanted)) != (given := shapes(state)):
            pairs = zip(mine, given, strict=False)
            (name, want), (_, got) = next(
                (pair for pair in pairs if pair[0] != pair[1]), (("arrays", mine), ("", given))
            )
            raise ValueError(
                f"{self.what}: needs the state of a batch of {batch} rows and of this config, got state{name} of shape {got} "
                f"instead of {want}; pass what init_state({batch}) or a call of this layer on as many rows returned"
            )


def said(x: PyTree) -> str:
    """What an argument is, for error messages."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"of shape {tuple(x.shape)} and dtype {x.dtype}"
    return f"of type {type(x).__name__}"


def require_per_token(what: str, name: str, array: Array, shape: tuple[int, int]) -> None:
    """Raises ValueError for what is not one integer per token."""
    if getattr(array, "shape", None) != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{what}: needs {name} [B T] of integers and shape {tuple(shape)}, one per token, got {name} {said(array)}; "
            "pass an int32 array"
        )


def init_cursor(batch: int) -> Cursor:
    """The cursor of `batch` rows that have seen nothing."""
    return Cursor(
        constrain(jnp.ones(batch, jnp.int32), "batch"),
        constrain(jnp.zeros(batch, jnp.int32), "batch"),
    )


def advance(
    cursor: Cursor, segment_ids: Int[Array, "B T"] | None, n_tokens: int, what: str = "mixer"
) -> tuple[Tokens, Cursor]:
    """Reads the next `n_tokens` of every row: what is known of them, and the cursor behind them.

    Raises: ValueError where values are known and a row has padding in front of a token or a negative id, now or in a call
      before; `what` is what it names.

    >>> tokens, cursor = advance(init_cursor(1), jnp.array([[1, 1, 7, 7, 1, 0]]), 6)
    >>> tokens.document.tolist(), tokens.position[0, :5].tolist(), cursor.segment.tolist(), cursor.position.tolist()
    ([[1, 1, 2, 2, 3, 0]], [0, 1, 0, 1, 0], [1], [1])
    """
    given = segment_ids
    if segment_ids is None:
        rows = cursor.segment.shape[0]
        segment_ids = constrain(jnp.broadcast_to(cursor.segment[:, None], (rows, n_tokens)), "batch", "time")
    else:
        require_per_token(what, "segment_ids", segment_ids, (cursor.segment.shape[0], n_tokens))
        segment_ids = in_int32(what, segment_ids)
    rows, row = ("batch", "time"), ("batch",)
    tokens, end = local(
        _advance, in_axes=(Cursor(row, row), rows), out_axes=(Tokens(rows, rows, rows), Cursor(row, row))
    )(cursor, segment_ids)
    if (after := known(end.segment)) is not None and np.any(after == BROKEN):
        if given is not None:
            require_padding_behind(what, given)
        raise ValueError(
            f"{what}: needs a state whose calls had padding behind their tokens only, got one that had padding in front of a "
            f"token, or a negative id, in row {int(np.argmax(after == BROKEN))}; start that row again with an empty state"
        )
    return tokens, end


def _advance(cursor: Cursor, segment: Int[Array, "B T"]) -> tuple[Tokens, Cursor]:
    axis, layout = sequence_axis(any_layout=True), current_rules().layout
    broken = (cursor.segment == BROKEN) | misplaced(to_contiguous(segment, layout, axis), axis)
    cursor, given = spread((cursor, segment), axis)
    segment = to_contiguous(given, layout, axis)
    n_tokens, first = segment.shape[1], is_first(axis)
    before = jnp.where(first, cursor.segment[:, None], halo(segment, 1, axis))
    starts = (segment != jnp.concatenate([before, segment[:, :-1]], axis=1)) & (segment != 0)
    index = jnp.arange(n_tokens, dtype=jnp.int32) + n_tokens * (0 if axis is None else jax.lax.axis_index(axis))
    last_start = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    number = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    # of the devices before: where the last document started, and how many did
    nothing = jnp.full_like(last_start[:, -1], -1), jnp.zeros_like(number[:, -1])
    earlier = prefix_fold(
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1]), nothing, (last_start[:, -1], number[:, -1]), axis
    )
    start = jnp.maximum(last_start, earlier[0][:, None])
    position = index - start + jnp.where(start < 0, cursor.position[:, None] - 1, 0)
    document = jnp.where(segment == 0, 0, 1 + number + earlier[1][:, None])

    n_real, holds_end = find_end(segment != 0, axis)
    at_end = lambda x: jnp.take_along_axis(x, jnp.maximum(n_real - 1, 0)[:, None], 1)[:, 0]
    end = Cursor(
        jnp.where(n_real == 0, cursor.segment, at_end(segment)),
        jnp.where(n_real == 0, cursor.position, at_end(position) + 1),
    )
    end = from_where(end, holds_end, axis)
    document, position, starts = (from_contiguous(x, layout, axis) for x in (document, position, starts))
    return Tokens(document, position, starts), end._replace(segment=jnp.where(broken, BROKEN, end.segment))


def place_state(state: PyTree, axes: PyTree) -> PyTree:
    """A state whose arrays are laid out as `axes` say: one tuple of logical axes per array, in the state's structure."""
    return jax.tree.map(lambda names, x: constrain(x, *names), axes, state, is_leaf=lambda node: type(node) is tuple)

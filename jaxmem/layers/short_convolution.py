"""Short causal convolution: every channel mixes its last W inputs, y_t = sum_j w_{W-1-j} x_{t-j}, j = 0 .. W-1.

The state is the last W-1 inputs (the `suffix` algebra). Taps never reach into another document: a tap that would, reads 0.

Cost: 2 W FLOPs per channel and token; W-1 values per channel of state.
Reference: Poli et al. 2023 (arXiv 2302.10866), section 3; used before linear recurrences since Dao and Gu 2024.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Bounds, checked
from jaxmem.layers.mixer import Call, Cursor, SequenceMixer, init_cursor, place_state
from jaxmem.sharding import VECTOR, constrain, local, param
from jaxmem.sharding.folds import find_end, from_where, halo, is_first, sequence_axis, spread
from jaxmem.showing import tree_text
from jaxmem.typing import Array, DTypeLike, Float, Int, PRNGKeyArray


def convolve(
    items: Float[Array, "B S *channels"], segment: Int[Array, "B S"], weight: Float[Array, "W *channels"]
) -> Float[Array, "B S-W+1 *channels"]:
    """Convolves inputs that already stand behind their W-1 predecessors; the output lines up with items[:, W-1:].

    Sums in fp32 or better, returns items.dtype.

    >>> convolve(jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[1, 1, 2]]), jnp.array([[10.0], [1.0]]))[0, :, 0].tolist()
    [12.0, 3.0]
    """
    width = weight.shape[0]
    n_tokens = items.shape[1] - (width - 1)
    here = segment[:, width - 1 :]
    full = jnp.promote_types(items.dtype, jnp.float32)
    y = jnp.zeros((), full)
    for tap in range(width):
        same = segment[:, tap : tap + n_tokens] == here
        same = same.reshape(same.shape + (1,) * (items.ndim - 2))
        y += weight[tap].astype(full) * jnp.where(same, items[:, tap : tap + n_tokens], 0).astype(full)
    return y.astype(items.dtype)


def last_items(
    items: Float[Array, "B S *channels"], segment: Int[Array, "B S"], end: Int[Array, "B"], width: int
) -> tuple[Float[Array, "B {width}-1 *channels"], Int[Array, "B"]]:
    """The state behind items[:, :end]: its last width - 1 items, 0 where they are of another document than the last, and
    the segment id of the last."""

    def of_row(items, segment, end):
        start = end - (width - 1)
        items = jax.lax.dynamic_slice_in_dim(items, start, width - 1)
        segment = jax.lax.dynamic_slice_in_dim(segment, start, width - 1)
        same = (segment == segment[-1]).reshape((-1,) + (1,) * (items.ndim - 1))
        return jnp.where(same, items, 0), segment[-1]

    return jax.vmap(of_row)(items, segment, end)


def short_convolution(
    x: Float[Array, "B T *channels"],
    weight: Float[Array, "W *channels"],
    history: Float[Array, "B W-1 *channels"],
    document: Int[Array, "B T"],
) -> tuple[Float[Array, "B T *channels"], Float[Array, "B W-1 *channels"]]:
    """Convolves x behind `history`, the last W-1 inputs seen (zeros if none), all of document 1.

    Document 0 is padding at the end of a row. Returns y and the new history. Inside `local` on a mesh that splits time, a
    device reads the last W-1 inputs of the one before, in one exchange.
    """
    axis, n_history = sequence_axis(), weight.shape[0] - 1
    first = is_first(axis)
    items_before = jnp.where(first, spread(history, axis).astype(x.dtype), halo(x, n_history, axis))
    documents = jnp.concatenate([jnp.where(first, 1, halo(document, n_history, axis)), document], axis=1)
    items = jnp.concatenate([items_before, x], axis=1)
    n_real, holds_end = find_end(document != 0, axis)
    new_history, _ = last_items(items, documents, n_history + n_real, n_history + 1)
    return convolve(items, documents, weight), from_where(new_history.astype(history.dtype), holds_end, axis)


@dataclasses.dataclass(frozen=True)
@checked
class ShortConvolutionConfig:
    """A short convolution over the model's width, as a mixer of its own."""

    width: Annotated[int, Bounds("[2, inf)")] = 4
    """Tokens that an output depends on, its own included."""

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "ShortConvolution":
        return ShortConvolution(self, d_model, rngs=rngs)

    def mixing_flops(self, d_model: int, context_tokens: int) -> int:
        """Forward FLOPs per token beyond two per parameter: none, a tap is used once per token."""
        return 0


class ShortConvolutionState(NamedTuple):
    """What the layer remembers."""

    history: Float[Array, "B W-1 D"]
    """The last inputs."""
    cursor: Cursor

    __repr__ = tree_text


_STATE_AXES = ShortConvolutionState(("batch", "tap", "embed"), Cursor(("batch",), ("batch",)))


class ShortConvolution(SequenceMixer):
    """Every channel of x mixed with its last W-1 values; see `mixer` for how it is called.

    >>> layer = ShortConvolutionConfig(width=2).make(8, rngs=nnx.Rngs(0))
    >>> y, state = layer(jnp.ones((1, 5, 8)))
    >>> y.shape, state.history.shape
    ((1, 5, 8), (1, 1, 8))
    """

    state_type = ShortConvolutionState

    def __init__(self, config: ShortConvolutionConfig, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(config, d_model)
        self.weight = param(rngs, init_taps, (config.width, d_model), ("tap", "embed"), VECTOR)

    def empty_state(self, batch: int, capacity: int | None, dtype: DTypeLike) -> ShortConvolutionState:
        history = jnp.zeros((batch, self.config.width - 1, self.d_model), dtype)
        return place_state(ShortConvolutionState(history, init_cursor(batch)), _STATE_AXES)

    def mix(
        self, x: Float[Array, "B T D"], state: ShortConvolutionState, call: Call
    ) -> tuple[Array, ShortConvolutionState]:
        run = local(
            short_convolution,
            in_axes=(("batch", "time", "embed"), ("tap", "embed"), _STATE_AXES.history, ("batch", "time")),
            out_axes=(("batch", "time", "embed"), _STATE_AXES.history),
        )
        y, history = run(x, constrain(self.weight[...], "tap", "embed"), state.history, call.tokens.document)
        return y, state._replace(history=history)


def init_taps(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Taps [W, *channels] drawn from U(-1/sqrt(W), 1/sqrt(W)), the usual start of a depthwise convolution."""
    return jax.random.uniform(key, shape, dtype, -(shape[0] ** -0.5), shape[0] ** -0.5)


def require_history(what: str, width: int) -> None:
    """Raises ValueError for a convolution that remembers nothing."""
    if width < 2:
        raise ValueError(f"{what}: needs a convolution over 2 tokens or more, got width={width}; 4 is usual")

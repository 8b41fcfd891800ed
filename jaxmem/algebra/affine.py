"""The affine monoid: what a stretch of tokens does to the state of a linear recurrence.

Every recurrence that is linear in its state, S_t = M_t S_{t-1} + B_t with S [K, V], turns a stretch of tokens into one
map S -> M S + B. Composing two stretches, the earlier first, gives

    M = M_then M_first        B = M_then B_first + B_then.

M comes in four kinds, told apart by type and not by rank, so that leading dimensions stay free for batch, heads, time
and devices, and a kind is never guessed from a coincidence of sizes:

    Scalar(g)   M = exp(g) I          RetNet, lightning attention, simple GLA, Mamba-2
    Vector(g)   M = diag(exp(g))      GLA, HGRN2, S4D; g may be complex
    Elementwise(g)  M S = exp(g) * S  Mamba, HGRN, RG-LRU; g may be complex
    Matrix(m)   M = m                 DeltaNet, Gated DeltaNet, KDA, RWKV-7: e.g. m = exp(g) (I - beta k k^T); LSSL

The decays stay natural logs: composing adds them, so a long product neither underflows early nor is divided by, and
g = -inf, a full reset, is an ordinary value whose gradient is 0. (A Matrix resets with m = 0.) States are finite.

Reference: Blelloch 1990, "Prefix sums and their applications", CMU-CS-90-190, section 1.4; Martin & Cundy 2018,
"Parallelizing linear recurrent neural nets over sequence length", arXiv:1709.04057, section 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped
from numpy.lib.array_utils import normalize_axis_index


class Scalar(NamedTuple):
    """M = exp(g) I: one decay for the whole state."""

    g: Float[Array, "*batch"]
    """Natural log-decay <= 0; -inf forgets everything."""

    @classmethod
    def identity(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Scalar":
        return cls(jnp.zeros(shape[:-2], dtype))

    def after(self, first: "Scalar") -> "Scalar":
        return Scalar(first.g + self.g)

    def times(self, state: Float[Array, "*#batch K V"]) -> Float[Array, "*#batch K V"]:
        return jnp.exp(self.g)[..., None, None] * state


class Vector(NamedTuple):
    """M = diag(exp(g)): one decay per key channel, that is per row of the state."""

    g: Shaped[Array, "*batch K"]
    """Natural log-decays of real part <= 0; -inf forgets the channel."""

    @classmethod
    def identity(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Vector":
        return cls(jnp.zeros(shape[:-1], dtype))

    def after(self, first: "Vector") -> "Vector":
        return Vector(first.g + self.g)

    def times(self, state: Shaped[Array, "*#batch K V"]) -> Shaped[Array, "*#batch K V"]:
        return jnp.exp(self.g)[..., None] * state


class Elementwise(NamedTuple):
    """M S = exp(g) * S, entry by entry: a decay of its own for every number of the state."""

    g: Shaped[Array, "*batch K V"]
    """Natural log-decays, of real part <= 0; -inf forgets the entry."""

    @classmethod
    def identity(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Elementwise":
        return cls(jnp.zeros(shape, dtype))

    def after(self, first: "Elementwise") -> "Elementwise":
        return Elementwise(first.g + self.g)

    def times(self, state: Shaped[Array, "*#batch K V"]) -> Shaped[Array, "*#batch K V"]:
        return jnp.exp(self.g) * state


class Matrix(NamedTuple):
    """M = m: a full transition of the key channels."""

    m: Float[Array, "*batch K K"]

    @classmethod
    def identity(cls, shape: tuple[int, ...], dtype: DTypeLike) -> "Matrix":
        return cls(jnp.broadcast_to(jnp.eye(shape[-2], dtype=dtype), (*shape[:-1], shape[-2])))

    def after(self, first: "Matrix") -> "Matrix":
        return Matrix(self.times(first.m))

    def times(self, state: Float[Array, "*#batch K V"]) -> Float[Array, "*#batch K V"]:
        return jnp.einsum("...ij,...jv->...iv", self.m, state, precision=jax.lax.Precision.HIGHEST)


class Segment(NamedTuple):
    """The map S -> M S + B of a stretch of tokens."""

    M: Scalar | Vector | Elementwise | Matrix
    """What becomes of the state before it."""
    B: Shaped[Array, "*batch K V"]
    """What it writes: the state after it, had the state before it been 0; fp32."""


def identity(
    kind: type[Scalar | Vector | Elementwise | Matrix], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Segment:
    """The map that leaves every state of the given shape [..., K, V] as it is.

    >>> identity(Vector, (2, 4, 8)).M.g.shape
    (2, 4)
    """
    return Segment(kind.identity(shape, dtype), jnp.zeros(shape, dtype))


def combine(first: Segment, then: Segment) -> Segment:
    """The map of two stretches one after the other, S -> then(first(S)); does not commute.

    Raises: ValueError if their M are of different kinds.
    Cost: O(K V) FLOPs for decays, 2 K^2 (K + V) for matrices.

    >>> half = Segment(Scalar(jnp.log(jnp.array(0.5))), jnp.array([[4.0]]))
    >>> apply(combine(half, half), jnp.array([[16.0]])).item()
    10.0
    """
    if type(first.M) is not type(then.M):
        raise ValueError(
            f"affine.combine: needs two segments of one kind, got first.M={type(first.M).__name__} and "
            f"then.M={type(then.M).__name__}; write both as the more general of the two"
        )
    return Segment(then.M.after(first.M), then.M.times(first.B) + then.B)


def apply(segment: Segment, state: Shaped[Array, "*#batch K V"]) -> Shaped[Array, "*#batch K V"]:
    """The state after a stretch, M S + B, given the state before it; leading dimensions broadcast.

    >>> forget = Segment(Scalar(jnp.array(-jnp.inf)), jnp.array([[4.0]]))
    >>> apply(forget, jnp.array([[16.0]])).item()
    4.0
    """
    return segment.M.times(state) + segment.B


def scan(segments: Segment, axis: int = 0) -> Segment:
    """All prefixes along an axis: entry t is segments 0..t combined, by a parallel scan of depth O(log N).

    Args:
      segments: stacked maps, one per token, chunk or device.
      axis: which leading (batch) dimension they are stacked on; negative counts from the last leading one.

    Returns: the prefixes, stacked alike. `apply(prefixes, state)` gives every state, for a state that broadcasts.
    Raises: ValueError (numpy's AxisError) if there is no such leading axis.
    Cost: below 2 N combines; N K V numbers are kept, so scan chunks rather than tokens where K V is large.

    >>> tokens = Segment(Scalar(jnp.log(jnp.full(3, 0.5))), jnp.ones((3, 1, 1)))
    >>> scan(tokens).B.round(4).ravel().tolist()
    [1.0, 1.5, 1.75]
    """
    return jax.lax.associative_scan(combine, segments, axis=_leading(segments, axis))


def fold(segments: Segment, axis: int = 0) -> Segment:
    """The one map of all segments along an axis, earliest first, by a balanced tree; of none, the identity.

    The arguments are those of `scan`, whose last entry this is, without keeping the others.
    Cost: below N combines, in ceil(log2 N) steps.

    >>> tokens = Segment(Scalar(jnp.log(jnp.full(3, 0.5))), jnp.ones((3, 1, 1)))
    >>> fold(tokens).B.round(4).item()
    1.75
    """
    axis = _leading(segments, axis)
    segments = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), segments)
    nothing = identity(type(segments.M), segments.B.shape[1:], segments.B.dtype)
    while (n := segments.B.shape[0]) > 1:
        if n % 2:
            segments = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), segments, nothing)
        segments = combine(jax.tree.map(lambda x: x[0::2], segments), jax.tree.map(lambda x: x[1::2], segments))
    return jax.tree.map(lambda x: x[0], segments) if n else nothing


def _leading(segments: Segment, axis: int) -> int:
    return normalize_axis_index(axis, segments.B.ndim - 2)

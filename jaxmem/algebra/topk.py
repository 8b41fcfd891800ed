"""The top-k monoid: the best k of some scored rows, mergeable with the best k of the others.

An element is the first k pairs (score, id) in the order "higher score first, lower id first where scores are equal".
For distinct ids that order is total, so the best k of a union depends neither on how the rows were grouped nor on the
order in which groups were merged: a table spread over devices picks the rows that it would pick whole, ties included.
(Rows offered twice with one id are two rows.) A score of -inf means "no row" and carries the id -1; NaN ranks first,
where it is seen. Gradients flow through the scores of the winners, and to nothing else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from numpy.lib.array_utils import normalize_axis_index

NO_ID = -1


class TopK(NamedTuple):
    """The best k of some rows, best first."""

    scores: Float[Array, "*batch k"]
    """Their scores, descending; -inf where there are fewer than k rows."""
    ids: Int[Array, "*batch k"]
    """Their ids, >= 0; -1 where there are fewer than k rows."""


def identity(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> TopK:
    """The best of no rows, scores -inf and ids -1 of the given shape [..., k].

    >>> identity((2,)).ids.tolist()
    [-1, -1]
    """
    return TopK(jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, NO_ID, jnp.int32))


def top_k(scores: Float[Array, "*batch S"], ids: Int[Array, "*#batch S"] | None, k: int) -> TopK:
    """The best k of S rows.

    Args:
      scores: any float; -inf leaves a row out.
      ids: >= 0, distinct, in any order; None numbers the rows 0..S-1 and is the fast way, a selection and not a sort.
      k: how many to keep, >= 1; above S the rest is "no row".

    Raises: ValueError if k < 1.
    Cost: a sort of S pairs, or with ids=None one `jax.lax.top_k`.

    >>> top_k(jnp.array([1.0, 3.0, 3.0, 2.0]), None, 2).ids.tolist()
    [1, 2]
    >>> top_k(jnp.array([1.0, 3.0, 3.0, 2.0]), jnp.array([7, 6, 5, 4]), 2).ids.tolist()
    [5, 6]
    """
    if k < 1:
        raise ValueError(f"topk.top_k: needs k >= 1, got k={k}; keep at least one row")
    if ids is not None:
        return _best(scores, jnp.broadcast_to(ids, scores.shape), k)
    order_by = jax.lax.stop_gradient(jnp.where(scores == 0, 0, scores))  # lax.top_k puts -0.0 below 0.0, sort does not
    _, ids = jax.lax.top_k(order_by, min(k, scores.shape[-1]))
    return _filled(jnp.take_along_axis(scores, ids, axis=-1), ids, k)


def combine(a: TopK, b: TopK) -> TopK:
    """The best k of the rows of a and the rows of b; commutes.

    Raises: ValueError if a and b keep different numbers of rows.

    >>> left, right = (top_k(jnp.array(s), jnp.array(i), 2) for s, i in [([5.0, 1.0], [0, 1]), ([3.0, 5.0], [2, 3])])
    >>> combine(left, right).ids.tolist()
    [0, 3]
    """
    if a.scores.shape[-1] != b.scores.shape[-1]:
        raise ValueError(
            f"topk.combine: needs elements with one k, got k={a.scores.shape[-1]} and k={b.scores.shape[-1]}; "
            "make both with the larger"
        )
    scores, ids = (jnp.concatenate(pair, axis=-1) for pair in zip(a, b, strict=True))
    return _best(scores, ids, a.scores.shape[-1])


def fold(elements: TopK, axis: int = 0) -> TopK:
    """Combines all elements along a leading axis, with one sort of their N k pairs; the fold of none is the identity.

    Args:
      elements: stacked elements, scores and ids [..., N, ..., k].
      axis: which leading dimension is N; negative counts from the last leading one.

    Raises: ValueError (numpy's AxisError) if there is no such leading axis.

    >>> fold(top_k(jnp.array([[1.0, 4.0], [3.0, 2.0]]), jnp.array([[0, 1], [2, 3]]), 2)).ids.tolist()
    [1, 2]
    """
    axis = normalize_axis_index(axis, elements.scores.ndim - 1)
    scores, ids = (jnp.moveaxis(x, axis, -2) for x in elements)
    *batch, n, k = scores.shape
    return _best(scores.reshape(*batch, n * k), ids.reshape(*batch, n * k), k)


def _best(scores: Float[Array, "*batch S"], ids: Int[Array, "*batch S"], k: int) -> TopK:
    scores, negated_ids = jax.lax.sort((scores, -ids), num_keys=2)  # ascending: the best row, or a NaN, is last
    first = slice(None, -k - 1, -1)
    return _filled(scores[..., first], -negated_ids[..., first], k)


def _filled(scores: Float[Array, "*batch n"], ids: Int[Array, "*batch n"], k: int) -> TopK:
    """n <= k rows in order as an element of k, with "no row" at the end and without any gradient there."""
    room = [(0, 0)] * (scores.ndim - 1) + [(0, k - scores.shape[-1])]
    none = scores == -jnp.inf
    return TopK(
        jnp.pad(jnp.where(none, -jnp.inf, scores), room, constant_values=-jnp.inf),
        jnp.pad(jnp.where(none, NO_ID, ids), room, constant_values=NO_ID),
    )

"""What segment ids may say, asked at one place by layers, models and recurrences.

Documents of a row have any ids above 0, and each change of the id starts one. Padding is 0 and stands behind the tokens of a
row: padding in front of a token, or a negative id, raises where values are known; under jit, where nothing can be raised,
the row's results are NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.recurrences.streams import Documents
from jaxmem.sharding.folds import n_shards, total
from jaxmem.typing import Array, Bool, Int


def misplaced(segment_ids: Int[Array, "B T"], axis: str | None = None) -> Bool[Array, "B"]:
    """Rows with negative ids, or with padding in front of a token.

    Args: axis: inside `local`, the mesh axis that splits the sequence, contiguously; the result is the same on its devices.

    >>> misplaced(jnp.array([[2, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, -1, 0]])).tolist()
    [False, True, True, False, True]
    """
    n_tokens, real = segment_ids.shape[1], segment_ids != 0
    place = jnp.arange(1, n_tokens + 1, dtype=jnp.int32) + (0 if axis is None else n_tokens * jax.lax.axis_index(axis))
    end = jnp.max(jnp.where(real, place, 0), axis=1, initial=0)
    end = jnp.where(jnp.any(segment_ids < 0, axis=1), jnp.iinfo(jnp.int32).max, end)
    end = jax.lax.pmax(end, axis) if n_shards(axis) > 1 else total(end, axis)
    return end != total(jnp.sum(real, axis=1, dtype=jnp.int32), axis)


def require_padding_behind(what: str, segment_ids: Array) -> None:
    """Raises ValueError for rows that are `misplaced`, if the ids' values are known."""
    if (ids := known(segment_ids)) is None or not ids.size:
        return
    real = ids != 0
    wrong = np.any(real[:, 1:] & ~real[:, :-1], axis=1) | np.any(ids < 0, axis=1)
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{what}: needs segment_ids above 0 for tokens and 0 for the padding behind them, never in front of a token, got "
            f"segment_ids={ids[row, :16].tolist()} in row {row}; move padding to the end of the row"
        )


def in_int32(what: str, segment_ids: Array | np.ndarray) -> Int[Array, "B T"]:
    """The ids as int32. Raises ValueError for ids above that, which are negative under jit and so `misplaced`.

    >>> in_int32("mixer", np.array([[1, 2, 0]], np.int64)).dtype
    dtype('int32')
    """
    largest = jnp.iinfo(jnp.int32).max
    if jnp.iinfo(segment_ids.dtype).max <= largest:
        return jnp.asarray(segment_ids, jnp.int32)
    ids = known(segment_ids)
    if ids is not None and ids.size and ids.max() > largest:
        raise ValueError(
            f"{what}: needs segment_ids of at most {largest}, which int32 holds, got {ids.max()}; number the documents anew"
        )
    return ids_in_int32(segment_ids)


def ids_in_int32(ids: Array | np.ndarray) -> Int[Array, "*ids"]:
    """As int32; -1 for what that does not hold.

    >>> ids_in_int32(np.array([7, 2**32 - 1], np.uint32)).tolist(), ids_in_int32(np.array([255], np.uint8)).tolist()
    ([7, -1], [255])
    """
    largest = jnp.iinfo(jnp.int32).max
    if jnp.iinfo(ids.dtype).max > largest:
        where = jnp.where if known(ids) is None else np.where
        ids = where((ids < 0) | (ids > largest), np.int32(-1), ids.astype(np.int32))  # -1 does not go into unsigned ids
    return jnp.asarray(ids, jnp.int32)


def read_documents(what: str, segment_ids: Array, shape: tuple[int, int]) -> tuple[Documents, Bool[Array, "B"]]:
    """Where documents start and which tokens are real, and the rows of which nothing right can be said.

    Raises: ValueError for another shape, and for padding in front of tokens where values are known.
    """
    if segment_ids.shape != shape:
        raise ValueError(
            f"{what}: needs segment_ids [B T] of shape {shape}, got {segment_ids.shape}; pass one id per token"
        )
    require_padding_behind(what, segment_ids)
    real = segment_ids != 0
    changes = (segment_ids[:, 1:] != segment_ids[:, :-1]) & real[:, 1:]
    return Documents(jnp.pad(changes, [(0, 0), (1, 0)])[:, : shape[1]], real), misplaced(segment_ids)


def known(x: Array | np.ndarray) -> np.ndarray | None:
    """The values of an array that is neither traced nor spread over other processes."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)

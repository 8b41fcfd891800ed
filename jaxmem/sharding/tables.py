"""Reading memory tables that are split over devices by rows, by columns, or both: the table never moves.

    rows      a device holds M / n slots, and reads those of its and the others' tokens that it has
    columns   a device holds V / n numbers of every slot, and reads these for all: the load is always even

The devices that share a table are its owners. The slots that their tokens ask for go to all of them, and outputs come home:
partial sums of rows are added on the way (reduce-scatter), columns change places with tokens (all-to-all). Per token that is
k ids and weights and V numbers to each owner of rows, V in all for columns, whatever the number of slots.

Owners stand along the mesh axes of the rules' "slots" and "slot_width". Along an axis that splits batch or time they gather
each other's tokens; along `model`, each other's heads. Devices along other axes hold copies, whose gradients are added.

Choosing slots stays with the token: product keys need N n sub-keys only, which every device has, and ids and weights of the
chosen are less to send than queries. (Where keys are rows themselves, `algebra.topk` merges what owners find.)

Cost: FLOPs as of `memory_lookup`, 1 / n of them on each owner of columns; owners of rows look at all ids, and read their own.
Reference: columns as in Berges et al. 2024, Memory Layers at Scale, arXiv 2412.09764, section 3.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.pallas_kernels import memory_lookup
from jaxmem.pallas_kernels.memory_lookup import RowGradient, row_gradient
from jaxmem.sharding.folds import spread_like
from jaxmem.sharding.placement import local, sum_over
from jaxmem.sharding.rules import Axes, current_rules
from jaxmem.typing import Array, Float, Int, PyTree

TABLE = ("slots", "slot_width")
CHOICES = ("batch", "time", "heads", None)
X = ("batch", "time", "embed")


def bag(
    values: Float[Array, "*L M V"],
    ids: Int[Array, "B T H k"],
    weights: Float[Array, "B T H k"],
    layer: Int[Array, ""] | None = None,
    axes: Axes = CHOICES,
) -> Float[Array, "B T V"]:
    """`memory_lookup.bag` of a split table, summed over heads, in fp32.

    Args:
      layer: which of stacked tables [L M V] is read; no slice of them is copied. None: there is one.
      axes: of ids and weights.
    """

    def read(values, ids, weights, *layer):
        values, ids, weights = spread_like((values, ids, weights), (values, weights))  # their gradients: exchanged once
        ids, weights = _to_owners(ids, axes), _to_owners(weights, axes)
        values, ids = _rows_of_layer(values, ids, *layer)
        y = memory_lookup.bag(values, _flat(ids), _flat(weights))
        if axes[2] is not None and not any(_dimension(axis, axes) == 2 for axis in _owners()):
            y = sum_over(y, "heads")
        for axis in reversed(_owners()):
            if axis in _axes("slots"):
                y = _scatter_sum(y, axis, _dimension(axis, X))
            elif (dimension := _dimension(axis, X)) is None:
                y = jax.lax.all_gather(y, axis, axis=2, tiled=True, to="invarying")
            else:
                y = jax.lax.all_to_all(y, axis, dimension, 2, tiled=True)
        return y

    which, of_table = _stacking(layer)
    in_axes = (of_table, axes, axes, *[()] * len(which))
    return local(read, in_axes=in_axes, out_axes=X)(values, ids, weights, *which)


def dots(
    values: Float[Array, "*L M V"],
    ids: Int[Array, "B T H k"],
    y: Float[Array, "B T V"],
    layer: Int[Array, ""] | None = None,
    axes: Axes = CHOICES,
) -> Float[Array, "B T H k"]:
    """`memory_lookup.dots` of a split table, in fp32; `layer` and `axes` as of `bag`."""

    def read(values, ids, y, *layer):
        values, ids, y = spread_like((values, ids, y), (values, ids))
        ids, y = _to_owners(ids, axes), _columns_to_owners(y, X)
        shape = ids.shape
        values, ids = _rows_of_layer(values, ids, *layer)
        d = memory_lookup.dots(values, _flat(ids), y).reshape(shape)
        for axis in reversed(_owners()):
            d = _scatter_sum(d, axis, _dimension(axis, axes))
        return d

    which, of_table = _stacking(layer)
    in_axes = (of_table, axes, X, *[()] * len(which))
    return local(read, in_axes=in_axes, out_axes=axes)(values, ids, y, *which)


def gradient_of_rows(
    ids: Int[Array, "N B T H k"],
    weights: Float[Array, "N B T H k"],
    y: Float[Array, "N B T V"],
    n_rows: int,
    size: int,
    axes: Axes = CHOICES,
) -> RowGradient:
    """`memory_lookup.row_gradient` of a split table, of N times B rows of tokens.

    Args:
      n_rows: M.
      size: most rows that a step reads of each owner's.
      axes: of ids and weights, behind N.

    Returns: rows [n size] and sums [n size, V] of all n owners of rows, split as the table is; rows count within the owner's.
    """
    out = RowGradient(TABLE[:1], TABLE, TABLE[:1])
    find = lambda ids, weights, y, n_own: row_gradient(ids, weights, y, n_own, size)
    return _of_all_tokens(find, out, ids, weights, y, n_rows, axes)


def gradient_of_table(
    ids: Int[Array, "N B T H k"],
    weights: Float[Array, "N B T H k"],
    y: Float[Array, "N B T V"],
    n_rows: int,
    axes: Axes = CHOICES,
) -> Float[Array, "M V"]:
    """`memory_lookup.sum_rows` of a split table, of N times B rows of tokens."""
    return _of_all_tokens(memory_lookup.sum_rows, TABLE, ids, weights, y, n_rows, axes)


def _of_all_tokens(function: Callable[..., PyTree], out_axes: PyTree, ids, weights, y, n_rows: int, axes) -> PyTree:
    """function(ids, weights, y, own rows) on every owner, with what all tokens read, and their y in the owner's columns."""
    choices, x = (None, *axes), (None, *X)

    def find(ids, weights, y):
        others = tuple(axis for axis in jax.sharding.get_abstract_mesh().manual_axes if axis not in _owners())
        everywhere = _owners() + others
        ids, weights = (_gather(a, choices, everywhere, to="invarying") for a in (ids, weights))
        y = _gather(_columns_to_owners(y, x, to="invarying"), x, others, to="invarying")
        rows = _axes("slots")
        n_own = n_rows // (jax.lax.axis_size(rows) if rows else 1)
        ids = _own(ids, n_own)
        weights, y = spread_like((weights, y), (ids, y))
        return function(_flat(ids), _flat(weights), y, n_own)

    return local(find, in_axes=(choices, choices, x), out_axes=out_axes)(ids, weights, y)


def _axes(name: str) -> tuple[str, ...]:
    """The mesh axes that split this logical axis here, inside `local`; none outside."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in current_rules().activations[name] if axis in manual)


def _owners() -> tuple[str, ...]:
    """Mesh axes along which owners stand, in the order in which arrays are gathered."""
    return _axes("slots") + _axes("slot_width")


def _dimension(axis: str, axes: Axes) -> int | None:
    """Of an array with these logical axes, the dimension that a mesh axis splits."""
    return next((d for d, name in enumerate(axes) if name is not None and axis in _axes(name)), None)


def _stacking(layer: Array | None) -> tuple[tuple[Array, ...], Axes]:
    """What says which of stacked tables is read, and the axes of tables."""
    return ((), TABLE) if layer is None else ((layer,), (None, *TABLE))


def _rows_of_layer(values: Array, ids: Int[Array, "..."], layer: Array | None = None) -> tuple[Array, Array]:
    """Values [M V], of all layers one after the other where they are stacked, and ids of this owner's rows in them."""
    n_rows = values.shape[-2]
    ids = _own(ids, n_rows)
    if layer is None:
        return values, ids
    n = values.shape[0] * n_rows
    ids = jnp.where((ids < 0) | (ids >= n_rows), n, ids + n_rows * layer)
    return values.reshape(n, values.shape[-1]), ids


def _own(ids: Int[Array, "..."], n_rows: int) -> Int[Array, "..."]:
    """Ids counted from this owner's first row: those of other owners' rows become no row's."""
    rows = _axes("slots")
    return ids - n_rows * jax.lax.axis_index(rows) if rows else ids


def _flat(x: Array) -> Array:
    """[.. H k] -> [.. Hk]"""
    return x.reshape(*x.shape[:-2], -1)


def _gather(x: Array, axes: Axes, over: tuple[str, ...], to: str = "varying") -> Array:
    """All that the devices along these mesh axes have; the last of them becomes the outermost."""
    for axis in over:
        if (dimension := _dimension(axis, axes)) is not None:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True, to=to)
    return x


def _to_owners(x: Array, axes: Axes) -> Array:
    return _gather(x, axes, _owners())


def _columns_to_owners(y: Array, axes: Axes, to: str = "varying") -> Array:
    """What owners' tokens have, of each the columns that this owner holds."""
    last = y.ndim - 1
    for axis in _owners():
        dimension = _dimension(axis, axes)
        if axis in _axes("slots"):
            y = _gather(y, axes, (axis,), to)
        elif dimension is not None:
            y = jax.lax.all_to_all(y, axis, last, dimension, tiled=True)
        else:
            width = y.shape[last] // jax.lax.axis_size(axis)
            y = jax.lax.dynamic_slice_in_dim(y, width * jax.lax.axis_index(axis), width, last)
    return y


def _scatter_sum(x: Array, axis: str, dimension: int | None) -> Array:
    """The sum over devices, of which each keeps its part of a dimension, or all."""
    if dimension is None:
        return jax.lax.psum(x, axis)
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)

"""Folds over the devices between which a sequence is split, contiguously and in order; for use inside `local`.

A device holds T / n tokens. What a mixer has to know of the tokens before them is a prefix of small elements of an
associative algebra (`jaxmem.algebra`), one per device: `prefix_fold` hands each device the fold of those before it, by
log2 n exchanges of one element. All are the identity, or trivial, on one device, and have gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.sharding.rules import current_rules
from jaxmem.typing import Array, Bool, Int, PyTree, Shaped


def sequence_axis(*, any_layout: bool = False) -> str | None:
    """The mesh axis that splits the logical axis "time", inside `local`; None outside, or if the rules name none.

    Args:
      any_layout: the caller goes by places in the sequence, not by order.

    Raises: NotImplementedError if the rules split time over several mesh axes; ValueError if tokens do not stand in order.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = [name for name in current_rules().activations["time"] if name in manual]
    if len(names) > 1:
        raise NotImplementedError(
            f"sequence parallelism: needs 'time' on one mesh axis, got {names}; change Rules.activations"
        )
    axis, layout = names[0] if names else None, current_rules().layout
    if layout != "contiguous" and not any_layout and n_shards(axis) > 1:
        raise ValueError(
            f"sequence parallelism: needs tokens in order, for all layers but attention, got Rules(layout={layout!r}); "
            "use layout='contiguous', or attention alone"
        )
    return axis


def n_shards(axis: str | None) -> int:
    """Devices between which the sequence is split."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def spread(tree: PyTree, axis: str | None) -> PyTree:
    """The same values, free to become different on each device."""

    def cast(x: Array) -> Array:
        return x if axis in jax.typeof(x).manual_axis_type.varying else jax.lax.pcast(x, axis, to="varying")

    return tree if axis is None else jax.tree.map(cast, tree)


def spread_like(tree: PyTree, like: PyTree) -> PyTree:
    """The same values, free to become different wherever those of `like` may be."""
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(like)))

    def cast(x: Array) -> Array:
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def is_first(axis: str | None) -> Array:
    """Whether this device holds the beginning of the sequence."""
    return jnp.bool_(True) if axis is None else jax.lax.axis_index(axis) == 0


def from_last(tree: PyTree, axis: str | None) -> PyTree:
    """The value of the device that holds the end of the sequence, on every device."""
    return tree if axis is None else from_where(tree, jax.lax.axis_index(axis) == n_shards(axis) - 1, axis)


def from_where(tree: PyTree, chosen: Array, axis: str | None) -> PyTree:
    """The value of the one device on which `chosen` holds (per row [B], or for all), on every device."""
    if axis is None:
        return tree
    rows = lambda x: chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim))
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(rows(x), x, 0), axis), spread(tree, axis))


def total(tree: PyTree, axis: str | None) -> PyTree:
    """The sum over devices."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def from_before(tree: PyTree, axis: str | None, distance: int = 1) -> PyTree:
    """The value of the device `distance` places earlier in the sequence; 0 where there is none."""
    n = n_shards(axis)
    if n == 1:
        return jax.tree.map(jnp.zeros_like, tree)
    return jax.lax.ppermute(spread(tree, axis), axis, [(i, i + distance) for i in range(n - distance)])


def prefix_fold(
    combine: Callable[[PyTree, PyTree], PyTree], identity: PyTree, element: PyTree, axis: str | None
) -> PyTree:
    """The fold of the elements of all devices before this one, the earliest first; `identity` on the first.

    Args:
      combine: associative; (earlier, later) -> both. It must make no NaN of zeros.
      identity: in the structure of element.

    Cost: 1 + ceil(log2(n - 1)) exchanges of one element and as many combines, whatever T.
    """
    n = n_shards(axis)
    if n == 1:
        return spread(identity, axis)
    place = jax.lax.axis_index(axis)
    select = lambda condition, a, b: jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
    fold = select(place > 0, from_before(element, axis), identity)
    distance = 1
    while distance < n - 1:
        earlier = from_before(fold, axis, distance)
        fold = select(place > distance, combine(earlier, fold), fold)
        distance *= 2
    return fold


def halo(x: Shaped[Array, "B T *x"], n_tokens: int, axis: str | None) -> Shaped[Array, "B n *x"]:
    """The last n tokens of the device before; 0 on the first.

    Raises: ValueError if a device holds fewer.
    """
    if n_shards(axis) == 1:
        return jnp.zeros_like(x, shape=(x.shape[0], n_tokens, *x.shape[2:]))
    if x.shape[1] < n_tokens:
        raise ValueError(
            f"sequence parallelism: needs at least {n_tokens} tokens per device, what a short convolution reaches back, "
            f"got {x.shape[1]}; use fewer devices on the mesh axis {axis!r} or longer sequences"
        )
    return from_before(x[:, x.shape[1] - n_tokens :], axis)


def find_end(real: Bool[Array, "B T"], axis: str | None) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Tokens of each row that are real on this device, up to the row's end, and whether it is the device that holds the
    last of them (the first device, in a row of none)."""
    n_tokens, place = real.shape[1], 0 if axis is None else jax.lax.axis_index(axis)
    end = spread(total(jnp.sum(real, axis=1), axis), axis) - n_tokens * place
    holds = (end > 0) & (end <= n_tokens) | is_first(axis) & (end == 0)
    return jnp.clip(end, 0, n_tokens), holds

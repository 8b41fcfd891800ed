"""Rings on the links of TPUs: devices along a mesh axis in an order in which each is linked to the next, and the last to the
first.

Where links wrap around, a line of chips is a ring. Where they do not, a closed snake over two dimensions is one, such as

    0 1 2 3
    7 6 5 4
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np


def wraps(dims: Sequence[int], flat: bool) -> tuple[bool, ...]:
    """Which dimensions of a slice of TPUs close to rings: 16 chips of flat generations (v5e, v6e); all of the others, if each
    is a multiple of 4."""
    if flat:
        return tuple(size == 16 for size in dims)
    return (all(size % 4 == 0 for size in dims),) * len(dims)


def snake(dims: Sequence[int]) -> np.ndarray:
    """Places [n] of a grid, numbered row by row, in the order of a closed walk along its edges, if there is one.

    There is one if two sizes are above 1 and any is even. Otherwise the last step leads back over many edges.

    >>> snake((2, 4))
    array([0, 1, 2, 3, 7, 6, 5, 4])
    """
    dims = [size for size in dims if size > 1]
    if len(dims) < 2:
        return np.arange(math.prod(dims))
    *others, width = dims
    rows = snake(others)  # neighbours stand together in it, closed or not
    grid = rows[:, None] * width + np.arange(width)
    if len(rows) % 2 == 0:
        return _closed(grid)
    if width % 2 == 0:
        return _closed(grid.T)
    return np.concatenate([row if i % 2 == 0 else row[::-1] for i, row in enumerate(grid)])


def _closed(grid: np.ndarray) -> np.ndarray:
    """To and fro along an even number of rows, all but their first column, by which it goes back."""
    there = [row[1:] if i % 2 == 0 else row[:0:-1] for i, row in enumerate(grid)]
    return np.roll(np.concatenate([*there, grid[::-1, 0]]), 1)


def longest_hop(places: np.ndarray, dims: Sequence[int], wrapped: Sequence[bool]) -> int:
    """Links that the longest step of a ring through these places [n, dims] crosses."""
    steps = np.abs(places - np.roll(places, -1, axis=0))
    around = np.where(wrapped, np.asarray(dims) - steps, steps)
    return int(np.max(np.sum(np.minimum(steps, around), axis=-1)))


def arrange(devices: Sequence[jax.Device], sizes: Sequence[int], ring: int) -> np.ndarray | None:
    """TPUs as an array of these sizes; those along axis `ring` are linked as closely as may be, then those along the last.

    Every axis gets a box of the slice, a ring the one with the shortest steps; None if the devices fill no box.
    """
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    places -= places.min(axis=0)
    dims = tuple(int(size) for size in places.max(axis=0) + 1)
    if math.prod(dims) != len(devices):
        return None
    grid = np.empty(dims, dtype=object)
    grid[tuple(places.T)] = devices
    wrapped = (*wraps(dims[:3], flat="lite" in devices[0].device_kind), False)

    def cost(box: tuple[int, ...], axis: int, left: tuple[int, ...]) -> tuple[int, int]:
        walk = np.stack(np.unravel_index(snake(box), box), axis=-1)
        closed = [wraps and size == whole for wraps, size, whole in zip(wrapped, box, dims, strict=True)]
        hop = longest_hop(walk, dims, closed) if axis == ring else 0
        return hop, sum(1 < size < whole for size, whole in zip(box, left, strict=True))

    innermost_first = [ring, *(axis for axis in reversed(range(len(sizes))) if axis != ring)]
    boxes, left = {}, dims
    for axis in innermost_first:
        boxes[axis] = min(_boxes(sizes[axis], left), key=functools.partial(cost, axis=axis, left=left))
        left = tuple(whole // size for whole, size in zip(left, boxes[axis], strict=True))

    factors = [boxes[axis][d] for d in range(len(dims)) for axis in reversed(innermost_first)]
    at = lambda axis, d: d * len(sizes) + innermost_first[::-1].index(axis)
    by_axis = grid.reshape(factors).transpose([at(axis, d) for axis in range(len(sizes)) for d in range(len(dims))])
    return np.take(by_axis.reshape(sizes), snake(boxes[ring]), axis=ring)


def _boxes(n: int, dims: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Those of n places that tile a grid."""
    sizes = [[size for size in range(1, n + 1) if n % size == 0 and whole % size == 0] for whole in dims]
    return (box for box in itertools.product(*sizes) if math.prod(box) == n)

"""Which devices an exchange of a compiled program is between: XLA writes that in four ways.

A list of groups, all devices in order cut into groups, the same with axes of devices exchanged first, and, for programs whose
shardings name a mesh (from jax 0.11 on nearly all), axes of that mesh: devices are in one group if they differ along these
axes alone.
"""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_CUT = re.compile(r"replica_groups=(\[[\d,]*\])<=(\[[\d,]*\](?:T\([\d,]*\))?)")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'([^']*)'(?:=(\d+)|:\((\d+)\)(\d+))?")


def replica_groups(instruction: str) -> list[tuple[int, ...]] | None:
    """The groups of devices of one line of a program; None if the line names none, [] that all devices are one group.

    >>> replica_groups("all-reduce(%x), replica_groups={{0,1},{2,3}}")
    [(0, 1), (2, 3)]
    >>> replica_groups("all-reduce(%x), replica_groups=[2,2]<=[2,2]T(1,0)")
    [(0, 2), (1, 3)]
    >>> replica_groups("all-reduce(%x), replica_groups=mesh['data'=2,'model'=2] {'data'}, to_apply=%add")
    [(0, 2), (1, 3)]
    """
    if (match := _LISTED.search(instruction)) is not None:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if (match := _CUT.search(instruction)) is not None:
        return _tuples(_devices(match[2]).reshape(_integers(match[1])))
    if (match := _MESH.search(instruction)) is not None:
        mesh, order, axes = match.groups()
        return _tuples(_along(mesh, order, axes))
    return None


def is_alone(instruction: str) -> bool:
    """Whether an exchange is of every device with itself, along axes of one device: nothing goes over a link."""
    if (pairs := _PAIRS.search(instruction)) is not None:
        return all(a == b for a, b in re.findall(r"(\d+),(\d+)", pairs[1]))
    groups = replica_groups(instruction)
    return bool(groups) and all(len(group) == 1 for group in groups)


def _along(mesh: str, order: str | None, axes: str) -> np.ndarray:
    """[groups, devices of one] along `axes`, some of them parts of a mesh's axis: 'x':(2)4 is 4 of 'x' as 2, 4, a rest."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh)}
    wanted = [(name, (int(before), int(part)) if part else None) for name, _, before, part in _AXIS.findall(axes)]
    shape, place = [], {}
    for name, size in sizes.items():
        cuts = {1, size}  # devices of the axis that stand beside one another at the borders of its parts
        for part in (part for of, part in wanted if of == name and part):
            cuts |= {part[0], part[0] * part[1]}
        cuts = sorted(cuts)
        for first, last in zip(cuts, cuts[1:]):
            place[name, first] = len(shape)
            shape.append(last // first)
    chosen = []
    for name, part in wanted:
        first, last = (part[0], part[0] * part[1]) if part else (1, sizes[name])
        chosen += [i for (of, start), i in place.items() if of == name and first <= start < last]
    devices = np.arange(math.prod(shape)) if order is None else _devices(order)
    kept = [i for i in range(len(shape)) if i not in chosen]
    return devices.reshape(shape).transpose(kept + chosen).reshape(-1, math.prod(shape[i] for i in chosen))


def _devices(order: str) -> np.ndarray:
    """All devices in the order `[2,4]`, which is theirs, `[2,4]T(1,0)`, by exchanged axes, or `3,1,0,2`, in words."""
    if "[" not in order:
        return np.array([int(n) for n in order.split(",")])
    shape, _, axes = order.partition("T")
    devices = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return devices.transpose(_integers(axes) if axes else None).reshape(-1)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _tuples(groups: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, group)) for group in groups]

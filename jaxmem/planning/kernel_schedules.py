"""How many cycles does a TPU kernel take, by the schedule that its compiler wrote? Static cycles, without the TPU.

libtpu, asked to dump its last stage, writes every kernel as VLIW bundles, one per cycle as long as nothing stalls, and for
each bundle how many of its slots are used. Here they are read back as a tree of loops; a part that a branch can skip (a block
that needs no mask) is an arm of its own. Cycles = sum over loops of bundles x turns, with the turns told by who knows the
kernel. Stalls, waits for copies and cache misses are not in it: good for comparing kernels, no prediction of time.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

SLOTS = ("matmul", "matpush", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")
"""Columns of the compiler's table of use."""
ARM_BUNDLES = 64
"""A branch that skips fewer is no arm."""

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(?:LH|LB|LE|PB|PF|CT)\s*)*:\s*((?:> ?)*)(.*)$")
_BRANCH = re.compile(r"sbr\.rel(?: \([^)]*\))? target = \$region(\d+)")
_REGION = re.compile(r"(?:Start/End empty|Start|End) region (\d+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive bundles of one loop, the arms in it left out."""

    depth: int
    """Of the loop it belongs to; 0: outside all."""
    bundles: int
    used: dict[str, int]
    """Slots of each kind."""
    arms: tuple["Part", ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler wrote for one kernel."""

    name: str
    capacity: dict[str, int]
    """Slots of each kind in a bundle."""
    parts: tuple[Part, ...]
    """One per depth, outermost first."""

    def cycles(self, turns: Callable[[Part], float]) -> float:
        """Bundles of every part and arm, times its turns."""
        everything = [part for outer in self.parts for part in (outer, *outer.arms)]
        return sum(part.bundles * turns(part) for part in everything)


def read_schedules(folder: Path) -> dict[str, Schedule]:
    """Every kernel that was dumped into a folder, by name.

    Raises: ValueError if there is none.
    """
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        stamp, name = re.match(r"(\d+)-(.*)-\d+-final_bundles\.txt", path.name).groups()
        used = list(folder.glob(f"{stamp}-{name}-*final_hlo-static-per-bundle-utilization.txt"))
        if used:
            found[name] = _read_schedule(name, path.read_text(errors="replace"), used[0].read_text())
    if not found:
        raise ValueError(f"kernel schedules: needs dumps of libtpu's bundles in {folder}, got none; compile something")
    return found


def _read_schedule(name: str, bundles_text: str, used_text: str) -> Schedule:
    bundles = []  # [depth, text]
    for line in bundles_text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            bundles.append([match[2].count(">"), match[3]])
        elif bundles:
            bundles[-1][1] += line
    rows = [line.split() for line in used_text.splitlines()]
    rows = [[int(x) for x in row] for row in rows if row and all(x.isdigit() for x in row)]
    capacity, used = dict(zip(SLOTS, rows[0], strict=True)), rows[1:]
    assert len(used) == len(bundles), "one row of use per bundle"

    def part(indices: list[int], depth: int, arms: tuple[Part, ...] = ()) -> Part:
        sums = (sum(used[i][slot] for i in indices) for slot in range(len(SLOTS)))
        return Part(depth, len(indices), dict(zip(SLOTS, sums, strict=True)), arms)

    arms = _arms([depth for depth, _ in bundles], [text for _, text in bundles])
    parts = []
    for depth in range(1 + max(depth for depth, _ in bundles)):
        here = [span for span in arms if bundles[span[0] - 1][0] == depth]
        within = {i for first, end in here for i in range(first, end)}
        common = [i for i, (d, _) in enumerate(bundles) if d == depth and i not in within]
        of_arms = tuple(part([i for i in range(*span) if bundles[i][0] == depth], depth) for span in here)
        parts.append(part(common, depth, of_arms))
    return Schedule(name, capacity, tuple(parts))


def _arms(depths: list[int], texts: list[str]) -> list[tuple[int, int]]:
    """[first, end) of what branches inside loops can skip; of nested ones at the same depth, the outermost."""
    starts: dict[str, int] = {}
    for i, text in enumerate(texts):
        for region in _REGION.findall(text):
            starts.setdefault(region, i)
    spans = []
    for i, text in enumerate(texts):
        for region in _BRANCH.findall(text):
            end = starts.get(region, -1)
            own = sum(depth == depths[i] for depth in depths[i + 1 : end])
            nested = any(depths[first - 1] == depths[i] and first <= i < last for first, last in spans)
            if depths[i] > 0 and own >= ARM_BUNDLES and not nested:
                spans.append((i + 1, end))
    return spans

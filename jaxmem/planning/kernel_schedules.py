"""How many cycles does a TPU kernel take, by the schedule that its compiler wrote? Static cycles, without the TPU.

libtpu, asked to dump its last stage, writes every kernel as VLIW bundles, one per cycle as long as nothing stalls, and for
each bundle how many of its slots are used. Here they are read back as a tree of loops; a part that a branch can skip (a block
that needs no mask) is an arm of its own. Cycles = sum over loops of bundles x turns, with the turns told by who knows the
kernel. Stalls, waits for copies and cache misses are not in it: good for comparing kernels, no prediction of time.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

SLOTS = ("matmul", "matpush", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")
"""Columns of the compiler's table of use."""
ARM_BUNDLES = 64
"""A branch that skips fewer is no arm."""

Span = tuple[int, int]
"""First bundle, and one past the last."""

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(?:LH|LB|LE|PB|PF|CT)\s*)*:\s*((?:> ?)*)(.*)$")
_BRANCH = re.compile(r"sbr\.rel(?: \([^)]*\))? target = \$region(\d+)")
_REGION = re.compile(r"(?:Start/End empty|Start|End) region (\d+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """Bundles of one loop or arm, the arms in it left out."""

    depth: int
    """Of the loop it belongs to; 0: outside all."""
    bundles: int
    used: dict[str, int]
    """Slots of each kind."""
    arms: tuple["Part", ...] = ()

    @property
    def all_parts(self) -> list["Part"]:
        """This one, its arms, and theirs."""
        return [self, *(part for arm in self.arms for part in arm.all_parts)]


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
        return sum(part.bundles * turns(part) for outer in self.parts for part in outer.all_parts)


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

    depths = [depth for depth, _ in bundles]
    spans = _spans(depths, [text for _, text in bundles])

    def part(within: Iterable[int], depth: int, inner: list[Span]) -> Part:
        """Of the bundles at this depth; the longest of the inner spans are its arms."""
        longest = [a for a in inner if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in inner)]
        arms = tuple(part(range(*a), depth, [b for b in inner if b != a and a[0] <= b[0] < a[1]]) for a in longest)
        in_arms = {i for arm in longest for i in range(*arm)}
        own = [i for i in within if depths[i] == depth and i not in in_arms]
        sums = (sum(used[i][slot] for i in own) for slot in range(len(SLOTS)))
        return Part(depth, len(own), dict(zip(SLOTS, sums, strict=True)), arms)

    everywhere = range(len(bundles))
    of_depth = lambda depth: [span for span in spans if depths[span[0] - 1] == depth]
    return Schedule(name, capacity, tuple(part(everywhere, d, of_depth(d)) for d in range(1 + max(depths))))


def _spans(depths: list[int], texts: list[str]) -> list[Span]:
    """What branches inside loops can skip, each once."""
    starts: dict[str, int] = {}
    for i, text in enumerate(texts):
        for region in _REGION.findall(text):
            starts.setdefault(region, i)
    spans = []
    for i, text in enumerate(texts):
        for region in _BRANCH.findall(text):
            end = starts.get(region, -1)
            own = sum(depth == depths[i] for depth in depths[i + 1 : end])
            if depths[i] > 0 and own >= ARM_BUNDLES and (i + 1, end) not in spans:
                spans.append((i + 1, end))
    return spans

"""Is communication hidden behind a kernel? The order of instructions in a scheduled TPU program says so.

XLA splits an exchange between TPUs into a start and a done and schedules both. Between them the chip is free to compute: an
exchange is hidden behind a kernel if it starts before and is done after it.
"""

import math
import re
from typing import NamedTuple

from jaxmem.planning.replica_groups import is_alone

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)")
_OPERAND = re.compile(r"%?([\w.\-]+)")
_EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
_ARRAY = re.compile(r"[a-z]+(\d*)\[([\d,]*)\]")


class Exchange(NamedTuple):
    """One exchange in a computation that has kernels too."""

    computation: str
    name: str
    start: int
    """Kernels in front of its start."""
    done: int
    """Kernels in front of its done; start < done if it is hidden."""
    n_kernels: int
    """Of the computation."""
    n_bytes: int
    """That a device sends."""

    @property
    def hidden(self) -> bool:
        """It starts before and is done after some kernel."""
        return self.start < self.done


def exchanges_beside_kernels(program: str) -> list[Exchange]:
    """Every collective-permute in computations of a scheduled program (`compiled.as_text()`) that run a Pallas kernel; one
    that is not split into start and done counts as both at once."""
    found = []
    for computation in program.split("\n\n"):
        starts, here, n_kernels = {}, [], 0
        for line in computation.splitlines():
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            name, result, operation, rest = match.groups()
            if operation == "custom-call" and "tpu_custom_call" in rest:
                n_kernels += 1
            elif operation == "collective-permute-start":
                starts[name] = n_kernels, _n_bytes(result)
            elif operation == "collective-permute-done":
                of = _OPERAND.match(rest)[1]
                start, n_bytes = starts[of]
                here.append((of, start, n_kernels, n_bytes))
            elif operation == "collective-permute":
                here.append((name, n_kernels, n_kernels, _n_bytes(result)))
        title = computation.strip().splitlines()[0].split(" ")[0] if computation.strip() else ""
        found += [Exchange(title, name, start, done, n_kernels, size) for name, start, done, size in here if n_kernels]
    return found


def exchanged_bytes(program: str) -> dict[str, list[int]]:
    """Bytes that each exchange of a program leaves on a device, by its kind; in a loop they count once, between a device and
    itself not at all.

    >>> exchanged_bytes("  %a = f32[4,2]{1,0} all-gather(%b), dimensions={0}")
    {'all-gather': [32]}
    """
    found: dict[str, list[int]] = {}
    alone = set()
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, operation, rest = match.groups()
        if is_alone(line) or (operation.endswith("-done") and _OPERAND.match(rest)[1] in alone):
            alone.add(name)  # a done names its start, which names the devices
        elif operation.removesuffix("-done") in _EXCHANGES:
            sizes = found.setdefault(operation.removesuffix("-done"), [])
            sizes.append(sum(_array_bytes(*array) for array in _ARRAY.findall(result)))
    return found


def _n_bytes(result: str) -> int:
    """Of the first array of an instruction's result."""
    return _array_bytes(*_ARRAY.search(result).groups())


def _array_bytes(bits: str, shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size) * max(int(bits or 8) // 8, 1)

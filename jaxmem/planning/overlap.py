"""Is communication hidden behind a kernel? The order of instructions in a scheduled TPU program says so.

XLA splits an exchange between TPUs into a start and a done and schedules both. Between them the chip is free to compute: an
exchange is hidden behind a kernel if it starts before and is done after it.
"""

import re
from typing import NamedTuple

OVERLAP_OPTIONS = {"xla_tpu_enable_all_experimental_scheduler_features": "true"}
"""Compile options under which libtpu starts a ring's exchanges before its kernels on every generation. Without them it does
not on v5p and v6e, whatever the kernels' cost estimates say."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\([^=]*?\)|\S+) ([\w\-]+)\((.*)")


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
            name, operation, rest = match.groups()
            if operation == "custom-call" and "tpu_custom_call" in rest:
                n_kernels += 1
            elif operation == "collective-permute-start":
                starts[name] = n_kernels
            elif operation == "collective-permute-done":
                of = re.match(r"%?([\w.\-]+)", rest)[1]
                here.append((of, starts[of], n_kernels))
            elif operation == "collective-permute":
                here.append((name, n_kernels, n_kernels))
        title = computation.strip().splitlines()[0].split(" ")[0] if computation.strip() else ""
        found += [Exchange(title, *exchange, n_kernels) for exchange in here if n_kernels]
    return found

"""`jaxmem kernels --gpu`: attention's kernels compiled for a GPU that is not here, with the memory and registers they take.

One process compiles all of them, since XLA reads only at its start that it shall dump what it makes.
"""

import dataclasses
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmem.pallas_kernels.flash_attention import Dropout, flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.planning.gpu import CHIPS, devices, environment

WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
DTYPES = ("bfloat16", "float32")
KINDS = ("causal", "window", "packed", "dropout", "prefix")
KERNELS = ("forward", "dq", "dkv")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention of 8 query heads and 4 kv heads."""

    width: int
    value: int
    dtype: str
    kind: str
    """Of `KINDS`; a window of 1024 tokens, documents given as segments, dropout of 0.1, a prefix with chunks and a cap."""
    tokens: int = 8192

    @property
    def name(self) -> str:
        return f"attention_{self.width}_{self.value}_{self.dtype}_{self.kind}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    shared_bytes: int
    """Shared memory of a program."""
    registers: int | None
    """Of a thread; None without ptxas to ask."""
    spilled_bytes: int | None
    """What a thread keeps in memory because registers do not suffice."""

    def __str__(self) -> str:
        text = f"{self.shared_bytes / 1024:.0f} KiB"
        if self.registers is not None:
            text += f", {self.registers} regs" + (f", {self.spilled_bytes} B spilled" if self.spilled_bytes else "")
        return text


def problems() -> list[Problem]:
    return [Problem(*width, dtype, kind) for dtype, width, kind in itertools.product(DTYPES, WIDTHS, KINDS)]


def report(chip: str, tokens: int = 8192, say: Callable[[str], None] = lambda text: None) -> str:
    """A table of all problems: what each kernel takes, or the compiler's message. `say` is told what is being compiled.

    Raises: ValueError for an unknown chip; RuntimeError without JAX's CUDA plugin, or if compiling them dies.
    """
    if chip not in CHIPS:
        raise ValueError(f"gpu: needs one of {', '.join(CHIPS)}, got {chip!r}; change it")
    with tempfile.TemporaryDirectory() as folder:
        dump = {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", "")}
        command = [sys.executable, "-m", "jaxmem.planning.gpu_report", chip, str(tokens)]
        env = os.environ | environment() | dump
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            failed = {}
            for line in process.stdout:
                what, name, message = (line.split(maxsplit=2) + 3 * [""])[:3]
                if what == "failed":
                    failed[name] = message.strip()
                elif what == "compiling":
                    say(f"{chip}: compiling {name} ({message.strip()})")
            if process.wait():
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [f"ended with {process.returncode}"])[-1]
                raise RuntimeError(f"gpu compiler: {last}")
        lines = [
            f"{chip}: 8 query heads, 4 kv heads, {tokens} tokens; shared memory of a program, registers of a thread"
        ]
        lines.append(f"  {'':34}" + "".join(f"{kernel:36}" for kernel in KERNELS))
        for problem in problems():
            kernels = {} if problem.name in failed else read_kernels(Path(folder), problem.name, chip)
            cells = [f"{kernels[kernel]!s:36}" for kernel in KERNELS] if kernels else [failed[problem.name]]
            widths = f"{problem.width}/{problem.value}"
            lines.append(f"  {problem.dtype:10}{widths:10}{problem.kind:14}" + "".join(cells).rstrip())
    return "\n".join(lines)


def read_kernels(folder: Path, name: str, chip: str) -> dict[str, Kernel]:
    """The kernels of one compiled program among those that XLA dumped."""
    (sequence,) = folder.glob(f"*.jit_{name}.thunk_sequence.txt")
    shared = dict(re.findall(r"flash_attention_(\w+) .*shared_memory: (\d+) bytes", sequence.read_text()))
    of_kernel = {}
    for ptx in folder.glob(f"*.jit_{name}.*.ptx"):
        for entry in re.findall(r"\.entry flash_attention_(\w+)\(", ptx.read_text()):
            of_kernel[entry] = ptx
    return {
        kernel: Kernel(int(size), *(registers(of_kernel[kernel], chip) if kernel in of_kernel else (None, None)))
        for kernel, size in shared.items()
    }


def registers(ptx: Path, chip: str) -> tuple[int | None, int | None]:
    """(registers of a thread, bytes it spills) by ptxas of the package nvidia-cuda-nvcc-cu12; Nones without it."""
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else list(found.submodule_search_locations)
    ptxas = next((path for place in places for path in Path(place).glob("*/bin/ptxas")), None)
    if ptxas is None:
        return None, None
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    command = [str(ptxas), "-v", f"-arch={target[1] if target else chip}", str(ptx), "-o", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", text)[1]), int(re.search(r"(\d+) bytes spill stores", text)[1])


def compile_problem(chip: str, problem: Problem) -> None:
    """Forward and backward in one program.

    Raises: what the compiler does, e.g. when shared memory does not suffice.
    """
    mesh = jax.sharding.Mesh(devices(chip), ("only",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = lambda *shape, dtype=problem.dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=there)
    tokens = (1, problem.tokens)
    mask = {"window": Mask(window=1024), "prefix": Mask(chunk=1024)}.get(problem.kind, Mask())

    def loss(q, k, v, segment, seeds):
        place, options = Place(jnp.broadcast_to(jnp.arange(problem.tokens), tokens), segment), {}
        if problem.kind == "packed":
            options = {"q_place": place, "k_place": place}
        elif problem.kind == "dropout":
            options = {"dropped": Dropout(seeds, 0.1)}
        elif problem.kind == "prefix":
            options = {"q_place": place, "k_place": place._replace(prefix=place.index < 100), "soft_cap": 30.0}
        o, lse = flash_attention(q, k, v, mask, implementation="pallas_gpu", **options)
        return jnp.sum(o) + jnp.sum(lse)

    step = jax.value_and_grad(loss, (0, 1, 2))
    step.__name__ = problem.name
    with jax.set_mesh(mesh):  # where newer versions of Pallas look for the kind of GPU
        jax.jit(step).lower(
            array(*tokens, 8, problem.width), array(*tokens, 4, problem.width), array(*tokens, 4, problem.value),
            array(*tokens, dtype=jnp.int32), array(1, 8, dtype=jnp.uint32),
        ).compile()  # fmt: skip


def main(chip: str, tokens: str) -> None:
    for i, problem in enumerate(every := problems()):
        print("compiling", problem.name, f"{i + 1} of {len(every)}", flush=True)
        try:
            compile_problem(chip, dataclasses.replace(problem, tokens=int(tokens)))
        except Exception as error:
            print("failed", problem.name, str(error).replace("\n", " ")[:160])


if __name__ == "__main__":
    main(*sys.argv[1:])

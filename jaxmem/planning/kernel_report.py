"""`jaxmem kernels`: static cycles of attention on a TPU that is not here, beside JAX's own splash attention.

Every kernel is compiled in a process of its own, since libtpu reads only at its start that it shall dump schedules.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from jaxmem.pallas_kernels.block_spans import sees_all, spans
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.planning.kernel_schedules import Part, Schedule, read_schedules
from jaxmem.planning.tpu import devices, environment


@dataclasses.dataclass(frozen=True)
class Problem:
    """Causal attention in bf16."""

    heads: int = 8
    tokens: int = 8192
    width: int = 128


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel with its block sizes."""

    code: str
    """jaxmem or splash."""
    backward: bool
    block_q: int
    block_k: int
    block_k_compute: int = 512
    """Of splash."""

    @property
    def kernels(self) -> str:
        """What the names of its kernels have in common."""
        return "flash_attention" if self.code == "jaxmem" else "splash"

    @property
    def name(self) -> str:
        blocks = f"{self.block_q} x {self.block_k}" + (f" by {self.block_k_compute}" if self.code == "splash" else "")
        return f"{self.code} {'backward' if self.backward else 'forward'}, {blocks}"


def candidates() -> list[Candidate]:
    """Ours, and splash attention with the block sizes that are worth trying."""
    sizes = [(1024, 1024), (512, 1024), (1024, 512), (2048, 512)]
    of_splash = [(1024, 1024, 512), (1024, 1024, 1024), (512, 1024, 512), (1024, 2048, 512), (2048, 1024, 512)]
    found = []
    for backward in (False, True):
        found += [Candidate("jaxmem", backward, *size) for size in sizes]
        found += [Candidate("splash", backward, *size) for size in of_splash]
    return found


def static_cycles(candidate: Candidate, problem: Problem, topology: str) -> tuple[float, float]:
    """(cycles, share of the MXU's issue slots), summed over the kernels of a pass.

    Raises: RuntimeError with the compiler's message if it refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "jaxmem.planning.kernel_report", topology]
        command += [str(value) for part in (candidate, problem) for value in dataclasses.astuple(part)]
        done = subprocess.run(command, env=os.environ | environment() | dump, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{candidate.name} on {topology}: {done.stderr.strip().splitlines()[-1]}")
        passes = ("backward", "dkv", "dq") if candidate.backward else ("forward", "fwd")
        schedules = read_schedules(Path(folder)).items()
        kernels = [s for name, s in schedules if candidate.kernels in name and any(word in name for word in passes)]
    turns = [_turns(candidate, problem, kernel) for kernel in kernels]
    cycles = sum(kernel.cycles(of) for kernel, of in zip(kernels, turns, strict=True))
    issued = sum(
        part.used["matmul"] * of(part)
        for kernel, of in zip(kernels, turns, strict=True)
        for outer in kernel.parts
        for part in (outer, *outer.arms)
    )
    return cycles, issued / (cycles * kernels[0].capacity["matmul"])


def _turns(candidate: Candidate, problem: Problem, kernel: Schedule):
    """How often each part of a kernel runs."""
    whole, masked = (problem.heads * n for n in visited(problem.tokens, candidate.block_q, candidate.block_k))
    n_q, n_k = problem.tokens // candidate.block_q, problem.tokens // candidate.block_k
    programs = problem.heads * (n_k if candidate.backward else n_q)

    def of_ours(part: Part) -> float:
        unmasked_arm, masked_arm = sorted(kernel.parts[2].arms, key=lambda arm: arm.bundles)[-2:]
        if part in (unmasked_arm, masked_arm):
            return whole if part == unmasked_arm else masked
        return {0: 1, 1: programs, 2: whole + masked}.get(part.depth, programs)

    def of_splash(part: Part) -> float:
        if part.depth == 1:
            return whole + masked if part in kernel.parts[1].arms else problem.heads * n_q * n_k
        return 1 if part.depth == 0 else whole + masked

    return of_ours if candidate.code == "jaxmem" else of_splash


def visited(n_tokens: int, block_q: int, block_k: int) -> tuple[int, int]:
    """(pairs of blocks that need no mask, pairs that do) of one causal head.

    >>> visited(4096, 1024, 1024), visited(4096, 512, 1024)
    ((6, 4), (12, 8))
    """
    blocks = lambda size: Place(
        *(jnp.asarray(x.reshape(1, -1, size)) for x in (np.arange(n_tokens), np.ones(n_tokens, int)))
    )
    q, k = spans(Mask(), blocks(block_q), blocks(block_k))
    pairs = int(jnp.sum(q.end - q.first))
    each = lambda span, axis: jax.tree.map(lambda x: jnp.expand_dims(x, axis), span)
    whole = int(jnp.sum(sees_all(Mask(), each(q, 2), each(k, 1))))
    return whole, pairs - whole


def report(topology: str, problem: Problem = Problem()) -> str:
    """A table of all candidates, and the ratio of the best of ours to the best of splash."""
    lines = [f"{topology}: causal attention, {problem}; static cycles, which ignore stalls"]
    best: dict[tuple[str, bool], float] = {}
    for candidate in candidates():
        try:
            cycles, mxu = static_cycles(candidate, problem, topology)
        except RuntimeError as error:
            lines.append(f"  {candidate.name:44} {str(error)[:80]}")
            continue
        key = candidate.code, candidate.backward
        best[key] = min(best.get(key, float("inf")), cycles)
        lines.append(f"  {candidate.name:44}{cycles:14,.0f}   MXU {100 * mxu:3.0f} % of issue slots")
    for backward, name in ((False, "forward"), (True, "backward")):
        lines.append(f"  {name}: jaxmem / splash {best['jaxmem', backward] / best['splash', backward]:.2f}")
    total = {code: best[code, False] + best[code, True] for code in ("jaxmem", "splash")}
    lines.append(f"  forward + backward: jaxmem / splash {total['jaxmem'] / total['splash']:.2f}")
    return "\n".join(lines)


def compile_candidate(topology: str, candidate: Candidate, problem: Problem) -> None:
    """Compiles one kernel; the process dumps its schedule."""
    shape = (problem.heads, problem.tokens, problem.width)
    f = _splash(candidate, problem) if candidate.code == "splash" else _ours(candidate)
    if candidate.code == "jaxmem":
        shape = (1, problem.tokens, problem.heads, problem.width)
    there = jax.sharding.SingleDeviceSharding(devices(topology)[0])
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=there)
    gradients = jax.grad(lambda q, k, v: jnp.sum(f(q, k, v).astype(jnp.float32)), (0, 1, 2))
    jax.jit(gradients if candidate.backward else f).lower(x, x, x).compile()


def _ours(candidate: Candidate):
    blocks = {"block_q": candidate.block_q, "block_k": candidate.block_k}
    return lambda q, k, v: flash_attention(q, k, v, Mask(), implementation="pallas_tpu", **blocks).o


def _splash(candidate: Candidate, problem: Problem):
    """With the backward pass in one kernel, as ours."""
    q, k, compute = candidate.block_q, candidate.block_k, candidate.block_k_compute
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    causal = splash_attention_mask.CausalMask((problem.tokens, problem.tokens))
    mask = splash_attention_mask.MultiHeadMask([causal] * problem.heads)
    return splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)


if __name__ == "__main__":
    topology, code, backward, *numbers = sys.argv[1:]
    sizes = [int(x) for x in numbers]
    compile_candidate(topology, Candidate(code, backward == "True", *sizes[:3]), Problem(*sizes[3:]))

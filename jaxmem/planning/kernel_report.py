"""`jaxmem kernels`: static cycles of attention on a TPU that is not here, beside JAX's own splash attention and tokamax's.

Every kernel is compiled in a process of its own, since libtpu reads only at its start that it shall dump schedules.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from jaxmem.fields import Count, checked
from jaxmem.pallas_kernels.block_spans import sees_all, spans
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.planning.kernel_schedules import Part, Schedule, read_schedules
from jaxmem.planning.tpu import devices, environment, full_name


@dataclasses.dataclass(frozen=True)
@checked
class Problem:
    """Causal attention in bf16."""

    heads: Count = 8
    tokens: Count = 8192
    width: Count = 128


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel with its block sizes."""

    code: str
    """jaxmem, splash (JAX's), or tokamax."""
    backward: bool
    block_q: int
    block_k: int
    block_k_compute: int = 512
    """Of splash and tokamax."""
    scheduler: bool = False
    """Of tokamax: `use_experimental_scheduler`."""

    @property
    def kernels(self) -> str:
        """What the names of its kernels have in common."""
        return "flash_attention" if self.code == "jaxmem" else "splash"

    @property
    def name(self) -> str:
        blocks = f"{self.block_q} x {self.block_k}" + (f" by {self.block_k_compute}" if self.code != "jaxmem" else "")
        scheduled = ", scheduler" if self.scheduler else ""
        return f"{self.code} {'backward' if self.backward else 'forward'}, {blocks}{scheduled}"


def candidates() -> list[Candidate]:
    """Ours, JAX's splash attention and tokamax's, if that is installed, with the block sizes that are worth trying."""
    sizes = [(1024, 1024), (512, 1024), (2048, 512)]
    of_others = [(1024, 1024, 512), (1024, 1024, 1024), (1024, 2048, 512), (2048, 1024, 512)]
    has_tokamax, found = importlib.util.find_spec("tokamax") is not None, []
    for backward in (False, True):
        found += [Candidate("jaxmem", backward, *size) for size in sizes]
        found += [Candidate("splash", backward, *size) for size in of_others]
        schedulers = [False, True] if has_tokamax and not backward else [False] * has_tokamax  # the flag is for forward
        found += [Candidate("tokamax", backward, *size, chosen) for size in of_others for chosen in schedulers]
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
        for part in outer.all_parts
    )
    return cycles, issued / (cycles * kernels[0].capacity["matmul"])


def _turns(candidate: Candidate, problem: Problem, kernel: Schedule) -> Callable[[Part], float]:
    """How often each part of a kernel runs."""
    whole, masked = (problem.heads * n for n in visited(problem.tokens, candidate.block_q, candidate.block_k))
    n_q, n_k = problem.tokens // candidate.block_q, problem.tokens // candidate.block_k
    programs = problem.heads * (n_k if candidate.backward else n_q)
    steps = problem.heads * n_q * n_k if candidate.code == "splash" else whole + masked

    def of_ours(part: Part) -> float:
        *others, unmasked, masked_in_segment, in_general = sorted(kernel.parts[2].arms, key=lambda arm: arm.bundles)
        known = {id(unmasked): whole, id(masked_in_segment): masked, id(in_general): 0}
        return known.get(id(part), {0: 1, 1: programs, 2: whole + masked}.get(part.depth, programs))

    def of_theirs(part: Part) -> float:
        """A loop over pairs of blocks; in it an arm for those that are visited; in that begin, work and end."""
        inside = sorted((p for arm in kernel.parts[1].arms for p in arm.arms), key=lambda arm: arm.bundles)
        n_works = 1 if candidate.code == "splash" else 2  # with a mask always, or with and without one
        works = (whole + masked,) if n_works == 1 else (whole, masked)
        known = {id(kernel.parts[0]): 1, id(kernel.parts[1]): steps}
        known |= {id(arm): n for arm, n in zip(inside[-n_works:], works, strict=True)}
        known |= {id(arm): programs for arm in inside[:-n_works]}
        return known.get(id(part), whole + masked)

    return of_ours if candidate.code == "jaxmem" else of_theirs


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


def report(
    topology: str, problem: Problem = Problem(), say: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Lines of a table of all candidates, as they are compiled; then the ratios of the best of ours to the best of others.

    `say` is told what is being compiled.

    Raises: ValueError for an unknown topology; RuntimeError without the libtpu package.
    """
    full_name(topology)
    environment()
    yield f"{topology}: causal attention, {problem}; static cycles, which ignore stalls"
    best: dict[tuple[str, bool], float] = {}
    for i, candidate in enumerate(all_candidates := candidates()):
        say(f"{topology}: compiling {candidate.name} ({i + 1} of {len(all_candidates)})")
        try:
            cycles, mxu = static_cycles(candidate, problem, topology)
        except RuntimeError as error:
            yield f"  {candidate.name:44} {str(error)[:80]}"
            continue
        key = candidate.code, candidate.backward
        best[key] = min(best.get(key, float("inf")), cycles)
        yield f"  {candidate.name:44}{cycles:14,.0f}   MXU {100 * mxu:3.0f} % of issue slots"
    for theirs in ("splash", "tokamax"):
        if (theirs, False) in best and (theirs, True) in best:
            ratios = ", ".join(
                f"{name} {sum(best['jaxmem', x] for x in passes) / sum(best[theirs, x] for x in passes):.2f}"
                for name, passes in (("forward", [False]), ("backward", [True]), ("both", [False, True]))
            )
            yield f"  jaxmem / {theirs}: {ratios}"


def compile_candidate(topology: str, candidate: Candidate, problem: Problem) -> None:
    """Compiles one kernel; the process dumps its schedule."""
    shape = (problem.heads, problem.tokens, problem.width)
    f = {"jaxmem": _ours, "splash": _splash, "tokamax": _tokamax}[candidate.code](candidate, problem)
    if candidate.code == "jaxmem":
        shape = (1, problem.tokens, problem.heads, problem.width)
    mesh = jax.sharding.Mesh(devices(topology)[:1], ("only",))
    x = jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    gradients = jax.grad(lambda q, k, v: jnp.sum(f(q, k, v).astype(jnp.float32)), (0, 1, 2))
    with jax.set_mesh(mesh):  # where the kernels learn the kind of TPU
        jax.jit(gradients if candidate.backward else f).lower(x, x, x).compile()


def _ours(candidate: Candidate, problem: Problem):
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


def _tokamax(candidate: Candidate, problem: Problem):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernels
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    q, k, compute = candidate.block_q, candidate.block_k, candidate.block_k_compute
    config = kernels.SplashConfig(
        block_q=q, block_kv=k, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=compute,
        use_experimental_scheduler=candidate.scheduler,
    )  # fmt: skip
    return kernels.make_splash_mha_single_device(masks.CausalMask((problem.tokens, problem.tokens)), config=config)


if __name__ == "__main__":
    topology, code, backward, *numbers = sys.argv[1:]
    *blocks, scheduler, heads, tokens, width = numbers
    candidate = Candidate(code, backward == "True", *map(int, blocks), scheduler == "True")
    compile_candidate(topology, candidate, Problem(int(heads), int(tokens), int(width)))

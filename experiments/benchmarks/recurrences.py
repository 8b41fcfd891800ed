"""Is each recurrence worth its algebra? Chunks against steps and against other people's code; time, memory, one long run.

    python experiments/benchmarks/recurrences.py [--only rwkv7 hgrn] [--chunk-tokens 32 64] [--tokens 4096]
    python experiments/benchmarks/recurrences.py --long
    python experiments/benchmarks/recurrences.py --compile-for v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1

"steps" is each recurrence's own step-by-step scan, whose outputs all others have to match before they are timed; backward
goes to every input. Beside them, where installed, other code for the same mathematics, none of it needed:

    pip install torch==2.13.0 einops pydantic chex tqdm
    pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 ejkernel==0.0.80.3
    pip install --no-deps --ignore-requires-python maxtext==0.2.5

flash-linear-attention's naive chunks in torch, ejkernel's XLA path, and MaxText's function, which is read out of its file:
importing that takes all of MaxText, whose dependencies are not those of this project.
"""

import ast
import dataclasses
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distribution, version

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from measure import interleaved_ms, peak_mib, where

from jaxmem.recurrences import decay_only, delta, elementwise, state_space

LONG_TOKENS = 65_536
ERROR = 1e-4
"""Relative RMS of outputs beyond which code is not timed: it computes something else."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and what to measure."""

    only: tuple[str, ...] = ()
    """Recurrences by name; none: all."""
    tokens: int = 4096
    batch: int = 1
    heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    channels: int = 256
    """Of elementwise recurrences."""
    state_dim: int = 16
    """Of each of these channels, in selective_scan, state_space and linear_state_space."""
    chunk_tokens: tuple[int, ...] = (32,)
    """The first is the other code's too."""
    repeats: int = 5
    long: bool = False
    """Instead of the table, 65,536 tokens of the gated delta rule, K = V = 64, in a process of its own, for its memory."""
    compile_for: tuple[str, ...] = ()
    """Instead of the table, forward + backward of all compiled for TPUs that need not be there (with libtpu installed)."""


def cases(o: Options) -> dict[Callable, Callable[[], tuple[jax.Array, ...]]]:
    """Every recurrence and what draws its inputs: keys of length 1, decays of about 0.85 per token, gates in (0, 1)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    unit = lambda *shape: (x := normal(*shape)) / jnp.linalg.norm(x, axis=-1, keepdims=True)
    positive = lambda *shape: jax.nn.softplus(normal(*shape) - 2)
    gate = lambda *shape: jax.nn.sigmoid(normal(*shape))
    tokens, modes = (o.batch, o.tokens), (o.channels, o.state_dim)
    heads, channels = (*tokens, o.heads), (*tokens, o.channels)
    keys, values, two = (*heads, o.key_dim), (*heads, o.value_dim), (*tokens, 2, o.heads)
    ramp = lambda low, high: jnp.linspace(low, high, o.channels, dtype=jnp.float32)
    count = jnp.broadcast_to(jnp.arange(1.0, o.state_dim + 1), modes)
    poles, ones = -0.5 + 1j * jnp.pi * count, jnp.ones(modes, jnp.complex64)
    q, k, v, g, beta = unit(*keys), unit(*keys), normal(*values), -positive(*heads), gate(*heads)
    erased = lambda: (-k, beta[..., None] * k)
    return {
        decay_only.linear_attention: lambda: (q, k, v),
        decay_only.retention: lambda: (q, k, v),
        decay_only.lightning_attention: lambda: (q, k, v, decay_only.lightning_slopes(o.heads, 1, 24)),
        decay_only.simple_gla: lambda: (q, k, v, g),
        decay_only.gated_linear_attention: lambda: (q, k, v, -positive(*keys)),
        decay_only.hgrn2: lambda: (q, v, -positive(*keys)),
        decay_only.state_space_dual: lambda: (v, -g, -jnp.arange(1.0, o.heads + 1), k, q),
        elementwise.hgrn: lambda: (normal(*channels), -positive(*channels)),
        elementwise.rg_lru: lambda: (normal(*channels), gate(*channels), gate(*channels), ramp(-7, -2)),
        elementwise.selective_scan: lambda: (
            *(normal(*channels), positive(*channels), -count),
            *(normal(*tokens, o.state_dim), normal(*tokens, o.state_dim)),
        ),
        state_space.state_space: lambda: (normal(*channels), jnp.exp(ramp(-7, -2)), poles, ones, normal(*modes) * ones),
        state_space.linear_state_space: lambda: (
            *(normal(*channels), jnp.exp(ramp(-7, -2)), *state_space.hippo_legs(o.state_dim)),
            normal(o.channels, o.state_dim),
        ),
        delta.delta_rule: lambda: (q, k, v, beta),
        delta.gated_delta_rule: lambda: (q, k, v, g, beta),
        delta.kimi_delta_attention: lambda: (q, k, v, -positive(*keys), beta),
        delta.gated_delta_product: lambda: (q, unit(*two, o.key_dim), normal(*two, o.value_dim), g, gate(*two)),
        delta.gated_delta_net_2: lambda: (q, k, v, -positive(*keys), gate(*keys), gate(*values)),
        delta.comba: lambda: (q, k, v, 0.9 * k, g, beta),
        delta.dplr: lambda: (q, k, v, *erased(), -positive(*keys)),
        delta.rwkv7: lambda: (q, -positive(*keys), k, v, *erased()),
    }


def jax_pass(f: Callable, arrays: tuple[jax.Array, ...], backward: bool) -> tuple[Callable[[], object], float]:
    """One compiled pass, to be called, and the MiB of its temporaries."""
    gradients = jax.grad(lambda *args: jnp.sum(f(*args) ** 2), argnums=tuple(range(len(arrays))))
    compiled = jax.jit(gradients if backward else f).lower(*arrays).compile()
    return lambda: compiled(*arrays), compiled.memory_analysis().temp_size_in_bytes / 2**20


def torch_pass(f: Callable, arrays: tuple[jax.Array, ...], backward: bool) -> tuple[Callable[[], object], float]:
    """The same in torch, which does not say what memory it takes."""
    import torch

    leaves = [torch.tensor(np.asarray(x), requires_grad=backward) for x in arrays]
    if backward:
        return lambda: torch.autograd.grad((f(*leaves) ** 2).sum(), leaves), np.nan
    return lambda: f(*leaves), np.nan


def fla_forms(chunk: int) -> dict[str, Callable]:
    def naive(folder: str, name: str) -> Callable:  # by path: importing fla.ops needs Triton
        path = distribution("fla-core").locate_file(f"fla/ops/{folder}/naive.py")
        spec = importlib.util.spec_from_file_location("naive", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return getattr(module, name)

    def first(folder: str, name: str, heads_first: bool = False) -> Callable:
        f, turn = naive(folder, name), (lambda x: x.transpose(1, 2)) if heads_first else (lambda x: x)
        return lambda *args: turn(f(*map(turn, args), chunk_size=chunk)[0])

    return {
        "linear_attention": naive("linear_attn", "naive_chunk_linear_attn"),
        "simple_gla": first("simple_gla", "naive_chunk_simple_gla"),
        "delta_rule": first("delta_rule", "delta_rule_chunkwise", heads_first=True),
        "gated_delta_rule": first("gated_delta_rule", "naive_chunk_gated_delta_rule"),
        "kimi_delta_attention": first("kda", "naive_chunk_kda"),
        "gated_delta_net_2": first("gdn2", "naive_chunk_gdn2"),
        "comba": first("comba", "naive_chunk_comba"),
        "dplr": first("generalized_delta_rule/dplr", "dplr_chunkwise", heads_first=True),
    }


def ejkernel_forms(chunk: int) -> dict[str, Callable]:
    from ejkernel.kernels._xla.gated_delta_rule import gated_delta_rule as rule

    options = {"chunk_size": chunk, "use_qk_l2norm": False}
    return {"gated_delta_rule": lambda q, k, v, g, beta: rule(q, k, v, beta, g, **options)[0]}


def maxtext_forms(chunk: int) -> dict[str, Callable]:
    name, names = "jax_chunk_gated_delta_rule", {"jax": jax, "jnp": jnp, "lax": jax.lax, "Array": jax.Array}
    source = ast.parse(distribution("maxtext").locate_file("maxtext/models/qwen3.py").read_text())
    source.body = [part for part in source.body if getattr(part, "name", None) == name]
    exec(compile(source, "maxtext", "exec"), names)
    return {"gated_delta_rule": lambda *args: names[name](*args, chunk_size=chunk, compute_dtype=jnp.float32)[0]}


OTHERS = {
    "fla-core": (fla_forms, torch_pass),
    "ejkernel": (ejkernel_forms, jax_pass),
    "maxtext": (maxtext_forms, jax_pass),
}
Others = dict[str, tuple[dict[str, Callable], Callable]]


def installed(chunk: int) -> Others:
    """Forms of other packages by the recurrence they compute; says which packages there are."""
    for name, value in {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)  # or their waiting threads spin: 20 times slower on a busy machine
    found = {}
    for package, (forms, make_pass) in OTHERS.items():
        try:
            found[package] = forms(chunk), make_pass
            print(f"beside: {package} {version(package)}")
        except (ImportError, OSError) as missing:
            print(f"without {package}: {missing}")
    return found


def compare(f: Callable, arrays: tuple[jax.Array, ...], o: Options, others: Others) -> None:
    """The lines of one recurrence."""
    name = f.__name__
    ways = {"steps": (lambda *args: f(*args, implementation="reference")[0], jax_pass)}
    for c in o.chunk_tokens:
        ways[f"chunks of {c}"] = (lambda *args, c=c: f(*args, implementation="xla", chunk_tokens=c)[0], jax_pass)
    ways |= {package: (forms[name], make) for package, (forms, make) in others.items() if name in forms}

    passes = {way: make(form, arrays, False) for way, (form, make) in ways.items()}
    outputs = {way: np.asarray(run()) for way, (run, _) in passes.items()}
    rms = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    errors = {way: rms(x - outputs["steps"]) / rms(outputs["steps"]) for way, x in outputs.items()}
    ways = {way: found for way, found in ways.items() if errors[way] < ERROR}
    cells = {way: f"{error:10.0e}" for way, error in errors.items()}
    for backward in (False, True):
        passes = {way: passes[way] if not backward else make(form, arrays, True) for way, (form, make) in ways.items()}
        ms = interleaved_ms({way: run for way, (run, _) in passes.items()}, o.repeats)
        for way, (_, mib) in passes.items():
            cells[way] += f"{ms[way]:12.1f}{ms['steps'] / ms[way]:9.2f}x{mib:8.0f}"
    print(name, *(f"  {way:18}{line}" for way, line in cells.items()), sep="\n", flush=True)


def long_run(o: Options) -> str:
    """Forward + backward of the gated delta rule with K = V = 64, in a process that has done nothing else."""
    o, f = dataclasses.replace(o, tokens=LONG_TOKENS, key_dim=64, value_dim=64), delta.gated_delta_rule
    arrays = cases(o)[f]()
    began = time.perf_counter()
    run, mib = jax_pass(lambda *args: f(*args, chunk_tokens=o.chunk_tokens[0])[0], arrays, True)
    compile_s = time.perf_counter() - began
    ms = interleaved_ms({"long": run}, o.repeats)["long"]
    return (
        f"gated_delta_rule, {LONG_TOKENS} tokens, forward + backward in chunks of {o.chunk_tokens[0]}: {ms / 1e3:.2f} s "
        f"(compiling {compile_s:.1f} s)\ntemporaries {mib:.0f} MiB, peak resident memory {peak_mib():.0f} MiB"
    )


def compile_for(topology: str, f: Callable, arrays: tuple[jax.Array, ...]) -> str:
    """One line on forward + backward as one device of a TPU topology would run it."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    there = jax.sharding.SingleDeviceSharding(device)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in arrays)
    gradients = jax.grad(lambda *args: jnp.sum(f(*args)[0] ** 2), argnums=tuple(range(len(arrays))))
    began = time.perf_counter()
    mib = jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20
    return f"{topology:12}{f.__name__:24}{mib:8.0f} MiB of temporaries, compiled in {time.perf_counter() - began:.0f} s"


def main(o: Options) -> None:
    print(where())
    print(o)
    if o.long:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            return print(fresh.submit(long_run, o).result())
    drawn = {f: draw for f, draw in cases(o).items() if not o.only or f.__name__ in o.only}
    if unknown := set(o.only) - {f.__name__ for f in drawn}:
        raise ValueError(f"--only: no such recurrence: {', '.join(sorted(unknown))}")
    for topology in o.compile_for:
        for f, draw in drawn.items():
            print(compile_for(topology, f, draw()), flush=True)
    if o.compile_for:
        return
    others = installed(o.chunk_tokens[0])
    print(f"\n{'':30}{'forward':>21}{'forward + backward':>30}")
    print(f"{'':20}{'error':>10}" + f"{'ms':>12}{'steps /':>10}{'MiB':>8}" * 2)
    for f, draw in drawn.items():
        compare(f, draw(), o, others)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

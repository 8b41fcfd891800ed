"""Is attention in blocks worth it on a CPU? Against all scores at once, and against the ringattention package.

    python experiments/benchmarks/attention.py [--tokens 8192] [--blocks 256 512]

Causal, fp32; forward, and forward + backward with gradients of q, k and v. "naive" is `jax.nn.dot_product_attention`. The
ringattention package, none of it needed, takes part where it is installed:

    pip install --no-deps ringattention==0.1.2 einops

Its import asks for `jax.lib.xla_bridge`, which JAX no longer has: it is given a stand-in; its path for CPUs runs unchanged.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.extend
import jax.lib
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from measure import interleaved_ms, where

from jaxmem.pallas_kernels.flash_attention import flash_attention

ERROR = 1e-4
"""Relative RMS of outputs beyond which code is not timed: it computes something else."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and how often."""

    tokens: int = 8192
    heads: int = 4
    width: int = 64
    blocks: tuple[int, ...] = (128, 256, 512, 1024)
    """Tokens per block, of queries and of keys."""
    repeats: int = 3


def naive(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def in_blocks(size: int) -> Callable:
    return lambda q, k, v: flash_attention(q, k, v, block_q=size, block_k=size, implementation="xla").o


def ringattention(size: int) -> Callable:
    """The package's own path for CPUs, on a ring of one device.

    Raises: ImportError if it is not installed.
    """
    bridge = types.ModuleType("jax.lib.xla_bridge")
    bridge.get_backend = jax.extend.backend.get_backend
    jax.lib.xla_bridge = bridge
    from ringattention import ringattention as ring

    options = {"causal_block_size": 1, "query_chunk_size": size, "key_chunk_size": size, "deterministic": True}
    options |= {"dropout_rng": None, "attn_pdrop": 0.0, "policy": jax.checkpoint_policies.nothing_saveable}
    options |= {"dtype": jnp.float32, "precision": None, "prevent_cse": True}
    mesh = jax.make_mesh((1,), ("sp",), axis_types=(AxisType.Auto,))
    local = functools.partial(ring, axis_name="sp", float32_logits=True, cache_idx=None, blockwise_kwargs=options)
    call = lambda q, k, v: local(q, k, v, None, None)
    return jax.shard_map(call, mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"), check_vma=False)


def compiled(f: Callable, arrays: tuple[jax.Array, ...], backward: bool) -> tuple[Callable[[], object], float]:
    """One pass, to be called, and the MiB of its temporaries."""
    gradients = jax.grad(lambda q, k, v: jnp.sum(f(q, k, v) ** 2), (0, 1, 2))
    program = jax.jit(gradients if backward else f).lower(*arrays).compile()
    return lambda: program(*arrays), program.memory_analysis().temp_size_in_bytes / 2**20


def main(o: Options) -> None:
    print(where())
    print(o)
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.standard_normal((1, o.tokens, o.heads, o.width), np.float32))
    arrays = draw(), draw(), draw()
    ways = {"naive": naive} | {f"blocks of {size}": in_blocks(size) for size in o.blocks}
    try:
        ways |= {f"ringattention, {size}": ringattention(size) for size in o.blocks}
        print(f"beside: ringattention {version('ringattention')}")
    except ImportError as missing:
        print(f"without ringattention: {missing}")

    rms = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    passes = {name: compiled(f, arrays, False) for name, f in ways.items()}
    want, errors = np.asarray(naive(*arrays)), {}
    for name, (run, _) in passes.items():
        errors[name] = rms(np.asarray(run()) - want) / rms(want)
    print(
        f"\n{'':20}{'error':>10}{'forward ms':>14}{'naive /':>10}{'MiB':>8}{'with backward':>16}{'naive /':>10}{'MiB':>8}"
    )
    cells = {name: f"{name:20}{error:10.0e}" for name, error in errors.items()}
    for backward in (False, True):
        passes = {name: compiled(f, arrays, backward) for name, f in ways.items() if errors[name] < ERROR}
        ms = interleaved_ms({name: run for name, (run, _) in passes.items()}, o.repeats)
        for name, (_, mib) in passes.items():
            cells[name] += f"{ms[name]:{16 if backward else 14}.0f}{ms['naive'] / ms[name]:9.2f}x{mib:8.0f}"
    print(*cells.values(), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

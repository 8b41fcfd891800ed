"""Is reading a table by `bag` worth it? Against the gather and product that one would write, with JAX's own gradients.

    python experiments/benchmarks/memory.py [--tokens 2048] [--slots 65536]

fp32; forward, and forward + backward with gradients of values and weights. MiB are of temporaries, gradients not included.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from measure import interleaved_ms, where

from jaxmem.pallas_kernels.memory_lookup import bag


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and how often."""

    tokens: int = 2048
    reads: int = 128
    """Rows per token, of all heads."""
    width: int = 256
    slots: int = 65536
    repeats: int = 3


def gathered(values, ids, weights):
    return jnp.einsum("tkv,tk->tv", values[ids], weights)


def both(f, values, ids, weights, dy):
    y, pull = jax.vjp(lambda values, weights: f(values, ids, weights), values, weights)
    return y, pull(dy)


def main(o: Options) -> None:
    print(where())
    print(o)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    ids = jnp.asarray(rng.integers(0, o.slots, (o.tokens, o.reads), np.int32))
    arrays = normal(o.slots, o.width), ids, normal(o.tokens, o.reads)
    dy = normal(o.tokens, o.width)
    ways = {"einsum(values[ids], w)": gathered, "bag": bag}
    passes = {
        "forward": {name: (f, arrays) for name, f in ways.items()},
        "forward + backward": {name: (functools.partial(both, f), (*arrays, dy)) for name, f in ways.items()},
    }
    for title, functions in passes.items():
        programs = {name: jax.jit(f).lower(*inputs).compile() for name, (f, inputs) in functions.items()}
        calls = {name: functools.partial(programs[name], *inputs) for name, (_, inputs) in functions.items()}
        results = [jax.tree.leaves(call()) for call in calls.values()]
        for a, b in zip(*results, strict=True):
            assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 1e-5
        ms = interleaved_ms(calls, o.repeats)
        mib = {name: p.memory_analysis().temp_size_in_bytes / 2**20 for name, p in programs.items()}
        plain = next(iter(ways))
        print(f"\n{title}")
        for name in ways:
            ratios = f"{ms[plain] / ms[name]:6.2f}x as fast, {mib[name] / mib[plain]:6.3f}x the memory"
            print(f"  {name:24}{ms[name]:9.1f} ms{mib[name]:9.1f} MiB   {ratios}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

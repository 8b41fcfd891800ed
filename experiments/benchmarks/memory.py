"""Is reading a table by `bag` worth it? Against the gather and product that one would write, with JAX's own gradients. And is
Adam of the rows that a step read, against Adam of the table?

    python experiments/benchmarks/memory.py [--tokens 2048] [--slots 65536] [--train-slots 4194304]

fp32; forward, and forward + backward with gradients of values and weights. MiB are of temporaries, gradients not included.
A training step reads `train_tokens` x `reads` rows of a table, each another one, and updates table and moments in place.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from measure import interleaved_ms, where

from jaxmem.pallas_kernels.memory_lookup import bag, row_gradient
from jaxmem.training.lazy_adam import apply_rows, lazy_adam


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes, and how often."""

    tokens: int = 2048
    reads: int = 128
    """Rows per token, of all heads."""
    width: int = 256
    slots: int = 65536
    train_tokens: int = 64
    train_slots: int = 4 * 2**20
    train_width: int = 64
    repeats: int = 3


def gathered(values, ids, weights):
    return jnp.einsum("tkv,tk->tv", values[ids], weights)


def both(f, values, ids, weights, dy):
    y, pull = jax.vjp(lambda values, weights: f(values, ids, weights), values, weights)
    return y, pull(dy)


def train_steps(o: Options) -> dict[str, tuple[Callable, Callable]]:
    """By name, a function (table, state, ids, weights, dy) -> (table, state), and the one that makes a state of a table."""
    dense, lazy = optax.adam(1e-3), lazy_adam(1e-3)

    def dense_step(table, state, ids, weights, dy):
        (gradient,) = jax.vjp(lambda table: bag(table, ids, weights), table)[1](dy)
        updates, state = dense.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    def lazy_step(table, state, ids, weights, dy):
        gradient = row_gradient(ids, weights, dy, o.train_slots, ids.size)
        updates, state = lazy.update(gradient, state, table)
        return apply_rows(table, updates), state

    return {"Adam of the table": (dense_step, dense.init), "Adam of the rows": (lazy_step, lazy.init)}


def time_training(o: Options) -> None:
    rng = np.random.default_rng(0)
    rows = rng.choice(o.train_slots, (o.train_tokens, o.reads), replace=False).astype(np.int32)
    dy = jnp.asarray(rng.standard_normal((o.train_tokens, o.train_width), np.float32))
    inputs = jnp.asarray(rows), jnp.ones(rows.shape), dy
    calls, mib, tables = {}, {}, {}
    for name, (step, init) in train_steps(o).items():
        table = jnp.zeros((o.train_slots, o.train_width))
        state = init(table)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *inputs).compile()
        mib[name] = program.memory_analysis().temp_size_in_bytes / 2**20
        held = [table, state]

        def call(held=held, program=program):
            held[:] = program(*held, *inputs)
            return held[0]

        calls[name], tables[name] = call, held
    ms = interleaved_ms(calls, o.repeats)
    read = jnp.asarray(rows.ravel())
    first, second = (held[0][read] for held in tables.values())
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-7)
    plain = next(iter(calls))
    print(f"\na training step of {o.train_slots:,} slots x {o.train_width}, {rows.size:,} rows read")
    for name in calls:
        print(f"  {name:24}{ms[name]:9.1f} ms{mib[name]:9.1f} MiB   {ms[plain] / ms[name]:6.1f}x as fast")


def main(o: Options) -> None:
    print(where())
    print(o)
    time_training(o)
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

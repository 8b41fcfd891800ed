"""Is the chunked gated delta rule worth its algebra? Chunks against steps, forward and forward + backward.

    python experiments/benchmarks/gated_delta_rule.py [--tokens 4096]

Expected on two CPU cores at T = 4096: forward + backward in chunks of 32 at least ten times faster than the step-by-step
scan, whose backward pass has to store a state per token; forward alone is about even, as a state of 64 x 64 stays in cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tyro
from measure import interleaved_ms, peak_mib, where

from jaxmem.recurrences.delta import gated_delta_rule


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the recurrence."""

    tokens: int = 4096
    heads: int = 4
    key_dim: int = 64
    value_dim: int = 64
    batch: int = 1
    repeats: int = 5
    chunks: tuple[int, ...] = (16, 32, 64, 128)


def main(shape: Shape) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    size = (shape.batch, shape.tokens, shape.heads)
    q, k = (jax.random.normal(key, (*size, shape.key_dim)) for key in keys[:2])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = jax.random.normal(keys[2], (*size, shape.value_dim))
    g = -jax.nn.softplus(jax.random.normal(keys[3], size) - 2)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], size))

    def forward(**options):
        return lambda *args: gated_delta_rule(*args, **options)[0]

    def backward(**options):
        return jax.grad(lambda *args: jnp.sum(forward(**options)(*args) ** 2), argnums=(0, 1, 2, 3, 4))

    variants = {"steps": {"implementation": "reference"}}
    variants |= {f"chunks of {c}": {"implementation": "xla", "chunk_tokens": c} for c in shape.chunks}
    print(where())
    print(f"{shape}\n{'':16}{'ms':>10}{'steps / this':>14}{'temporaries, MiB':>18}")
    for title, make in (("forward", forward), ("forward + backward", backward)):
        compiled = {
            name: jax.jit(make(**options)).lower(q, k, v, g, beta).compile() for name, options in variants.items()
        }
        ms = interleaved_ms({name: lambda f=f: f(q, k, v, g, beta) for name, f in compiled.items()}, shape.repeats)
        print(title)
        for name, f in compiled.items():
            temporaries = f.memory_analysis().temp_size_in_bytes / 2**20
            print(f"  {name:14}{ms[name]:10.1f}{ms['steps'] / ms[name]:13.1f}x{temporaries:18.0f}")
    print(f"peak resident memory {peak_mib():.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Shape, description=__doc__))

"""A function of single tokens, computed for a block of them at a time, and again for its gradients.

What it makes on the way, such as the wide activations of a feed-forward, never exists for more tokens than a block's; only
its input is saved. Every device works on blocks of its own tokens.
Reference: Liu and Abbeel 2023, "Blockwise Parallel Transformer", arXiv 2305.19370.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.sharding import current_mesh, current_rules, n_shards_of
from jaxmem.typing import Array, Float


def in_blocks(
    f: Callable[[Float[Array, "B C D"]], Float[Array, "B C D"]], x: Float[Array, "B T D"], block_tokens: int
) -> Float[Array, "B T D"]:
    """f(x), at most block_tokens tokens of a row and device at a time; blocks are of one size, the largest that divides.

    Cost: f once forward, once more and its gradient backward.
    Raises: ValueError for block_tokens < 1.

    >>> in_blocks(lambda x: 2 * x, jnp.ones((1, 6, 1)), 4)[0, :, 0].tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if block_tokens < 1:
        raise ValueError(f"in_blocks: needs block_tokens >= 1, got block_tokens={block_tokens}; None is no blocks")
    batch, n_tokens, width = x.shape
    n = n_shards_of("time")
    here = n_tokens // n
    size = next(size for size in range(min(block_tokens, here), 0, -1) if here % size == 0)
    if size == here:
        return f(x)

    def block(x: Float[Array, "B R C D"]) -> Float[Array, "B R C D"]:
        y = f(_reshaped(x, (batch, n * size, width), "batch", "time", "embed"))
        return _reshaped(y, (batch, n, size, width), "batch", "time", None, "embed")

    blocks = _reshaped(x, (batch, n, here // size, size, width), "batch", "time", None, None, "embed")
    blocks = jax.lax.map(jax.checkpoint(block), jnp.moveaxis(blocks, 2, 0))
    return _reshaped(jnp.moveaxis(blocks, 0, 2), x.shape, "batch", "time", "embed")


def _reshaped(x: Array, shape: tuple[int, ...], *axes: str | None) -> Array:
    if current_mesh() is None:
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=current_rules().spec(axes, "activations"))

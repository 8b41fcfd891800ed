"""Which tokens a device holds of a sequence that is split over n devices.

| layout | device d holds, of T tokens | |
|---|---|---|
| contiguous | d T/n ... (d + 1) T/n - 1 | what recurrences, halos and everybody else expects |
| zigzag | the pieces d and 2n - 1 - d of 2n | a causal ring computes as much on every device |
| striped | d, d + n, d + 2n, ... | the same, and evenly at every hop |

Attention goes by `Place.index`, never by order, so only work depends on a layout, no result. Tokens, positions and segment
ids change their layout once, where a batch enters the model (`lay_out`), and what comes out once, where it leaves
(`restore`): two exchanges of T/2n tokens for zigzag, one all-to-all for striped.
Reference: Brandon et al. 2023, "Striped Attention", arXiv 2311.09431; zigzag: the order of Llama 3's context parallelism,
Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2.
"""

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from jaxmem.sharding.folds import n_shards, sequence_axis
from jaxmem.sharding.placement import constrain, local, n_shards_of
from jaxmem.sharding.rules import Layout
from jaxmem.typing import Array, Int, Shaped


def lay_out(x: Shaped[Array, "B T *x"], layout: Layout, *axes: str | None) -> Shaped[Array, "B T *x"]:
    """An array in the order of the sequence, whose dimensions are `axes`, in that of the layout.

    Raises: ValueError for tokens that do not divide.
    """
    return _exchanged(from_contiguous, x, layout, axes)


def restore(x: Shaped[Array, "B T *x"], layout: Layout, *axes: str | None) -> Shaped[Array, "B T *x"]:
    """The inverse of `lay_out`."""
    return _exchanged(to_contiguous, x, layout, axes)


def _exchanged(exchange: Callable, x: Array, layout: Layout, axes: tuple[str | None, ...]) -> Array:
    x = constrain(x, *axes)
    if layout == "contiguous":
        return x
    check_layout(layout, x.shape[1], n_shards_of("time"))
    return local(lambda x: exchange(x, layout, sequence_axis(any_layout=True)), (axes,), axes)(x)


def check_layout(layout: Layout, n_tokens: int, n_devices: int) -> None:
    """Raises ValueError for an unknown layout, or tokens that do not divide."""
    pieces = {"contiguous": n_devices, "zigzag": 2 * n_devices, "striped": n_devices**2}
    if layout not in pieces:
        raise ValueError(f"layout: needs one of {', '.join(get_args(Layout))}, got {layout!r}; change it")
    if n_devices > 1 and n_tokens % pieces[layout]:
        raise ValueError(
            f"layout: needs a number of tokens that {pieces[layout]} divides, for {layout} over {n_devices} devices, got "
            f"{n_tokens}; pad with {-n_tokens % pieces[layout]} tokens of segment 0"
        )


def own_tokens(layout: Layout, n_tokens: int, axis: str | None) -> Int[Array, "T"]:
    """Inside `local`: the places in the sequence of the n_tokens that this device holds."""
    n, token = n_shards(axis), jnp.arange(n_tokens, dtype=jnp.int32)
    if n == 1:
        return token
    device, half = jax.lax.axis_index(axis), n_tokens // 2
    if layout == "striped":
        return n * token + device
    if layout == "zigzag":
        return jnp.where(token < half, half * device + token, half * (2 * n - 2 - device) + token)
    return n_tokens * device + token


def from_contiguous(x: Shaped[Array, "B T *x"], layout: Layout, axis: str | None) -> Shaped[Array, "B T *x"]:
    """Inside `local`: this device's tokens in the layout, of those that it holds in order."""
    n = n_shards(axis)
    if n == 1 or layout == "contiguous":
        return x
    if layout == "striped":
        pieces = x.reshape(x.shape[0], -1, n, *x.shape[2:]).swapaxes(1, 2)  # [B n T/n ...]
        return jax.lax.all_to_all(pieces, axis, 1, 1, tiled=True).reshape(x.shape)
    even, odd = (
        jax.lax.ppermute(piece, axis, _moves(n, parity)) for parity, piece in enumerate(jnp.split(x, 2, axis=1))
    )
    return _paired(even, odd, axis)


def to_contiguous(x: Shaped[Array, "B T *x"], layout: Layout, axis: str | None) -> Shaped[Array, "B T *x"]:
    """Inside `local`: the inverse of `from_contiguous`."""
    n = n_shards(axis)
    if n == 1 or layout == "contiguous":
        return x
    if layout == "striped":
        pieces = x.reshape(x.shape[0], n, -1, *x.shape[2:])
        return jax.lax.all_to_all(pieces, axis, 1, 1, tiled=True).swapaxes(1, 2).reshape(x.shape)
    even, odd = jnp.split(_paired(*jnp.split(x, 2, axis=1), axis), 2, axis=1)
    back = lambda piece, parity: jax.lax.ppermute(piece, axis, [(b, a) for a, b in _moves(n, parity)])
    return jnp.concatenate([back(even, 0), back(odd, 1)], axis=1)


def _moves(n: int, parity: int) -> list[tuple[int, int]]:
    """(from, to) of the pieces 2 d + parity of 2n, from devices that hold them in order to their places in a zigzag."""
    return [(d, min(2 * d + parity, 2 * n - 1 - 2 * d - parity)) for d in range(n)]


def _paired(first: Array, second: Array, axis: str) -> Array:
    """The piece d in front of 2n - 1 - d, where the even one of the two comes first; its own inverse."""
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, first, second), jnp.where(is_even, second, first)], axis=1)

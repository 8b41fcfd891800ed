"""How a named recurrence is called: shapes checked by name, defaults filled in, streams made in fp32, the engine run."""

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np

from jaxmem.recurrences.documents import known, read_documents
from jaxmem.recurrences.engine import Implementation, recurrence
from jaxmem.recurrences.streams import Streams, streams_shape
from jaxmem.typing import Array, DTypeLike, Int

CHUNK_TOKENS = 32
"""Measured on a CPU (experiments/benchmarks/recurrences.py)."""

MOST_ROWS = 128
"""Steps in a chunk of a delta rule, tokens x steps per token: the rounding of fp32 grows with them
(tests/recurrences/test_precision.py)."""


class Options(TypedDict, total=False):
    """What every named recurrence takes besides its arrays."""

    scale: float
    """Of q; default K^-0.5."""
    segment_ids: Int[Array, "B T"]
    """Documents, by ids above 0: each change of the id starts one from nothing; the first continues `state`. 0 is padding
    at the end of a row: passed over, with o = 0; in front of a token it raises, or under jit makes o and the final state
    of the row NaN. Default: one document."""
    chunk_tokens: int
    """C, a power of two from 8; default 32. In a delta rule at most 128 steps, tokens x steps per token."""
    implementation: Implementation | None
    """"reference" steps token by token; "xla" works in chunks; default: steps for T == 1, else chunks."""


def call(
    what: str,
    streams: Callable[..., Streams],
    arrays: dict[str, tuple[Array, str]],
    state: Array | None,
    *,
    n_steps: int = 1,
    beside: Array | None = None,
    state_axes: str = "B H K V",
    sizes: dict[str, int] | None = None,
    dtype: DTypeLike | None = None,
    is_complex: bool = False,
    scale: float | None = None,
    segment_ids: Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """o in v.dtype and the final state in fp32 (or better) of the recurrence with streams(**arrays, scale=scale).

    Args:
      arrays: name: (array, its axes); axes by the same letter have the same size, G divides H. Log-decays, which must not
        be positive, are those named g.
      beside: what is added to o of all tokens.
      state_axes: of the state; the engine's has dimensions of size 1 behind it if they are fewer.
      sizes: of axes that no array has.
      dtype: of o, default that of v.
      is_complex: whether the state is.
    """
    require_chunk(what, chunk_tokens)
    if implementation not in (None, "reference", "xla"):
        raise ValueError(
            f"{what}: needs implementation 'reference', 'xla' or None, "
            f"got implementation={implementation!r}; choose one of these"
        )
    sizes = check_shapes(what, arrays) | (sizes or {})
    shape = tuple(sizes[axis] for axis in state_axes.split())
    dtype = arrays["v"][0].dtype if dtype is None else dtype
    state_dtype = jnp.promote_types(dtype, jnp.complex64 if is_complex else jnp.float32)
    if state is None:
        state = jnp.zeros(shape, state_dtype)
    elif state.shape != shape:
        raise ValueError(
            f"{what}: needs an initial state [{state_axes}] of shape {shape}, got state of shape {state.shape}; "
            "pass the final state of a call with the same sizes, or none"
        )
    if "g" in arrays:
        require_decays(what, arrays["g"][0])
    documents, broken = None, None
    if segment_ids is not None:
        documents, broken = read_documents(what, segment_ids, (sizes["B"], sizes["T"]))
    if not sizes["B"] or not sizes["T"]:  # nothing to do
        of_token = (sizes["H"], sizes["V"]) if "V" in sizes else (sizes["D"], 1)
        return jnp.zeros((sizes["B"], sizes["T"], *of_token), dtype), state.astype(state_dtype)
    scale = sizes.get("K", 1) ** -0.5 if scale is None else scale
    make = in_float32(functools.partial(streams, scale=scale))
    inputs = {name: array for name, (array, _) in arrays.items()}
    if implementation != "reference" and sizes["T"] > 1 and streams_shape(make, inputs).erase is not None:
        require_rows(what, chunk_tokens, n_steps)
    o, state = recurrence(
        make,
        inputs,
        state.astype(state_dtype).reshape(*shape, *[1] * (4 - len(shape))),
        n_steps=n_steps,
        documents=documents,
        chunk_tokens=chunk_tokens,
        implementation=implementation,
    )
    o = jnp.real(o) if jnp.iscomplexobj(o) else o
    if beside is not None:
        o += beside
    if documents is not None:
        of_rows = lambda a: broken.reshape(-1, *[1] * (a.ndim - 1))
        o = jnp.where(documents.real[..., None, None], o, 0)
        o, state = (jnp.where(of_rows(a), jnp.nan, a) for a in (o, state))
    return o.astype(dtype), state.reshape(shape)


def call_by_channel(
    what: str,
    streams: Callable[..., Streams],
    arrays: dict[str, tuple[Array, str]],
    x: Array,
    state: Array | None,
    axes: str = "B D",
    *,
    d: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """`call` of states [B D] or [B D N] whose channels are heads, with d x beside what is read."""
    beside = None if d is None else (d * x)[..., None]
    y, state = call(what, streams, arrays, state, state_axes=axes, dtype=x.dtype, beside=beside, **options)
    return y[..., 0], state


def in_float32(streams: Callable[..., Streams]) -> Callable[[dict[str, Array]], Streams]:
    """Streams of a dict of arrays, computed in fp32 (or better, if that is what comes in)."""
    full = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return lambda inputs: streams(**{name: full(x) for name, x in inputs.items()})


def repeat_heads(x: Array, like: Array, axis: int = -2) -> Array:
    """x with each of its heads repeated to serve the more heads of `like` (grouped values)."""
    return x if x.shape[axis] == like.shape[axis] else jnp.repeat(x, like.shape[axis] // x.shape[axis], axis)


def check_shapes(what: str, arrays: dict[str, tuple[Array, str]]) -> dict[str, int]:
    """The size of every axis letter; raises ValueError where two arrays disagree."""
    sizes: dict[str, int] = {}
    said: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        letters = axes.split()
        if array.ndim != len(letters):
            raise ValueError(f"{what}: needs {name} [{axes}], got {name} of shape {array.shape}; reshape it")
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{what}: needs {name} [{axes}] with {letter} = {sizes[letter]} as in {said[letter]}, "
                    f"got {name} of shape {array.shape}; {letter} is the same in both"
                )
            said.setdefault(letter, f"{name} [{axes}]")
        if "G" in sizes and sizes.get("H", 0) % sizes["G"]:
            raise ValueError(
                f"{what}: needs a number of heads H that is a multiple of the key heads G, got H={sizes['H']} and "
                f"G={sizes['G']}; every key head serves equally many heads"
            )
    return sizes


def require_chunk(what: str, chunk_tokens: int) -> None:
    """Raises ValueError for a chunk size that cannot be halved, or that a TPU cannot tile."""
    if chunk_tokens < 8 or chunk_tokens & (chunk_tokens - 1):
        raise ValueError(
            f"{what}: needs a power of two from 8, a tile of a TPU, as chunk_tokens, got chunk_tokens={chunk_tokens}; "
            "use 32, 64 or 128"
        )


def require_rows(what: str, chunk_tokens: int, n_steps: int) -> None:
    """Raises ValueError for chunks of a delta rule with so many steps that fp32 loses more than 1e-5."""
    if chunk_tokens * n_steps > MOST_ROWS:
        fits = 1 << (MOST_ROWS // n_steps).bit_length() - 1 if n_steps <= MOST_ROWS // 8 else 0
        raise ValueError(
            f"{what}: needs at most {MOST_ROWS} steps in a chunk, for rounding errors grow with them, got "
            f"chunk_tokens={chunk_tokens} of {n_steps} steps each; "
            + (f"use chunk_tokens={fits}" if fits else f"use at most {MOST_ROWS // 8} steps per token")
        )


def require_decays(what: str, g: Array) -> None:
    """Raises ValueError for log-decays above 0, if their values are known (not under jit)."""
    if (values := known(g)) is not None and np.any(values > 0):
        raise ValueError(
            f"{what}: needs log-decays g <= 0, got g up to {np.max(values):.3g}; "
            "pass natural logarithms of factors from 0 to 1"
        )

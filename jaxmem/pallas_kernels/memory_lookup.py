"""Reading a few rows of a large table, and the gradients of that: three operations, each made of the others' transposes.

    bag(v, ids, w)      y_t = sum_j w_tj v[ids_tj]            [T V]
    dots(v, ids, y)     d_tj = <y_t, v[ids_tj]>               [T k]      the gradient of w
    sum_rows(ids, w, y) s_m = sum_{t, j: ids_tj = m} w_tj y_t [M V]      the gradient of v

All products are summed in fp32, and each is the gradient of the other two: every order of derivative exists, in reverse mode.
A gradient of a table is cast once to its dtype: a slot of bf16 that is read 4,096 times gets 4,096 times its gradient,
where the gradient of JAX's own gather stops at 256. Rows are summed in the order of their ids and then of the tokens.

An id outside 0 .. M - 1 reads nothing: it counts as a row of zeros, and gets no gradient. Outside jit it is an error.

`xla` works in chunks of tokens: no array [T, k, V] exists. `pallas_tpu` and `pallas_gpu` fetch each row where it is used
(`memory_lookup_tpu`, `memory_lookup_gpu`). Cost: 2 T k V FLOPs and T k rows read, for each of the three.
Reference: Lample et al. 2019, arXiv 1907.05242, section 3.1; Berges et al. 2024, arXiv 2412.09764, section 3.2.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.pallas_kernels import memory_lookup_gpu, memory_lookup_tpu
from jaxmem.typing import Array, Float, Int, PyTree

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"pallas_tpu": memory_lookup_tpu, "pallas_gpu": memory_lookup_gpu}
"""By implementation."""
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
CHUNK_NUMBERS = 2**18
"""Of gathered rows at once: 1 MiB in fp32, which stays in a core's cache."""


def bag(
    values: Float[Array, "M V"],
    ids: Int[Array, "*batch k"],
    weights: Float[Array, "*batch k"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch V"]:
    """The weighted sum of rows, y_t = sum_j w_tj values[ids_tj], in fp32.

    Args:
      values: a table, in any float dtype.
      ids: rows to read; an id that is no row's reads nothing.
      weights: of each.
      implementation: "reference" is the equation, with an array [*batch, k, V]; "xla" works in chunks; "pallas_tpu" and
        "pallas_gpu" are kernels; None: the kernel of the platform compiled for, if it can read such a table, or "xla".

    Raises: ValueError if ids and weights have not one shape, outside jit for an id that is no row's, or for an unknown
      implementation; NotImplementedError for a table that the kernel asked for cannot read.

    >>> bag(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0, 1, 1]]), jnp.array([[0.5, 2.0, 3.0]])).tolist()
    [[0.5, 5.0]]
    """
    _check("bag", values, ids, weights.shape, implementation)
    return _bag(values, ids, weights, implementation)


def dots(
    values: Float[Array, "M V"],
    ids: Int[Array, "*batch k"],
    y: Float[Array, "*batch V"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch k"]:
    """The products with rows, d_tj = <y_t, values[ids_tj]>, in fp32: the gradient of `bag` in its weights.

    Arguments and errors as of `bag`.

    >>> dots(jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([[1, 0]]), jnp.array([[10.0, 1.0]])).tolist()
    [[23.0, 10.0]]
    """
    _check("dots", values, ids, (*y.shape[:-1], ids.shape[-1]), implementation)
    return _dots(values, ids, y, implementation)


def sum_rows(
    ids: Int[Array, "*batch k"],
    weights: Float[Array, "*batch k"],
    y: Float[Array, "*batch V"],
    n_rows: int,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M V"]:
    """Weighted sums into rows, s_m = sum of w_tj y_t over ids_tj = m, in fp32: the gradient of `bag` in its values.

    >>> sum_rows(jnp.array([[1, 1], [1, 5]]), jnp.ones((2, 2)), jnp.array([[1.0], [10.0]]), 2).tolist()
    [[0.0], [12.0]]
    """
    _check_implementation("sum_rows", jax.ShapeDtypeStruct((n_rows, y.shape[-1]), jnp.float32), implementation)
    return _sum_rows(ids, weights, y, n_rows, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _bag(values, ids, weights, implementation):
    return _product_with_rows("bag", values, ids, weights, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dots(values, ids, y, implementation):
    return _product_with_rows("dots", values, ids, y, implementation)


_EQUATIONS = {"bag": "...k,...kv->...v", "dots": "...v,...kv->...k"}


def _product_with_rows(what: str, values, ids, x, implementation) -> Float[Array, "*batch n"]:
    """The einsum of x, of each token, and the rows that it reads."""
    x, batch = _fp32(x), ids.shape[:-1]
    if implementation == "reference" or ids.size == 0:
        return _einsum(what, values, ids, x)
    ids, x = (a.reshape(-1, a.shape[-1]) for a in (ids, x))
    xla = functools.partial(_in_chunks, what)
    if implementation is None:
        able = {
            PLATFORMS[name]: _kernel(name, what) for name, kernel in KERNELS.items() if kernel.lacks(values) is None
        }
        found = jax.lax.platform_dependent(values, ids, x, default=xla, **able) if able else xla(values, ids, x)
    else:
        found = (xla if implementation == "xla" else _kernel(implementation, what))(values, ids, x)
    return found.reshape(*batch, found.shape[-1])


def _kernel(implementation: str, what: str) -> Callable[[Array, Array, Array], Array]:
    """Under vmap once per table and batch: a kernel has one table."""
    return jax.custom_batching.sequential_vmap(getattr(KERNELS[implementation], what))


def _einsum(what: str, values, ids, x) -> Float[Array, "*batch n"]:
    return jnp.einsum(_EQUATIONS[what], x, _rows(values, ids), precision="highest")


def _in_chunks(what: str, values, ids, x) -> Float[Array, "T n"]:
    """Chunks of tokens that have about `CHUNK_NUMBERS` in their rows."""
    n_tokens, k = ids.shape
    size = min(n_tokens, max(1, CHUNK_NUMBERS // max(k * values.shape[1], 1)))
    found = jax.lax.map(lambda tokens: _einsum(what, values, *tokens), _split((ids, x), size, 0))
    return found.reshape(-1, found.shape[-1])[:n_tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sum_rows(ids, weights, y, n_rows, implementation):
    n_tokens, k, width = math.prod(ids.shape[:-1]), ids.shape[-1], y.shape[-1]
    rows, weights, y = _known(ids, n_rows).reshape(-1), _fp32(weights).reshape(-1), _fp32(y).reshape(n_tokens, width)
    nothing = jnp.full_like(y, 0, shape=(n_rows, width))
    if implementation == "reference":
        return nothing.at[rows].add(weights[:, None] * jnp.repeat(y, k, axis=0), mode="drop")
    order = jnp.argsort(rows, stable=True)
    return _sum_sorted(nothing, order, rows[order], weights, y, implementation)


def _sum_sorted(nothing, order, rows, weights, y, implementation: Implementation | None = None) -> Float[Array, "M V"]:
    """Sums into `nothing`, zeros. GPUs have a kernel for it, since XLA's scatter there adds in any order."""
    if rows.size == 0:
        return nothing
    kernel = jax.custom_batching.sequential_vmap(memory_lookup_gpu.add_sorted)
    arrays = nothing, order, rows, weights, y
    if implementation is None:
        return jax.lax.platform_dependent(*arrays, default=_add_sorted, cuda=kernel)
    return (kernel if implementation == "pallas_gpu" else _add_sorted)(*arrays)


def _add_sorted(
    sums: Float[Array, "M V"],
    order: Int[Array, "n"],
    rows: Int[Array, "n"],
    weights: Float[Array, "n"],
    y: Float[Array, "T V"],
) -> Float[Array, "M V"]:
    """With weights[order] times their token's y, a chunk at a time, in `rows`, which ascend."""
    k, (n_rows, width) = rows.size // y.shape[0], sums.shape
    size = min(rows.size, max(1, CHUNK_NUMBERS // max(width, 1)))

    def add(sums, chunk):
        order, rows = chunk
        products = weights[order][:, None] * y[order // k]
        return sums.at[rows].add(products, mode="drop", indices_are_sorted=True), None

    return jax.lax.scan(add, sums, _split((order, rows), size, n_rows))[0]


class RowGradient(NamedTuple):
    """The gradient of a table in the rows that were read, in ascending order; M, 0 and 0 in places behind the last."""

    rows: Int[Array, "n"]
    sums: Float[Array, "n V"]
    """fp32; all NaN if more than n rows were read, so that no gradient is lost unseen."""
    counts: Int[Array, "n"]
    """How often each was read."""


def row_gradient(
    ids: Int[Array, "*batch k"],
    weights: Float[Array, "*batch k"],
    dy: Float[Array, "*batch V"],
    n_rows: int,
    size: int,
) -> RowGradient:
    """What `bag` passes back to its table for a cotangent dy, in at most `size` rows: no array is as long as the table.

    Raises: ValueError for size < 1.

    >>> found = row_gradient(jnp.array([[7, 2], [7, 7]]), jnp.ones((2, 2)), jnp.array([[1.0], [10.0]]), n_rows=9, size=3)
    >>> found.rows.tolist(), found.sums[:, 0].tolist(), found.counts.tolist()
    ([2, 7, 9], [1.0, 21.0, 0.0], [1, 3, 0])
    """
    if size < 1:
        raise ValueError(f"row_gradient: needs size >= 1, got size={size}; pass the most rows that a step may read")
    n_tokens, width = math.prod(ids.shape[:-1]), dy.shape[-1]
    rows, weights, dy = _known(ids, n_rows).reshape(-1), _fp32(weights).reshape(-1), _fp32(dy).reshape(n_tokens, width)
    order = jnp.argsort(rows, stable=True)
    rows = rows[order]
    starts = (rows != jnp.concatenate([jnp.full_like(rows[:1], -1), rows[:-1]])) & (rows < n_rows)
    place = jnp.where(rows < n_rows, jnp.cumsum(starts) - 1, size)
    sums = _sum_sorted(jnp.full_like(dy, 0, shape=(size, width)), order, place, weights, dy)
    sums = jnp.where(jnp.sum(starts) > size, jnp.nan, sums)
    found = jnp.full_like(rows, n_rows, shape=size).at[place].set(rows, mode="drop")
    return RowGradient(found, sums, jnp.full_like(rows, 0, shape=size).at[place].add(1, mode="drop"))


def _bag_backward(implementation, saved, dy):
    values, ids, weights = saved
    d_values = _sum_rows(ids, weights, dy, values.shape[0], implementation)
    return d_values.astype(values.dtype), None, _dots(values, ids, dy, implementation).astype(weights.dtype)


def _dots_backward(implementation, saved, dd):
    values, ids, y = saved
    d_values = _sum_rows(ids, dd, y, values.shape[0], implementation)
    return d_values.astype(values.dtype), None, _bag(values, ids, dd, implementation).astype(y.dtype)


def _sum_rows_backward(n_rows, implementation, saved, ds):
    ids, weights, y = saved
    d_weights, dy = _dots(ds, ids, y, implementation), _bag(ds, ids, weights, implementation)
    return None, d_weights.astype(weights.dtype), dy.astype(y.dtype)


_bag.defvjp(lambda *a: (_bag(*a), a[:3]), _bag_backward)
_dots.defvjp(lambda *a: (_dots(*a), a[:3]), _dots_backward)
_sum_rows.defvjp(lambda *a: (_sum_rows(*a), a[:3]), _sum_rows_backward)


def _fp32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)


def _known(ids: Int[Array, "..."], n_rows: int) -> Int[Array, "..."]:
    """n_rows, one past the last, for ids that are no row's: negative ones would count from the end."""
    return jnp.where((ids < 0) | (ids >= n_rows), n_rows, ids)


def _rows(values: Float[Array, "M V"], ids: Int[Array, "*batch k"]) -> Float[Array, "*batch k V"]:
    return _fp32(values.at[_known(ids, values.shape[0])].get(mode="fill", fill_value=0))


def _split(arrays: PyTree, size: int, filling: int) -> PyTree:
    """[T ...] -> [N size ...], filled up at the end."""

    def split(x):
        padding = [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, constant_values=filling).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, arrays)


def _check(what: str, values, ids, shape: tuple[int, ...], implementation) -> None:
    _check_implementation(what, values, implementation)
    if ids.shape != shape:
        raise ValueError(
            f"{what}: needs as many ids as weights for the same tokens, got ids={ids.shape} for {shape}; change one of them"
        )
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    numbers, n_rows = np.asarray(ids), values.shape[0]  # in NumPy, which sees them while jit is tracing too
    low, high = numbers.min(), numbers.max()
    if low < 0 or high >= n_rows:
        raise ValueError(
            f"{what}: needs ids in 0..{n_rows - 1}, the rows of the table, got {low}..{high}; under jit such ids read nothing"
        )


def _check_implementation(what: str, values, implementation) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"{what}: needs implementation to be one of {', '.join(get_args(Implementation))}, got {implementation!r}; "
            "change it"
        )
    if implementation in KERNELS and (lacking := KERNELS[implementation].lacks(values)) is not None:
        raise NotImplementedError(f"{what}: {implementation} needs {lacking}; use implementation='xla'")

"""`bag`, `dots` and the sums of sorted rows on NVIDIA GPUs, through Triton: rows are fetched where they are used.

    bag     a program per token and piece of V: 16 rows at a time are fetched, weighted and added in registers
    dots    a program per token and 16 of its reads, over the pieces of V
    sums    a program per run of equal rows and piece of V, in the order of the run: no atomic sums, the same bits every time,
            which XLA's scatter on GPUs does not promise

Bytes moved: the rows read, ids, weights and results; ids of no row's read nothing. Registers: 16 rows of a piece.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxmem.pallas_kernels.attention_scores import fp32_result
from jaxmem.typing import Array, Float, Int

ROWS, PIECE = 16, 256
"""Rows, and numbers of each, that a program holds at once."""


def lacks(values: Array) -> str | None:
    """What of a table these kernels cannot read; None: nothing."""
    if values.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"tables of float32, bfloat16 or float16, got values of {values.dtype}"
    return None


def bag(
    values: Float[Array, "M V"], ids: Int[Array, "T k"], weights: Float[Array, "T k"], **call
) -> Float[Array, "T V"]:
    """As `memory_lookup.bag`, of tokens in one dimension."""
    (n_tokens, k), width = ids.shape, values.shape[1]
    piece = _piece(width)
    return pl.pallas_call(
        functools.partial(_bag_kernel, piece=piece),
        grid=(n_tokens, -(-width // piece)),
        out_shape=fp32_result(values, n_tokens, width),
        cost_estimate=_cost(values, n_tokens, k),
        name="memory_bag",
        **_launch(call),
    )(ids, weights.astype(jnp.float32), values)


def dots(values: Float[Array, "M V"], ids: Int[Array, "T k"], y: Float[Array, "T V"], **call) -> Float[Array, "T k"]:
    """As `memory_lookup.dots`, of tokens in one dimension."""
    (n_tokens, k), width = ids.shape, values.shape[1]
    return pl.pallas_call(
        functools.partial(_dots_kernel, piece=_piece(width)),
        grid=(n_tokens, -(-k // ROWS)),
        out_shape=fp32_result(values, n_tokens, k),
        cost_estimate=_cost(values, n_tokens, k),
        name="memory_dots",
        **_launch(call),
    )(ids, y.astype(jnp.float32), values)


def add_sorted(
    sums: Float[Array, "M V"],
    order: Int[Array, "n"],
    rows: Int[Array, "n"],
    weights: Float[Array, "n"],
    y: Float[Array, "T V"],
    **call,
) -> Float[Array, "M V"]:
    """As `memory_lookup._add_sorted`, of sums that are zeros: a row with any is replaced by the sum."""
    (n_rows, width), n = sums.shape, rows.size
    piece = _piece(width)
    index = jnp.arange(n, dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones_like(rows[:1], bool), rows[1:] != rows[:-1]])
    next_first = jax.lax.cummin(jnp.where(is_first, index, n), reverse=True)
    after = jnp.concatenate([next_first[1:], jnp.full_like(next_first[:1], n)])
    lengths = jnp.where(is_first & (rows < n_rows), after - index, 0)
    return pl.pallas_call(
        functools.partial(_sums_kernel, piece=piece, k=n // y.shape[0]),
        grid=(n, -(-width // piece)),
        out_shape=fp32_result(y, n_rows, width),
        input_output_aliases={5: 0},
        cost_estimate=pl.CostEstimate(flops=2 * n * width, transcendentals=0, bytes_accessed=8 * n * width),
        name="memory_sums",
        **_launch(call),
    )(order.astype(jnp.int32), rows, lengths, weights, y, sums)


def _piece(width: int) -> int:
    return min(PIECE, max(16, 1 << (width - 1).bit_length()))


def _launch(call: dict) -> dict:
    return {"compiler_params": pltriton.CompilerParams(num_warps=4, num_stages=2)} | call


def _cost(values: Array, n_tokens: int, k: int) -> pl.CostEstimate:
    width = values.shape[1]
    moved = n_tokens * (k * (width * values.dtype.itemsize + 8) + 4 * width)
    return pl.CostEstimate(flops=2 * n_tokens * k * width, transcendentals=0, bytes_accessed=moved)


def _rows_at(ids, values, token, first, columns):
    """[rows piece] of a token's reads from `first` on, zeros where there are none."""
    reads = first + jnp.arange(ROWS)
    row = pltriton.load(ids.at[token, reads], mask=reads < ids.shape[1], other=-1)
    real = (row >= 0) & (row < values.shape[0])
    mask = real[:, None] & (columns < values.shape[1])[None, :]
    return pltriton.load(values.at[row[:, None], columns[None, :]], mask=mask, other=0).astype(jnp.float32)


def _bag_kernel(ids, weights, values, y, *, piece: int):
    token, columns = pl.program_id(0), pl.program_id(1) * piece + jnp.arange(piece)

    def of_group(g, total):
        reads = ROWS * g + jnp.arange(ROWS)
        w = pltriton.load(weights.at[token, reads], mask=reads < ids.shape[1], other=0)
        return total + jnp.sum(w[:, None] * _rows_at(ids, values, token, ROWS * g, columns), axis=0)

    total = jax.lax.fori_loop(0, -(-ids.shape[1] // ROWS), of_group, jnp.zeros(piece, jnp.float32))
    pltriton.store(y.at[token, columns], total, mask=columns < values.shape[1])


def _dots_kernel(ids, x, values, d, *, piece: int):
    token, first = pl.program_id(0), pl.program_id(1) * ROWS

    def of_piece(p, total):
        columns = piece * p + jnp.arange(piece)
        here = pltriton.load(x.at[token, columns], mask=columns < values.shape[1], other=0)
        return total + jnp.sum(here[None, :] * _rows_at(ids, values, token, first, columns), axis=1)

    total = jax.lax.fori_loop(0, -(-values.shape[1] // piece), of_piece, jnp.zeros(ROWS, jnp.float32))
    reads = first + jnp.arange(ROWS)
    pltriton.store(d.at[token, reads], total, mask=reads < ids.shape[1])


def _sums_kernel(order, rows, lengths, weights, y, _, sums, *, piece: int, k: int):
    first, columns = pl.program_id(0), pl.program_id(1) * piece + jnp.arange(piece)
    length, inside = lengths[first], columns < y.shape[1]

    @pl.when(length > 0)
    def _():
        def of_read(j, total):
            read = order[first + j]
            here = pltriton.load(y.at[read // k, columns], mask=inside, other=0)
            return total + weights[read] * here

        total = jax.lax.fori_loop(0, length, of_read, jnp.zeros(piece, jnp.float32))
        pltriton.store(sums.at[rows[first], columns], total, mask=inside)

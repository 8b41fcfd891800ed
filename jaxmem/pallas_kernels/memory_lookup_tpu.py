"""`bag` and `dots` on TPUs: the rows that tokens read come from HBM one by one, each by a copy of its own.

A program has 8 tokens, whose ids and weights lie in scalar memory. Their reads are one stream of groups of 8 rows: while the
rows of a group are multiplied, those of the next come into the other of two buffers. An id of no row's starts no copy: owners
of a part of a table (`jaxmem.sharding.tables`) move the rows that they have and no others.

    bytes moved = rows read x V x 4 + ids, weights and results

Scalar memory: 2 x 8 k numbers, whatever the number of tokens. VMEM: 2 x 8 rows, and 8 tokens' vectors.
Tables are fp32: two rows of bf16 share each 32-bit word of a TPU's memory, and copies of them begin at whole tiles of 8 rows,
so that one row would cost eight. Those tables are read by XLA, as are rows of V that is no multiple of 128.
`sum_rows` stays XLA's too: sorted rows are added in fp32, in one order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmem.pallas_kernels.attention_scores import fp32_result
from jaxmem.typing import Array, Float, Int

LANES = 128
TOKENS, ROWS = 8, 8
"""Of a program, and of a group."""


def lacks(values: Array) -> str | None:
    """What of a table these kernels cannot read; None: nothing."""
    if values.dtype != jnp.float32:
        return f"tables of fp32, got values of {values.dtype}"
    if values.shape[1] % LANES:
        return f"rows of a multiple of {LANES} numbers, got V={values.shape[1]}"
    return None


def bag(values: Float[Array, "M V"], ids: Int[Array, "T k"], weights: Float[Array, "T k"]) -> Float[Array, "T V"]:
    """As `memory_lookup.bag`, of tokens in one dimension."""
    return _call(_bag_kernel, "memory_bag", values, ids, weights, values.shape[1])


def dots(values: Float[Array, "M V"], ids: Int[Array, "T k"], y: Float[Array, "T V"]) -> Float[Array, "T k"]:
    """As `memory_lookup.dots`, of tokens in one dimension."""
    return _call(_dots_kernel, "memory_dots", values, ids, y, None)


def moved_bytes(n_tokens: int, k: int, width: int, n_rows_read: int) -> int:
    """By `bag`: rows, ids and weights of whole programs, and results."""
    n, k = -(-n_tokens // TOKENS) * TOKENS, _padded(k)
    return 4 * (n_rows_read * width + 2 * n * k + n * width)


def _padded(k: int) -> int:
    return -(-k // ROWS) * ROWS


def _call(kernel, name: str, values, ids, x, width: int | None) -> Float[Array, "T n"]:
    n_rows, row = values.shape
    n_tokens, k = ids.shape
    n, k_padded = -(-n_tokens // TOKENS) * TOKENS, _padded(k)
    fill = lambda a, columns, value: jnp.pad(a, ((0, n - n_tokens), (0, columns - a.shape[1])), constant_values=value)
    ids = fill(ids, k_padded, -1)
    here = lambda columns, space: pl.BlockSpec((TOKENS, columns), lambda i: (i, 0), memory_space=space)
    of_x = here(k_padded, pltpu.SMEM) if width else here(row, pltpu.VMEM)
    x = fill(x.astype(jnp.float32), k_padded if width else row, 0)
    out = width or k_padded
    scratch = [pltpu.VMEM((2, ROWS, row), jnp.float32), pltpu.SemaphoreType.DMA((2,))]
    if not width:
        scratch.append(pltpu.VMEM((k_padded, LANES), jnp.float32))
    result = pl.pallas_call(
        functools.partial(kernel, n_rows=n_rows),
        grid=(n // TOKENS,),
        in_specs=[here(k_padded, pltpu.SMEM), of_x, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=here(out, pltpu.VMEM),
        out_shape=fp32_result(values, n, out),
        scratch_shapes=scratch,
        cost_estimate=pl.CostEstimate(
            flops=2 * n * k * row, transcendentals=0, bytes_accessed=moved_bytes(n_tokens, k, row, n_tokens * k)
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=name,
    )(ids, x, values)
    return result[:n_tokens, : out if width else k]


class _Stream:
    """The rows of a program's reads in groups, each of which is on its way while the one before is used."""

    def __init__(self, ids, table, buffers, arrived, n_rows: int):
        self.ids, self.table, self.buffers, self.arrived, self.n_rows = ids, table, buffers, arrived, n_rows
        self.groups = ids.shape[1] // ROWS

    def is_row(self, group, i: int):
        token, first = jax.lax.div(group, self.groups), ROWS * jax.lax.rem(group, self.groups)
        row = self.ids[token, first + i]
        return row, (row >= 0) & (row < self.n_rows)

    def _each(self, group, act) -> None:
        buffer = jax.lax.rem(group, 2)
        for i in range(ROWS):
            row, real = self.is_row(group, i)

            @pl.when(real)
            def _(row=row, i=i):
                there = self.buffers.at[buffer, pl.ds(i, 1)]
                act(pltpu.make_async_copy(self.table.at[pl.ds(row, 1)], there, self.arrived.at[buffer]))

    def start(self, group) -> None:
        self._each(group, lambda copy: copy.start())

    def rows(self, group):
        """[1 V] each, zeros for no row's id; the next group is begun."""

        @pl.when(group + 1 < TOKENS * self.groups)
        def _():
            self.start(group + 1)

        self._each(group, lambda copy: copy.wait())
        buffer = jax.lax.rem(group, 2)
        return [jnp.where(self.is_row(group, i)[1], self.buffers[buffer, pl.ds(i, 1)], 0.0) for i in range(ROWS)]


def _bag_kernel(ids, weights, table, y, buffers, arrived, *, n_rows: int):
    stream = _Stream(ids, table, buffers, arrived, n_rows)
    stream.start(0)

    def of_token(token, _):
        def of_group(g, total):
            rows = stream.rows(token * stream.groups + g)
            return sum((weights[token, ROWS * g + i] * row for i, row in enumerate(rows)), total)

        y[pl.ds(token, 1)] = jax.lax.fori_loop(0, stream.groups, of_group, jnp.zeros((1, y.shape[1]), jnp.float32))
        return 0

    jax.lax.fori_loop(0, TOKENS, of_token, 0)


def _dots_kernel(ids, x, table, d, buffers, arrived, sums, *, n_rows: int):
    stream = _Stream(ids, table, buffers, arrived, n_rows)
    stream.start(0)

    def of_token(token, _):
        def of_group(g, _):
            here = x[pl.ds(token, 1)]
            products = [row * here for row in stream.rows(token * stream.groups + g)]  # [1 V]
            folded = [sum(p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)) for p in products]
            sums[pl.ds(ROWS * g, ROWS)] = jnp.concatenate(folded, axis=0)
            return 0

        jax.lax.fori_loop(0, stream.groups, of_group, 0)
        over_lanes = (((1,), (1,)), ((), ()))
        ones = jnp.ones((8, LANES), jnp.float32)
        whole = jax.lax.dot_general(ones, sums[...], over_lanes, precision=jax.lax.Precision.HIGHEST)  # [8 k]
        d[pl.ds(token, 1)] = whole[:1]
        return 0

    jax.lax.fori_loop(0, TOKENS, of_token, 0)

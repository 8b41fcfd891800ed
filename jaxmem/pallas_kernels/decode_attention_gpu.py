"""`decode_sums` on an NVIDIA GPU, Pallas compiled by Triton: the visited keys of a row are shared out among many programs.

A program has all queries of one kv head, R T of them, and a part of the blocks of keys that some of them see: the longest run
of blocks that need no mask in one loop, the others in a second one, from a list of one number per block. (Triton has several
loads on their way only where their addresses come from no list.) Its sums stay in registers, one per column of a block
until the end, since with a maximum known before nothing is rescaled; those of programs are added by XLA.

    s = q k^T [R T, C]      p = exp(s - m)      weights += p      values += p v [R T, V]

The cache keeps its order [B S G K]. It is copied only where 16 does not divide K or V.
HBM: each visited key and value once, R T (V + 2) fp32 numbers per program.
Reference: Hong et al. 2023, arXiv 2311.01282, section 3 (a unified maximum); Dao et al. 2023, "Flash-Decoding for
long-context inference" (keys split over programs).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxmem.pallas_kernels.attention_scores import Static, filled, fp32_result, product
from jaxmem.pallas_kernels.block_spans import visible
from jaxmem.pallas_kernels.decode_sums import UNSEEN, WHOLE, Sums, block_kinds
from jaxmem.pallas_kernels.gpu_launches import decode_launch
from jaxmem.pallas_kernels.head_pieces import SMALLEST, load, products, store, zeros
from jaxmem.pallas_kernels.masks import Place
from jaxmem.typing import Array, Float, Int

LOG2_E = math.log2(math.e)
MOST_ROWS = 128
"""Queries of a kv head."""
PROGRAMS = 396
"""That fill a GPU: three for each of 132 processors, as shared memory allows."""
KEYS_PER_ROW = 16
"""Of a program at least, so that its results are an eighth of what it reads in 16 bits."""


class Visits(NamedTuple):
    """Of a row of the batch: the longest run of blocks that need no mask, and all others that some query sees."""

    run: Int[Array, "B 1"]
    """The first of them."""
    n_run: Int[Array, "B 1"]
    others: Int[Array, "B M"]
    n_others: Int[Array, "B 1"]


def _kernel(
    visits: Visits, q, q_place: Place, maximum, k, v, k_place: Place, values, weights, top, *, static: Static
):  # fmt: skip
    size, n_keys, part, n_parts = static.block_k, k.shape[0], pl.program_id(0), pl.num_programs(0)
    rows, row_maximum, run, n_run = load(q, slice(None)), maximum[:][:, None], visits.run[0], visits.n_run[0]
    start, end = (jax.lax.div((part + i) * (n_run + visits.n_others[0]), n_parts) for i in (0, 1))

    def fold(i, carry, cut: bool):
        total, highest, acc = carry
        block = visits.others[i - n_run] if cut else run + i
        first = jnp.minimum(block * size, n_keys - size)  # the last block is a whole one, that overlaps the one before
        tokens = pl.ds(first, size)
        s = (static.scale * LOG2_E) * products(rows, load(k, tokens))  # [N C]
        if cut:
            there = jax.tree.map(lambda x: x[tokens][None], k_place)
            here = jax.tree.map(lambda x: x[:][:, None], q_place)
            own = first + jnp.arange(size, dtype=jnp.int32)[None] >= block * size
            s = jnp.where(visible(static.mask, here, there) & own, s, -jnp.inf)
        p = jnp.exp2(s - row_maximum)
        y = load(v, tokens)
        acc = [x + product("ts,sv->tv", p.astype(v.dtype), y) for x, y in zip(acc, y, strict=True)]
        return total + p, jnp.maximum(highest, s), acc

    shape = (q.shape[0], size)
    carry = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32), zeros(q.shape[0], v)
    middle = jnp.clip(n_run, start, end)
    carry = jax.lax.fori_loop(start, middle, functools.partial(fold, cut=False), carry)
    total, highest, acc = jax.lax.fori_loop(middle, end, functools.partial(fold, cut=True), carry)
    store(values, acc)
    weights[:], top[:] = jnp.sum(total, axis=1), jnp.max(highest, axis=1)


def why_not(q, k, v, static: Static) -> tuple[str, str] | None:
    """A condition that is not met, and what there is instead; None: all are."""
    rows, size = q.shape[1] * q.shape[2] // k.shape[2], static.block_k
    if rows > MOST_ROWS:
        return f"at most {MOST_ROWS} queries of a kv head", f"{rows}"
    if size is not None and (size < SMALLEST or size & (size - 1)):
        return f"blocks of a power of two from {SMALLEST} keys", f"block_k={size}"
    return None


def sums(q, k, v, q_place: Place, k_place: Place, maximum: Float[Array, "B T H"], static: Static, **call) -> Sums:
    """As `decode_sums.sums`."""
    (batch, n_tokens, heads, _), groups, value, same = q.shape, k.shape[2], v.shape[3], jnp.result_type(q, k)
    n_rows = n_tokens * heads // groups
    n_filled = max(SMALLEST, 1 << (n_rows - 1).bit_length())
    by_group = lambda a: filled(
        jnp.swapaxes(a, 1, 2).reshape(batch, groups, n_rows, *a.shape[3:]), n_filled, axis=2
    )  # [B G N ...], of [B T H ...]
    of_rows = lambda a: by_group(jnp.broadcast_to(a[..., None], (batch, n_tokens, heads)))[:, 0]
    wide = lambda a: filled(a, SMALLEST, axis=-1)
    q, k, v = wide(by_group(q.astype(same))), wide(k.astype(same)), wide(v)
    if k.shape[1] < SMALLEST:
        k, v, k_place = jax.tree.map(lambda a: filled(a, SMALLEST, axis=1), (k, v, k_place))
    launch = decode_launch(n_filled, max(k.shape[3], v.shape[3]), max(same.itemsize, v.dtype.itemsize))
    size = min(static.block_k or launch.block_k, 1 << k.shape[1].bit_length() - 1)
    visits = _visits(static, q_place, k_place, size)
    real = Place(q_place.index, jnp.where(q_place.segment == 0, -1, q_place.segment))
    q_place = jax.tree.map(lambda a: of_rows(a.astype(jnp.int32) + 1) - 1, real)  # the segment of padding is -1
    most = max(1, k.shape[1] // (KEYS_PER_ROW * n_filled))
    parts = min(-(-PROGRAMS // (batch * groups)), visits.others.shape[1], most)

    of_row = lambda a: pl.BlockSpec((None, a.shape[1]), lambda i, g, b: (b, 0))
    of_group = lambda a: pl.BlockSpec((None, None, *a.shape[2:]), lambda i, g, b: (b, g, *[0] * (a.ndim - 2)))
    of_keys = lambda a: pl.BlockSpec((None, a.shape[1], None, a.shape[3]), lambda i, g, b: (b, 0, g, 0))
    of_part = lambda a: pl.BlockSpec((None, None, None, *a.shape[3:]), lambda i, g, b: (b, g, i, *[0] * (a.ndim - 3)))
    inputs = visits, q, q_place, by_group(LOG2_E * maximum), k, v, jax.tree.map(lambda a: a.astype(jnp.int32), k_place)
    ways = of_row, of_group, of_row, of_group, of_keys, of_keys, of_row
    shape = batch, groups, parts, n_filled
    results = [fp32_result(q, *shape, v.shape[3]), fp32_result(q, *shape), fp32_result(q, *shape)]
    values, weights, top = pl.pallas_call(
        functools.partial(_kernel, static=static._replace(block_k=size)),
        grid=(parts, groups, batch),
        in_specs=[jax.tree.map(way, array) for way, array in zip(ways, inputs, strict=True)],
        out_specs=[of_part(a) for a in results],
        out_shape=results,
        compiler_params=pltriton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * n_filled * (k.size + v.size),
            transcendentals=n_filled * batch * groups * k.shape[1],
            bytes_accessed=k.size * k.dtype.itemsize + v.size * v.dtype.itemsize,
        ),
        name="decode_attention",
        **call,
    )(*inputs)
    by_token = lambda a: jnp.swapaxes(a[:, :, :n_rows].reshape(batch, heads, n_tokens, *a.shape[3:]), 1, 2)
    add = lambda a: by_token(jnp.sum(a, axis=2))
    return Sums(add(weights), add(values)[..., :value], by_token(jnp.max(top, axis=2)) / LOG2_E)


def _visits(static: Static, q_place: Place, k_place: Place, size: int) -> Visits:
    kinds = block_kinds(static.mask, q_place, k_place, size)
    block = jnp.arange(kinds.shape[1], dtype=jnp.int32)
    length = block - jax.lax.cummax(jnp.where(kinds == WHOLE, -1, block), axis=1)  # of the run that ends here
    last, n_run = jnp.argmax(length, axis=1, keepdims=True).astype(jnp.int32), jnp.max(length, axis=1, keepdims=True)
    run = last + 1 - n_run
    other = (kinds != UNSEEN) & ((block < run) | (block > last))
    others = jnp.argsort(~other, axis=1, stable=True).astype(jnp.int32)
    return Visits(run, n_run, others, jnp.sum(other, axis=1, keepdims=True, dtype=jnp.int32))

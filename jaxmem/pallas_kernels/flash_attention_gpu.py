"""Attention on an NVIDIA GPU, Pallas compiled by Triton: forward and dq by blocks of queries, dk and dv by blocks of keys.

A program walks over the blocks of the other side from the first to the last that may be seen, and keeps its own sums in
registers; no two programs add to the same number, so that results are the same every time. A program's own tokens are the
rows of its scores, so that weights go from registers into the next product as they are:

    forward, dq: s = q k^T [C_q C_k]      o = p v        dp = do v^T    dq = ds k
    dk, dv:      s = k q^T [C_k C_q]      dv = p do      dp = v do^T    dk = ds q       ds = p (d dp - delta)

Exponents are to the base 2, log2(e) in the scale. Which blocks to visit, and which run of them needs no mask, are four
numbers per block (`block_spans.Visits`); a loop without any branch runs over those, a second one over the others. Arrays keep
the order of the operation, [B T H K]. Triton computes with powers of two: a head is cut into pieces, 192 = 128 + 64, whose
products are summed or stand side by side.

Shared memory per program: its own block and `stages` blocks of the other side. HBM: each block of queries reads the
keys it visits once forward and once backward; a block of keys reads the queries and do of all heads of its group.
Reference: Dao 2023, arXiv 2307.08691; Milakov and Gimelshein 2018, arXiv 1805.02867 (running maximum).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.attention_scores import Extras, Static, filled, fp32_result, kept, product, row_delta
from jaxmem.pallas_kernels.block_spans import Visits, visible, visits
from jaxmem.pallas_kernels.gpu_launches import Launch, default_launch
from jaxmem.pallas_kernels.head_pieces import SMALLEST, load, products, store, zeros
from jaxmem.pallas_kernels.masks import Place
from jaxmem.typing import Array, Float, Int, PyTree, Shaped, UInt32

LOG2_E = math.log2(math.e)
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Running maximum before any key: finite, so that masked scores of -inf weigh exp2(-inf) = 0."""


def _scores(rows, columns, static: Static):
    """(s, factor, slope): logits to the base 2 are factor * s, not masked; slope is that of the soft cap, or None."""
    s = products(rows, columns)
    if static.soft_cap is None:
        return s, static.scale * LOG2_E, None
    bent = jnp.tanh(s * (static.scale / static.soft_cap))
    return bent, static.soft_cap * LOG2_E, 1 - bent * bent


def _at(refs: PyTree, where) -> PyTree:
    """Numbers of a block (Span), or of tokens (Place)."""
    return jax.tree.map(lambda ref: ref[where], refs)


def _along(place: Place, axis: int) -> Place:
    """Of tokens that stand in the rows (axis 0) or columns (1) of the scores."""
    return jax.tree.map(lambda x: jnp.expand_dims(x, 1 - axis), place)


def _over_blocks(mine: Visits, fold, carry: PyTree, repeats: int = 1) -> PyTree:
    """carry = fold(r, j, carry, masked) for r < repeats and all blocks j to be visited: the unmasked run, then the others."""
    n_whole, n_before = mine.end_whole - mine.whole, mine.whole - mine.first

    def loop(carry, n_blocks, block, masked: bool):
        def turn(n, carry):
            r, i = (0, n) if repeats == 1 else (jax.lax.div(n, n_blocks), jax.lax.rem(n, n_blocks))
            return fold(r, block(i), carry, masked)

        return jax.lax.fori_loop(0, repeats * n_blocks, turn, carry)

    carry = loop(carry, n_whole, lambda i: mine.whole + i, masked=False)
    others = lambda i: mine.first + i + jnp.where(i < n_before, 0, n_whole)
    return loop(carry, n_before + mine.end - mine.end_whole, others, masked=True)


def _forward_kernel(
    mine: Visits, q, q_place: Place, k, v, k_place: Place, seeds, o, lse, *, static: Static
):  # fmt: skip
    size, queries = static.block_k, load(q, slice(None))
    here = lambda: _along(_at(q_place, slice(None)), 0)

    def fold(_, j, carry, masked: bool):
        top, total, acc = carry
        tokens = pl.ds(j * size, size)
        there = lambda: _along(_at(k_place, tokens), 1)
        s, factor, _ = _scores(queries, load(k, tokens), static)  # [C_q C_k]
        if factor <= 0:  # or the largest s would not be the largest logit
            s, factor = s * factor, 1.0
        if masked:
            s = jnp.where(visible(static.mask, here(), there()), s, -jnp.inf)
        new_top = jnp.maximum(top, factor * jnp.max(s, axis=1))
        p, fade = jnp.exp2(factor * s - new_top[:, None]), jnp.exp2(top - new_top)
        total = fade * total + jnp.sum(p, axis=1)
        if seeds is not None:
            p *= kept(seeds[0], here().index, there().index, static.rate)
        values = load(v, tokens)
        p = p.astype(values[0].dtype)
        acc = [fade[:, None] * x + product("ts,sv->tv", p, y) for x, y in zip(acc, values, strict=True)]
        return new_top, total, acc

    row = lambda value: jnp.full((static.block_q,), value, jnp.float32)
    start = row(LOWEST), row(0), zeros(static.block_q, v)
    top, total, acc = _over_blocks(_at(mine, _block_of_queries(static)), fold, start)
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    store(o, [x / divisor[:, None] for x in acc])
    lse[:] = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)


def _dq_kernel(
    mine: Visits, q, q_place: Place, k, v, k_place: Place, seeds, do, lse, delta, dq, *, static: Static
):  # fmt: skip
    size, queries, cotangents = static.block_k, load(q, slice(None)), load(do, slice(None))
    here = lambda: _along(_at(q_place, slice(None)), 0)
    row_lse, row_deltas = lse[:][:, None], delta[:][:, None]

    def fold(_, j, acc, masked: bool):
        tokens = pl.ds(j * size, size)
        there = lambda: _along(_at(k_place, tokens), 1)
        keys = load(k, tokens)
        s, factor, slope = _scores(queries, keys, static)  # [C_q C_k]
        p = jnp.exp2(factor * s - row_lse)
        if masked:
            p = jnp.where(visible(static.mask, here(), there()), p, 0)
        dp = products(cotangents, load(v, tokens))
        if seeds is not None:
            dp *= kept(seeds[0], here().index, there().index, static.rate)
        ds = _d_scores(p, dp - row_deltas, slope).astype(keys[0].dtype)
        return [x + product("ts,sk->tk", ds, y) for x, y in zip(acc, keys, strict=True)]

    found = _over_blocks(_at(mine, _block_of_queries(static)), fold, zeros(static.block_q, q))
    store(dq, [static.scale * x for x in found])


def _dkv_kernel(
    mine: Visits, q, q_place: Place, k, v, k_place: Place, seeds, do, lse, delta, dk, dv, *, static: Static
):  # fmt: skip
    size, keys, values = static.block_q, load(k, slice(None)), load(v, slice(None))
    here = lambda: _along(_at(k_place, slice(None)), 0)

    def fold(r, i, carry, masked: bool):
        dk, dv = carry
        tokens = pl.ds(i * size, size)
        there = lambda: _along(_at(q_place, tokens), 1)
        queries, cotangents = load(q, tokens, r), load(do, tokens, r)
        s, factor, slope = _scores(keys, queries, static)  # [C_k C_q]
        p = jnp.exp2(factor * s - lse[r, tokens][None])
        if masked:
            p = jnp.where(visible(static.mask, there(), here()), p, 0)
        dp = products(values, cotangents)
        keep = 1.0 if seeds is None else kept(seeds[r], there().index, here().index, static.rate)
        weights = (keep * p).astype(cotangents[0].dtype)
        dv = [x + product("st,tv->sv", weights, y) for x, y in zip(dv, cotangents, strict=True)]
        ds = _d_scores(p, keep * dp - delta[r, tokens][None], slope).astype(queries[0].dtype)
        return [x + product("st,tk->sk", ds, y) for x, y in zip(dk, queries, strict=True)], dv

    start = zeros(static.block_k, k), zeros(static.block_k, v)
    found_k, found_v = _over_blocks(_at(mine, pl.program_id(0)), fold, start, repeats=q.shape[1])
    store(dk, [static.scale * x for x in found_k])
    store(dv, found_v)


def _d_scores(p, d_p, slope):
    """Of scale * q . k."""
    ds = p * d_p
    return ds if slope is None else ds * slope


def _block_of_queries(static: Static) -> Int[Array, ""]:
    """The block of this program: under a causal mask the last come first, which see the most keys."""
    i = pl.program_id(0)
    return pl.num_programs(0) - 1 - i if static.mask.causal else i


def forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, **call) -> Partial:
    """(o [B T H V], lse [B T H]) in fp32."""
    x = _arrange("forward", q, k, v, q_place, k_place, extras, static)
    by, (batch, n_tokens, heads, _) = _by_query(x), x.q.shape
    results = [
        (by.of_q, fp32_result(q, batch, n_tokens, heads, x.v.shape[-1])),
        (by.q_rows, fp32_result(q, batch, heads, n_tokens)),
    ]
    o, lse = _call(_forward_kernel, "forward", x, by, (), results, n_products=2, **call)
    return Partial(o[:, : q.shape[1], :, : v.shape[-1]], lse.transpose(0, 2, 1)[:, : q.shape[1]])


def gradients(
    q,
    k,
    v,
    q_place: Place,
    k_place: Place,
    extras: Extras,
    result: Partial,
    cotangents: Partial,
    static: Static,
    **call,
):
    """(dq, dk, dv, None) in fp32."""
    delta, lse = row_delta(result, cotangents), jnp.where(result.lse == -jnp.inf, 0.0, result.lse * LOG2_E)
    do = cotangents.o.astype(v.dtype)
    arrange = lambda kernel: _arrange(kernel, q, k, v, q_place, k_place, extras, static)

    def more(x: Arranged, by: Specs):
        """[(how programs see it, array)] of what only the backward pass reads."""
        rows = [(by.q_rows, filled(a.transpose(0, 2, 1), x.static.block_q, axis=2)) for a in (lse, delta)]
        return [(by.of_q, _fill_heads(do, x.static.block_q)), *rows]

    x = arrange("dq")
    by = _by_query(x)
    (dq,) = _call(_dq_kernel, "dq", x, by, more(x, by), [(by.of_q, fp32_result(q, *x.q.shape))], n_products=3, **call)
    x = arrange("dkv")
    by = _by_key(x)
    results = [(by.of_k, fp32_result(q, *x.k.shape)), (by.of_k, fp32_result(q, *x.v.shape))]
    dk, dv = _call(_dkv_kernel, "dkv", x, by, more(x, by), results, n_products=4, **call)
    cut = lambda a, like: a[:, : like.shape[1], :, : like.shape[-1]]
    return cut(dq, q), cut(dk, k), cut(dv, v), None


def why_not(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> str | None:
    """What these kernels lack for such attention; None: nothing."""
    if extras.relative is not None:
        return "relative positions"
    if any(size is not None and (size < SMALLEST or size & (size - 1)) for size in (static.block_q, static.block_k)):
        return f"blocks that are no powers of two from {SMALLEST}, such as {static.block_q} x {static.block_k}"
    return None


class Arranged(NamedTuple):
    """Arrays as kernels take them, whole blocks and widths that 16 divides."""

    q_visits: Visits
    """Of numbers [B N]."""
    k_visits: Visits
    q: Float[Array, "B T H K"]
    q_place: Place
    """The segment of padding is -1."""
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    k_place: Place
    """The segment of padding is 0; prefix is int32."""
    seeds: UInt32[Array, "B H"] | None
    static: Static
    """With the sizes of blocks."""
    launch: Launch

    @property
    def repeats(self) -> int:
        """Query heads of a kv head."""
        return self.q.shape[2] // self.k.shape[2]


def _arrange(kernel: str, q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Arranged:
    lacking = why_not(q, k, v, q_place, k_place, extras, static)
    if lacking is not None:
        raise NotImplementedError(
            f"flash_attention: needs an implementation with {lacking}, got 'pallas_gpu'; use 'xla'"
        )
    width = max(-(-x.shape[-1] // SMALLEST) * SMALLEST for x in (k, v))
    same = jnp.result_type(q, k)
    launch = default_launch(kernel, width, max(same.itemsize, v.dtype.itemsize))
    static = static.with_blocks(launch.block_q, launch.block_k)
    fits = lambda size, x: min(size, max(SMALLEST, 1 << (x.shape[1] - 1).bit_length()))
    sizes = fits(static.block_q, q), fits(static.block_k, k)
    fill = lambda place, size: jax.tree.map(lambda x: filled(x.astype(jnp.int32), size, axis=1), place)
    q_place, k_place = fill(q_place._replace(prefix=None), sizes[0]), fill(k_place, sizes[1])
    q_place = q_place._replace(segment=jnp.where(q_place.segment == 0, -1, q_place.segment))
    blocks = lambda place, size: jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), place)
    of_q, of_k = visits(static.mask, blocks(q_place, sizes[0]), blocks(k_place, sizes[1]))
    return Arranged(
        of_q, of_k, _fill_heads(q.astype(same), sizes[0]), q_place, _fill_heads(k.astype(same), sizes[1]),
        _fill_heads(v, sizes[1]), k_place, None if extras.seeds is None else extras.seeds.reshape(q.shape[0], -1),
        static._replace(block_q=sizes[0], block_k=sizes[1]), launch,
    )  # fmt: skip


class Specs(NamedTuple):
    """Which part of an array a program sees."""

    queries: bool
    """Whether its own block is one of queries, or of keys."""
    grid: tuple[int, int, int]
    of_q: Callable[[Array], pl.BlockSpec]
    """Of [B T H K]."""
    q_rows: Callable[[Array], pl.BlockSpec]
    """Of [B H T]."""
    q_tokens: Callable[[Array], pl.BlockSpec]
    """Of [B T]."""
    of_k: Callable[[Array], pl.BlockSpec]
    k_tokens: Callable[[Array], pl.BlockSpec]
    seeds: Callable[[Array], pl.BlockSpec]


def _by_query(x: Arranged) -> Specs:
    """A program has a block of queries of one head, and all keys of its group."""
    size, (batch, n_tokens, heads, _) = x.static.block_q, x.q.shape
    n = n_tokens // size
    block = lambda i: n - 1 - i if x.static.mask.causal else i  # as `_block_of_queries`
    group = lambda h: jax.lax.div(h, x.repeats)
    return Specs(
        queries=True,
        grid=(n, heads, batch),
        of_q=lambda a: pl.BlockSpec((None, size, None, a.shape[-1]), lambda i, h, b: (b, block(i), h, 0)),
        q_rows=lambda a: pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, block(i))),
        q_tokens=lambda a: pl.BlockSpec((None, size), lambda i, h, b: (b, block(i))),
        of_k=lambda a: pl.BlockSpec((None, a.shape[1], None, a.shape[-1]), lambda i, h, b: (b, 0, group(h), 0)),
        k_tokens=_of_row,
        seeds=lambda a: pl.BlockSpec((None, 1), lambda i, h, b: (b, h)),
    )


def _by_key(x: Arranged) -> Specs:
    """A program has a block of keys of one head, and all queries of the heads of its group."""
    size, repeats, (batch, n_tokens, groups, _) = x.static.block_k, x.repeats, x.k.shape
    return Specs(
        queries=False,
        grid=(n_tokens // size, groups, batch),
        of_q=lambda a: pl.BlockSpec((None, a.shape[1], repeats, a.shape[-1]), lambda j, g, b: (b, 0, g, 0)),
        q_rows=lambda a: pl.BlockSpec((None, repeats, a.shape[2]), lambda j, g, b: (b, g, 0)),
        q_tokens=_of_row,
        of_k=lambda a: pl.BlockSpec((None, size, None, a.shape[-1]), lambda j, g, b: (b, j, g, 0)),
        k_tokens=lambda a: pl.BlockSpec((None, size), lambda j, g, b: (b, j)),
        seeds=lambda a: pl.BlockSpec((None, repeats), lambda j, g, b: (b, g)),
    )


def _of_row(a: Shaped[Array, "B N"]) -> pl.BlockSpec:
    return pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (b, 0))


def _call(kernel, name: str, x: Arranged, by: Specs, more, results, n_products: int, **call):
    """The results of a kernel, of `x` and of [(Specs' function, array)]."""
    inputs = x.q_visits if by.queries else x.k_visits, *x[2:8]
    ways = (_of_row, by.of_q, by.q_tokens, by.of_k, by.of_k, by.k_tokens, by.seeds)
    in_specs = [jax.tree.map(way, array) for way, array in zip(ways, inputs, strict=True)]
    batch, n_queries, heads, width = x.q.shape
    pairs = batch * heads * n_queries * x.k.shape[1] // (2 if x.static.mask.causal else 1)
    return pl.pallas_call(
        functools.partial(kernel, static=x.static),
        grid=by.grid,
        in_specs=[*in_specs, *(way(array) for way, array in more)],
        out_specs=[way(shape) for way, shape in results],
        out_shape=[shape for _, shape in results],
        compiler_params=pltriton.CompilerParams(num_warps=x.launch.warps, num_stages=x.launch.stages),
        cost_estimate=pl.CostEstimate(
            flops=n_products * pairs * (width + x.v.shape[-1]),
            transcendentals=pairs,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (x.q, x.k, x.v)) * n_products,
        ),
        name=f"flash_attention_{name}",
        **call,
    )(*inputs, *(array for _, array in more))


def _fill_heads(x: Float[Array, "B T H K"], size: int) -> Float[Array, "B T H K"]:
    return filled(filled(x, size, axis=1), SMALLEST, axis=3)

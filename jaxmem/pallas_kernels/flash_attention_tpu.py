"""Attention on a TPU: one program per block of queries forward, per block of keys backward; the other side comes by DMA.

Everything in the kernels is transposed, scores [C_k, C_q] with keys along sublanes, so that maxima and sums over keys are
elementwise operations of whole registers, statistics are rows [1, C_q], and all products are plain ones:

    s = k q^T [C_k C_q]      p = exp(s - top)      o^T = v^T p [V C_q]
    dp = v do^T [C_k C_q]    ds = p (dp - delta)   dv = p do    dk = ds q    dq^T = k^T ds [K C_q]

Exponents are to the base 2, and the scale of the logits is in q^T, which is rounded to its dtype once more. Blocks of the
other side go double-buffered from HBM to VMEM, from the first to the last that may be seen, which XLA finds from what each
block spans: a few numbers per block in SMEM, no table of pairs. A pair of blocks that all see each other is not masked, one
of a single document by indices alone. The backward pass visits each pair once: dk and dv stay in VMEM, dq^T is read, added
to and written back to HBM in fp32.

VMEM per program: 2 blocks of keys and values, a few [C_k, C_q] in fp32. HBM: forward reads k and v once per block of queries.
Reference: Dao 2023, arXiv 2307.08691; Milakov and Gimelshein 2018, arXiv 1805.02867 (running maximum).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmem.algebra.softmax import Partial
from jaxmem.devices import kind_of_device
from jaxmem.pallas_kernels.attention_scores import Extras, Static, filled, fp32_result, kept, row_delta
from jaxmem.pallas_kernels.block_spans import Span, one_segment, sees_all, spans, visible, visible_in_segment
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.typing import Array, Float, Int

LOG2_E = math.log2(math.e)
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Running maximum before any key: finite, so that masked scores of -inf weigh exp2(-inf) = 0."""
VMEM_BYTES = 64 * 2**20
"""What a program may use."""
PIECES = {"TPU v4": (512, 256), "TPU v5": (512, 256), "TPU v5 lite": (512, 256)}
"""Queries and keys of a piece of a pair of blocks, whose scores are multiplied while the weights of the piece before are
computed, by kind of TPU; 1024 and 512 on others, whose matrix units are twice as wide."""
SPAN = 6
"""Numbers that a kernel is told of each of its own blocks, and of the other side's."""


def _read(spans, b: Int[Array, ""], n: Int[Array, ""], n_blocks: int) -> Span:
    """The span of block n of row b, of numbers in SMEM."""
    return Span(*(spans[(b * n_blocks + n) * SPAN + i] for i in range(SPAN)))


class Stream:
    """Blocks that come from HBM one after the other, each while the one before is worked on."""

    def __init__(self, sources, buffers, semaphores):
        self.sources, self.buffers, self.semaphores = sources, buffers, semaphores

    def _copies(self, n, slot):
        for i, (source, buffer) in enumerate(zip(self.sources(n), self.buffers, strict=True)):
            yield pltpu.make_async_copy(source, buffer.at[slot], self.semaphores.at[slot, i])

    def start(self, n, slot):
        for copy in self._copies(n, slot):
            copy.start()

    def wait(self, n, slot):
        for copy in self._copies(n, slot):
            copy.wait()

    def run(self, n_blocks, body, settle=lambda n, slot: None):
        """body(n, slot) for n = 0 ... n_blocks - 1, its data in buffers[slot]; settle(n, slot) before others come there."""

        @pl.when(n_blocks > 0)
        def _():
            self.start(0, 0)

        def step(n, _):
            slot = jax.lax.rem(n, 2)

            @pl.when(n > 0)
            def _():
                settle(n - 1, 1 - slot)

            @pl.when(n + 1 < n_blocks)
            def _():
                self.start(n + 1, 1 - slot)

            self.wait(n, slot)
            body(n, slot)

        jax.lax.fori_loop(0, n_blocks, step, None)

        @pl.when(n_blocks > 0)
        def _():
            settle(n_blocks - 1, jax.lax.rem(n_blocks - 1, 2))


def _scores(k, qT, static: Static):
    """[C_k C_q], to the base 2, not masked; and the derivative of the soft cap, or None. The scale is in qT."""
    s = _dot(k, qT)
    if static.soft_cap is None:
        return s, None
    bent = jnp.tanh(s)
    return (LOG2_E * static.soft_cap) * bent, 1 - bent * bent


def _scaled(qT: Float[Array, "B H K T"], static: Static) -> Float[Array, "B H K T"]:
    scale = static.scale * LOG2_E if static.soft_cap is None else static.scale / static.soft_cap
    return (qT.astype(jnp.float32) * scale).astype(qT.dtype)


def _by_mask(static: Static, q: Span, k: Span, work) -> None:
    """work(rule), where rule(mask, q, k) says which pairs of tokens of two blocks see each other; None: all."""
    whole, together = sees_all(static.mask, q, k), one_segment(q, k)
    pl.when(whole)(lambda: work(None))
    pl.when(~whole & together)(lambda: work(visible_in_segment))
    pl.when(~together)(lambda: work(visible))


def _dot(a, b):
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _pieces(size: int, of: int) -> list[slice]:
    return [slice(start, min(start + of, size)) for start in range(0, size, of)]


def _rows(places: Int[Array, "P C"]) -> Place:
    """Of queries: index and segment [1 C]."""
    return Place(*(places[i : i + 1] for i in range(places.shape[0])))


def _columns(places: Int[Array, "P C"]) -> Place:
    """Of keys: index, segment, and prefix if there is one, [C 1]."""
    column = lambda row: jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
    return Place(*(column(places[i : i + 1]) for i in range(places.shape[0])))


def _forward_kernel(
    q_spans, k_spans, seeds, qT, q_places, k_hbm, vT_hbm, k_places_hbm, oT, lse,
    k_buffer, vT_buffer, k_places_buffer, acc, top, total, semaphores,
    *, static: Static, n_q: int, n_k: int, repeats: int, pieces: tuple[int, int],
):  # fmt: skip
    b, h, i = (pl.program_id(axis) for axis in range(3))
    g, size = jax.lax.div(h, repeats), static.block_k
    mine = _read(q_spans, b, i, n_q)
    acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)
    top[...] = jnp.full_like(top, LOWEST)

    def sources(n):
        tokens = pl.ds((mine.first + n) * size, size)
        return k_hbm.at[b, g, tokens], vT_hbm.at[b, g, :, tokens], k_places_hbm.at[b, :, tokens]

    def fold(n, slot):
        def attend(rule):
            of_queries, of_keys = _pieces(static.block_q, pieces[0]), _pieces(size, pieces[1])
            turns = [(queries, keys) for keys in of_keys for queries in of_queries]
            score = lambda queries, keys: _scores(k_buffer[slot, keys], qT[0, 0, :, queries], static)[0]
            state = {q.start: (top[:, q], total[:, q], acc[:, q]) for q in of_queries}
            following = score(*turns[0])
            for here, (queries, keys) in enumerate(turns):
                s = following  # [C_k C_q]
                if rule or static.rate:
                    q, k = _rows(q_places[0, :, queries]), _columns(k_places_buffer[slot, :, keys])
                if rule:
                    s = jnp.where(rule(static.mask, q, k), s, -jnp.inf)
                if here + 1 < len(turns):
                    following = score(*turns[here + 1])
                old_top, weight, o = state[queries.start]
                new_top = jnp.maximum(old_top, jnp.max(s, axis=0, keepdims=True))
                p, fade = jnp.exp2(s - new_top), jnp.exp2(old_top - new_top)
                weight = fade * weight + jnp.sum(p, axis=0, keepdims=True)
                if static.rate:
                    p *= kept(seeds[b * pl.num_programs(1) + h], q.index, k.index, static.rate)
                o = fade * o + _dot(vT_buffer[slot, :, keys], p.astype(vT_buffer.dtype))
                state[queries.start] = new_top, weight, o
            for queries in of_queries:
                top[:, queries], total[:, queries], acc[:, queries] = state[queries.start]

        _by_mask(static, mine, _read(k_spans, b, mine.first + n, n_k), attend)

    buffers = k_buffer, vT_buffer, k_places_buffer
    Stream(sources, buffers, semaphores).run(mine.end - mine.first, fold)
    empty = total[...] == 0
    divisor = jnp.where(empty, 1.0, total[...])
    oT[0, 0] = acc[...] / divisor
    lse[0, 0] = jnp.where(empty, -jnp.inf, (top[...] + jnp.log2(divisor)) / LOG2_E)


def _backward_kernel(
    q_spans, k_spans, seeds, k, v, kT, k_places, q_hbm, qT_hbm, do_hbm, doT_hbm, rows_hbm, places_hbm, dqT_in,
    dqT_hbm, dk, dv, q_buffer, qT_buffer, do_buffer, doT_buffer, rows_buffer, places_buffer, dqT_buffer, semaphores,
    write_semaphores, *, static: Static, n_q: int, n_k: int, repeats: int,
):  # fmt: skip
    del dqT_in  # the same memory as dqT_hbm
    b, g, j = (pl.program_id(axis) for axis in range(3))
    size = static.block_q
    mine = _read(k_spans, b, j, n_k)
    n_blocks = mine.end - mine.first
    some = jnp.maximum(n_blocks, 1)
    dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    def block(n):
        """(query head, block of queries) of turn n."""
        return g * repeats + jax.lax.div(n, some), mine.first + jax.lax.rem(n, some)

    def sources(n):
        h, i = block(n)
        tokens = pl.ds(i * size, size)
        rows, columns = (lambda x: x.at[b, h, tokens]), (lambda x: x.at[b, h, :, tokens])
        return (
            rows(q_hbm),
            columns(qT_hbm),
            rows(do_hbm),
            columns(doT_hbm),
            columns(rows_hbm),
            places_hbm.at[b, :, tokens],
            columns(dqT_hbm),
        )

    def write(n, slot):
        h, i = block(n)
        there = dqT_hbm.at[b, h, :, pl.ds(i * size, size)]
        return pltpu.make_async_copy(dqT_buffer.at[slot], there, write_semaphores.at[slot])

    def pull_back(n, slot):
        h, i = block(n)

        def add(rule):
            s, slope = _scores(k[0, 0], qT_buffer[slot], static)
            if rule or static.rate:
                queries, keys = _rows(places_buffer[slot]), _columns(k_places[0])
            if rule:
                s = jnp.where(rule(static.mask, queries, keys), s, -jnp.inf)
            lse, delta = rows_buffer[slot, 0:1], rows_buffer[slot, 1:2]
            p = jnp.exp2(s - lse)
            dp, weights = _dot(v[0, 0], doT_buffer[slot]), p
            if static.rate:
                keep = kept(seeds[b * pl.num_programs(1) * repeats + h], queries.index, keys.index, static.rate)
                dp, weights = keep * dp, keep * p
            dv[0, 0] += _dot(weights.astype(do_buffer.dtype), do_buffer[slot])
            ds = p * (dp - delta)
            ds = (ds if slope is None else ds * slope).astype(q_buffer.dtype)
            dk[0, 0] += _dot(ds, q_buffer[slot])
            dqT_buffer[slot] += _dot(kT[0, 0], ds)

        _by_mask(static, _read(q_spans, b, i, n_q), mine, add)
        write(n, slot).start()

    buffers = q_buffer, qT_buffer, do_buffer, doT_buffer, rows_buffer, places_buffer, dqT_buffer
    settle = lambda n, slot: write(n, slot).wait()
    Stream(sources, buffers, semaphores).run(repeats * n_blocks, pull_back, settle)


def forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, **call) -> Partial:
    """(o [B T H V], lse [B T H]) in fp32."""
    x = _arrange(q, k, v, q_place, k_place, extras, static)
    (batch, heads, groups, width, value), (n_q, n_k), (size_q, size_k) = x.shape, x.n_blocks, x.sizes
    of_q = lambda b, h, i, *_: (b, h, 0, i)
    places_of_q = pl.BlockSpec((1, 2, size_q), lambda b, h, i, *_: (b, 0, i))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    pieces = PIECES.get(kind_of_device(), (1024, 512))
    oT, lse = pl.pallas_call(
        functools.partial(_forward_kernel, static=x.static, n_q=n_q, n_k=n_k, repeats=heads // groups, pieces=pieces),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, n_q),
            in_specs=[pl.BlockSpec((1, 1, width, size_q), of_q), places_of_q, *3 * [anywhere]],
            out_specs=[pl.BlockSpec((1, 1, value, size_q), of_q), pl.BlockSpec((1, 1, 1, size_q), of_q)],
            scratch_shapes=[
                pltpu.VMEM((2, size_k, width), k.dtype),
                pltpu.VMEM((2, value, size_k), v.dtype),
                pltpu.VMEM((2, x.k_places.shape[1], size_k), jnp.int32),
                pltpu.VMEM((value, size_q), jnp.float32),
                *2 * [pltpu.VMEM((1, size_q), jnp.float32)],
                pltpu.SemaphoreType.DMA((2, 3)),
            ],
        ),
        out_shape=[
            fp32_result(q, batch, heads, value, n_q * size_q),
            fp32_result(q, batch, heads, 1, n_q * size_q),
        ],
        compiler_params=_parameters("parallel"),
        cost_estimate=_cost(x, n_products=2),
        name="flash_attention_forward",
        **call,
    )(x.q_spans, x.k_spans, x.seeds, _scaled(x.q.mT, static), x.q_places, x.k, x.v.mT, x.k_places)
    n_tokens = q.shape[1]
    return Partial(oT.transpose(0, 3, 1, 2)[:, :n_tokens], lse[:, :, 0].transpose(0, 2, 1)[:, :n_tokens])


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
    x = _arrange(q, k, v, q_place, k_place, extras, static)
    (batch, heads, groups, width, value), (n_q, n_k), (size_q, size_k) = x.shape, x.n_blocks, x.sizes
    lse = jnp.where(result.lse == -jnp.inf, 0.0, result.lse * LOG2_E)
    rows = jnp.stack([lse, row_delta(result, cotangents)], axis=1)  # [B 2 T H]
    rows = filled(rows.transpose(0, 3, 1, 2), size_q, axis=3)
    do = filled(cotangents.o.astype(v.dtype).transpose(0, 2, 1, 3), size_q, axis=2)

    of_k, of_kT = (lambda b, g, j, *_: (b, g, j, 0)), (lambda b, g, j, *_: (b, g, 0, j))
    places_of_k = pl.BlockSpec((1, x.k_places.shape[1], size_k), lambda b, g, j, *_: (b, 0, j))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    two = lambda *shape, dtype=jnp.float32: pltpu.VMEM((2, *shape), dtype)
    dqT, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, static=x.static, n_q=n_q, n_k=n_k, repeats=heads // groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, groups, n_k),
            in_specs=[
                pl.BlockSpec((1, 1, size_k, width), of_k),
                pl.BlockSpec((1, 1, size_k, value), of_k),
                pl.BlockSpec((1, 1, width, size_k), of_kT),
                places_of_k,
                *7 * [anywhere],
            ],
            out_specs=[
                anywhere,
                pl.BlockSpec((1, 1, size_k, width), of_k),
                pl.BlockSpec((1, 1, size_k, value), of_k),
            ],
            scratch_shapes=[
                two(size_q, width, dtype=q.dtype),
                two(width, size_q, dtype=q.dtype),
                two(size_q, value, dtype=v.dtype),
                two(value, size_q, dtype=v.dtype),
                two(2, size_q),
                two(2, size_q, dtype=jnp.int32),
                two(width, size_q),
                pltpu.SemaphoreType.DMA((2, 7)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            fp32_result(q, batch, heads, width, n_q * size_q),
            fp32_result(q, batch, groups, n_k * size_k, width),
            fp32_result(q, batch, groups, n_k * size_k, value),
        ],
        input_output_aliases={13: 0},
        compiler_params=_parameters("arbitrary"),  # blocks of keys add to the same dq
        cost_estimate=_cost(x, n_products=5),
        name="flash_attention_backward",
        **call,
    )(
        x.q_spans, x.k_spans, x.seeds, x.k, x.v, x.k.mT, x.k_places, x.q, _scaled(x.q.mT, static), do, do.mT, rows,
        x.q_places, jnp.zeros_like(x.q.mT, jnp.float32),
    )  # fmt: skip
    back = lambda a, n_tokens: a.transpose(0, 2, 1, 3)[:, :n_tokens]
    return static.scale * back(dqT.mT, q.shape[1]), static.scale * back(dk, k.shape[1]), back(dv, k.shape[1]), None


class Arranged(NamedTuple):
    """Arrays as kernels take them, whole blocks, heads in front of time."""

    q: Float[Array, "B H T K"]
    k: Float[Array, "B G S K"]
    v: Float[Array, "B G S V"]
    q_places: Int[Array, "B 2 T"]
    """Index and segment, -1 for padding."""
    k_places: Int[Array, "B P S"]
    """Index, segment, 0 for padding, and prefix if there is one."""
    q_spans: Int[Array, "n"]
    k_spans: Int[Array, "m"]
    seeds: Int[Array, "l"]
    """Of dropout, one per row and head, or one number that nobody reads."""
    static: Static
    shape: tuple[int, int, int, int, int]
    """B, H, G, K, V."""
    n_blocks: tuple[int, int]
    sizes: tuple[int, int]


def why_not(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> str | None:
    """What these kernels lack for such attention; None: nothing."""
    if extras.relative is not None:
        return "relative positions"
    if (static.block_q or 0) % 128 or (static.block_k or 0) % 128:
        return f"blocks that 128 does not divide, such as {static.block_q} x {static.block_k}"
    return None


def _arrange(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Arranged:
    mask, lacking = static.mask, why_not(q, k, v, q_place, k_place, extras, static)
    static = static.with_blocks(1024, 1024)
    if lacking is not None:
        raise NotImplementedError(
            f"flash_attention: needs an implementation with {lacking}, got 'pallas_tpu'; use 'xla'"
        )
    sizes = tuple(min(size, -(-x.shape[1] // 128) * 128) for size, x in ((static.block_q, q), (static.block_k, k)))
    heads_first = lambda x, size: filled(x.transpose(0, 2, 1, 3), size, axis=2)
    of_blocks = lambda place, size: jax.tree.map(lambda x: filled(x.astype(jnp.int32), size, axis=1), place)
    q_place, k_place = of_blocks(q_place, sizes[0]), of_blocks(k_place, sizes[1])
    q_place = q_place._replace(segment=jnp.where(q_place.segment == 0, -1, q_place.segment))
    together = lambda place: jnp.stack([x for x in place if x is not None], axis=1)
    return Arranged(
        q=heads_first(q, sizes[0]),
        k=heads_first(k, sizes[1]),
        v=heads_first(v, sizes[1]),
        q_places=together(q_place),
        k_places=together(k_place),
        **_flat_spans(mask, q_place, k_place, sizes),
        seeds=q_place.index[:1, 0] if extras.seeds is None else extras.seeds.astype(jnp.int32).reshape(-1),
        static=static._replace(block_q=sizes[0], block_k=sizes[1]),
        shape=(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        n_blocks=(q_place.index.shape[1] // sizes[0], k_place.index.shape[1] // sizes[1]),
        sizes=sizes,
    )


def _flat_spans(mask: Mask, q: Place, k: Place, sizes: tuple[int, int]) -> dict[str, Int[Array, "n"]]:
    if k.prefix is not None:
        in_front = mask.window is None and mask.chunk is None  # of every query, as far as a causal mask goes
        prefix = k.prefix != 0
        k = Place(jnp.where(prefix, -1, k.index), k.segment) if in_front else k._replace(prefix=prefix)
    blocks = lambda place, size: jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), place)
    found = spans(mask, blocks(q, sizes[0]), blocks(k, sizes[1]))
    return {
        name: jnp.stack(span, axis=-1).reshape(-1) for name, span in zip(("q_spans", "k_spans"), found, strict=True)
    }


def _parameters(of_blocks: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", of_blocks), vmem_limit_bytes=VMEM_BYTES)


def _cost(x: Arranged, n_products: int) -> pl.CostEstimate:
    """Of the pairs that a causal mask leaves, so that schedulers know how long the kernel takes."""
    batch, heads, _, width, value = x.shape
    pairs = batch * heads * x.q.shape[2] * x.k.shape[2] // (2 if x.static.mask.causal else 1)
    arrays = (x.q, x.k, x.v)
    return pl.CostEstimate(
        flops=n_products * pairs * (width + value),
        transcendentals=pairs,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays) * n_products,
    )

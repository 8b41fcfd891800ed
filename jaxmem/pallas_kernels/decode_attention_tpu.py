"""`decode_sums` on a TPU: every block of keys that some query sees goes once through the matrix unit, as the cache has it.

Where kv heads fill whole tiles, [B S G K] is in memory what [B (S G) K] is: no copy. All queries of a row, H T of them, meet
all heads of a block of keys in one product, and pairs of two groups are masked,

    s = q k^T [H T, C G]      p = exp(s - m)      weights += sum p      values += p v [H T, V],

which costs the matrix unit nothing: keys are what it holds, and it has rows to spare. Other caches come as [(B G) S K], or
[(B G) K S] where 128 does not divide K, as XLA lays them out by itself; a program then has one kv head. With K = 256 and 2 or
4 kv heads, or where 128 divides only one of K and V, XLA copies.

The grid is a list of the blocks that some query sees, of all rows of the batch one after the other, one number per block in
SMEM: no turn is spent on others. Where a chip has two cores, each gets half of the list.

VMEM: two blocks of keys and values of about 1 MiB each. HBM: each visited key and value once.
Reference: Hong et al. 2023, arXiv 2311.01282, section 3 (a unified maximum).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmem.devices import kind_of_device
from jaxmem.pallas_kernels.attention_scores import Static, filled, fp32_result
from jaxmem.pallas_kernels.block_spans import visible
from jaxmem.pallas_kernels.decode_sums import UNSEEN, WHOLE, Sums, block_kinds
from jaxmem.pallas_kernels.flash_attention_tpu import LOG2_E, VMEM_BYTES
from jaxmem.pallas_kernels.masks import Place
from jaxmem.typing import Array, Bool, Float, Int

CORES = {"TPU v4": 2, "TPU v5": 2}
"""That one program's grid is spread over, by kind of TPU; one on others."""
LANES = 128
MOST_ROWS = 512
"""Queries times heads that a program holds."""
MOST_BLOCKS = 2**16
"""Numbers in SMEM."""
BLOCK_BYTES = 2**20
"""Of keys."""
PIECE = 2**14
"""Scores that are worked on at once."""


class Layout(NamedTuple):
    """How the cache lies in memory, and is cut."""

    groups: int
    """Kv heads of a program: all, or one."""
    k_transposed: bool
    """[K S] instead of [S K]."""
    v_transposed: bool
    block_k: int
    """Tokens of a block."""
    n_blocks: int
    n_keys: int

    @property
    def columns(self) -> int:
        """Keys of all heads of a block."""
        return self.block_k * self.groups


def layout(k: Float[Array, "B S G K"], v: Float[Array, "B S G V"], block_k: int | None) -> Layout:
    """Blocks of that size, or of the default one."""
    (batch, n_keys, groups, width), value = k.shape, v.shape[3]
    tiled = width % LANES == 0 and value % LANES == 0 and (groups % 8 == 0 or groups in (1, 2, 4))
    here, programs = (groups, batch) if tiled else (1, batch * groups)
    size = block_k
    if size is None:
        token_bytes = here * max(width * k.dtype.itemsize, value * v.dtype.itemsize)
        size = max(LANES, 1 << max(BLOCK_BYTES // token_bytes, 1).bit_length() - 1)
        while programs * -(-n_keys // size) > MOST_BLOCKS:
            size *= 2
    size = min(size, -(-n_keys // LANES) * LANES)
    transposed = lambda width: not tiled and width % LANES != 0
    return Layout(here, transposed(width), transposed(value), size, -(-n_keys // size), n_keys)


def _dot(a, b, contracted: tuple[int, int]):
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((contracted[0],), (contracted[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _by_lane(f, x: Float[Array, "N C"]) -> Float[Array, "N 128"]:
    return functools.reduce(f, (x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


def _row(item: Int[Array, ""], x: Layout) -> Int[Array, ""]:
    """The program that a number of the list belongs to."""
    return jax.lax.div(item, 2 * x.n_blocks)


def _block(item: Int[Array, ""], x: Layout) -> Int[Array, ""]:
    return jax.lax.rem(jax.lax.div(item, 2), x.n_blocks)


def _kernel(
    count, items, q, q_places, maximum, k, v, k_places, values, weights, top, *, static: Static, x: Layout
):  # fmt: skip
    turn = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    item, before = items[turn], items[jnp.maximum(turn - 1, 0)]
    whole = jax.lax.rem(item, 2) == 1

    @pl.when((pl.program_id(1) == 0) | (_row(item, x) != _row(before, x)))
    def _():
        values[...], weights[...] = jnp.zeros_like(values), jnp.zeros_like(weights)
        top[...] = jnp.full_like(top, -jnp.inf)

    def add(cut: bool):
        step = max(LANES, PIECE // q.shape[1] // LANES * LANES)
        step = min(step, LANES * x.groups) if cut and x.groups > 1 else step
        for start in range(0, x.columns, step):
            here = slice(start, min(start + step, x.columns))
            _add(here, _block(item, x), cut, q, q_places, maximum, k, v, k_places, values, weights, top, static, x)

    visit = turn < count[0]
    pl.when(visit & whole)(lambda: add(cut=False))
    pl.when(visit & ~whole)(lambda: add(cut=True))


def _add(here, block, cut, q, q_places, maximum, k, v, k_places, values, weights, top, static: Static, x: Layout):
    """The keys `here` of a block to the sums."""
    n = here.stop - here.start
    keys = k[0, :, here] if x.k_transposed else k[0, here]
    value = v[0, :, here] if x.v_transposed else v[0, here]
    s = (static.scale * LOG2_E) * _dot(q[0], keys, (1, 0 if x.k_transposed else 1))  # [N C]
    rows = [q_places[0, :, i : i + 1] for i in range(3)]
    if x.groups > 1:
        group = jax.lax.rem(here.start + jax.lax.broadcasted_iota(jnp.int32, (1, n), 1), x.groups)
        s = jnp.where(rows[2] == group, s, -jnp.inf)
    if cut:
        first = here.start // x.groups // LANES * LANES
        tokens = here if x.groups == 1 else slice(first, first + LANES)
        of_tokens = Place(*(k_places[0, i : i + 1, tokens] for i in range(k_places.shape[1])))
        seen = visible(static.mask, Place(*rows[:2]), of_tokens)
        s = jnp.where(seen if x.groups == 1 else _repeated(seen, here.start - first * x.groups, n, x), s, -jnp.inf)
        if x.n_keys % x.block_k:  # what lies behind the cache is no number, and weighs 0
            left = x.n_keys * x.groups - block * x.columns - here.start
            axis = 1 if x.v_transposed else 0
            value = jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, axis) < left, value, 0)
    p = jnp.exp2(s - maximum[0])
    top[0, 0] = jnp.maximum(top[0, 0], _by_lane(jnp.maximum, s))
    weights[0, 0] += _by_lane(jnp.add, p)
    values[0, 0] += _dot(p.astype(v.dtype), value, (1, 1 if x.v_transposed else 0))


def _repeated(seen: Bool[Array, "N 128"], start: int, n: int, x: Layout) -> Bool[Array, "N C"]:
    """n columns from `start` of what is seen, each token's as often as it has heads: a product with ones and zeros."""
    shape = (LANES, n)
    head = (
        start + jax.lax.broadcasted_iota(jnp.int32, shape, 1) - x.groups * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    )
    ones = lambda of: jnp.where(of, 1.0, 0.0).astype(jnp.bfloat16)
    return _dot(ones(seen), ones((head >= 0) & (head < x.groups)), (1, 0)) > 0.5


def why_not(q, k, v, static: Static) -> tuple[str, str] | None:
    """A condition that is not met, and what there is instead; None: all are."""
    x = layout(k, v, static.block_k)
    rows = q.shape[1] * q.shape[2] // (k.shape[2] // x.groups)
    if rows > MOST_ROWS:
        return f"at most {MOST_ROWS} queries times heads", f"{rows}"
    if x.block_k % LANES:
        return f"blocks that {LANES} divides", f"block_k={x.block_k}"
    return None


def sums(q, k, v, q_place: Place, k_place: Place, maximum: Float[Array, "B T H"], static: Static, **call) -> Sums:
    """As `decode_sums.sums`."""
    x = layout(k, v, static.block_k)
    (batch, n_tokens, heads, _), groups, value = q.shape, k.shape[2], v.shape[3]
    programs, cores = batch * groups // x.groups, CORES.get(kind_of_device(), 1)
    same = jnp.result_type(q, k)
    packed = 32 // min(same.itemsize, v.dtype.itemsize)
    rows = lambda a: filled(jnp.swapaxes(a, 1, 2).reshape(programs, -1, a.shape[3]), packed, axis=1)
    queries = rows(q.astype(same))
    count, items, written = _visits(static, q_place, k_place, x, programs, cores)

    here = lambda c, i, items: items[c * pl.num_programs(1) + i]
    of_row = lambda c, i, count, items: (_row(here(c, i, items), x), 0, 0)
    of_result = lambda c, i, count, items: (c, _row(here(c, i, items), x), 0, 0)
    along = lambda c, i, count, items: (_row(here(c, i, items), x), _block(here(c, i, items), x), 0)
    across = lambda c, i, count, items: (_row(here(c, i, items), x), 0, _block(here(c, i, items), x))

    def of_places(c, i, count, items):
        item = here(c, i, items)  # a whole block needs none, and asks for those that are there
        row = jax.lax.div(_row(item, x), programs // batch)
        return row, 0, jnp.where(jax.lax.rem(item, 2) == 1, 0, _block(item, x))

    of_keys = lambda width, transposed: (
        pl.BlockSpec((1, width, x.columns), across) if transposed else pl.BlockSpec((1, x.columns, width), along)
    )
    own = lambda a: pl.BlockSpec((1, *a.shape[1:]), of_row)
    q_places, k_places, maxima = _row_places(q_place, rows, x, heads), _places(k_place, x), rows(maximum[..., None])
    results = [fp32_result(q, cores, programs, queries.shape[1], width) for width in (value, LANES, LANES)]
    values, weights, top = pl.pallas_call(
        functools.partial(_kernel, static=static, x=x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, jnp.maximum(-(-count // cores), 1)),
            in_specs=[
                *(own(a) for a in (queries, q_places, maxima)),
                of_keys(k.shape[3], x.k_transposed),
                of_keys(value, x.v_transposed),
                pl.BlockSpec((1, k_places.shape[1], x.block_k), of_places),
            ],
            out_specs=[pl.BlockSpec((1, 1, *a.shape[2:]), of_result) for a in results],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * queries.shape[1] * (k.size + v.size) // programs,
            transcendentals=queries.shape[1] * x.n_keys * x.groups * programs,
            bytes_accessed=k.size * k.dtype.itemsize + v.size * v.dtype.itemsize,
        ),
        name="decode_attention",
        **call,
    )(
        count[None], items, queries, q_places, LOG2_E * maxima, _laid_out(k.astype(same), x, x.k_transposed),
        _laid_out(v, x, x.v_transposed), k_places,
    )  # fmt: skip
    n_rows = n_tokens * heads * x.groups // groups
    by_token = lambda a: jnp.swapaxes(a[:, :n_rows].reshape(batch, heads, n_tokens, *a.shape[2:]), 1, 2)
    kept = lambda a, otherwise: jnp.where(written[..., None, None], a, otherwise)
    return Sums(
        by_token(jnp.sum(kept(weights, 0), axis=(0, 3))),
        by_token(jnp.sum(kept(values, 0), axis=0)),
        by_token(jnp.max(kept(top, -jnp.inf), axis=(0, 3)) / LOG2_E),
    )


def _visits(
    static: Static, q_place: Place, k_place: Place, x: Layout, programs: int, cores: int
) -> tuple[Int[Array, ""], Int[Array, "n"], Bool[Array, "cores programs"]]:
    """(blocks to visit, their list, which core visits some of which program): 2 (n_blocks program + block) + whole."""
    kinds = block_kinds(static.mask, q_place, k_place, x.block_k)
    kinds = jnp.repeat(kinds, programs // kinds.shape[0], axis=0)
    seen = kinds != UNSEEN
    ends = jnp.cumsum(jnp.sum(seen, axis=1, dtype=jnp.int32))
    count = ends[-1]
    number = 2 * jnp.arange(kinds.size, dtype=jnp.int32) + (kinds == WHOLE).reshape(-1)
    last = jnp.max(jnp.where(seen.reshape(-1), number, 0))
    items = jnp.sort(jnp.where(seen.reshape(-1), number, last))  # those behind the last one are it again
    items = jnp.pad(items, (0, cores - 1), constant_values=last)
    starts, turns = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]]), jnp.maximum(-(-count // cores), 1)
    core = jnp.arange(cores)[:, None]
    written = (starts < ends) & (starts < (core + 1) * turns) & (ends > core * turns)
    return count, items, written


def _row_places(q_place: Place, rows, x: Layout, heads: int) -> Int[Array, "N rows 3"]:
    """Index, segment and kv head among those of the program; -1 where a row is padding."""
    index, segment = (q_place.index, jnp.where(q_place.segment == 0, -1, q_place.segment))
    group = jnp.arange(heads) // (heads // x.groups) if x.groups > 1 else jnp.zeros(heads, jnp.int32)
    each = jnp.broadcast_arrays(index[..., None], segment[..., None], group)
    return rows(jnp.stack(each, axis=-1).astype(jnp.int32) + 1) - 1


def _places(k_place: Place, x: Layout) -> Int[Array, "B P S"]:
    """Index, segment, and prefix if there is one, of whole blocks."""
    return filled(jnp.stack([a.astype(jnp.int32) for a in k_place if a is not None], axis=1), x.block_k, axis=2)


def _laid_out(a: Float[Array, "B S G K"], x: Layout, transposed: bool) -> Float[Array, "N S K"]:
    batch, n_keys, groups, width = a.shape
    if x.groups > 1:
        return a.reshape(batch, n_keys * groups, width)
    a = a.transpose((0, 2, 3, 1) if transposed else (0, 2, 1, 3))
    return a.reshape(batch * groups, *a.shape[2:])

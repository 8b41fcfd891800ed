"""Attention block by block: no array of query time by key time, forward or backward.

Forward, per block of queries, a softmax folded over blocks of keys with a running maximum m, sum z and output a:

    m' = max(m, max_s l_ts),   z' = e^{m-m'} z + sum_s e^{l_ts-m'},   a' = e^{m-m'} a + sum_s e^{l_ts-m'} d_ts v_s.

Backward, from q, k, v, o and lse alone; lse is an output too, hence its cotangent in delta:

    delta_t = do_t . o_t - dlse_t,             dl_ts = p_ts (d_ts do_t . v_s - delta_t),
    dq_t = scale sum_s dl_ts k_s,              dk_s = scale sum_t dl_ts q_t,              dv_s = sum_t d_ts p_ts do_t.

Each block of queries visits only the blocks of keys in which some pair can see each other, found at run time from what
each block spans. So causality halves the work and a window makes it linear.

Memory beyond inputs and outputs: a few arrays [B, H, block_q, block_k], and one number per block of keys.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.attention_scores import Extras, Static, keep_factor, product, row_delta, score
from jaxmem.pallas_kernels.masks import Extent, Place, extent, may_see
from jaxmem.typing import Array, Float, Int, PyTree, Shaped


def forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Partial:
    """(o [B T H V], lse [B T H]) in fp32."""
    static = _sized(static, q, k)
    queries, keys, extents = _prepare(q, k, v, q_place, k_place, static)

    def attend(query):
        q, q_place = query
        by_distance = _by_distance(q, extras)
        order, n_visible = _visits(q_place, extents, static)

        def fold(n, carry):
            top, total, o = carry
            k, v, k_place = _block(keys, order[n], static.block_k)
            logits = score(product("bgrtk,bsgk->bgrts", q, k), by_distance, q_place, k_place, static)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
            weights = jnp.exp(logits - new_top)
            fade = jnp.exp(top - new_top)
            total = fade * total + jnp.sum(weights, axis=-1, keepdims=True)
            weights *= keep_factor(extras.seeds, q_place, k_place, static.rate)
            o = fade * o + product("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v)
            return new_top, total, o

        # The maximum starts finite, so that masked logits of -inf weigh exp(-inf - finite) = 0 and never NaN.
        lowest = float(jnp.finfo(jnp.float32).min)
        start = _fp32_like(q, 1, lowest), _fp32_like(q, 1), _fp32_like(q, v.shape[-1])
        top, total, o = jax.lax.fori_loop(0, n_visible, fold, start)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        return o / total, jnp.where(empty, -jnp.inf, top + jnp.log(total))

    o, lse = (_ungrouped(x, q.shape[1]) for x in jax.lax.map(attend, queries))
    return Partial(o, lse[..., 0])


def gradients(
    q, k, v, q_place: Place, k_place: Place, extras: Extras, result: Partial, cotangents: Partial, static: Static
):
    """(dq, dk, dv, d_relative or None) in fp32, in one pass over the visible pairs of blocks."""
    static, delta = _sized(static, q, k), row_delta(result, cotangents)
    lse = jnp.where(result.lse == -jnp.inf, 0.0, result.lse)
    queries, keys, extents = _prepare(q, k, v, q_place, k_place, static)
    grouped = partial(_grouped_blocks, groups=k.shape[2], size=static.block_q)
    do, delta, lse = (grouped(x) for x in (cotangents.o.astype(v.dtype), delta[..., None], lse[..., None]))

    def pull_back(carry, block):
        d_keys, d_relative = carry
        (q, q_place), do, delta, lse = block
        by_distance = _by_distance(q, extras)
        order, n_visible = _visits(q_place, extents, static)

        def fold(n, carry):
            dq, d_by_distance, dk, dv = carry
            k, v, k_place = _block(keys, order[n], static.block_k)
            start = order[n] * static.block_k
            products = product("bgrtk,bsgk->bgrts", q, k)
            scores = partial(score, q=q_place, k=k_place, static=static)
            logits, to_products = jax.vjp(scores, products, by_distance)
            p, keep = jnp.exp(logits - lse), keep_factor(extras.seeds, q_place, k_place, static.rate)
            dl = p * (keep * product("bgrtv,bsgv->bgrts", do, v) - delta)
            d_products, d_distances = to_products(dl)
            d_products = d_products.astype(q.dtype)
            dq += product("bgrts,bsgk->bgrtk", d_products, k)
            dk = _add_at(dk, start, product("bgrts,bgrtk->bsgk", d_products, q))
            dv = _add_at(dv, start, product("bgrts,bgrtv->bsgv", (keep * p).astype(do.dtype), do))
            return dq, jax.tree.map(jnp.add, d_by_distance, d_distances), dk, dv

        zero = _fp32_like(q, q.shape[-1]), jax.tree.map(jnp.zeros_like, by_distance)
        dq, d_by_distance, *d_keys = jax.lax.fori_loop(0, n_visible, fold, (*zero, *d_keys))
        if by_distance is not None:
            dq += product("bgrtl,grlk->bgrtk", d_by_distance, extras.relative.astype(jnp.float32))
            d_relative += product("bgrtl,bgrtk->grlk", d_by_distance, q.astype(jnp.float32))
        return (tuple(d_keys), d_relative), dq

    zeros = _fp32_like(keys[0], k.shape[-1]), _fp32_like(keys[1], v.shape[-1])
    d_relative = None if extras.relative is None else _fp32_like(extras.relative, k.shape[-1])
    ((dk, dv), d_relative), dq = jax.lax.scan(pull_back, (zeros, d_relative), (queries, do, delta, lse))
    return _ungrouped(dq, q.shape[1]), dk[:, : k.shape[1]], dv[:, : k.shape[1]], d_relative


def _sized(static: Static, q: Float[Array, "B T H K"], k: Float[Array, "B S G K"]) -> Static:
    size = 128
    if static.mask.window is None and static.mask.chunk is None:
        # large blocks are faster; below an eighth of the keys, causality still halves the work
        size = 128 * max(1, min(4, k.shape[1] // 1024))
    static = static.with_blocks(size, size)
    return static._replace(block_q=min(static.block_q, q.shape[1]), block_k=min(static.block_k, k.shape[1]))


def _by_distance(q: Float[Array, "B G R C K"], extras: Extras) -> Float[Array, "B G R C L"] | None:
    return None if extras.relative is None else product("bgrtk,grlk->bgrtl", q, extras.relative.astype(q.dtype))


def _prepare(q, k, v, q_place: Place, k_place: Place, static: Static):
    """Queries in blocks [N B G R C K], keys filled up to whole blocks in their own layout (a cache must not be copied), and
    what each block of keys spans."""
    queries = _grouped_blocks(q, k.shape[2], static.block_q), _blocks(q_place, static.block_q)
    keys = _fill((k, v, k_place), static.block_k)
    return queries, keys, extent(_blocks(keys[2], static.block_k))


def _visits(q_place: Place, extents: Extent, static: Static) -> tuple[Int[Array, "M"], Int[Array, ""]]:
    """The M blocks of keys, those first that a block of queries may see, and how many these are."""
    visible = jnp.any(may_see(static.mask, extent(q_place), extents), axis=-1)
    return jnp.argsort(~visible), jnp.sum(visible)


def _block(keys: PyTree, j: Int[Array, ""], size: int) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=1), keys)


def _grouped_blocks(x: Float[Array, "B T H K"], groups: int, size: int) -> Float[Array, "N B G R C K"]:
    """Blocks of `size` tokens; the R heads of each of the groups stand together, and before time."""
    batch, n_tokens, heads, width = x.shape
    blocks = _blocks(x.reshape(batch, n_tokens, groups, heads // groups, width), size)
    return blocks.transpose(0, 1, 3, 4, 2, 5)


def _ungrouped(blocks: Float[Array, "N B G R C K"], n_tokens: int) -> Float[Array, "B T H K"]:
    """The inverse of `_grouped_blocks`."""
    n_blocks, batch, groups, repeats, size, width = blocks.shape
    x = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, n_blocks * size, groups * repeats, width)
    return x[:, :n_tokens]


def _blocks(tree: PyTree, size: int) -> PyTree:
    """[B T ...] as blocks [N B C ...] of `size` tokens, the last filled up."""
    split = lambda x: x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
    return jax.tree.map(split, _fill(tree, size))


def _fill(tree: PyTree, size: int) -> PyTree:
    """Zeros behind the last token of [B T ...], up to a multiple of `size`: segment 0, tokens that are nowhere."""
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return jax.tree.map(fill, tree)


def _add_at(x: Float[Array, "B S G K"], start: Int[Array, ""], y: Float[Array, "B C G K"]) -> Float[Array, "B S G K"]:
    """x[:, start : start + C] += y."""
    block = jax.lax.dynamic_slice_in_dim(x, start, y.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, block + y, start, axis=1)


def _fp32_like(x: Shaped[Array, "*rows K"], width: int, value: float = 0.0) -> Float[Array, "*rows W"]:
    """An fp32 array of one value, with another last dimension than x, but varying over the same mesh axes."""
    return jnp.full_like(x, value, dtype=jnp.float32, shape=(*x.shape[:-1], width))

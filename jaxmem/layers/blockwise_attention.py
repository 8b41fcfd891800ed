"""Blockwise softmax attention: exact, causal, windowed and packed, without an array of query time by key time.

    o_t = sum_s p_ts v_s,   p_ts = exp(l_ts - lse_t),   l_ts = scale q_t . k_s,   lse_t = log sum_s exp(l_ts)

over the keys s that query t sees: same segment (not 0), not of the future, less than `window` tokens back. Time is an
index per token and not its place in the array, so the keys may be a cache in any order.

Forward, per block of queries: a softmax folded over the blocks of keys with a running maximum m, sum z and output a,

    m' = max(m, max_s l_ts),   z' = e^{m-m'} z + sum_s e^{l_ts-m'},   a' = e^{m-m'} a + sum_s e^{l_ts-m'} v_s.

Backward, from q, k, v, o and lse alone (p is recomputed); lse is an output too, hence its cotangent in delta:

    delta_t = do_t . o_t - dlse_t,             dl_ts = p_ts (do_t . v_s - delta_t),
    dq_t = scale sum_s dl_ts k_s,              dk_s = scale sum_t dl_ts q_t,              dv_s = sum_t p_ts do_t.

Each block of queries visits only the blocks of keys in which some pair can see each other, found at run time from the
range of indices and segments in each block. So causality halves the work and a window makes it linear.

Cost: 2 (K + V) FLOPs forward and 2 (3 K + 2 V) backward per head and visited pair; inputs, o and lse are saved.
Reference: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3; Dao 2023, arXiv 2307.08691, algorithms 1 and 2.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra import softmax
from jaxmem.algebra.softmax import Partial
from jaxmem.typing import Array, Bool, Float, Int, Shaped

Implementation = Literal["reference", "xla"]


def blockwise_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    q_index: Int[Array, "B T"],
    k_index: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | None = None,
    scale: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    implementation: Implementation | None = None,
) -> Partial:
    """Attention of q over the keys it sees, as `Partial(o [B T H V], lse [B T H])`, both fp32 and differentiable.

    Args:
      q, k, v: head h reads kv head h // (H / G). Products are taken in their dtype; logits, softmax and sums in fp32.
      q_index, k_index: order of the tokens in their row, >= 0; a query sees its own index and smaller ones.
      q_segment, k_segment: document of each token; 0, padding or an empty cache slot, neither sees nor is seen.
      window: how many indices back a query sees, its own included; None is all.
      scale: of the logits; None is K^-0.5.
      block_q, block_k: tokens per block; "xla" works in a few arrays [B, H, block_q, block_k].
      implementation: "reference" is the equation in fp32 with arrays [B, H, T, S]; "xla" is blockwise, and what None
        picks. The gradient of "xla" cannot be differentiated again, that of "reference" can.

    Returns: a query that sees nothing has o = 0, lse = -inf and no gradient.
    Raises: ValueError if shapes do not match, window or blocks are not positive, or the implementation is unknown.

    >>> x, t, one = jnp.array([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1), jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32)
    >>> o, lse = blockwise_attention(0 * x, x, x, q_index=t, k_index=t, q_segment=one, k_segment=one)
    >>> o[0, :, 0, 0].tolist()
    [1.0, 1.5, 3.0]
    """
    q_place, k_place = Place(q_index, q_segment), Place(k_index, k_segment)
    _validate(q, k, v, q_place, k_place)
    for name, value in (("window", window), ("block_q", block_q), ("block_k", block_k)):
        if value is not None and value < 1:
            raise ValueError(f"blockwise_attention: needs {name} >= 1, got {name}={value}; change it or leave it out")
    if implementation not in (None, "reference", "xla"):
        raise ValueError(
            "blockwise_attention: needs implementation 'reference', 'xla' or None, "
            f"got implementation={implementation!r}; None picks the best"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if implementation == "reference":
        return _reference(q, k, v, q_place, k_place, window, scale)
    static = Static(min(block_q, q.shape[1]), min(block_k, k.shape[1]), window, scale)
    return Partial(*_attention(q, k, v, q_place, k_place, static))


class Place(NamedTuple):
    """Where tokens stand: their order in the row and their document (0: nowhere)."""

    index: Int[Array, "*rows T"]
    segment: Int[Array, "*rows T"]


class Static(NamedTuple):
    """What is fixed when tracing: tokens per block of queries and of keys, window, scale of the logits."""

    block_q: int
    block_k: int
    window: int | None
    scale: float


class Queries(NamedTuple):
    """N blocks of queries (or one, without the leading axis); the R heads that share keys stand together."""

    q: Float[Array, "N B G R C K"]
    place: Place


class Keys(NamedTuple):
    """Keys and values, filled up to M whole blocks; they stay in their layout, as a cache must not be copied."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    place: Place

    def block(self, j: Int[Array, ""], size: int) -> "Keys":
        """The j-th block of `size` tokens."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=1), self)


def sees(q: Place, k: Place, window: int | None) -> Bool[Array, "B T S"]:
    """True where query t attends to key s."""
    same = (q.segment[:, :, None] == k.segment[:, None, :]) & (q.segment[:, :, None] != 0)
    ago = q.index[:, :, None] - k.index[:, None, :]
    return same & (ago >= 0) if window is None else same & (ago >= 0) & (ago < window)


def _reference(q, k, v, q_place: Place, k_place: Place, window: int | None, scale: float) -> Partial:
    """The equation as it stands."""
    batch, n_tokens, heads, width = q.shape
    q = q.reshape(batch, n_tokens, k.shape[2], -1, width)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = scale * _einsum("btgrk,bsgk->bgrts", q, k)
    mask = sees(q_place, k_place, window)[:, None, None]
    o, lse = softmax.partial(logits, jnp.einsum("bsgv->bgsv", v)[:, :, None, None], mask)
    o, lse = jnp.einsum("bgrtv->btgrv", o), jnp.einsum("bgrt->btgr", lse)
    return Partial(o.reshape(batch, n_tokens, heads, -1), lse.reshape(batch, n_tokens, heads))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, q_place: Place, k_place: Place, static: Static):
    return _forward(q, k, v, q_place, k_place, static)[0]


def _forward(q, k, v, q_place: Place, k_place: Place, static: Static):
    """(o, lse) and what the backward pass needs."""
    queries, keys, schedule = _prepare(q, k, v, q_place, k_place, static)

    def attend(queries: tuple[Queries, Int[Array, "M"], Int[Array, ""]]):
        (q, q_place), order, n_visible = queries

        def fold(n, carry):
            top, total, o = carry
            k, v, k_place = keys.block(order[n], static.block_k)
            logits = _logits(q, q_place, k, k_place, static)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
            weights = jnp.exp(logits - new_top)
            fade = jnp.exp(top - new_top)
            total = fade * total + jnp.sum(weights, axis=-1, keepdims=True)
            o = fade * o + _einsum("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v)
            return new_top, total, o

        # The maximum starts finite, so that masked logits of -inf weigh exp(-inf - finite) = 0 and never NaN.
        lowest = float(jnp.finfo(jnp.float32).min)
        start = _fp32_like(q, 1, lowest), _fp32_like(q, 1), _fp32_like(q, v.shape[-1])
        top, total, o = jax.lax.fori_loop(0, n_visible, fold, start)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        return o / total, jnp.where(empty, -jnp.inf, top + jnp.log(total))

    o, lse = (_ungrouped(x, q.shape[1]) for x in jax.lax.map(attend, (queries, *schedule)))
    lse = lse[..., 0]
    return (o, lse), (q, k, v, q_place, k_place, o.astype(v.dtype), lse)


def _backward(static: Static, saved, cotangents):
    """(dq, dk, dv) in one pass over the visible pairs of blocks; the tokens have no gradient."""
    q, k, v, q_place, k_place, o, lse = saved
    do, dlse = cotangents
    empty = lse == -jnp.inf
    delta = jnp.where(empty, 0.0, jnp.sum(do * o, axis=-1) - dlse)
    lse = jnp.where(empty, 0.0, lse)
    queries, keys, schedule = _prepare(q, k, v, q_place, k_place, static)
    grouped = partial(_grouped_blocks, groups=k.shape[2], size=static.block_q)
    do, delta, lse = (grouped(x) for x in (do.astype(v.dtype), delta[..., None], lse[..., None]))

    def pull_back(d_keys, queries):
        (q, q_place), do, delta, lse, order, n_visible = queries

        def fold(n, carry):
            dq, dk, dv = carry
            k, v, k_place = keys.block(order[n], static.block_k)
            start = order[n] * static.block_k
            p = jnp.exp(_logits(q, q_place, k, k_place, static) - lse)
            dp = _einsum("bgrtv,bsgv->bgrts", do, v)
            dl = (static.scale * p * (dp - delta)).astype(q.dtype)
            dq += _einsum("bgrts,bsgk->bgrtk", dl, k)
            dk = _add_at(dk, start, _einsum("bgrts,bgrtk->bsgk", dl, q))
            dv = _add_at(dv, start, _einsum("bgrts,bgrtv->bsgv", p.astype(do.dtype), do))
            return dq, dk, dv

        dq, *d_keys = jax.lax.fori_loop(0, n_visible, fold, (_fp32_like(q, q.shape[-1]), *d_keys))
        return tuple(d_keys), dq

    zeros = _fp32_like(keys.k, k.shape[-1]), _fp32_like(keys.v, v.shape[-1])
    (dk, dv), dq = jax.lax.scan(pull_back, zeros, (queries, do, delta, lse, *schedule))
    dq, dk, dv = _ungrouped(dq, q.shape[1]), dk[:, : k.shape[1]], dv[:, : k.shape[1]]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _prepare(q, k, v, q_place: Place, k_place: Place, static: Static):
    """Queries in blocks, keys filled up to whole blocks, and which blocks of keys each block of queries visits."""
    queries = Queries(
        _grouped_blocks(q, k.shape[2], static.block_q),
        jax.tree.map(lambda x: _blocks(x, static.block_q), q_place),
    )
    keys = jax.tree.map(lambda x: _fill(x, static.block_k), Keys(k, v, k_place))
    k_blocks = jax.tree.map(lambda x: _blocks(x, static.block_k), keys.place)
    return queries, keys, _visible_blocks(queries.place, k_blocks, static.window)


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


def _blocks(x: Shaped[Array, "B T *rest"], size: int) -> Shaped[Array, "N B C *rest"]:
    """Blocks of `size` tokens, the last filled up."""
    x = _fill(x, size)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _fill(x: Shaped[Array, "B T *rest"], size: int) -> Shaped[Array, "B filled *rest"]:
    """x with 0 behind its last token, up to a multiple of `size`: segment 0, tokens that are nowhere."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))


def _add_at(x: Float[Array, "B S G K"], start: Int[Array, ""], y: Float[Array, "B C G K"]) -> Float[Array, "B S G K"]:
    """x[:, start : start + C] += y."""
    block = jax.lax.dynamic_slice_in_dim(x, start, y.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, block + y, start, axis=1)


def _visible_blocks(q: Place, k: Place, window: int | None) -> tuple[Int[Array, "N M"], Int[Array, "N"]]:
    """For each of N blocks of queries: the M blocks of keys, those first that it may see, and how many these are."""
    q_index, q_segment = _extent(q.index, q), _extent(q.segment, q)
    k_index, k_segment = _extent(k.index, k), _extent(k.segment, k)
    visible = (k_index.low <= q_index.high[:, None]) & (k_segment.low <= q_segment.high[:, None])
    visible &= q_segment.low[:, None] <= k_segment.high
    if window is not None:
        visible &= q_index.low[:, None] - window < k_index.high
    visible = jnp.any(visible, axis=2)
    return jnp.argsort(~visible, axis=1), jnp.sum(visible, axis=1)


class Extent(NamedTuple):
    """Smallest and largest value in each row of each block; low > high in a row of nothing but padding."""

    low: Int[Array, "N B"]
    high: Int[Array, "N B"]


def _extent(x: Int[Array, "N B C"], place: Place) -> Extent:
    int32 = jnp.iinfo(jnp.int32)
    real = place.segment != 0
    return Extent(jnp.min(jnp.where(real, x, int32.max), axis=2), jnp.max(jnp.where(real, x, int32.min), axis=2))


def _logits(
    q: Float[Array, "B G R Cq K"], q_place: Place, k: Float[Array, "B Ck G K"], k_place: Place, static: Static
) -> Float[Array, "B G R Cq Ck"]:
    """Scaled fp32 logits of a pair of blocks, -inf where masked."""
    logits = static.scale * _einsum("bgrtk,bsgk->bgrts", q, k)
    return jnp.where(sees(q_place, k_place, static.window)[:, None, None], logits, -jnp.inf)


def _einsum(subscripts: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product in the dtype of its factors, exact if that is fp32, summed in fp32."""
    exact = jnp.result_type(x, y) == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _fp32_like(x: Float[Array, "*rows K"], width: int, value: float = 0.0) -> Float[Array, "*rows W"]:
    """An fp32 array of one value, with another last dimension than x, but varying over the same mesh axes."""
    return jnp.full_like(x, value, dtype=jnp.float32, shape=(*x.shape[:-1], width))


def _validate(q, k, v, q_place: Place, k_place: Place) -> None:
    batch, n_queries, heads, width = q.shape
    n_keys, groups = k.shape[1:3]

    def need(condition: bool, what: str, got: str, todo: str):
        if not condition:
            raise ValueError(f"blockwise_attention: needs {what}, got {got}; {todo}")

    shapes = f"q={q.shape}, k={k.shape}, v={v.shape}"
    need(k.shape == (batch, n_keys, groups, width), "k of shape [B, S, G, K]", shapes, "B and K are those of q")
    need(v.shape[:3] == k.shape[:3], "v of shape [B, S, G, V]", shapes, "B, S and G are those of k")
    need(heads % groups == 0, "H divisible by G", f"H={heads}, G={groups}", "change the number of heads or of kv heads")
    for side, place, shape in (("q", q_place, (batch, n_queries)), ("k", k_place, (batch, n_keys))):
        for name, array in zip(Place._fields, place, strict=True):
            need(
                array.shape == shape and jnp.issubdtype(array.dtype, jnp.integer),
                f"{side}_{name} to be integers of shape {shape}",
                f"{side}_{name}={array.dtype}{list(array.shape)}",
                f"pass one integer per token of {side}",
            )

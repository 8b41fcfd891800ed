"""A product-key table that is written by gradient descent while it is read: one table per row of a batch, fp32.

    s_p[i] = -log(eps + |q_p - c_p[i]|^2)  ("idw": weights of inverse distances)  or  q_p . c_p[i]  ("dot"),  p = 1, 2
    ids, w = the k slots (i, j) of the highest s_1[i] + s_2[j], and the softmax of these          read(q) = sum_j w_j v[ids_j]

One step on C pairs of a query, a target z and a gate g, all with the table as it was before them:

    values      v_m -= a (k / N_m) sum_{t, j: ids_tj = m} w_tj g_t (read(q_t) - z_t)          N_m: how often slot m was read
    sub-keys    c_p -= a' d L_p / d c_p,   L_p = sum_i u_i log u_i,   u = mean_t softmax(the k highest s_p of q_t)

The first is the gradient of sum_t g_t |read(q_t) - z_t|^2 / 2 in the values, per slot and read. The second is that of minus
the entropy of how the chunk as a whole uses the sub-keys of a part: it spreads them out, and nothing else moves them. Both
are written in closed form, so an outer gradient goes through them as through any other code.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra import topk
from jaxmem.layers.product_keys import product_top_k
from jaxmem.pallas_kernels.memory_lookup import bag, sum_rows
from jaxmem.typing import Array, Bool, Float, Int

Score = Literal["idw", "dot"]


class Rates(NamedTuple):
    """How a table is read and written."""

    top_k: int
    score: Score
    eps: float
    """Of "idw"."""
    values: float
    """a k: the step of values."""
    keys: float
    """a': the step of sub-keys."""


class Pairs(NamedTuple):
    """What is to be written: reading query should give target."""

    query: Float[Array, "B C 2 half"]
    gate: Float[Array, "B C"]
    target: Float[Array, "B C V"]


def sub_scores(
    query: Float[Array, "B T 2 half"], keys: Float[Array, "B 2 n half"], score: Score, eps: float
) -> Float[Array, "B T 2 n"]:
    """s_p of every sub-key.

    >>> query, keys = jnp.array([[[[3.0], [4.0]]]]), jnp.array([[[[1.0]], [[2.0]]]])
    >>> sub_scores(query, keys, "dot", 1.0).tolist(), jnp.exp(-sub_scores(query, keys, "idw", 1.0)).round(3).tolist()
    ([[[[3.0], [8.0]]]], [[[[5.0], [5.0]]]])
    """
    products = jnp.einsum("btpk,bpnk->btpn", query, keys, precision="highest")
    if score == "dot":
        return products
    squares = jnp.sum(query**2, axis=-1)[..., None] + jnp.sum(keys**2, axis=-1)[:, None]
    return -jnp.log(eps + jnp.maximum(squares - 2 * products, 0))


def read(
    query: Float[Array, "B T 2 half"], keys: Float[Array, "B 2 n half"], values: Float[Array, "B M V"], rates: Rates
) -> Float[Array, "B T V"]:
    """What the rows' tables hold for these queries."""
    return _look_up(sub_scores(query, keys, rates.score, rates.eps), values, rates.top_k)[0]


def _look_up(scores, values, top_k):
    """What is read, and the slots [B T k] among those of all rows, and their weights."""
    best = product_top_k(scores, top_k)
    weights = jax.nn.softmax(best.scores, axis=-1)
    ids = best.ids + _first_row(values.shape[0], values.shape[1])
    return bag(values.reshape(-1, values.shape[-1]), ids, weights), ids, weights


def _first_row(batch: int, n_rows: int) -> Int[Array, "B 1 1"]:
    return n_rows * jnp.arange(batch, dtype=jnp.int32)[:, None, None]


def write(
    pairs: Pairs,
    valid: Bool[Array, "B C"],
    keys: Float[Array, "B 2 n half"],
    values: Float[Array, "B M V"],
    rates: Rates,
) -> tuple[Float[Array, "B 2 n half"], Float[Array, "B M V"]]:
    """The step of the module docstring: what to add to the sub-keys, and the new values.

    Args:
      pairs: in any order.
      valid: False leaves a pair out.
    """
    scores = sub_scores(pairs.query, keys, rates.score, rates.eps)
    found, ids, weights = _look_up(scores, values, rates.top_k)
    batch, n_rows, width = values.shape
    counted = jnp.broadcast_to(valid[..., None], ids.shape).astype(jnp.float32)
    n_reads = jnp.zeros_like(values, shape=batch * n_rows).at[ids].add(counted)
    step = rates.values * weights * (counted / jnp.maximum(n_reads[ids], 1)) * pairs.gate[..., None]
    change = step[..., None] * (pairs.target - found)[..., None, :]  # [B C k V]
    values = values.reshape(-1, width).at[ids].add(change).reshape(values.shape)
    return -rates.keys * addressing_gradient(pairs.query, valid, keys, scores, rates), values


def addressing_loss(scores: Float[Array, "B C 2 n"], valid: Bool[Array, "B C"], top_k: int) -> Float[Array, "B"]:
    """L_1 + L_2 of each row: minus the entropies of how its valid queries use the sub-keys of each part.

    >>> loss = addressing_loss(jnp.zeros((1, 1, 2, 4)), jnp.ones((1, 1), bool), 2)  # two sub-keys of each part, evenly
    >>> round(float(loss[0] / jnp.log(2)), 4)
    -2.0
    """
    best, weights = _of_parts(scores, top_k)
    usage = _usage(best.ids, weights, valid, scores.shape[-1])
    return jnp.sum(jax.scipy.special.xlogy(usage, usage), axis=(1, 2))


def _of_parts(scores, top_k):
    best = topk.top_k(scores, None, min(top_k, scores.shape[-1]))
    return best, jax.nn.softmax(best.scores, axis=-1)


def _usage(ids: Int[Array, "B C 2 k"], weights, valid, n: int) -> Float[Array, "B 2 n"]:
    share = valid.astype(weights.dtype) / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    row, part = jnp.arange(ids.shape[0])[:, None, None, None], jnp.arange(2)[:, None]
    nothing = jnp.zeros_like(weights, shape=(ids.shape[0], 2, n))
    return nothing.at[row, part, ids].add(weights * share[..., None, None])


def addressing_gradient(
    query: Float[Array, "B C 2 half"],
    valid: Bool[Array, "B C"],
    keys: Float[Array, "B 2 n half"],
    scores: Float[Array, "B C 2 n"],
    rates: Rates,
) -> Float[Array, "B 2 n half"]:
    """The gradient of `addressing_loss` in the sub-keys.

    dL / ds_ti = softmax_ti (log u_i - sum_j softmax_tj log u_j) / C, and ds_ti / dc_i = q_t or 2 (q_t - c_i) / (eps + d^2).
    """
    batch, _, n, width = keys.shape
    best, weights = _of_parts(scores, rates.top_k)
    usage = _usage(best.ids, weights, valid, n)
    row, part = jnp.arange(batch)[:, None, None, None], jnp.arange(2)[:, None]
    log_usage = jnp.log(jnp.maximum(usage, 1e-30))[row, part, best.ids]  # [B C 2 k]
    share = valid.astype(weights.dtype) / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    centred = log_usage - jnp.sum(weights * log_usage, axis=-1, keepdims=True)
    slope = weights * centred * share[..., None, None]
    if rates.score == "idw":
        slope = 2 * slope * jnp.exp(best.scores)  # e^s = 1 / (eps + d^2)
    ids = best.ids + n * (2 * row + part)
    of_queries = sum_rows(ids, slope, query, batch * 2 * n).reshape(keys.shape)
    if rates.score == "dot":
        return of_queries
    total = jnp.zeros_like(usage).at[row, part, best.ids].add(slope)
    return of_queries - total[..., None] * keys

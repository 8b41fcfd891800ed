"""Ring attention: every device keeps its queries while the keys of all pass by, one device at a time.

At each of n hops a device attends to the keys it holds, merges the result into (o, lse), and passes them on; the exchange
for the next hop depends on nothing that is computed in this one. The backward pass sends the keys around once more, and
with them the gradients of keys and values, in fp32, one hop behind: what was added in one hop travels during the next. The
second half of a device's queries meets the device's own keys last, while those gradients make their last hop home.

Memory per device is O(T / n): nothing is kept of a hop but (o, lse). Exchanged per device: n - 1 times keys, values and
places forward; backward the same, and n times dk and dv in fp32. Hops are turns of a scan, because XLA puts the exchanges of
unrolled ones in front of all arithmetic.
Reference: Liu, Zaharia, Abbeel 2023, arXiv 2310.01889.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial, combine
from jaxmem.pallas_kernels.attention_core import as_cotangents, forward, gradients, to_save
from jaxmem.pallas_kernels.attention_scores import Extras, Static
from jaxmem.pallas_kernels.masks import Place
from jaxmem.sharding.rings import Ring
from jaxmem.typing import Array, Int, PyTree


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def ring_attention(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, ring: Ring) -> Partial:
    """(o, lse) of this device's queries over the keys of all devices of a ring; inside `local`."""

    def attend(seen: Partial, keys) -> Partial:
        k, v, k_place = keys
        return combine(seen, forward(q, k, v, q_place, _unpacked(k_place), extras, static))

    def hop(carry, _):
        seen, keys = carry
        return (attend(seen, keys), ring.onward(keys)), None

    nothing = jnp.full_like(q, 0, jnp.float32, shape=(*q.shape[:-1], v.shape[-1]))
    seen = Partial(nothing, jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
    (seen, keys), _ = jax.lax.scan(hop, (seen, (k, v, _packed(k_place))), length=ring.size - 1)
    return attend(seen, keys)


def _forward(*arguments):
    result = ring_attention(*arguments)
    return result, to_save(*arguments[:-2], result)


def _backward(static: Static, ring: Ring, saved, cotangents: Partial):
    q, k, v, q_place, k_place, extras, result = saved
    half = -(-q.shape[1] // 2) if ring.size > 1 else q.shape[1]

    def pull_back(keys, queries=slice(None)):
        part = lambda tree: jax.tree.map(lambda x: x[:, queries], tree)
        k, v, k_place = keys[0], keys[1], _unpacked(keys[2])
        dq, dk, dv, d_relative = gradients(
            part(q), k, v, part(q_place), k_place, extras, part(result), part(cotangents), static
        )
        dq = jnp.zeros_like(q, jnp.float32).at[:, queries].set(dq)
        return (dq, d_relative), jnp.concatenate([dk, dv], axis=-1)  # one exchange

    def hop(carry, _):
        mine, d_keys, keys = carry
        more, d_here = pull_back(keys)
        return (_add(mine, more), _add(ring.onward(d_keys), d_here), ring.onward(keys)), None

    keys = own = k, v, _packed(k_place)
    mine, d_keys = pull_back(own, slice(half))
    if ring.size > 1:
        (mine, d_keys, keys), _ = jax.lax.scan(hop, (mine, d_keys, ring.onward(own)), length=ring.size - 2)
        more, d_here = pull_back(keys)
        mine, d_keys = _add(mine, more), _add(ring.onward(d_keys), d_here)
        own, d_keys = jax.lax.optimization_barrier((own, d_keys))  # what comes home meets kernels that are still to run
        d_keys = ring.onward(d_keys)
    if half < q.shape[1]:
        last = pull_back(own, slice(half, None))
        # nothing that follows may start before both, or that exchange would be hidden behind something of less certain length
        mine, d_keys, last = jax.lax.optimization_barrier((mine, d_keys, last))
        mine, d_keys = _add((mine, d_keys), last)
    (dq, d_relative), (dk, dv) = mine, jnp.split(d_keys, [k.shape[-1]], axis=-1)
    return as_cotangents((dq, dk, dv, d_relative), q, k, v, extras)


ring_attention.defvjp(_forward, _backward)


def _packed(place: Place) -> Int[Array, "P B S"]:
    """One array to be exchanged: XLA keeps five exchanges in flight at most."""
    return jnp.stack([x.astype(jnp.int32) for x in place if x is not None])


def _unpacked(rows: Int[Array, "P B S"]) -> Place:
    index, segment, *prefix = rows
    return Place(index, segment, *(x != 0 for x in prefix))


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)

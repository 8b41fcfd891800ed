"""Ring attention: every device keeps its queries while the keys of all pass by, one device at a time.

A device holds T / n queries, keys and values of a sequence, in any layout: `Place.index` says which tokens they are. At each
of n hops it attends to the keys it holds, merges the result into (o, lse), and passes them on; the exchange for the next
hop depends on nothing that is computed in this one. The backward pass sends the keys around once more, and with them the
gradients of keys and values, in fp32, one hop behind: what was added in one hop travels during the next.

Memory per device is O(T / n): nothing is kept of a hop but (o, lse). Exchanged per device: n - 1 times keys, values and
places forward; backward the same, and n times dk and dv in fp32.
Reference: Liu, Zaharia, Abbeel 2023, arXiv 2310.01889.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial, combine
from jaxmem.pallas_kernels.attention_scores import Extras, Static
from jaxmem.pallas_kernels.flash_attention_xla import attention, gradients
from jaxmem.pallas_kernels.masks import Place
from jaxmem.sharding.folds import n_shards
from jaxmem.typing import PyTree


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def ring_attention(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, axis: str):
    """(o, lse) of this device's queries over the keys of all devices of a mesh axis; inside `local`."""
    return _forward(q, k, v, q_place, k_place, extras, static, axis)[0]


def _forward(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, axis: str):
    def attend(seen: Partial, keys) -> Partial:
        k, v, k_place = keys
        return combine(seen, Partial(*attention(q, k, v, q_place, k_place, extras, static)))

    def hop(carry, _):
        seen, keys = carry
        return (attend(seen, keys), _onward(keys, axis)), None

    nothing = jnp.full_like(q, 0, jnp.float32, shape=(*q.shape[:-1], v.shape[-1]))
    seen = Partial(nothing, jnp.full_like(q[..., 0], -jnp.inf, jnp.float32))
    (seen, keys), _ = jax.lax.scan(hop, (seen, (k, v, k_place)), length=n_shards(axis) - 1)
    o, lse = attend(seen, keys)
    return (o, lse), (q, k, v, q_place, k_place, extras, o.astype(v.dtype), lse)


def _backward(static: Static, axis: str, saved, cotangents):
    q, k, v, q_place, k_place, extras, o, lse = saved
    n = n_shards(axis)

    def pull_back(keys):
        k, v, k_place = keys
        dq, dk, dv, d_relative = gradients(q, k, v, q_place, k_place, extras, o, lse, *cotangents, static)
        return (dq, d_relative), (dk, dv)

    def hop(carry, _):
        mine, d_keys, keys = carry
        more, d_here = pull_back(keys)
        return (_add(mine, more), _add(_onward(d_keys, axis), d_here), _onward(keys, axis)), None

    keys = k, v, k_place
    mine, d_keys = pull_back(keys)
    if n > 1:
        carry = mine, d_keys, _onward(keys, axis)
        (mine, d_keys, keys), _ = jax.lax.scan(hop, carry, length=n - 2)
        more, d_here = pull_back(keys)
        mine, d_keys = _add(mine, more), _onward(_add(_onward(d_keys, axis), d_here), axis)
    (dq, d_relative), (dk, dv) = mine, d_keys
    d_extras = None if d_relative is None else Extras(d_relative.astype(extras.relative.dtype), None)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, d_extras


ring_attention.defvjp(_forward, _backward)


def _onward(tree: PyTree, axis: str) -> PyTree:
    """What the device before holds."""
    n = n_shards(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % n) for i in range(n)])


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)

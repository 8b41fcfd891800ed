"""Where every number of the state decays on its own, all that has to happen in order is h_t = a_t * h_{t-1} + x_t.

The gradient of x is the same scan backwards, d_t = dh_t + a_{t+1} d_{t+1}; those of all else take part in no recurrence. On a
CPU both scans are loops over tokens, whose state stays in its first cache; elsewhere, trees of log2 T levels (Blelloch
1990, Prefix sums and their applications).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmem.recurrences.products import dot
from jaxmem.typing import Array, Shaped


@jax.custom_vjp
def scan_tokens(
    q: Shaped[Array, "T B K *#H"],
    k: Shaped[Array, "T B K *#H"],
    v: Shaped[Array, "T B V H"],
    a: Shaped[Array, "T B K V H"],
    start: Shaped[Array, "B K V H"],
) -> tuple[Shaped[Array, "T B V H"], Shaped[Array, "B K V H"]]:
    """o_t = h_t^T q_t of h_t = a_t * h_{t-1} + k_t v_t^T, and the last h; heads last, for they are many.

    Args: q, k: without H where they are the same for all heads.
    Cost: 5 FLOPs per number of the state and token; the backward pass keeps all states.
    """
    return _forward(q, k, v, a, start)[0]


def _forward(q, k, v, a, start):
    x = _outer(k, v)
    h = _run(loop, tree, a, x, start)
    return (dot(f"{_axes(q)},tbkvh->tbvh", q, h), h[-1]), (q, k, v, a, start, h)


def _backward(saved, cotangents):
    q, k, v, a, start, h = saved
    d_o, d_end = cotangents
    d = _run(loop_back, tree_back, a, _outer(q, d_o), d_end)
    d_q = dot(f"tbkvh,tbvh->{_axes(q)}", h, d_o)
    d_k = dot(f"tbkvh,tbvh->{_axes(k)}", d, v)
    d_v = dot(f"{_axes(k)},tbkvh->tbvh", k, d)
    return d_q, d_k, d_v, d * jnp.concatenate([start[None], h[:-1]]), a[0] * d[0]


scan_tokens.defvjp(_forward, _backward)


def _axes(key: Array) -> str:
    return "tbk" if key.ndim == 3 else "tbkh"


def _outer(key: Array, value: Array) -> Array:
    """[T B K V H]"""
    key = key[..., None] if key.ndim == 3 else key
    return key[..., None, :] * value[..., None, :, :]


def _run(on_cpu: Callable, elsewhere: Callable, a: Array, x: Array, start: Array) -> Array:
    """The scan, without dimensions of size 1, which XLA would copy everything to move."""
    sizes = [size for size in start.shape if size > 1]
    dense = a.reshape(len(a), *sizes), x.reshape(len(x), *sizes), start.reshape(sizes)
    return jax.lax.platform_dependent(*dense, cpu=on_cpu, default=elsewhere).reshape(a.shape)


def loop(a: Shaped[Array, "T *n"], x: Shaped[Array, "T *n"], start: Shaped[Array, "*n"]) -> Shaped[Array, "T *n"]:
    """h_t = a_t h_{t-1} + x_t, token by token."""

    def token(h, ax):
        h = ax[0] * h + ax[1]
        return h, h

    return jax.lax.scan(token, start, (a, x))[1]


def tree(a: Shaped[Array, "T *n"], x: Shaped[Array, "T *n"], start: Shaped[Array, "*n"]) -> Shaped[Array, "T *n"]:
    """The same in log2 T levels."""
    then = lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1])
    return jax.lax.associative_scan(then, (a, x.at[0].add(a[0] * start)))[1]


def loop_back(
    a: Shaped[Array, "T *n"], d_h: Shaped[Array, "T *n"], d_end: Shaped[Array, "*n"]
) -> Shaped[Array, "T *n"]:
    """d_t = d_h_t + a_{t+1} d_{t+1}, the last one with d_end, token by token."""

    def token(d, xs):
        d += xs[1]
        return xs[0] * d, d

    return jax.lax.scan(token, d_end, (a, d_h), reverse=True)[1]


def tree_back(
    a: Shaped[Array, "T *n"], d_h: Shaped[Array, "T *n"], d_end: Shaped[Array, "*n"]
) -> Shaped[Array, "T *n"]:
    """The same in log2 T levels."""
    then = lambda last, first: (first[0] * last[0], first[0] * last[1] + first[1])
    after = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
    return jax.lax.associative_scan(then, (after, d_h.at[-1].add(d_end)), reverse=True)[1]

"""Memories in which every number decays on its own: h_t = e^{g_t} h_{t-1} + x_t, elementwise.

| name | e^g | x | source |
|---|---|---|---|
| `hgrn` | a forget gate | any | Qin et al. 2023, arXiv 2311.04823 |
| `rg_lru` | a = e^{-8 r softplus(lam)} | sqrt(1 - a^2) (i * x) | De et al. 2024, arXiv 2402.19427 (Griffin) |
| `selective_scan` | e^{dt A} [D N] | dt x B^T | Gu and Dao 2023, arXiv 2312.00752 (Mamba) |

In the engine's terms every channel is a head of its own, with a state [N 1] or [1 1]. All take `state`, None for zero,
and the `Options` of `call` but scale; they return y in x.dtype and the final state in fp32.

Cost per token: 7 FLOPs per number of the state. State: D or N D floats.
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.call import Options, call_by_channel
from jaxmem.recurrences.products import for_tokens, widen
from jaxmem.recurrences.streams import Streams
from jaxmem.typing import Array, Bool, Float

GATE_POWER = 8.0
"""The c of RG-LRU: its gates range over a in (sigmoid(lam)^c, 1)."""


def hgrn(
    x: Float[Array, "B T D"],
    g: Float[Array, "B T D"],
    state: Float[Array, "B D"] | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """h_t = e^{g_t} h_{t-1} + x_t, every h_t and the last one.

    >>> h, state = hgrn(jnp.ones((1, 3, 1)), jnp.log(jnp.full((1, 3, 1), 0.5)))
    >>> h[0, :, 0].tolist()
    [1.0, 1.5, 1.75]
    """
    return call_by_channel("hgrn", hgrn_streams, {"x": (x, "B T D"), "g": (g, "B T D")}, x, state, **options)


def hgrn_streams(x: Array, g: Array, *, scale: float) -> Streams:
    one = jnp.ones((*x.shape[:-1], 1, 1), x.dtype)
    return Streams(scale * one, one, x[..., None], affine.Elementwise(g[..., None, None]))


def rg_lru(
    x: Float[Array, "B T D"],
    r: Float[Array, "B T D"],
    i: Float[Array, "B T D"],
    lam: Float[Array, "D"],
    state: Float[Array, "B D"] | None = None,
    *,
    first: Bool[Array, "B T"] | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Griffin's real-gated linear recurrent unit.

    Args:
      r, i: recurrence and input gates, in (0, 1).
      lam: the parameter of a.
      first: the first tokens of documents, which enter unscaled: there is nothing yet to keep the variance of.
    """
    first = jnp.zeros(x.shape[:2], bool) if first is None else first
    arrays = {"x": (x, "B T D"), "r": (r, "B T D"), "i": (i, "B T D"), "first": (first, "B T")}
    rate = -GATE_POWER * jax.nn.softplus(lam)

    def streams(x: Array, r: Array, i: Array, first: Array, *, scale: float) -> Streams:
        return rg_lru_streams(x, r * for_tokens(rate, r.shape[:-1]), i, first, scale=scale)

    return call_by_channel("rg_lru", streams, arrays, x, state, **options)


def rg_lru_streams(x: Array, g: Array, i: Array, first: Array, *, scale: float) -> Streams:
    is_first = first[..., None] != 0
    return hgrn_streams(jnp.where(is_first, 1.0, _bounded_sqrt(-jnp.expm1(2 * g))) * i * x, g, scale=scale)


@jax.custom_jvp
def _bounded_sqrt(x: Array) -> Array:
    """sqrt, of derivative 1,000 at most: a gate that is shut, a = 1, would send back infinity (as in Griffin's code)."""
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = jnp.sqrt(primals[0])
    return y, tangents[0] / jnp.maximum(2 * y, 1e-3)


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    d: Float[Array, "D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Mamba's recurrence: h = e^{dt a} h + dt x b^T, y = h c + d x.

    Args:
      dt: step sizes >= 0, after softplus and bias.
      a: < 0: -exp(a_log).
      d: what of x goes past the state; None: nothing.
    """
    arrays = {"x": (x, "B T D"), "dt": (dt, "B T D"), "b": (b, "B T N"), "c": (c, "B T N")}

    def streams(x: Array, dt: Array, b: Array, c: Array, *, scale: float) -> Streams:
        return selective_streams(x, dt, a, b, scale * c)

    return call_by_channel("selective_scan", streams, arrays, x, state, "B D N", d=d, **options)


def selective_streams(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Streams:
    g = (widen(dt, a.shape[-1], -2) * for_tokens(a.mT, dt.shape[:-1])).mT
    return Streams(c[..., None, :], b[..., None, :], (dt * x)[..., None], affine.Elementwise(g[..., None]))

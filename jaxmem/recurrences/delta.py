"""Delta rules: memories that correct what they hold for a key before they write.

Each is S_t = (I - b_t e_t^T) D_t S_{t-1} + k_t v_t^T of the engine under names of its own; o_t = scale * S_t^T q_t.

| name | S_t | source |
|---|---|---|
| `delta_rule` | S + k u^T, u = beta (v - S^T k) | Yang et al. 2024, arXiv 2406.06484 |
| `gated_delta_rule` | S' + k u^T, S' = e^g S, u = beta (v - S'^T k) | Yang et al. 2024, arXiv 2412.06464, eq. 10 |
| `kimi_delta_attention` | the same with S' = diag(e^g) S | Kimi Team 2025, arXiv 2510.26692 |
| `gated_delta_product` | n delta rules per token, the first behind the decay | Siems et al. 2025, arXiv 2502.10297 |
| `gated_delta_net_2` | S' = diag(e^g) S, u = w * v - S'^T (b * k) | as in flash-linear-attention 0.6 |
| `comba` | e^g S + k u^T, u = beta (v - S^T p): S before it decays | Hu et al. 2025, arXiv 2506.02475 |
| `dplr` | diag(e^g) S + b (S^T a)^T + k v^T: S before it decays | Peng et al. 2025, arXiv 2503.14456 |
| `rwkv7` | the same, scale 1 | Peng et al. 2025, arXiv 2503.14456 |

All take `state` [B H K V], None for zero, and the `Options` of `call`; they return o in v.dtype and the final state in fp32.
Heads of q and k (G of them) may be fewer than those of v (H): each then serves H / G. A ValueError says what does not fit.

Cost per token and head: `engine.recurrence_flops`; state K V floats.
"""

from typing import Unpack

import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.call import Options, call, repeat_heads
from jaxmem.recurrences.products import widen
from jaxmem.recurrences.streams import Erase, Streams
from jaxmem.typing import Array, Float

Outputs = tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """DeltaNet: keys of length 1 and write strengths beta in (0, 1), or (0, 2) for negative eigenvalues."""
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V"), "beta": (beta, "B T H")}
    return call("delta_rule", delta_streams, arrays, state, **options)


def delta_streams(q: Array, k: Array, v: Array, beta: Array, *, scale: float) -> Streams:
    return gated_delta_streams(q, k, v, jnp.zeros_like(beta), beta, scale=scale)


def gated_delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Gated DeltaNet: a log-decay g <= 0 per head. A token with g = 0, beta = 0 leaves the state as it is.

    >>> one = jnp.ones((1, 3, 1, 1))
    >>> o, state = gated_delta_rule(one, one, one, jnp.zeros((1, 3, 1)), jnp.full((1, 3, 1), 0.5))
    >>> o[0, :, 0, 0].tolist()
    [0.5, 0.75, 0.875]
    """
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V")}
    arrays |= {"g": (g, "B T H"), "beta": (beta, "B T H")}
    return call("gated_delta_rule", gated_delta_streams, arrays, state, **options)


def gated_delta_streams(q: Array, k: Array, v: Array, g: Array, beta: Array, *, scale: float) -> Streams:
    q, k = repeat_heads(q, v), repeat_heads(k, v)
    return Streams(scale * q, k, _scaled(beta, v), affine.Scalar(g), Erase(_scaled(beta, k)))


def kimi_delta_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """KDA: a log-decay g <= 0 per key channel. With equal channels it is `gated_delta_rule`."""
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V")}
    arrays |= {"g": (g, "B T H K"), "beta": (beta, "B T H")}
    return call("kimi_delta_attention", kimi_delta_streams, arrays, state, **options)


def kimi_delta_streams(q: Array, k: Array, v: Array, g: Array, beta: Array, *, scale: float) -> Streams:
    q, k = repeat_heads(q, v), repeat_heads(k, v)
    return Streams(scale * q, k, _scaled(beta, v), affine.Vector(g), Erase(_scaled(beta, k)))


def gated_delta_product(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T n H K"],
    v: Float[Array, "B T n H V"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B T n H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Gated DeltaProduct: n delta rules per token, one decay before the first, o read behind the last.

    Cost: that of n tokens of `gated_delta_rule` per token.
    """
    arrays = {"q": (q, "B T H K"), "k": (k, "B T n H K"), "v": (v, "B T n H V")}
    arrays |= {"g": (g, "B T H"), "beta": (beta, "B T n H")}
    return call("gated_delta_product", gated_delta_product_streams, arrays, state, n_steps=k.shape[2], **options)


def gated_delta_product_streams(q: Array, k: Array, v: Array, g: Array, beta: Array, *, scale: float) -> Streams:
    n = k.shape[-3]
    if n == 1:  # streams of one step have no dimension of steps
        k, v, beta = k[..., 0, :, :], v[..., 0, :, :], beta[..., 0, :]
        return gated_delta_streams(q, k, v, g, beta, scale=scale)
    at = lambda x, place: jnp.pad(x[..., None, :, :], [(0, 0)] * (x.ndim - 2) + [place, (0, 0), (0, 0)])
    last, first = (n - 1, 0), (0, n - 1)
    return gated_delta_streams(at(q, last), k, v, at(g[..., None], first)[..., 0], beta, scale=scale)


def gated_delta_net_2(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T H V"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """GDN-2: strengths of its own for erasing (b, per key channel) and writing (w, per value channel)."""
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V")}
    arrays |= {"g": (g, "B T H K"), "b": (b, "B T H K"), "w": (w, "B T H V")}
    return call("gated_delta_net_2", gated_delta_net_2_streams, arrays, state, **options)


def gated_delta_net_2_streams(q: Array, k: Array, v: Array, g: Array, b: Array, w: Array, *, scale: float) -> Streams:
    q, k = repeat_heads(q, v), repeat_heads(k, v)
    return Streams(scale * q, k, w * v, affine.Vector(g), Erase(b * k))


def comba(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    p: Float[Array, "B T G K"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Comba: corrects by what the state held for p before it decayed."""
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V"), "p": (p, "B T G K")}
    arrays |= {"g": (g, "B T H"), "beta": (beta, "B T H")}
    return call("comba", comba_streams, arrays, state, **options)


def comba_streams(q: Array, k: Array, v: Array, p: Array, g: Array, beta: Array, *, scale: float) -> Streams:
    q, k, p = (repeat_heads(x, v) for x in (q, k, p))
    return Streams(scale * q, k, _scaled(beta, v), affine.Scalar(g), Erase(undecayed=_scaled(beta, p)))


def dplr(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    g: Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Diagonal plus low rank: M_t = diag(e^g) + b a^T. Stable where a = -c * b' with b' near b, c from 0 to 2."""
    arrays = {name: (x, "B T H K") for name, x in {"q": q, "k": k, "a": a, "b": b, "g": g}.items()}
    return call("dplr", dplr_streams, arrays | {"v": (v, "B T H V")}, state, **options)


def dplr_streams(q: Array, k: Array, v: Array, a: Array, b: Array, g: Array, *, scale: float) -> Streams:
    return Streams(scale * q, k, v, affine.Vector(g), Erase(undecayed=-a, at=b))


def rwkv7(
    r: Float[Array, "B T H K"],
    w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """RWKV-7: `dplr` in its own names, r for q and log-decay w = -e^{-0.5} sigmoid(.), with scale 1."""
    return dplr(r, k, v, a, b, w, state, **{"scale": 1.0} | options)


def _scaled(beta: Float[Array, "*tokens H"], x: Float[Array, "*tokens H K"]) -> Float[Array, "*tokens H K"]:
    return widen(beta, x.shape[-1]) * x

"""Memories that only decay: S_t = D_t S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

| name | D_t | source |
|---|---|---|
| `linear_attention` | 1; optionally o / (q . sum k) | Katharopoulos et al. 2020, arXiv 2006.16236 |
| `retention` | 1 - 2^{-5-h}, a constant of head h | Sun et al. 2023, arXiv 2307.08621 |
| `lightning_attention` | e^{-slope of head and layer} | Qin et al. 2024, arXiv 2401.04658; MiniMax 2025, arXiv 2501.08313 |
| `simple_gla` | e^g | Yang et al. 2023, arXiv 2312.06635 |
| `gated_linear_attention` | diag(e^g) | Yang et al. 2023, arXiv 2312.06635 |
| `hgrn2` | diag(e^g), k = 1 - e^g | Qin et al. 2024, arXiv 2404.07904 |
| `state_space_dual` | e^{dt a}, k = B, v = dt x, q = C | Dao and Gu 2024, arXiv 2405.21060 (Mamba-2) |

All take `state` [B H K V], None for zero, and the `Options` of `call`; they return o in v.dtype and the final state in fp32.
Heads of q and k (G of them) may be fewer than those of v (H): each then serves H / G. A ValueError says what does not fit.

Cost per token and head: 4 K V + 2 C (K + V) FLOPs in chunks of C; state K V floats.
"""

from typing import Literal, Unpack

import jax.numpy as jnp
import numpy as np

from jaxmem.algebra import affine
from jaxmem.recurrences.call import Options, call, repeat_heads
from jaxmem.recurrences.streams import Streams
from jaxmem.typing import Array, DTypeLike, Float

Outputs = tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]


def simple_gla(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"] | Float[Array, "H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """One log-decay g <= 0 per token and head, or a constant one per head.

    >>> one = jnp.ones((1, 3, 1, 1))
    >>> o, state = simple_gla(one, one, one, jnp.log(jnp.array([0.5])))
    >>> o[0, :, 0, 0].tolist()
    [1.0, 1.5, 1.75]
    """
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V"), "g": (_per_token(g, v), "B T H")}
    return call("simple_gla", simple_gla_streams, arrays, state, **options)


def simple_gla_streams(q: Array, k: Array, v: Array, g: Array, *, scale: float) -> Streams:
    return Streams(scale * repeat_heads(q, v), repeat_heads(k, v), v, affine.Scalar(g))


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H K S"] | None = None,
    *,
    normalize: bool = False,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K S"]]:
    """No decay; q and k are features already.

    Args:
      normalize: divide by scale * q . (sum of k) + 1e-10, for positive features. The sum is one more column of the
        state, [B H K V+1], so that it is handed on like the rest.
    """
    g = jnp.zeros(v.shape[:3], jnp.promote_types(v.dtype, jnp.float32))
    if not normalize:
        return simple_gla(q, k, v, g, state, **options)
    counted = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1).astype(g.dtype)
    o, state = simple_gla(q, k, counted, g, state, **options)
    return (o[..., :-1] / (o[..., -1:] + 1e-10)).astype(v.dtype), state


def retention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """RetNet: `simple_gla` with `retention_decays`."""
    return simple_gla(q, k, v, retention_decays(v.shape[2], jnp.promote_types(v.dtype, jnp.float32)), state, **options)


def retention_decays(n_heads: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "H"]:
    """Log-decays log(1 - 2^{-5-h}) of heads h = 0 ... H-1."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(n_heads)))), dtype)


def lightning_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    slopes: Float[Array, "H"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """`simple_gla` that decays by e^{-slope} per token, with scale 1 as in MiniMax; see `lightning_slopes`."""
    return simple_gla(q, k, v, -slopes, state, **{"scale": 1.0} | options)


def lightning_slopes(
    n_heads: int, layer: int, n_layers: int, convention: Literal["minimax", "fla"] = "minimax"
) -> Float[Array, "H"]:
    """The slopes of layer l of L, by either of two conventions that do not agree.

    minimax: 2^{-8 (h + 1) / H} (1 - l / (L - 1 + 1e-5) + 1e-5), that of the MiniMax checkpoints.
    fla: (8 / H) (1 - l / L) h, that of flash-linear-attention.
    """
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"lightning_slopes: needs 0 <= layer < n_layers, got layer={layer} of n_layers={n_layers}; count from 0"
        )
    head = np.arange(n_heads)
    if convention == "minimax":
        slopes = 2.0 ** (-8 * (head + 1) / n_heads) * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5)
    elif convention == "fla":
        slopes = 8 / n_heads * (1 - layer / n_layers) * head
    else:
        raise ValueError(
            f"lightning_slopes: needs convention 'minimax' or 'fla', got convention={convention!r}; choose one of these"
        )
    return jnp.asarray(slopes, jnp.float32)


def gated_linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """GLA: a log-decay g <= 0 per key channel. With equal channels it is `simple_gla`."""
    arrays = {"q": (q, "B T G K"), "k": (k, "B T G K"), "v": (v, "B T H V"), "g": (g, "B T H K")}
    return call("gated_linear_attention", gated_linear_streams, arrays, state, **options)


def gated_linear_streams(q: Array, k: Array, v: Array, g: Array, *, scale: float) -> Streams:
    return Streams(scale * repeat_heads(q, v), repeat_heads(k, v), v, affine.Vector(g))


def hgrn2(
    q: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """HGRN2: `gated_linear_attention` whose keys are what is forgotten, k = 1 - e^g; scale 1."""
    arrays = {"q": (q, "B T G K"), "v": (v, "B T H V"), "g": (g, "B T H K")}
    return call("hgrn2", hgrn2_streams, arrays, state, **{"scale": 1.0} | options)


def hgrn2_streams(q: Array, v: Array, g: Array, *, scale: float) -> Streams:
    return gated_linear_streams(q, -jnp.expm1(g), v, g, scale=scale)


def state_space_dual(
    x: Float[Array, "B T H V"],
    dt: Float[Array, "B T H"],
    a: Float[Array, "H"],
    b: Float[Array, "B T G K"],
    c: Float[Array, "B T G K"],
    d: Float[Array, "H"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    **options: Unpack[Options],
) -> Outputs:
    """Mamba-2's SSD: S = e^{dt a} S + b (dt x)^T, y = S^T c + d x. `simple_gla` with scale 1 in its own names.

    Args:
      x: H heads of width P, here V.
      dt: step sizes >= 0, after softplus and bias.
      a: < 0, one rate per head: -exp(a_log).
      b, c: N wide, here K, shared by the heads of each of G groups.
      d: what of x goes past the state; None: nothing.
      state: [B H N P], the transpose of mamba_ssm's.
    """
    arrays = {"c": (c, "B T G K"), "b": (b, "B T G K"), "v": (x, "B T H V"), "dt": (dt, "B T H")}

    def streams(c: Array, b: Array, v: Array, dt: Array, *, scale: float) -> Streams:
        return simple_gla_streams(c, b, dt[..., None] * v, dt * a, scale=scale)

    beside = None if d is None else d[:, None] * x
    return call("state_space_dual", streams, arrays, state, beside=beside, **{"scale": 1.0} | options)


def _per_token(g: Array, v: Array) -> Array:
    return jnp.broadcast_to(g, v.shape[:3]) if g.ndim == 1 else g

"""Memories in which every number decays on its own: h_t = e^{g_t} h_{t-1} + x_t, elementwise.

| name | e^g | x | source |
|---|---|---|---|
| `hgrn` | a forget gate | any | Qin et al. 2023, arXiv 2311.04823 |
| `rg_lru` | a = e^{-8 r softplus(lam)} | sqrt(1 - a^2) (i * x) | De et al. 2024, arXiv 2402.19427 (Griffin) |
| `selective_scan` | e^{dt A} [D N] | dt x B^T | Gu and Dao 2023, arXiv 2312.00752 (Mamba) |
| `state_space` | e^{dt A} [D N], complex, constant | (e^{dt A} - 1) / A * B x | Gu et al. 2022, arXiv 2206.11893 (S4D) |

In the engine's terms every channel is a head of its own, with a state [N 1] or [1 1]. All take `state`, None for zero,
and the `Options` of `call` but scale; they return y in x.dtype and the final state in fp32 (complex64 for `state_space`).

Cost per token: about 6 FLOPs per number of the state. State: D or N D floats.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.call import Options, call
from jaxmem.recurrences.engine import Streams
from jaxmem.typing import Array, Bool, Complex, Float

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
    return _call("hgrn", hgrn_streams, {"x": (x, "B T D"), "g": (g, "B T D")}, x, state, **options)


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
        return rg_lru_streams(x, r * rate, i, first, scale=scale)

    return _call("rg_lru", streams, arrays, x, state, **options)


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

    return _call("selective_scan", streams, arrays, x, state, "B D N", d=d, **options)


def selective_streams(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Streams:
    decay = affine.Elementwise((dt[..., None] * a)[..., None])
    return Streams(c[..., None, :], b[..., None, :], (dt * x)[..., None], decay)


def state_space(
    x: Float[Array, "B T D"],
    dt: Float[Array, "D"],
    a: Complex[Array, "D N"],
    b: Complex[Array, "D N"],
    c: Complex[Array, "D N"],
    d: Float[Array, "D"] | None = None,
    state: Complex[Array, "B D N"] | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D N"]]:
    """S4D, step by step or in chunks: h = e^{dt a} h + b' x with b' = (e^{dt a} - 1) / a b, y = 2 Re(c h) + d x.

    The same from an empty state as a convolution with `state_space_kernel`. N complex numbers stand for 2 N real ones.
    """

    def streams(x: Array, *, scale: float) -> Streams:
        return state_space_streams(x, dt, a, b, scale * c)

    more = {"sizes": {"N": a.shape[1]}, "is_complex": True, "d": d}
    return _call("state_space", streams, {"x": (x, "B T D")}, x, state, "B D N", **more, **options)


def state_space_streams(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Streams:
    g, scaled_b = _discretized(dt, a, b)
    over_tokens = lambda p: jnp.broadcast_to(p, (*x.shape[:-1], *p.shape))
    decay = affine.Elementwise(over_tokens(g)[..., None])
    return Streams(over_tokens(2 * c), over_tokens(scaled_b), x[..., None], decay)


def state_space_kernel(
    dt: Float[Array, "D"], a: Complex[Array, "D N"], b: Complex[Array, "D N"], c: Complex[Array, "D N"], n_tokens: int
) -> Float[Array, "T D"]:
    """What an impulse does to y, t tokens later: 2 Re sum_n c_n e^{t dt a_n} b'_n."""
    g, scaled_b = _discretized(dt, a, b)
    powers = jnp.exp(jnp.arange(n_tokens)[:, None, None] * g)
    return 2 * jnp.real(jnp.einsum("tdn,dn->td", powers, c * scaled_b, precision=jax.lax.Precision.HIGHEST))


def causal_convolution(x: Float[Array, "B T D"], kernel: Float[Array, "T D"]) -> Float[Array, "B T D"]:
    """y_t = sum_s kernel_s x_{t-s} by fast Fourier transforms of length 2 T.

    Cost: O(log T) per token; rounding of size 1e-7 reaches back in time, so it is not causal to the last bit.
    """
    size = 2 * x.shape[1]
    product = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(kernel, size, axis=0)
    return jnp.fft.irfft(product, size, axis=1)[:, : x.shape[1]].astype(x.dtype)


def _discretized(dt: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Log-decays [D N] and what x enters by, held constant over a step (zero-order hold)."""
    g = dt[:, None] * a
    return g, jnp.expm1(g) / a * b


def _call(
    what: str,
    streams: Callable[..., Streams],
    arrays: dict[str, tuple[Array, str]],
    x: Array,
    state: Array | None,
    axes: str = "B D",
    *,
    d: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """`call` of states [B D] or [B D N] whose channels are heads, with d x beside what is read."""
    beside = None if d is None else (d * x)[..., None]
    y, state = call(what, streams, arrays, state, state_axes=axes, dtype=x.dtype, beside=beside, **options)
    return y[..., 0], state

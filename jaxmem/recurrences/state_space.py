"""State spaces that are the same for all tokens, recurrent and as convolutions.

    S4D, `state_space`:         h_t = e^{dt a} h_{t-1} + (e^{dt a} - 1) / a * b x_t,  y_t = 2 Re(c h_t) + d x_t, complex
    LSSL, `linear_state_space`: h_t = M h_{t-1} + (I - dt/2 A)^{-1} dt b x_t,         y_t = c h_t + d x_t,
                                M = (I - dt/2 A)^{-1} (I + dt/2 A)

The first discretises h' = a h + b x by zero-order hold, the second by the bilinear rule. From an empty state both are
convolutions of x with the `..._kernel` beside them. In the engine's terms every channel is a head of its own, with a state
[N 1]. Both take `state`, None for zero, and the `Options` of `call` but scale; they return y in x.dtype and the final
state in complex64 and fp32.

Cost: see `invariant`, with K = N and V = 1. State: N D numbers.
References: Gu et al. 2022, arXiv 2206.11893; Gu et al. 2021, arXiv 2110.13985.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.algebra import affine
from jaxmem.recurrences.call import Options, call_by_channel, known
from jaxmem.recurrences.invariant import Invariant
from jaxmem.recurrences.products import dot
from jaxmem.recurrences.streams import Streams
from jaxmem.recurrences.triangular import unit_lower_inverse
from jaxmem.typing import Array, Complex, Float


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
    """S4D: a diagonal state space per channel. N complex numbers stand for 2 N real ones.

    Args:
      a: of real part < 0.
      d: what of x goes past the state; None: nothing.
    """

    def streams(x: Array, *, scale: float) -> Streams:
        return state_space_streams(x, dt, a, b, scale * c)

    more = {"sizes": {"N": a.shape[1]}, "is_complex": True, "d": d}
    return call_by_channel("state_space", streams, {"x": (x, "B T D")}, x, state, "B D N", **more, **options)


def state_space_streams(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Streams:
    g, written = _zero_order_hold(dt, a, b)
    return _streams(x, affine.Vector(g), written, 2 * c)


def state_space_kernel(
    dt: Float[Array, "D"], a: Complex[Array, "D N"], b: Complex[Array, "D N"], c: Complex[Array, "D N"], n_tokens: int
) -> Float[Array, "T D"]:
    """What an impulse does to y, t tokens later: 2 Re sum_n c_n e^{t dt a_n} b'_n."""
    g, written = _zero_order_hold(dt, a, b)
    powers = jnp.exp(jnp.arange(n_tokens)[:, None, None] * g)
    return 2 * jnp.real(dot("tdn,dn->td", powers, c * written))


def linear_state_space(
    x: Float[Array, "B T D"],
    dt: Float[Array, "D"],
    a: Float[Array, "N N"],
    b: Float[Array, "N"],
    c: Float[Array, "D N"],
    d: Float[Array, "D"] | None = None,
    state: Float[Array, "B D N"] | None = None,
    **options: Unpack[Options],
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """LSSL: one state space for all channels, each at a step size of its own.

    Args:
      a: lower triangular with a diagonal <= 0, such as that of `hippo_legs`.
      d: what of x goes past the state; None: nothing.
    Raises: ValueError for an a with anything above its diagonal.
    """
    if (values := known(a)) is not None and np.any(np.triu(values, 1)):
        raise ValueError(
            "linear_state_space: needs a lower triangular a, got one with numbers above its diagonal; "
            "turn the state by the orthogonal matrix of its real Schur form"
        )

    def streams(x: Array, *, scale: float) -> Streams:
        return linear_state_space_streams(x, dt, a, b, scale * c)

    arrays, more = {"x": (x, "B T D")}, {"sizes": {"N": a.shape[0]}, "d": d}
    return call_by_channel("linear_state_space", streams, arrays, x, state, "B D N", **more, **options)


def linear_state_space_streams(x: Array, dt: Array, a: Array, b: Array, c: Array) -> Streams:
    m, written = _bilinear(dt, a, b)
    return _streams(x, affine.Matrix(m), written, c)


def linear_state_space_kernel(
    dt: Float[Array, "D"], a: Float[Array, "N N"], b: Float[Array, "N"], c: Float[Array, "D N"], n_tokens: int
) -> Float[Array, "T D"]:
    """What an impulse does to y, t tokens later: c M^t b'."""
    m, written = _bilinear(dt, a, b)
    step = lambda h, _: (dot("dij,dj->di", m, h), jnp.sum(c * h, axis=-1))
    return jax.lax.scan(step, written, length=n_tokens)[1]


def hippo_legs(n_states: int) -> tuple[Float[Array, "N N"], Float[Array, "N"]]:
    """A and b that keep the coefficients of a signal's past in Legendre polynomials (scaled Legendre measure).

    A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it; b_n = sqrt(2n + 1).
    Reference: Gu et al. 2020, "HiPPO: recurrent memory with optimal polynomial projections", arXiv 2008.07669, theorem 2.
    """
    root = jnp.sqrt(2 * jnp.arange(n_states, dtype=jnp.float32) + 1)
    return -jnp.tril(root[:, None] * root, -1) - jnp.diag(jnp.arange(1, n_states + 1, dtype=jnp.float32)), root


def causal_convolution(x: Float[Array, "B T D"], kernel: Float[Array, "T D"]) -> Float[Array, "B T D"]:
    """y_t = sum_s kernel_s x_{t-s} by fast Fourier transforms of length 2 T.

    Cost: O(log T) per token; rounding of size 1e-7 reaches back in time, so it is not causal to the last bit.
    """
    size = 2 * x.shape[1]
    product = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(kernel, size, axis=0)
    return jnp.fft.irfft(product, size, axis=1)[:, : x.shape[1]].astype(x.dtype)


def _streams(x: Array, decay: affine.Vector | affine.Matrix, written: Array, read: Array) -> Streams:
    for_all_tokens = lambda p: p.reshape(*[1] * (x.ndim - 1), *p.shape)
    invariant = Invariant(type(decay)(for_all_tokens(decay[0])))
    return Streams(for_all_tokens(read), for_all_tokens(written), x[..., None], invariant)


def _zero_order_hold(dt: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Log-decays [D N] and what x enters by, held constant over a step."""
    g = dt[:, None] * a
    return g, jnp.expm1(g) / a * b


def _bilinear(dt: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """M [D N N] and what x enters by [D N], of one system whose steps begin and end half way each."""
    n, size = a.shape[0], 1 << (a.shape[0] - 1).bit_length()
    half = dt[:, None, None] / 2 * a
    diagonal = 1 - jnp.diagonal(half, axis1=-2, axis2=-1)
    below = -jnp.tril(half, -1) / diagonal[..., None]
    inverse = unit_lower_inverse(jnp.pad(below, [(0, 0)] + [(0, size - n)] * 2))[:, :n, :n] / diagonal[:, None]
    return 2 * inverse - jnp.eye(n, dtype=a.dtype), dt[:, None] * dot("dij,j->di", inverse, b)

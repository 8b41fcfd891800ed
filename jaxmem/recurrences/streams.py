"""What a linear recurrence is made of, token by token.

    S_t = (I - b_t e_t^T) D_t S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t

See `engine` for what the letters mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.invariant import Invariant
from jaxmem.recurrences.products import dot, widen
from jaxmem.typing import Array, Bool, Float, PyTree, Shaped


class Erase(NamedTuple):
    """What is read from the state before a token, and erased: one of the two e, and b."""

    decayed: Float[Array, "*tokens H K"] | None = None
    """e that reads the state behind its decay, D_t S_{t-1}."""
    undecayed: Float[Array, "*tokens H K"] | None = None
    """e that reads S_{t-1}."""
    at: Float[Array, "*tokens H K"] | None = None
    """b, where it is erased; None: at k."""


class Streams(NamedTuple):
    """The recurrence's inputs, token by token, in fp32."""

    q: Shaped[Array, "*tokens H K"]
    k: Shaped[Array, "*tokens H K"]
    v: Shaped[Array, "*tokens H V"]
    decay: affine.Scalar | affine.Vector | affine.Elementwise | Invariant
    """Log-decays g <= 0: [*tokens H], [*tokens H K] or [*tokens H K V], with which q and k may be one for all heads; or
    one M for all tokens, and then q and k are one for all tokens, their dimensions of size 1."""
    erase: Erase | None = None


class Documents(NamedTuple):
    """Which tokens start a document, so that the state before them is forgotten, and which are tokens at all."""

    starts: Bool[Array, "B T"]
    real: Bool[Array, "B T"]


MakeStreams = Callable[[PyTree], Streams]
"""Streams of a recurrence's own inputs; token by token, so that any leading dimensions will do. A recurrence of several
steps per token (n_steps > 1) makes streams [*tokens n H ...], of which only the last step's q is read."""


def step(x: Streams, state: Shaped[Array, "*B H K V"]) -> tuple[Shaped[Array, "*B H V"], Shaped[Array, "*B H K V"]]:
    """One token: the recurrence as it is written in the module docstring."""
    write = lambda key, value: widen(key, value.shape[-1]) * widen(value, key.shape[-1], -2)
    read = lambda query, state: dot("...k,...kv->...v", query, state)
    after = x.decay.times(state) + write(x.k, x.v)
    if x.erase is not None:
        e = x.erase.undecayed if x.erase.decayed is None else x.decay.times(x.erase.decayed[..., None])[..., 0]
        after -= write(x.k if x.erase.at is None else x.erase.at, read(e, state))
    return read(x.q, after), after


def make_streams(make: MakeStreams, n_steps: int, inputs: PyTree, documents: Documents | None) -> Streams:
    """make(inputs), as documents have it."""
    x = make(inputs)
    if documents is None:
        return x
    if n_steps > 1:
        first = jnp.arange(n_steps) == 0
        real = jnp.broadcast_to(documents.real[..., None], (*documents.real.shape, n_steps))
        documents = Documents(documents.starts[..., None] & first, real)
    return forget(x, documents)


def forget(x: Streams, documents: Documents) -> Streams:
    """The streams as documents have it: a start reads and keeps nothing of before, what is not a token does nothing."""
    at = lambda flags, a: flags.reshape(*flags.shape, *[1] * (a.ndim - flags.ndim))
    real = lambda a: jnp.where(at(documents.real, a), a, 0)
    v = real(x.v)
    if isinstance(x.decay, Invariant):
        return x._replace(v=v, decay=Invariant(x.decay.M, *(flags[..., None] for flags in documents)))
    g = x.decay.g
    decay = type(x.decay)(jnp.where(at(documents.starts, g), -jnp.inf, real(g)))
    erase = jax.tree.map(real, x.erase)
    if erase is not None and erase.undecayed is not None:
        e = erase.undecayed
        erase = erase._replace(undecayed=jnp.where(at(documents.starts, e), 0, e))
    return Streams(x.q, real(x.k), v, decay, erase)


def streams_shape(make: MakeStreams, inputs: PyTree) -> Streams:
    """make(inputs) without computing it."""
    return jax.eval_shape(lambda inputs: make(inputs), inputs)

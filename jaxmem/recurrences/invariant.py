"""Recurrences that are the same for all tokens: S_t = M S_{t-1} + k v_t^T, o_t = S_t^T q, with M, k and q constant.

What token j writes is read as q^T M^{i-j} k by token i, so that a chunk of C tokens is a convolution, and the few powers of
M that it needs are formed once for all chunks of a group:

    O_i = sum_{j <= i} (q^T M^{i-j} k) v_j + (M^{i+1} S)^T q,   S <- M^C S + sum_j M^{C-1-j} k v_j^T

The tokens of a chunk stand side by side; what is left of it does nothing, and it takes fewer powers.

Cost per token and head: 2 C V + 4 K V; besides, per group, 6 C K for a diagonal M, or 4 C K^2 + 2 log2(C) K^3.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.products import dot
from jaxmem.typing import Array, Bool, Float, Shaped

Powers = tuple[affine.Vector | affine.Matrix, ...]
"""M^1, M^2, M^4, ..."""


class Invariant(NamedTuple):
    """M, and where it does not apply. The dimensions of tokens of M, as of q and k beside it, are of size 1."""

    M: affine.Vector | affine.Matrix
    starts: Bool[Array, "*tokens 1"] | None = None
    """Tokens that find nothing in the state."""
    real: Bool[Array, "*tokens 1"] | None = None
    """What is not a token leaves the state as it is."""

    def times(self, state: Shaped[Array, "*tokens H K V"]) -> Shaped[Array, "*tokens H K V"]:
        if self.starts is None:
            return self.M.times(state)
        starts, real = (flags[..., None, None] for flags in (self.starts, self.real))
        return jnp.where(real, self.M.times(jnp.where(starts, 0, state)), state)

    def product(self, chunk_tokens: int) -> affine.Vector:
        """What all tokens [*N C] of a chunk come to; of a Vector only."""
        g = self.M.g[..., 0, :]
        if self.starts is None:
            return affine.Vector(chunk_tokens * g)
        n_tokens, starts = jnp.sum(self.real, axis=-1)[..., None], jnp.any(self.starts, axis=-1)[..., None]
        return affine.Vector(jnp.where(starts, -jnp.inf, n_tokens * g))


class Through(NamedTuple):
    """What chunks do to the state that comes in: powers of M, chosen by the binary digits of their numbers of tokens."""

    digits: Float[Array, "*N 1 digits"] | None
    """None: all chunks are full."""
    kept: Bool[Array, "*N 1"] | None
    """Whether no document starts in a chunk."""

    def times(self, powers: Powers, state: Array) -> Array:
        """Args: powers: M^1, M^2, M^4, ..., M^C."""
        if self.digits is None:
            return powers[-1].times(state)
        for digit, power in enumerate(powers):
            state = jnp.where(self.digits[..., digit, None, None] > 0, power.times(state), state)
        return jnp.where(self.kept[..., None, None], state, 0)


class InvariantChunks(NamedTuple):
    """Chunks [*N C] of tokens."""

    powers: Powers
    """M^1, M^2, M^4, ..., M^C, one for all chunks."""
    through: Through
    inside: Shaped[Array, "*#N C C"]
    """What of v_j is in o_i."""
    reads: Shaped[Array, "*#N K C"]
    """(M^T)^{i+1} q."""
    writes: Shaped[Array, "*#N K C"]
    """M^{C-1-j} k."""


def invariant_chunks(
    q: Shaped[Array, "1 1 H 1 K"], k: Shaped[Array, "1 1 H 1 K"], decay: Invariant, chunk_tokens: int
) -> InvariantChunks:
    """The parts of chunks [N B H C]; C is a power of two."""
    powers = [type(decay.M)(decay.M[0][0, 0, :, 0])]
    while 1 << (len(powers) - 1) < chunk_tokens:
        powers.append(powers[-1].after(powers[-1]))
    transposed = [affine.Matrix(p.m.mT) if isinstance(p, affine.Matrix) else p for p in powers]

    writes, reads = k.mT, transposed[0].times(q.mT)  # columns M^0 k, M^1 k, ... and M^1 q, M^2 q, ...
    for power, back in zip(powers[:-1], transposed[:-1], strict=True):
        writes = jnp.concatenate([writes, power.times(writes)], axis=-1)
        reads = jnp.concatenate([reads, back.times(reads)], axis=-1)
    kernel = dot("...k,...ks->...s", q[..., 0, :], writes)
    index = jnp.arange(chunk_tokens)
    lag = index[:, None] - index
    inside = jnp.where(lag >= 0, kernel[..., jnp.maximum(lag, 0)], 0)
    if decay.starts is None:
        return InvariantChunks(tuple(powers), Through(None, None), inside, reads, writes[..., ::-1])

    seen, document = (jnp.cumsum(flags, axis=-1) for flags in (decay.real, decay.starts))  # [*N C]
    at = lambda columns, place: jnp.take_along_axis(columns, place[..., None, :], axis=-1)
    digits = seen[..., -1:] >> jnp.arange(len(powers)) & 1
    return InvariantChunks(
        tuple(powers),
        Through(digits.astype(jnp.float32), document[..., -1] == 0),
        jnp.where(document[..., :, None] == document[..., None, :], inside, 0),
        jnp.where((document == 0)[..., None, :], at(reads, jnp.maximum(seen - 1, 0)), 0),
        jnp.where((document == document[..., -1:])[..., None, :], at(writes, seen[..., -1:] - seen), 0),
    )

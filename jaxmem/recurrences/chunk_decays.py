"""What decays inside a chunk of C tokens: between any two of its tokens, from its start, and to its end.

    D_ij = M_i M_{i-1} ... M_{j+1} for j <= i, else 0        (the write of token j as token i reads it, after its own decay)

Sums of log-decays are formed directly, never as differences of running sums, so that strong decays and -inf lose nothing
in values or gradients, and no exponent is ever positive.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxmem.algebra import affine
from jaxmem.recurrences.products import dot, widen
from jaxmem.recurrences.triangular import join_halves
from jaxmem.typing import Array, Float

DIRECT_TOKENS = 2
"""Up to this distance, per-channel decays between tokens are formed one by one; beyond it, as a product of two."""


def in_chunk(decay: affine.Scalar | affine.Vector) -> "ScalarInChunk | VectorInChunk":
    """The decays inside chunks of tokens whose own decay is exp(g), g [*N C] or [*N C K]."""
    return scalar_in_chunk(decay.g) if isinstance(decay, affine.Scalar) else vector_in_chunk(decay.g)


class ScalarInChunk(NamedTuple):
    """One decay per token."""

    between: Float[Array, "*N C C"]
    """D."""
    before: Float[Array, "*N C"]
    """From before the chunk to each token, its own decay included."""

    @property
    def through(self) -> Float[Array, "*N 1 1"]:
        """From before the chunk to its end, as a factor of the state."""
        return self.before[..., -1, None, None]

    def from_start(self, rows: Float[Array, "*N C K"]) -> Float[Array, "*N C K"]:
        return widen(self.before, rows.shape[-1]) * rows

    def to_end(self, columns: Float[Array, "*N C K"]) -> Float[Array, "*N K C"]:
        return widen(self.between[..., -1, :], columns.shape[-1], -2) * columns.mT

    def overlaps(self, rows: list[Array], columns: list[Array]) -> list[list[Float[Array, "*N C C"]]]:
        """rows_i^T D_ij columns_j, of every one of the rows [*N C K] with every one of the columns [*N C K]."""
        size = self.before.shape[-1]
        all_rows, all_columns = (jnp.concatenate(parts, axis=-2) for parts in (rows, columns))
        products = dot("...ik,...jk->...ij", all_rows, all_columns)
        block = lambda r, c: products[..., r * size : (r + 1) * size, c * size : (c + 1) * size]
        return [[self.between * block(r, c) for c in range(len(columns))] for r in range(len(rows))]


def scalar_in_chunk(g: Float[Array, "*N C"]) -> ScalarInChunk:
    index = jnp.arange(g.shape[-1])
    row, column = index[:, None], index
    sums = jnp.cumsum(jnp.where(row > column, widen(g, len(index)), 0), axis=-2)
    return ScalarInChunk(jnp.where(row >= column, jnp.exp(sums), 0), jnp.exp(jnp.cumsum(g, axis=-1)))


class VectorInChunk(NamedTuple):
    """One decay per token and key channel; C is a power of two.

    Pairs of tokens in the two halves of a block of 2 s tokens decay by way of its middle, D_ij = D_i,mid D_mid,j, so their
    overlaps are one product of [s, K] matrices; the halves are blocks themselves, down to a few tokens.
    """

    direct: Float[Array, "*N blocks c c K"]
    """D within the smallest blocks."""
    halves: list[tuple[Float[Array, "*N blocks s K"], Float[Array, "*N blocks s K"]]]
    """Per size of block: the decays from its middle to the tokens behind it, and to its middle of the tokens before it."""
    before: Float[Array, "*N C K"]
    """From before the chunk to each token, its own decay included."""
    after: Float[Array, "*N C K"]
    """From each token to the end of the chunk."""

    @property
    def through(self) -> Float[Array, "*N K 1"]:
        """From before the chunk to its end, as a factor of the state."""
        return self.before[..., -1, :, None]

    def from_start(self, rows: Float[Array, "*N C K"]) -> Float[Array, "*N C K"]:
        return self.before * rows

    def to_end(self, columns: Float[Array, "*N C K"]) -> Float[Array, "*N K C"]:
        return self.after.mT * columns.mT

    def overlaps(self, rows: list[Array], columns: list[Array]) -> list[list[Float[Array, "*N C C"]]]:
        """rows_i^T D_ij columns_j, of every one of the rows [*N C K] with every one of the columns [*N C K]."""
        small = self.direct.shape[-2]
        row_blocks, column_blocks = ([_blocks(x, small) for x in xs] for xs in (rows, columns))
        found = [
            [dot("...ijk,...ik->...ij", self.direct * widen(c, small, -3), r) for c in column_blocks]
            for r in row_blocks
        ]
        for behind, ahead in self.halves:
            size = behind.shape[-2]
            late = jnp.concatenate([behind * _blocks(x, 2 * size)[..., size:, :] for x in rows], axis=-2)
            early = jnp.concatenate([ahead * _blocks(x, 2 * size)[..., :size, :] for x in columns], axis=-2)
            corners = dot("...ik,...jk->...ij", late, early)
            for r, blocks_of_row in enumerate(found):
                for c, blocks in enumerate(blocks_of_row):
                    corner = corners[..., r * size : (r + 1) * size, c * size : (c + 1) * size]
                    blocks_of_row[c] = join_halves(blocks, corner)
        return [[blocks[..., 0, :, :] for blocks in blocks_of_row] for blocks_of_row in found]


def vector_in_chunk(g: Float[Array, "*N C K"]) -> VectorInChunk:
    size, small = g.shape[-2], min(DIRECT_TOKENS, g.shape[-2])
    g = _blocks(g, small)
    index = jnp.arange(small)
    row, column = index[:, None, None], index[:, None]
    sums = jnp.cumsum(jnp.where(row > column, widen(g, small, -2), 0), axis=-3)
    direct = jnp.where(row >= column, jnp.exp(sums), 0)

    halves = []
    before, after = jnp.cumsum(g, axis=-2), sums[..., -1, :, :]
    while before.shape[-2] < size:
        halves.append((jnp.exp(before[..., 1::2, :, :]), jnp.exp(after[..., 0::2, :, :])))
        total = before[..., -1:, :]
        joined = lambda first, second: jnp.concatenate([first, second], axis=-2)
        before, after = (
            joined(before[..., 0::2, :, :], total[..., 0::2, :, :] + before[..., 1::2, :, :]),
            joined(after[..., 0::2, :, :] + total[..., 1::2, :, :], after[..., 1::2, :, :]),
        )
    return VectorInChunk(direct, halves, *(jnp.exp(x[..., 0, :, :]) for x in (before, after)))


def _blocks(x: Float[Array, "*N C K"], size: int) -> Float[Array, "*N blocks size K"]:
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])

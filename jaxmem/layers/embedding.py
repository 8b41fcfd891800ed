"""Token embedding over a table whose rows may be spread over devices.

    y[b, t] = table[ids[b, t]]            dtable[v] = sum of dy[b, t] over all b, t with ids[b, t] = v

Under a mesh every device looks up the rows it owns and writes zeros for the others; a sum over the owners, of which
one is not zero, is the exact result in any dtype. The gradient is a scatter-add into fp32 followed by a sum over the
devices that hold other tokens: a token that occurs 4,096 times gets 4,096 contributions, also when dy is bf16, where
adding 1 to 256 changes nothing and the sum would stop there.

Cost: no FLOPs to speak of; B T D numbers out; the table is gathered over "fsdp" in the output's dtype.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.recurrences.documents import ids_in_int32, known
from jaxmem.sharding import ROWS, constrain, local, mesh_axes, param, stored_like
from jaxmem.showing import Module
from jaxmem.typing import Array, DTypeLike, Float, Int

TABLE = ("vocab", "embed")
TOKENS = ("batch", "time")
ROWS_MULTIPLE = 64
"""The table has a multiple of this many rows, so that up to 64 devices split any vocabulary evenly."""


class Embedding(Module):
    """table[ids]; the table has `vocab_size` rows, and unused ones up to the next multiple of 64.

    >>> embedding = Embedding(100, 8, rngs=nnx.Rngs(0))
    >>> embedding.table.shape, embedding(jnp.array([[1, 99]]), jnp.bfloat16).shape
    ((128, 8), (1, 2, 8))
    """

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs, std: float = 0.02):
        """A table of normal entries.

        Args:
          vocab_size: number of tokens; ids run from 0 to vocab_size - 1.
          d_model: width D of a row.
          rngs: `params` draws the table.
          std: standard deviation of an entry.
        """
        rows = -(-vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE
        self.table = param(rngs, jax.nn.initializers.normal(std), (rows, d_model), TABLE, ROWS)
        self.vocab_size = vocab_size

    def __call__(self, ids: Int[Array, "B T"], dtype: DTypeLike = jnp.float32) -> Float[Array, "B T D"]:
        """The rows of `ids` in `dtype`.

        Raises: ValueError for ids that are no integers, and for one outside 0 .. vocab_size - 1 if they are concrete.
        Under jit, where the ids are not known, such an id gives NaN.
        """
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"embedding: needs integers as token ids, got {ids.dtype}; encode the text first")
        numbers = known(ids)  # in NumPy, which sees them while jit is tracing too
        if numbers is not None and numbers.size:
            low, high = int(numbers.min()), int(numbers.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"embedding: needs token ids in 0..{self.vocab_size - 1}, got ids={low}..{high}; "
                    "check that the tokenizer belongs to this model"
                )
        ids = ids_in_int32(ids)
        is_token = constrain((ids >= 0) & (ids < self.vocab_size), *TOKENS)
        return jnp.where(is_token[..., None], lookup(self.table[...], ids, dtype), jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "Vocab D"], ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """table[ids] in `dtype`, zeros for ids outside the table; the gradient of the table accumulates in fp32."""
    n_rows, owners = table.shape[0], mesh_axes("vocab")

    def gather(table, ids):
        rows = table.at[own_rows(ids, n_rows, owners)].get(mode="fill", fill_value=0)
        return jax.lax.psum(rows, owners)

    placed = local(gather, in_axes=(TABLE, TOKENS), out_axes=(*TOKENS, "embed"))
    return placed(constrain(table.astype(dtype), *TABLE), constrain(ids, *TOKENS))


def _lookup_fwd(table, ids, dtype):
    return lookup(table, ids, dtype), (table, ids)


def _lookup_bwd(dtype, residuals, dy):
    table, ids = residuals
    n_rows, owners, others = table.shape[0], mesh_axes("vocab"), mesh_axes(*TOKENS)

    def scatter(dy, ids):
        zeros = jnp.zeros((n_rows // jax.lax.psum(1, owners), dy.shape[-1]), jnp.float32)
        rows = own_rows(ids, n_rows, owners)
        return jax.lax.psum(zeros.at[rows].add(dy.astype(jnp.float32), mode="drop"), others)

    placed = local(scatter, in_axes=((*TOKENS, "embed"), TOKENS), out_axes=TABLE)
    return stored_like(table, placed(constrain(dy, *TOKENS, "embed"), constrain(ids, *TOKENS))), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def own_rows(ids: Int[Array, "*tokens"], n_rows: int, owners: tuple[str, ...]) -> Int[Array, "*tokens"]:
    """Inside an island: where the rows of `ids` stand in this device's slice of a table of n_rows.

    One past the end of the slice (so that `mode="fill"` and `mode="drop"` skip it) for the rows of other devices and
    for ids that have no row. `owners` are the mesh axes over which the rows are spread.
    """
    n_own = n_rows // jax.lax.psum(1, owners)
    row = ids - n_own * jax.lax.axis_index(owners)
    return jnp.where((row >= 0) & (row < n_own), row, n_own)

"""Cross-entropy of the next token, a few thousand tokens' logits at a time.

    logits[v] = <table[v], x>     lse = log sum_v exp(logits[v])     nats = lse - logits[target]

The logits of a whole batch, B T Vocab numbers in fp32, would be the largest array of a training step. Here no more than
`chunk_tokens` rows of them exist at once on a device: the forward pass keeps two numbers per token, the target's logit
and the lse, and the backward pass computes each chunk's logits again:

    dlogits = exp(logits - lse) * dlse + onehot(target) * dlogit      dx = dlogits @ table      dtable = dlogits^T @ x

Matrix products take inputs in the dtype of x and accumulate in fp32; so does dtable, over all chunks and devices.
Under a mesh each device holds its own rows of the vocabulary and its own tokens. What crosses devices: the table,
gathered over "fsdp" in the dtype of x; three numbers per token (a max, two sums) and dx over the vocabulary's shards;
dtable over the tokens'. Logits never do.

Cost: 8 B T D Vocab FLOPs for loss and gradients, a third more than with stored logits; 4 chunk_tokens Vocab / shards
bytes for each of the two or three arrays of logits' shape that are alive at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.layers.embedding import TABLE, TOKENS, own_rows
from jaxmem.recurrences.documents import ids_in_int32, known
from jaxmem.sharding import constrain, local, mesh_axes, stored_like
from jaxmem.typing import Array, Bool, Float, Int

CHUNK_TOKENS = 1024
"""Enough rows that reading the table and adding to dtable once per chunk costs less than the products themselves."""

WIDTH = (*TOKENS, "embed")


class CrossEntropy(NamedTuple):
    """Sums over tokens, to be added over micro-batches before one is divided by another."""

    loss_sum: Float[Array, ""]
    """Sum of weight x (nats + z_loss x lse^2): what training minimises, divided by weight_sum."""
    nats_sum: Float[Array, ""]
    """Sum of weight x nats: what is reported."""
    weight_sum: Float[Array, ""]


def chunked_cross_entropy(
    x: Float[Array, "B T D"],
    table: Float[Array, "Vocab D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> CrossEntropy:
    """Weighted sums of -log softmax(x @ table^T)[target], differentiable in x, table and weights.

    Args:
      x: what the last layer gives; its dtype is that of the products' inputs.
      table: one row per token of the vocabulary, in fp32.
      targets: token ids; where the weight is 0 any number will do, elsewhere one that is no token makes the sums NaN.
      weights: >= 0 per token, 0 for tokens that do not count; all may be 0, the sums and gradients then are.
      vocab_size: rows of the table that are tokens; the rows after them get no probability. None: all are.
      z_loss: weight of lse^2, which keeps the logits' normaliser near 1; about 1e-4 where it is used.
      chunk_tokens: tokens per device whose logits are alive at once.

    Raises: ValueError for vocab_size outside 1..Vocab, chunk_tokens < 1, and, where values are known, for targets that are no
      tokens and weights below 0.

    Reference (z_loss): Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.

    >>> out = chunked_cross_entropy(jnp.ones((1, 2, 4)), jnp.zeros((8, 4)), jnp.array([[3, 5]]), jnp.ones((1, 2)))
    >>> bool(jnp.isclose(out.loss_sum / out.weight_sum, jnp.log(8.0)))
    True
    """
    _require_tokens(x, targets, vocab_size or table.shape[0], weights)
    targets = ids_in_int32(targets)
    logit, lse = target_logit_and_lse(x, table, targets, vocab_size, chunk_tokens)
    weights = constrain(weights.astype(jnp.float32), *TOKENS)
    nats = _of_tokens(lse - logit, targets, vocab_size or table.shape[0], weights != 0)
    nats_sum = jnp.sum(weights * nats)
    z_sum = jnp.sum(weights * jnp.square(lse))
    return CrossEntropy(nats_sum + z_loss * z_sum, nats_sum, jnp.sum(weights))


def token_nats(
    x: Float[Array, "B T D"],
    table: Float[Array, "Vocab D"],
    targets: Int[Array, "B T"],
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Array, "B T"]:
    """-log softmax(x @ table^T)[target] of every token, in nats, fp32; arguments as of `chunked_cross_entropy`.

    Raises: as `chunked_cross_entropy`; under jit a target that is no token has NaN.
    """
    _require_tokens(x, targets, vocab_size or table.shape[0])
    targets = ids_in_int32(targets)
    logit, lse = target_logit_and_lse(x, table, targets, vocab_size, chunk_tokens)
    return _of_tokens(lse - logit, targets, vocab_size or table.shape[0])


def _of_tokens(
    nats: Float[Array, "B T"], targets: Int[Array, "B T"], n_tokens: int, counts: Bool[Array, "B T"] | bool = True
) -> Float[Array, "B T"]:
    """NaN where a target that counts is none of the vocabulary."""
    is_token = constrain((targets >= 0) & (targets < n_tokens), *TOKENS)
    return jnp.where(is_token | ~jnp.asarray(counts), nats, jnp.nan)


def _require_tokens(x: Array, targets: Array, n_tokens: int, weights: Array | None = None) -> None:
    """Raises ValueError for what is not one target and weight per token, and for targets outside the vocabulary that
    count, if their values are known."""
    one_each = all(a.shape == x.shape[:2] for a in (targets, weights) if a is not None)
    if not one_each or not jnp.issubdtype(targets.dtype, jnp.integer):
        given = f"targets of shape {targets.shape} and dtype {targets.dtype}"
        given += "" if weights is None else f", weights of shape {weights.shape}"
        raise ValueError(
            f"cross-entropy: needs one integer target and one weight per token of x, {x.shape[:2]}, got {given}; change them"
        )
    known_targets, counted = known(targets), None if weights is None else known(weights)
    if known_targets is None or (weights is not None and counted is None):
        return
    if counted is not None and np.any(counted < 0):
        raise ValueError(
            f"cross-entropy: needs weights >= 0, got {counted.min():.3g}; give tokens that do not count a weight of 0"
        )
    wrong = (known_targets < 0) | (known_targets >= n_tokens)
    if counted is not None:
        wrong &= counted != 0
    if np.any(wrong):
        raise ValueError(
            f"cross-entropy: needs targets in 0..{n_tokens - 1}, the vocabulary, got {known_targets[wrong][0]}; give targets "
            "that do not count a weight of 0, or check that the tokenizer belongs to this model"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def target_logit_and_lse(
    x: Float[Array, "B T D"],
    table: Float[Array, "Vocab D"],
    targets: Int[Array, "B T"],
    vocab_size: int | None,
    chunk_tokens: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The target's logit (0 for a target that is no row of the table) and the log-sum-exp of all logits, in fp32."""
    _check(table, vocab_size, chunk_tokens)
    n_rows, owners = table.shape[0], mesh_axes("vocab")

    def forward(x, table, targets):
        def chunk(tokens):
            x, row = tokens
            logits, bounded = _logits(x, table, vocab_size, n_rows, owners)
            return jnp.sum(jnp.where(_onehot(row, table), logits, 0), axis=-1), jax.nn.logsumexp(bounded, axis=-1)

        rows = own_rows(targets, n_rows, owners)
        logit, lse = jax.lax.map(chunk, _split((x, rows), chunk_tokens))
        logit, lse = _join((logit, lse), targets.shape)
        most = jax.lax.pmax(lse, owners)
        return jax.lax.psum(logit, owners), most + jnp.log(jax.lax.psum(jnp.exp(lse - most), owners))

    placed = local(forward, in_axes=(WIDTH, TABLE, TOKENS), out_axes=(TOKENS, TOKENS))
    return placed(constrain(x, *WIDTH), constrain(table.astype(x.dtype), *TABLE), constrain(targets, *TOKENS))


def _forward(x, table, targets, vocab_size, chunk_tokens):
    logit, lse = target_logit_and_lse(x, table, targets, vocab_size, chunk_tokens)
    return (logit, lse), (x, table, targets, lse)


def _backward(vocab_size, chunk_tokens, residuals, cotangents):
    x, table, targets, lse = residuals
    n_rows, owners, others = table.shape[0], mesh_axes("vocab"), mesh_axes(*TOKENS)

    def backward(x, table, targets, lse, dlogit, dlse):
        def chunk(dtable, tokens):
            x, row, lse, dlogit, dlse = tokens
            _, bounded = _logits(x, table, vocab_size, n_rows, owners)
            dlogits = jnp.exp(bounded - lse[:, None]) * dlse[:, None]
            dlogits = (dlogits + jnp.where(_onehot(row, table), dlogit[:, None], 0)).astype(x.dtype)
            dx = jnp.einsum("cv,vd->cd", dlogits, table, preferred_element_type=jnp.float32)
            return dtable + jnp.einsum("cv,cd->vd", dlogits, x, preferred_element_type=jnp.float32), dx

        tokens = _split((x, own_rows(targets, n_rows, owners), lse, dlogit, dlse), chunk_tokens)
        zeros = jax.lax.pcast(jnp.zeros(table.shape, jnp.float32), (*owners, *others), to="varying")
        dtable, dx = jax.lax.scan(chunk, zeros, tokens)
        return jax.lax.psum(_join(dx, targets.shape), owners).astype(x.dtype), jax.lax.psum(dtable, others)

    placed = local(backward, in_axes=(WIDTH, TABLE, *(TOKENS,) * 4), out_axes=(WIDTH, TABLE))
    dx, dtable = placed(
        constrain(x, *WIDTH),
        constrain(table.astype(x.dtype), *TABLE),
        *(constrain(array, *TOKENS) for array in (targets, lse, *cotangents)),
    )
    return stored_like(x, dx), stored_like(table, dtable), None


target_logit_and_lse.defvjp(_forward, _backward)


def _logits(x, table, vocab_size, n_rows, owners):
    """A chunk's logits against this device's rows [C Vocab], and the same with -inf where the row is no token."""
    logits = jnp.einsum("cd,vd->cv", x, table, preferred_element_type=jnp.float32)
    if vocab_size in (None, n_rows):
        return logits, logits
    first = table.shape[0] * jax.lax.axis_index(owners)
    return logits, jnp.where(first + jnp.arange(table.shape[0]) < vocab_size, logits, -jnp.inf)


def _onehot(row, table):
    """True where the table's row is the token's target [C Vocab]; nowhere for targets of other devices."""
    return jnp.arange(table.shape[0]) == row[:, None]


def _split(arrays, chunk_tokens):
    """[B T ...] -> [N C ...]: the tokens in N chunks of at most chunk_tokens, as equal as can be, padded with zeros."""

    def split(array):
        n_tokens = array.shape[0] * array.shape[1]
        n_chunks = max(1, -(-n_tokens // chunk_tokens))
        size = -(-n_tokens // n_chunks)
        flat = array.reshape(n_tokens, *array.shape[2:])
        padding = [(0, n_chunks * size - n_tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(n_chunks, size, *flat.shape[1:])

    return jax.tree.map(split, arrays)


def _join(arrays, shape):
    """[N C ...] -> [B T ...]: the inverse of `_split`."""
    n_tokens = shape[0] * shape[1]
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n_tokens].reshape(*shape, *a.shape[2:]), arrays)


def _check(table, vocab_size, chunk_tokens):
    if vocab_size is not None and not 1 <= vocab_size <= table.shape[0]:
        raise ValueError(
            f"cross-entropy: needs vocab_size in 1..{table.shape[0]}, the rows of the table, "
            f"got vocab_size={vocab_size}; pass the model's vocabulary size or None"
        )
    if chunk_tokens < 1:
        raise ValueError(
            f"cross-entropy: needs chunk_tokens >= 1, got chunk_tokens={chunk_tokens}; "
            "pass the number of tokens whose logits fit in memory"
        )

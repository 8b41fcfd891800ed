"""Attention of a few new queries over many old keys: the same partial results, cut and merged in other ways.

| function | idea | source |
|---|---|---|
| `split_kv_attention` | pieces of a cache side by side, merged at the end | FlashDecoding: Dao et al. 2023 |
| `shared_prefix_attention` | what a batch shares is read once | RelayAttention: Zhu et al. 2024, arXiv 2402.14808 |
| `prefix_tree_attention` | the same for a tree of prefixes | ChunkAttention: Ye et al. 2024, arXiv 2402.15220 |
| `expanded_query_attention` | hidden states as all heads' keys | EL-attention: Yan et al. 2021, arXiv 2105.04779 |
| `unified_max_attention` | one maximum for all, known before | FlashDecoding++: Hong et al. 2023, arXiv 2311.01282 |

Results are `Partial`, to be merged with attention over other keys; pieces on several devices are in
`jaxmem.sharding.attention.spread_kv_attention`.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial, fold
from jaxmem.pallas_kernels import decode_attention_gpu, decode_attention_tpu, decode_sums
from jaxmem.pallas_kernels.attention_scores import Static
from jaxmem.pallas_kernels.decode_sums import Sums, finish
from jaxmem.pallas_kernels.flash_attention import flash_attention, prepare
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.typing import Array, Bool, Float, Int

DecodeImplementation = Literal["xla", "pallas_tpu", "pallas_gpu"]
KERNELS = {"pallas_tpu": decode_attention_tpu, "pallas_gpu": decode_attention_gpu}

OVERFLOW = 60.0
"""How far a logit may lie above the unified maximum, in nats: 2^23 terms of exp(60) are below fp32's largest number."""
UNDERFLOW = 60.0
"""How far below it the largest logit of a row may lie: its weight is still a normal number."""


def split_kv_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Mask = Mask(),
    *,
    q_place: Place,
    k_place: Place,
    n_splits: int,
    **options,
) -> Partial:
    """`flash_attention` over a cache in n_splits pieces that do not wait for each other, for a device that one row of
    queries would not fill.

    Raises: ValueError if the pieces do not divide the cache.
    """
    n_keys = k.shape[1]
    if n_splits < 1 or n_keys % n_splits:
        raise ValueError(
            f"split_kv_attention: needs n_splits that divides the {n_keys} keys, got n_splits={n_splits}; change it"
        )
    pieces = lambda x: x.reshape(x.shape[0], n_splits, -1, *x.shape[2:]).swapaxes(0, 1)
    attend = lambda k, v, place: flash_attention(q, k, v, mask, q_place=q_place, k_place=place, **options)
    return fold(jax.vmap(attend)(*jax.tree.map(pieces, (k, v, k_place))), axis=0)


def shared_prefix_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "S G K"], v: Float[Array, "S G V"], **options
) -> Partial:
    """Attention of all rows over one prefix, which all their tokens come after: its keys are read once per block of queries
    of the whole batch, a product of matrices even when every row has one token."""
    return prefix_tree_attention(q, [Prefixes(k[None], v[None], jnp.zeros(q.shape[0], jnp.int32))], **options)


class Prefixes(NamedTuple):
    """One level of a tree: N prefixes of S tokens, and which one each row has."""

    k: Float[Array, "N S G K"]
    v: Float[Array, "N S G V"]
    of_row: Int[Array, "B"]
    """-1: none at this level."""
    length: Int[Array, "N"] | None = None
    """Tokens of each that are real; None: all."""


def prefix_tree_attention(q: Float[Array, "B T H K"], levels: list[Prefixes], **options) -> Partial:
    """Attention of every row over its path in a tree of prefixes, all of which come before its tokens.

    Rows with the same prefix stand together as documents of one long sequence do, so that each level is one call and blocks
    of queries pass over the prefixes of others.
    """
    found = [_at_level(q, level, **options) for level in levels]
    return fold(jax.tree.map(lambda *x: jnp.stack(x), *found))


def _at_level(q: Float[Array, "B T H K"], level: Prefixes, **options) -> Partial:
    batch, n_tokens = q.shape[:2]
    n_prefixes, size = level.k.shape[:2]
    order = jnp.argsort(level.of_row)
    of_token = jnp.repeat(level.of_row[order] + 1, n_tokens)[None]
    real = jnp.arange(size) < (size if level.length is None else level.length[:, None])
    of_key = jnp.where(real, jnp.arange(1, n_prefixes + 1)[:, None], 0).reshape(1, -1)
    anywhere = lambda segment: Place(jnp.zeros_like(segment), segment)
    together = lambda x: x.reshape(1, -1, *x.shape[2:])
    found = flash_attention(
        together(q[order]), together(level.k), together(level.v), Mask(causal=False),
        q_place=anywhere(of_token), k_place=anywhere(of_key), **options,
    )  # fmt: skip
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: x.reshape(batch, n_tokens, *x.shape[2:])[back], found)


def expanded_query_attention(
    q: Float[Array, "B T H K"],
    key_weight: Float[Array, "D H K"],
    value_weight: Float[Array, "D H V"],
    hidden: Float[Array, "B S D"],
    mask: Mask = Mask(),
    **options,
) -> Float[Array, "B T H V"]:
    """Attention over keys x W_k and values x W_v without either: logits (q W_k^T) . x, output (sum_s p_s x_s) W_v.

    A cache holds D numbers per token instead of G (K + V), and one product of matrices serves all heads.
    """
    scale = q.shape[-1] ** -0.5
    expanded = jnp.einsum("bthk,dhk->bthd", q, key_weight, precision=jax.lax.Precision.HIGHEST)
    options = {"scale": scale} | options
    seen = flash_attention(expanded, hidden[:, :, None], hidden[:, :, None], mask, **options).o
    return jnp.einsum("bthd,dhv->bthv", seen, value_weight.astype(seen.dtype), precision=jax.lax.Precision.HIGHEST)


def unified_max_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Mask = Mask(),
    *,
    q_place: Place,
    k_place: Place,
    maximum: float | Float[Array, ""],
    scale: float | None = None,
    block_k: int | None = None,
    implementation: DecodeImplementation | None = None,
) -> tuple[Partial, Bool[Array, ""]]:
    """Attention whose exponentials all are of logit - maximum, so that no piece waits for another's maximum.

    Args:
      maximum: of the logits, as seen on other data; no gradient.
      scale: of the logits; None is K^-0.5.
      block_k: keys per block, a multiple of 128 on a TPU, a power of two on a GPU; None is what suits the device.
      implementation: "xla" has arrays [B, H, T, S]; "pallas_tpu" and "pallas_gpu" (NVIDIA, by Triton) read what some query
        sees of the cache once and have little else in memory, for few queries. None picks the best that there is when
        compiling for a platform. Gradients are those of "xla", whichever is chosen, in reverse and forward mode.

    Returns: the result, and whether the maximum served. Where some logit lies more than `OVERFLOW` above it, or all of some
      row more than `UNDERFLOW` below, everything is computed again, with the largest logit of each row.

    Raises: ValueError if shapes do not match or the implementation is unknown; NotImplementedError if the one asked for
      does not take as many queries or such blocks.
    """
    if implementation is not None and implementation not in get_args(DecodeImplementation):
        raise ValueError(
            f"unified_max_attention: needs implementation to be one of {', '.join(get_args(DecodeImplementation))}, "
            f"got implementation={implementation!r}; None picks the best"
        )
    q_place, k_place, _, static = prepare(
        q, k, v, mask, q_place=q_place, k_place=k_place, scale=scale, block_k=block_k, implementation=implementation
    )
    sums_below = lambda maximum: unified_sums(q, k, v, q_place, k_place, maximum, static)
    given = jnp.broadcast_to(jax.lax.stop_gradient(jnp.float32(maximum)), q.shape[:3])
    found = sums_below(given)
    top = jax.lax.stop_gradient(found.top)
    empty = top == -jnp.inf
    served = jnp.all(empty | ((top - given <= OVERFLOW) & (top - given >= -UNDERFLOW)))

    def again(_: Sums) -> Partial:
        of_row = jnp.where(empty, 0.0, top)
        return finish(sums_below(of_row), of_row)

    return jax.lax.cond(served, lambda sums: finish(sums, given), again, found), served


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def unified_sums(q, k, v, q_place: Place, k_place: Place, maximum: Float[Array, "B T H"], static: Static) -> Sums:
    """By the implementation asked for, or the best one on the platform that is compiled for."""
    arrays = q, k, v, q_place, k_place, maximum
    xla = functools.partial(decode_sums.sums, static=static)
    if static.implementation == "xla":
        return xla(*arrays)
    lacking = {name: module.why_not(q, k, v, static) for name, module in KERNELS.items()}
    if static.implementation is not None:
        if lacking[static.implementation] is not None:
            needs, got = lacking[static.implementation]
            raise NotImplementedError(
                f"unified_max_attention: needs {needs} with {static.implementation!r}, got {got}; use 'xla'"
            )
        return KERNELS[static.implementation].sums(*arrays, static)
    able = {
        platform: functools.partial(KERNELS[name].sums, static=static)
        for platform, name in (("tpu", "pallas_tpu"), ("cuda", "pallas_gpu"))
        if lacking[name] is None
    }
    return jax.lax.platform_dependent(*arrays, default=xla, **able) if able else xla(*arrays)


@unified_sums.defjvp
def _(static: Static, primals, tangents):
    return jax.jvp(functools.partial(decode_sums.sums, static=static), primals, tangents)

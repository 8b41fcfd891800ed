"""Exact attention as the softmax of some keys, (o, lse), to be merged with that of others.

    o_t = sum_s d_ts p_ts v_s,   p_ts = exp(l_ts - lse_t),   lse_t = log sum_s exp(l_ts),
    l_ts = f(scale (q_t . k_s + q_t . r_{t-s})),   f(x) = c tanh(x / c) with a soft cap c, else x

over the keys s that query t sees (`masks`). r are relative positions (Music Transformer), d_ts is 1 or dropout's 0 or
1 / (1 - rate). A learned sink is one more key of logit b and value 0: attention merged with (0, b).

o and lse are differentiable both, so that partial results merge with the right gradients whatever keys they are of: other
blocks, other devices, a cache. Implementations agree on rows that see nothing: o = 0, lse = -inf, no gradient.

Cost: 2 (K + V) FLOPs forward and 2 (3 K + 2 V) backward per head and visited pair; inputs, o and lse are saved.
Reference: Dao 2023, arXiv 2307.08691, algorithms 1 and 2; Rabe and Staats 2021, arXiv 2112.05682; Huang et al. 2018, arXiv
1809.04281, section 3.4 (relative positions); Xiao et al. 2023, arXiv 2309.17453 (sinks); Gemma Team 2024, arXiv 2408.00118,
section 2 (soft cap).
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxmem.algebra import softmax
from jaxmem.algebra.softmax import Partial
from jaxmem.pallas_kernels.attention_core import attention
from jaxmem.pallas_kernels.attention_scores import Extras, Static, keep_factor, product, score
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.typing import Array, Float, PRNGKeyArray, UInt32

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "cudnn"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["seeds"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Attention weights that are left out, the same ones however tokens are split into blocks or over devices."""

    seeds: UInt32[Array, "B H"]
    rate: float


def dropout(key: PRNGKeyArray, rate: float, batch: int, n_heads: int) -> Dropout:
    """A seed for every row and head.

    Raises: ValueError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"attention dropout: needs 0 <= rate < 1, got rate={rate}; it is the share of weights left out"
        )
    return Dropout(jax.random.bits(key, (batch, n_heads)), rate)


def flash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Mask = Mask(),
    *,
    q_place: Place | None = None,
    k_place: Place | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    relative: Float[Array, "H L K"] | None = None,
    dropped: Dropout | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
    implementation: Implementation | None = None,
) -> Partial:
    """Attention of q over the keys it sees, as `Partial(o [B T H V], lse [B T H])`, both fp32 and differentiable.

    Args:
      q, k, v: head h reads kv head h // (H / G). Products are taken in their dtype; logits, softmax and sums in fp32.
      q_place, k_place: where tokens stand; None: one document, token i at index i.
      scale: of the logits; None is K^-0.5.
      soft_cap: c; None: none.
      sinks: b of each head. Of several results to be merged, only one may have them.
      relative: r of each head for the distances 0 to L - 1, the last for all beyond; needs a causal mask.
      dropped: weights left out, from `dropout`; lse knows nothing of them.
      block_q, block_k: tokens per block, multiples of 128 on a TPU, powers of two on a GPU; "xla" works in a few arrays
        [B, H, block_q, block_k]. None is an eighth of S, from 128 to 512, for "xla" (128 with a window or chunk), 1024 for
        "pallas_tpu", what fits a pass for "pallas_gpu".
      implementation: "reference" is the equation in fp32 with arrays [B, H, T, S]; "xla" is blockwise; "pallas_tpu" has no
        relative positions, nor has "pallas_gpu" (NVIDIA, by Triton); "cudnn" takes whole rows of one document in 16 bits
        (no places, and none of soft_cap, relative, dropped, blocks and chunks) and rounds o to their dtype. None picks the
        best that there is when compiling for a platform. Gradients can be differentiated again with "reference" alone.

    Raises: ValueError if shapes do not match, blocks are not positive, relative positions would look ahead, or the
      implementation is unknown; NotImplementedError if the one asked for lacks something.

    >>> x = jnp.array([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    >>> flash_attention(0 * x, x, x).o[0, :, 0, 0].tolist()
    [1.0, 1.5, 3.0]
    """
    prepared = prepare(
        q, k, v, mask, q_place=q_place, k_place=k_place, scale=scale, soft_cap=soft_cap, relative=relative,
        dropped=dropped, block_q=block_q, block_k=block_k, implementation=implementation,
    )  # fmt: skip
    attend = _reference if implementation == "reference" else attention
    return with_sinks(attend(q, k, v, *prepared), sinks)


def prepare(
    q, k, v, mask, *, q_place=None, k_place=None, scale=None, soft_cap=None, relative=None, dropped=None, block_q=None,
    block_k=None, implementation=None,
) -> tuple[Place, Place, Extras, Static]:  # fmt: skip
    """Checked arguments of `flash_attention` as `attention_core` takes them, behind q, k and v."""
    in_order = q_place is None and k_place is None and q.shape[1] == k.shape[1]
    q_place, k_place = (_whole(x) if place is None else place for x, place in ((q, q_place), (k, k_place)))
    _validate(q, k, v, q_place, k_place, mask, relative, dropped)
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if value is not None and value < 1:
            raise ValueError(f"flash_attention: needs {name} >= 1, got {name}={value}; change it or leave it out")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"flash_attention: needs soft_cap > 0, got soft_cap={soft_cap}; None is no cap")
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"flash_attention: needs implementation to be one of {', '.join(get_args(Implementation))}, "
            f"got implementation={implementation!r}; None picks the best"
        )
    groups, heads = k.shape[2], q.shape[2]
    of_group = lambda x, axis: x.reshape(*x.shape[:axis], groups, heads // groups, *x.shape[axis + 1 :])
    extras = Extras(
        None if relative is None else of_group(relative, 0), None if dropped is None else of_group(dropped.seeds, 1)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rate = 0.0 if dropped is None else float(dropped.rate)
    static = Static(mask, scale, soft_cap, rate, block_q, block_k, implementation, in_order)
    return q_place, k_place, extras, static


def with_sinks(partial: Partial, sinks: Float[Array, "H"] | None) -> Partial:
    """A result over all keys, merged with one more key for each head.

    Raises: ValueError if there is not one sink per head.
    """
    if sinks is None:
        return partial
    heads = partial.lse.shape[-1]
    if sinks.shape != (heads,):
        raise ValueError(
            f"flash_attention: needs sinks of shape ({heads},), got sinks={sinks.shape}; pass one per query head"
        )
    sink = jnp.broadcast_to(sinks.astype(jnp.float32), partial.lse.shape)
    return softmax.combine(partial, Partial(jnp.zeros_like(partial.o), sink))


def _whole(x: Float[Array, "B T G K"]) -> Place:
    """One document."""
    index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Place(index, jnp.ones_like(index))


def _reference(q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static) -> Partial:
    """The equation as it stands."""
    batch, n_tokens, heads, width = q.shape
    q = q.reshape(batch, n_tokens, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)  # [B G R T K]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    by_distance = None if extras.relative is None else product("bgrtk,grlk->bgrtl", q, extras.relative)
    scores = score(product("bgrtk,bsgk->bgrts", q, k), by_distance, q_place, k_place, static)
    lse = softmax.partial(scores, jnp.zeros((scores.shape[-1], 0))).lse
    empty = lse == -jnp.inf
    weights = jnp.exp(scores - jnp.where(empty, 0, lse)[..., None])
    o = product("bgrts,bsgv->bgrtv", weights * keep_factor(extras.seeds, q_place, k_place, static.rate), v)
    o, lse = jnp.einsum("bgrtv->btgrv", o), jnp.einsum("bgrt->btgr", lse)
    return Partial(o.reshape(batch, n_tokens, heads, -1), lse.reshape(batch, n_tokens, heads))


def _validate(q, k, v, q_place, k_place, mask, relative, dropped) -> None:
    batch, n_queries, heads, width = q.shape
    n_keys, groups = k.shape[1:3]

    def need(condition: bool, what: str, got: str, todo: str):
        if not condition:
            raise ValueError(f"flash_attention: needs {what}, got {got}; {todo}")

    shapes = f"q={q.shape}, k={k.shape}, v={v.shape}"
    need(k.shape == (batch, n_keys, groups, width), "k of shape [B, S, G, K]", shapes, "B and K are those of q")
    need(v.shape[:3] == k.shape[:3], "v of shape [B, S, G, V]", shapes, "B, S and G are those of k")
    need(heads % groups == 0, "H divisible by G", f"H={heads}, G={groups}", "change the number of heads or of kv heads")
    for side, place, shape in (("q", q_place, (batch, n_queries)), ("k", k_place, (batch, n_keys))):
        for name, array in place._asdict().items():
            need(
                array is None or array.shape == shape,
                f"{side}_place.{name} of shape {shape}",
                f"{side}_place.{name}={None if array is None else array.shape}",
                f"pass one number per token of {side}",
            )
    if relative is not None:
        got = f"relative={relative.shape}"
        need(
            relative.shape[::2] == (heads, width),
            f"relative of shape [{heads}, L, {width}]",
            got,
            "one row per distance",
        )
        need(mask.causal, "a causal mask with relative positions", f"{mask}", "they have no distances ahead")
        need(k_place.prefix is None, "no prefix with relative positions", "a prefix", "they have no distances ahead")
    if dropped is not None:
        want, got = (batch, heads), f"dropped.seeds={dropped.seeds.shape}"
        need(dropped.seeds.shape == want, f"dropped.seeds of shape {want}", got, "make them with `dropout`")

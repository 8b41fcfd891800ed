"""Exact attention over a sequence that is split over devices: one call, every option of `flash_attention`, any scheme.

| keys come by | exchanged per device forward, in keys of G (K + V) numbers | memory | hidden behind arithmetic |
|---|---|---|---|
| ring | (n - 1) T/n | O(T/n) | yes |
| all_gather | (n - 1) T/n, dk and dv summed on the way back | O(T) | no |
| halo | R, what a window or chunk reaches back: only from the neighbours that hold it | O(T/n + R) | no |

In front of any of them, heads may take the place of tokens (Ulysses): u neighbours exchange, so that each holds H/u heads of
the tokens of all u, 2 (H + G) (K + V) / 2 T/n numbers there and back, and n/u devices are left for the table above. Heads of
keys are repeated if there are too few to be shared out.

All are exact for tokens in any order, halos for contiguous ones (`layouts`). Everything is in one custom rule per way, which
saves this device's q, k, v, o and lse alone; dk and dv are summed in fp32.
Reference: Liu et al. 2023, arXiv 2310.01889 (ring); Jacobs et al. 2023, arXiv 2309.14509 (Ulysses); Fang and Zhao 2024,
arXiv 2405.07719 (both).
"""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmem.algebra.softmax import Partial
from jaxmem.fields import Count, checked
from jaxmem.pallas_kernels.attention_core import as_cotangents, attention, forward, gradients, to_save
from jaxmem.pallas_kernels.attention_scores import Extras, Static
from jaxmem.pallas_kernels.flash_attention import Dropout, flash_attention, prepare, with_sinks
from jaxmem.pallas_kernels.masks import Mask, Place
from jaxmem.sharding.folds import n_shards, spread, spread_like
from jaxmem.sharding.ring_attention import ring_attention
from jaxmem.sharding.rings import Ring
from jaxmem.typing import Array, Float, PyTree, Shaped

Keys = Literal["ring", "all_gather", "halo"]


@dataclasses.dataclass(frozen=True)
@checked
class Scheme:
    """How queries meet the keys of other devices."""

    keys: Keys = "ring"
    ulysses: Count = 1
    """Neighbours between which heads take the place of tokens; divides devices and heads."""


def sharded_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Mask = Mask(),
    *,
    q_place: Place,
    k_place: Place,
    axis: str | None,
    scheme: Scheme = Scheme(),
    sinks: Float[Array, "H"] | None = None,
    relative: Float[Array, "H L K"] | None = None,
    dropped: Dropout | None = None,
    **options,
) -> Partial:
    """Attention of this device's queries over the keys of all devices of a mesh axis; inside `local`.

    Args:
      q, k, v, mask, sinks, relative, dropped, **options: as of `flash_attention`; all heads are here, tokens one device's.
      q_place, k_place: where this device's tokens stand in the whole sequence.
      axis: the mesh axis that splits it, from `sequence_axis`; None is `flash_attention`.
      scheme: how keys come here.

    Returns: `Partial(o, lse)` of this device's queries, both fp32 and differentiable.
    Raises: ValueError for heads that do not divide, or a halo of a mask that reaches further than some tokens back;
      NotImplementedError for implementation="reference", which no exchange has.
    """
    relative = spread_like(relative, (q, k, v))
    if n_shards(axis) == 1:
        options |= {"sinks": sinks, "relative": relative, "dropped": dropped}
        return flash_attention(q, k, v, mask, q_place=q_place, k_place=k_place, **options)
    if options.get("implementation") == "reference":
        raise NotImplementedError(
            "sharded attention: needs an implementation that merges blocks, got implementation='reference'; "
            "leave it out, or gather the sequence"
        )
    q, k, v, q_place, k_place, relative, dropped = spread((q, k, v, q_place, k_place, relative, dropped), axis)
    *places, extras, static = prepare(
        q, k, v, mask, q_place=q_place, k_place=k_place, relative=relative, dropped=dropped, **options
    )
    ring = Ring(axis, n_shards(axis), scheme.ulysses)
    _check(scheme, ring, q.shape[2], mask, k_place)
    if ring.inside > 1:
        q, k, v, places, extras = _share_heads(q, k, v, places, extras, ring)
    result = _over(q, k, v, *places, extras, static, scheme, ring)
    if ring.inside > 1:
        o, lse = (ring.tokens_for_heads(x) for x in (result.o, result.lse[..., None]))
        result = Partial(o, lse[..., 0])
    return with_sinks(result, sinks)


def _share_heads(q, k, v, places: PyTree, extras: Extras, ring: Ring):
    """Everything for this device's heads and its group's tokens."""
    groups = k.shape[2]
    repeats = ring.inside // math.gcd(groups, ring.inside)

    def own(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        heads = x.shape[axis] * repeats, x.shape[axis + 1] // repeats
        return ring.own_heads(x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 2 :]), axis)

    relative, seeds = extras
    extras = Extras(None if relative is None else own(relative, 0), None if seeds is None else own(seeds, 1))
    q, k, v = map(ring.heads_for_tokens, (q, *(jnp.repeat(x, repeats, axis=2) for x in (k, v))))
    return q, k, v, jax.tree.map(ring.gather_inside, places), extras


def _over(q, k, v, q_place, k_place, extras, static, scheme: Scheme, ring: Ring) -> Partial:
    if ring.size == 1:
        return attention(q, k, v, q_place, k_place, extras, static)
    if scheme.keys == "ring":
        return ring_attention(q, k, v, q_place, k_place, extras, static, ring)
    reach = reach_tokens(static.mask) if scheme.keys == "halo" else None
    return collected_attention(q, k, v, q_place, k_place, extras, static, ring, reach)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def collected_attention(
    q, k, v, q_place: Place, k_place: Place, extras: Extras, static: Static, ring: Ring, reach: int | None
) -> Partial:
    """(o, lse) over all keys of a ring, or those up to `reach` tokens before this device's, brought here at once."""
    return forward(q, *collect((k, v), ring, reach), q_place, collect(k_place, ring, reach), extras, static)


def _forward(*arguments):
    result = collected_attention(*arguments)
    return result, to_save(*arguments[:6], result)


def _backward(static: Static, ring: Ring, reach: int | None, saved, cotangents: Partial):
    saved, cotangents = jax.lax.optimization_barrier((saved, cotangents))  # or XLA keeps what came for the forward pass
    q, k, v, q_place, k_place, extras, result = saved
    bring = lambda keys: collect(keys, ring, reach)
    dq, dk, dv, d_relative = gradients(q, *bring((k, v)), q_place, bring(k_place), extras, result, cotangents, static)
    fp32 = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (k, v))
    ((dk, dv),) = jax.vjp(bring, fp32)[1]((dk, dv))
    return as_cotangents((dq, dk, dv, d_relative), q, k, v, extras)


collected_attention.defvjp(_forward, _backward)


def collect(keys: PyTree, ring: Ring, reach: int | None) -> PyTree:
    """[B S ...] of every device of the ring; or of the last `reach` tokens before this device's, 0 where there are none, and
    its own."""
    if reach is None:
        return jax.tree.map(ring.gather, keys)
    size = jax.tree.leaves(keys)[0].shape[1]

    def with_halo(x: Shaped[Array, "B S *x"]) -> Shaped[Array, "B R *x"]:
        n_whole, rest = divmod(min(reach, (ring.size - 1) * size), size)
        parts = [ring.from_before(x, n) for n in range(n_whole, 0, -1)]
        if rest:
            parts.insert(0, ring.from_before(x[:, size - rest :], n_whole + 1))
        return jnp.concatenate([*parts, x], axis=1)

    return jax.tree.map(with_halo, keys)


def reach_tokens(mask: Mask) -> int | None:
    """How many tokens back a query may see; None: any."""
    limits = [limit - 1 for limit in (mask.window, mask.chunk) if limit is not None]
    return min(limits) if mask.causal and limits else None


def _check(scheme: Scheme, ring: Ring, heads: int, mask: Mask, k_place: Place) -> None:
    if heads % ring.inside:
        raise ValueError(
            f"attention scheme: needs heads that ulysses={ring.inside} divides, got {heads} heads on this device; "
            "use a ring, Scheme('ring'), or a divisor of the heads"
        )
    if scheme.keys == "halo" and (reach_tokens(mask) is None or k_place.prefix is not None):
        raise ValueError(
            f"attention scheme: needs a causal mask with a window or chunk, and no prefix, for a halo, got {mask}; "
            "use a ring, Scheme('ring')"
        )


def merge_over(partial: Partial, axis: str | None) -> Partial:
    """Inside `local`: attention over the keys of all devices of a mesh axis, of each device's own; one max and two sums."""
    if axis is None:
        return partial
    top = jax.lax.pmax(jax.lax.stop_gradient(partial.lse), axis)
    top = jnp.where(top == -jnp.inf, 0, top)
    weight = jnp.exp(partial.lse - top)
    o = jnp.where(weight[..., None] == 0, 0, partial.o)
    o, total = jax.lax.psum((weight[..., None] * o, weight), axis)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return Partial(o / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total)))


def spread_kv_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    mask: Mask = Mask(),
    *,
    q_place: Place,
    k_place: Place,
    axis: str | None,
    **options,
) -> Partial:
    """Inside `local`: the same queries on all devices of a mesh axis, over keys of which each holds its own.

    Exchanged per device: o and lse, whatever the number of keys.
    Reference: Lin et al. 2024, arXiv 2401.02669 (DistAttention).
    """
    return merge_over(flash_attention(q, k, v, mask, q_place=q_place, k_place=k_place, **options), axis)

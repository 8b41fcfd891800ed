"""Product keys: the best k of n^N keys, from N n products and about k log k sums.

    key of slot (i_1 .. i_N) = [c_1[i_1] ; .. ; c_N[i_N]]     q = W_q x + b = [q_1 ; .. ; q_N]
    score of the slot        = sum_p q_p . c_p[i_p]            id = i_1 n^(N-1) + .. + i_N

Each part p has a codebook of n sub-keys of width K / N. The best k slots are found among the best k sub-keys of each part,
and with those sorted, place a_p in part p, only among places with

    (a_1 + 1) .. (a_N + 1) <= k                                the staircase

since every slot whose places are all as good or better scores as much, and there are that many of them: 119 sums instead
of 1,024 for N = 2 and k = 32. This is exact, rounding included: a sum of better sub-scores rounds to no less. Equal scores
rank the lower id first, as in `jaxmem.algebra.topk`; where sums that differ round to one number, which of these slots
is kept is the only thing that may differ from a search through all.

Cost per token and head: 2 K D FLOPs of the query, 2 n K of the scores, N selections of k from n and one sort of about
k log k sums (N = 2). Parameters: H K (D + n).
Reference: Lample et al. 2019, Large Memory Layers with Product Keys, arXiv 1907.05242, section 3.2. The published codes
(XLM, Memory Layers at Scale, lucidrains' product-key-memory and PEER-pytorch) sort all k^2 sums and know N = 2 only;
queries are never normalised over the batch here, which the paper does, since tokens of the future would be seen.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.algebra import topk
from jaxmem.algebra.topk import TopK
from jaxmem.fields import Bounds, Count, checked
from jaxmem.layers.norm import LayerNorm, RMSNorm
from jaxmem.sharding import ROWS, VECTOR, einsum, matrix, param
from jaxmem.showing import Module
from jaxmem.typing import Array, Float

Norm = Literal["none", "rms", "layer"]
Search = Literal["staircase", "square", "reference"]


@dataclasses.dataclass(frozen=True)
@checked
class ProductKeysConfig:
    """How slots are addressed; the sizes are those of the paper's language models."""

    n_slots: Count = 512**2
    """Slots, n^N."""
    n_heads: Count = 4
    """Queries per token, each with codebooks of its own."""
    top_k: Count = 32
    """Slots read per head."""
    key_dim: Count = 256
    """K: width of a whole key; a sub-key has K / N."""
    n_parts: Annotated[int, Bounds("[2, inf)")] = 2
    """N: codebooks per head, 2 or more."""
    query_norm: Norm = "none"
    """Of each part of each query over its K / N numbers, with one scale for all parts and heads."""
    key_norm: Norm = "none"
    """Of each sub-key, in the same way."""
    query_bias: bool = True

    def __post_init__(self):
        if self.key_dim % self.n_parts:
            raise ValueError(
                "product keys: needs key_dim divisible by n_parts, "
                f"got key_dim={self.key_dim}, n_parts={self.n_parts}; change one of them"
            )
        _check_k(self.top_k, _root(self.n_slots, self.n_parts), self.n_parts)

    @property
    def n_sub_keys(self) -> int:
        """n: sub-keys in a codebook."""
        return _root(self.n_slots, self.n_parts)

    @property
    def n_reads(self) -> int:
        """Slots read per token, all heads together."""
        return self.n_heads * self.top_k

    @property
    def search_flops(self) -> int:
        """Forward FLOPs of the products per token that are not 2 x parameters; sums and selections are not counted."""
        return 0

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "ProductKeys":
        return ProductKeys(self, d_model, rngs=rngs)


def _root(n_slots: int, n_parts: int) -> int:
    n = round(n_slots ** (1 / n_parts)) if n_slots > 0 else 0
    if n < 1 or n**n_parts != n_slots or n_slots >= 2**31:
        raise ValueError(
            f"product keys: needs n_slots to be n to the power of n_parts={n_parts} and below 2^31, "
            f"got n_slots={n_slots}; take {max(n, 1)}**{n_parts}={max(n, 1) ** n_parts}"
        )
    return n


def _check_k(k: int, n: int, n_parts: int) -> None:
    if not 1 <= k <= n**n_parts:
        raise ValueError(
            f"product keys: needs 1 <= top_k <= n_slots, got top_k={k} of n_slots={n**n_parts}; "
            "read fewer slots or have more sub-keys"
        )


@functools.cache
def staircase(k: int, n: int, n_parts: int) -> np.ndarray:
    """The places [places, N] in N sorted lists of n that can be among the best k sums, in lexicographic order.

    >>> staircase(3, 2, 2).tolist()
    [[0, 0], [0, 1], [1, 0]]
    >>> len(staircase(32, 1024, 2)), len(staircase(32, 1024, 3))
    (119, 300)
    """

    def grow(budget: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 0:
            yield ()
            return
        for place in range(min(n, budget)):
            for rest in grow(budget // (place + 1), parts - 1):
                yield place, *rest

    return np.array(list(grow(k, n_parts)), np.int32)


def square(k: int, n: int, n_parts: int) -> np.ndarray:
    """All places [k^N, N] among the best k of each list: what the staircase prunes."""
    return np.indices((min(k, n),) * n_parts, np.int32).reshape(n_parts, -1).T


def product_top_k(
    scores: Float[Array, "*batch parts subkeys"], k: int, search: Search = "staircase"
) -> TopK:  # [*batch k]
    """The best k slots, of which each is a choice of one sub-key per part and scores the sum.

    Args:
      scores: of the sub-keys of each part, finite.
      k: slots to keep, 1 .. subkeys^parts.
      search: "staircase" (see the module docstring); "square" looks at all sums of the best k of each part, and "reference"
        at those of all sub-keys; all find the same.

    Returns: scores [*batch k], descending, and ids; gradients go to the sub-scores of the chosen slots.
    Raises: ValueError for k that is not in 1 .. subkeys^parts.

    >>> best = product_top_k(jnp.array([[1.0, 2.0, 0.0], [0.0, 30.0, 20.0]]), 3)
    >>> best.scores.tolist(), best.ids.tolist()  # 1 * 3 + 1, 0 * 3 + 1, 2 * 3 + 1
    ([32.0, 31.0, 30.0], [4, 1, 7])
    """
    n_parts, n = scores.shape[-2:]
    _check_k(k, n, n_parts)
    if search not in get_args(Search):
        raise ValueError(f"product keys: needs search to be one of {', '.join(get_args(Search))}, got {search!r}")
    kept = n if search == "reference" else min(k, n)
    places = (staircase if search == "staircase" else square)(k if search == "staircase" else kept, n, n_parts)
    best = topk.top_k(scores, None, kept)
    sums, ids = best.scores[..., 0, places[:, 0]], best.ids[..., 0, places[:, 0]]
    for part in range(1, n_parts):
        sums = sums + best.scores[..., part, places[:, part]]
        ids = n * ids + best.ids[..., part, places[:, part]]
    return topk.top_k(sums, ids, k)


_QUERY = ("batch", "time", "heads", None, "key")


class ProductKeys(Module):
    """Scores of all sub-keys of every head, in fp32: what `product_top_k` selects from.

    >>> keys = ProductKeys(ProductKeysConfig(n_slots=9, n_heads=2, top_k=4, key_dim=8), 16, rngs=nnx.Rngs(0))
    >>> keys(jnp.ones((1, 5, 16))).shape
    (1, 5, 2, 2, 3)
    """

    def __init__(self, config: ProductKeysConfig, d_model: int, *, rngs: nnx.Rngs):
        """Sub-keys uniform within 1 / sqrt(K / N), as XLM's; Memory Layers at Scale has 1 / sqrt(K), though its sub-keys
        are of width K / 2 too. Queries have variance 1 / D per input."""
        self.config = config
        heads, parts, width = config.n_heads, config.n_parts, config.key_dim // config.n_parts
        into = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.query = param(rngs, into, (d_model, heads, parts, width), ("embed", "heads", None, "key"), matrix())
        zeros, bound = jax.nn.initializers.zeros, width**-0.5
        bias = (heads, parts, width), ("heads", None, "key"), VECTOR
        self.bias = param(rngs, zeros, *bias) if config.query_bias else None
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        shape = heads, parts, config.n_sub_keys, width
        self.keys = param(rngs, uniform, shape, ("heads", None, "sub_keys", "key"), ROWS)
        self.query_norm = make_norm(config.query_norm, width, rngs)
        self.key_norm = make_norm(config.key_norm, width, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H parts subkeys"]:
        q = einsum("btd,dhpk->bthpk", x, self.query[...], _QUERY).astype(jnp.float32)
        keys = self.keys[...]
        if self.bias is not None:
            q = q + self.bias[...]
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        return einsum("bthpk,hpnk->bthpn", q, keys, ("batch", "time", "heads", None, None))

    def choose(self, scores: Float[Array, "B T H parts subkeys"]) -> TopK:  # [B T H k]
        """The slots that each head reads; uses no parameter."""
        return product_top_k(scores, self.config.top_k)


def make_norm(kind: Norm, width: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """A norm of vectors of this width, or None."""
    if kind == "none":
        return None
    return (RMSNorm if kind == "rms" else LayerNorm)(width, axes=("key",), rngs=rngs)

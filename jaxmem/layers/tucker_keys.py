"""Product keys scored through a Tucker core, UltraMem's query-key retrieval (TDQKR): sub-scores multiply instead of adding.

    s_p[i] = (q_p . c_p[i, 1] .. q_p . c_p[i, r])            r sub-scores of sub-key i of part p = 1, 2; q and c normalised
    score of slot (i_1, i_2) = s_1[i_1]^T C s_2[i_2]          id = i_1 n + i_2,  C [r r] learned, one per head
    C ~ sigma_1 u v^T                                         its leading singular vectors, without gradient

With C of rank 1 the score is a product of two numbers, a = s_1 . u and b = s_2 . v. So candidates are the best sub-keys of
each part by a and by b; the pairs of these are scored by C itself, and the best k of them are read:

| search | candidates of each part | finds |
|---|---|---|
| "square" | the k highest, as published | the best slots if those have a > 0 and b > 0, and C is of rank 1 |
| "signed" | the k highest and the k lowest | the best slots, for every C of rank 1 |
| "reference" | all | the best slots |

A product is large too if both numbers are far below 0, which "square" does not see. As (u, v) and (-u, -v) are one
decomposition, its sign is the one with sum(u) + sum(v) >= 0, that of a C >= 0, as C starts; the released code keeps a state
to follow the sign instead. "signed" does not depend on it.

For any other C the search is the better the smaller its other singular values; `rank_penalty` holds them down.

Cost per token and head: 2 r n K FLOPs of the sub-scores, 2 r^2 n + 4 r n of C, u and v, 2 r k^2 of the candidates (of
"signed" four times as many), two selections of k from n and a sort of k^2. Parameters: H (K (D + r n) + r^2).

Reference: Huang et al. 2024, Ultra-Sparse Memory Network, arXiv 2411.12364, section 3 (TDQKR). Not here, of that paper:
values expanded by projections (IVE), the second core whose scores multiply one half of a value (multi-core scoring), the
shuffled ids, the convolution before queries, one query for two heads. ultra-mem 0.1.2 scores keys from before their norm.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.algebra import topk
from jaxmem.algebra.topk import TopK
from jaxmem.fields import Count
from jaxmem.layers.product_keys import Norm, ProductKeysConfig, make_norm
from jaxmem.sharding import ROWS, VECTOR, constrain, einsum, local, matrix, param
from jaxmem.showing import Module
from jaxmem.typing import Array, Float, Int

Search = Literal["square", "signed", "reference"]


@dataclasses.dataclass(frozen=True)
class TuckerKeysConfig(ProductKeysConfig):
    """As `ProductKeysConfig`, of two parts, with r vectors per sub-key and a core."""

    query_norm: Norm = "layer"
    key_norm: Norm = "layer"
    core_rank: Count = 2
    """r."""
    search: Search = "square"
    """Which pairs of sub-keys the core scores: see `tucker_keys`."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_parts != 2:
            raise ValueError(f"tucker keys: needs n_parts=2, got n_parts={self.n_parts}; change it")
        if self.top_k > self.n_candidates**2:
            raise ValueError(
                f"tucker keys: needs top_k <= {self.n_candidates**2} pairs of candidates, got top_k={self.top_k}; "
                "read fewer slots or have more sub-keys"
            )

    @property
    def n_candidates(self) -> int:
        """Sub-keys of each part whose pairs are scored."""
        several = {"square": self.top_k, "signed": 2 * self.top_k, "reference": self.n_sub_keys}[self.search]
        return min(several, self.n_sub_keys)

    @property
    def search_flops(self) -> int:
        rank, n = self.core_rank, self.n_sub_keys
        core = 2 * (n - 1) * rank**2  # once is 2 x its parameters
        return self.n_heads * (core + 2 * 2 * n * rank + 2 * rank * self.n_candidates**2)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "TuckerKeys":
        return TuckerKeys(self, d_model, rngs=rngs)


def leading_singular_vectors(core: Float[Array, "*H r r"]) -> tuple[Float[Array, "*H r"], Float[Array, "*H r"]]:
    """u and v of the best approximation sigma_1 u v^T, with sum(u) + sum(v) >= 0 and without gradient.

    >>> u, v = leading_singular_vectors(jnp.array([[0.0, 3.0], [0.0, 0.0]]))
    >>> u.tolist(), v.tolist()
    ([1.0, 0.0], [0.0, 1.0])
    """
    u, v = _leading(core)
    sign = jnp.where(jnp.sum(u + v, axis=-1, keepdims=True) < 0, -1, 1).astype(u.dtype)
    return sign * u, sign * v


def _leading(core: Float[Array, "*H r r"]) -> tuple[Float[Array, "*H r"], Float[Array, "*H r"]]:
    """u and v without LAPACK, whose batched routines can wait for each other: in closed form for r = 2, else by squaring
    C C^T thirty times. v is 0 for a core of zeros."""
    core = jax.lax.stop_gradient(core)
    product = lambda a, b: jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")
    squares = product(core, core.mT)
    if core.shape[-1] == 2:
        angle = jnp.arctan2(2 * squares[..., 0, 1], squares[..., 0, 0] - squares[..., 1, 1]) / 2
        u = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    else:
        scaled = lambda a: a / jnp.maximum(jnp.trace(a, axis1=-2, axis2=-1)[..., None, None], 1e-30)
        power = jax.lax.fori_loop(0, 30, lambda _, a: scaled(product(a, a)), scaled(squares))
        column = jnp.argmax(jnp.sum(power**2, axis=-2), axis=-1)
        u = _unit(jnp.take_along_axis(power, column[..., None, None], axis=-1)[..., 0])
    return u, _unit(jnp.einsum("...i,...ij->...j", u, core, precision="highest"))


def _unit(x: Float[Array, "*H r"]) -> Float[Array, "*H r"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def rank_penalty(core: Float[Array, "*H r r"], limit: float = 0.15) -> Float[Array, ""]:
    """The mean of relu(sigma_j - limit)^2 over all singular values but the first, j = 2 .. r: what keeps a core near rank 1.

    Args:
      core: of `TuckerKeys.core`, of one layer or of several.
      limit: below it a singular value costs nothing.

    Gradients are finite where singular values are equal, or 0. 0 for cores of rank 1.
    Reference: Huang et al. 2024, arXiv 2411.12364, section 3; limit as released.

    >>> round(float(rank_penalty(jnp.diag(jnp.array([2.0, 0.65])))), 4)
    0.25
    """
    if core.shape[-1] == 1:
        return jnp.zeros((), core.dtype)
    return jnp.mean(jax.nn.relu(second_singular_values(core) - limit) ** 2)


def second_singular_values(core: Float[Array, "*H r r"]) -> Float[Array, "*H r-1"]:
    """All singular values but the largest, descending; the gradient of each is u v^T, its singular vectors'."""

    def values(core):
        found, rest = [], jax.lax.stop_gradient(core)
        for _ in range(core.shape[-1]):
            u, v = _leading(rest)
            found.append(jnp.einsum("...i,...ij,...j->...", u, core, v, precision="highest"))
            rest = rest - jax.lax.stop_gradient(found[-1])[..., None, None] * u[..., :, None] * v[..., None, :]
        return jnp.stack(found[1:], axis=-1)

    axes = (*(None,) * (core.ndim - 3), "heads")[: core.ndim - 2]
    of_heads = local(values, in_axes=((*axes, None, None),), out_axes=(*axes, None))
    return of_heads(constrain(core, *axes, None, None))


def tucker_top_k(
    planes: Float[Array, "*batch planes subkeys"], k: int, search: Search = "square"
) -> TopK:  # [*batch k]
    """The best k slots (i, j) by the products f[:, i] . g[:, j], among the pairs of candidates.

    Args:
      planes: 2 + 2 r numbers of each sub-key: what the first part's candidates are chosen by, what the second's are, then f
        of the first part (s_1^T C in `tucker_keys`) and g of the second (s_2).
      k: slots to keep.
      search: which candidates; see `tucker_keys`.

    Returns: scores [*batch k], descending, and ids i n + j; gradients go to f and g of the chosen slots.

    >>> first, second = jnp.array([1.0, -5.0, 2.0]), jnp.array([3.0, -4.0, 1.0])
    >>> planes = jnp.stack([first, second, first, second])  # a core of rank 1
    >>> [tucker_top_k(planes, 1, search).scores.tolist() for search in ("square", "signed")]  # 2 x 3, -5 x -4
    [[6.0], [20.0]]
    """
    rank, n = planes.shape[-2] // 2 - 1, planes.shape[-1]
    left, right = (_candidates(planes[..., part, :], k, search) for part in (0, 1))
    pick = lambda rows, ids: jnp.take_along_axis(rows, ids[..., None, :], axis=-1)
    f, g = pick(planes[..., 2 : 2 + rank, :], left), pick(planes[..., 2 + rank :, :], right)
    scores = jnp.einsum("...ri,...rj->...ij", f, g, precision="highest")
    ids = left[..., :, None] * n + right[..., None, :]
    flat = lambda a: a.reshape(*a.shape[:-2], -1)
    return topk.top_k(flat(scores), flat(ids), k)


def _candidates(scores: Float[Array, "*batch n"], k: int, search: Search) -> Int[Array, "*batch c"]:
    n = scores.shape[-1]
    n_candidates = {"square": k, "signed": 2 * k, "reference": n}[search]
    if n_candidates >= n:
        return jnp.broadcast_to(jnp.arange(n), scores.shape)
    scores = jax.lax.stop_gradient(scores)
    best = topk.top_k(scores, None, k).ids
    return jnp.concatenate([best, topk.top_k(-scores, None, k).ids], axis=-1) if search == "signed" else best


_QUERY = ("batch", "time", "heads", None, "key")
_SCORES = ("batch", "time", "heads", None, None)


class TuckerKeys(Module):
    """What `tucker_top_k` selects from, in fp32: 2 + 2 r numbers of every sub-key of every head.

    >>> keys = TuckerKeysConfig(n_slots=9, n_heads=2, top_k=3, key_dim=8).make(16, rngs=nnx.Rngs(0))
    >>> keys(jnp.ones((1, 5, 16))).shape
    (1, 5, 2, 6, 3)
    """

    def __init__(self, config: TuckerKeysConfig, d_model: int, *, rngs: nnx.Rngs):
        """Sub-keys of variance 2 / K, cores uniform in 0 .. 1, scales of norms at (K / 2)^-0.33, as released; queries of
        variance 1 / D per input."""
        self.config = config
        heads, parts, width, rank = config.n_heads, config.n_parts, config.key_dim // config.n_parts, config.core_rank
        into = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.query = param(rngs, into, (d_model, heads, parts, width), ("embed", "heads", None, "key"), matrix())
        zeros, normal = jax.nn.initializers.zeros, jax.nn.initializers.normal(width**-0.5)
        bias = (heads, parts, width), ("heads", None, "key"), VECTOR
        self.bias = param(rngs, zeros, *bias) if config.query_bias else None
        shape = heads, parts, config.n_sub_keys, rank, width
        self.keys = param(rngs, normal, shape, ("heads", None, "sub_keys", "rank", "key"), ROWS)
        core = (heads, rank, rank), ("heads", None, None), matrix(copies=1)
        self.core = param(rngs, jax.nn.initializers.uniform(1.0), *core)
        self.query_norm, self.key_norm = (make_norm(kind, width, rngs) for kind in (config.query_norm, config.key_norm))
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.scale[...] = norm.scale[...] * width**-0.33

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H planes subkeys"]:
        q, keys = einsum("btd,dhpk->bthpk", x, self.query[...], _QUERY).astype(jnp.float32), self.keys[...]
        if self.bias is not None:
            q = q + self.bias[...]
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        s = einsum("bthpk,hpnrk->bthprn", q, keys, (*_SCORES, None))
        core = ("heads", None, None)
        vectors = local(leading_singular_vectors, in_axes=(core,), out_axes=(core[:2], core[:2]))
        u, v = vectors(constrain(self.core[...], *core))
        fixed = jax.lax.stop_gradient(s)
        chosen_by = [
            einsum("bthrn,hr->bthn", fixed[:, :, :, part], vector, _SCORES[:4])[:, :, :, None]
            for part, vector in enumerate((u, v))
        ]
        f = einsum("bthrn,hrq->bthqn", s[:, :, :, 0], self.core[...], _SCORES)
        return jnp.concatenate([*chosen_by, f, s[:, :, :, 1]], axis=3)

    def choose(self, scores: Float[Array, "B T H planes subkeys"]) -> TopK:  # [B T H k]
        """The slots that each head reads; uses no parameter."""
        return tucker_top_k(scores, self.config.top_k, self.config.search)

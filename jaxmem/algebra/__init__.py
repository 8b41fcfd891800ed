"""The four monoids that every exact memory in jaxmem is a fold of, in pure jnp.

| module | element | combine | identity |
|---|---|---|---|
| `softmax` | `Partial(o, lse)`: attention over some keys | log-sum-exp merge | no key |
| `affine` | `Segment(M, B)`: the map S -> M S + B | compose, earlier first | M = 1, B = 0 |
| `topk` | `TopK(scores, ids)`: the best k of some rows | merge, keep the best k | no row |
| `suffix` | `Suffix(items, count)`: the last W of a sequence | concatenate, keep the last W | no item |

Each module has `identity`, `combine` and `fold`, and they obey the same laws, in values and in gradients:

    combine(identity, a) == a == combine(a, identity)
    combine(combine(a, b), c) == combine(a, combine(b, c))
    fold of stacked elements == combine of them from first to last; the fold of none is the identity

so a sequence may be cut anywhere: per token to decode, per chunk to train, per device to spread it over a mesh.
`softmax` and `topk` also commute; `affine` and `suffix` are ordered. All functions are pure, batch over every leading
dimension, and go under jit, vmap, grad and `jax.lax.associative_scan`.
"""

from jaxmem.algebra import affine, softmax, suffix, topk

__all__ = ["affine", "softmax", "suffix", "topk"]

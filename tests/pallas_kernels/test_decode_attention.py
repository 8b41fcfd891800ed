"""Every way of decoding against plain attention over all keys, with gradients where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_close, relative_rms

from jaxmem.algebra.softmax import combine
from jaxmem.pallas_kernels.decode_attention import (
    Prefixes,
    expanded_query_attention,
    prefix_tree_attention,
    shared_prefix_attention,
    split_kv_attention,
    unified_max_attention,
)
from jaxmem.pallas_kernels.flash_attention import flash_attention
from jaxmem.pallas_kernels.masks import Mask, Place

B, S, H, G, K, V = 3, 24, 4, 2, 8, 6


def draw(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def cache(n_tokens=1):
    """Queries, keys, values, and places as in a ring cache: any order, some slots empty."""
    q, k, v = draw((B, n_tokens, H, K), (B, S, G, K), (B, S, G, V))
    index = jnp.stack([jax.random.permutation(jax.random.key(row), S) for row in range(B)])
    here = Place(jnp.full((B, n_tokens), S) + jnp.arange(n_tokens), jnp.ones((B, n_tokens), int))
    return q, k, v, here, Place(index, (index > 4).astype(int))


def as_dict(partial):
    return dict(zip(("o", "lse"), partial, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("n_splits", [1, 4, 24])
def test_pieces_of_a_cache(n_splits):
    q, k, v, here, there = cache(2)
    mask = Mask(window=15)

    @jax.jit
    def both(q, k, v):
        call = lambda attend, **options: attend(q, k, v, mask, q_place=here, k_place=there, **options)
        return call(split_kv_attention, n_splits=n_splits), call(flash_attention)

    got, want = both(q, k, v)
    assert_close(as_dict(got), as_dict(want), 2e-6)
    loss = lambda i: lambda *qkv: jnp.sum(jnp.sin(both(*qkv)[i].o)) + jnp.sum(both(*qkv)[i].lse)
    got, want = (jax.jit(jax.grad(loss(i), (0, 1, 2)))(q, k, v) for i in (0, 1))
    assert max(map(relative_rms, got, want)) < 2e-6


def test_a_prefix_that_a_batch_shares():
    q, k, v, prefix_k, prefix_v = draw((B, 2, H, K), (B, 2, G, K), (B, 2, G, V), (S, G, K), (S, G, V))

    @jax.jit
    def both(q, k, v, prefix_k, prefix_v):
        repeated = lambda x: jnp.broadcast_to(x, (B, *x.shape))
        own = flash_attention(q, k, v)
        index = jnp.broadcast_to(jnp.arange(S + 2), (B, S + 2))
        place = Place(index, jnp.ones_like(index))
        keys, values = (jnp.concatenate([repeated(a), b], axis=1) for a, b in ((prefix_k, k), (prefix_v, v)))
        whole = flash_attention(q, keys, values, q_place=jax.tree.map(lambda x: x[:, S:], place), k_place=place)
        return combine(shared_prefix_attention(q, prefix_k, prefix_v), own), whole

    got, want = both(q, k, v, prefix_k, prefix_v)
    assert_close(as_dict(got), as_dict(want), 2e-6)


def test_a_tree_of_prefixes():
    """A root for all, two branches of other lengths below it, one row on neither."""
    q, root_k, root_v, k, v = draw((4, 1, H, K), (1, 6, G, K), (1, 6, G, V), (2, 5, G, K), (2, 5, G, V))
    branch, length = jnp.array([1, -1, 0, 1]), jnp.array([5, 3])
    levels = [Prefixes(root_k, root_v, jnp.zeros(4, int)), Prefixes(k, v, branch, length)]
    got = jax.jit(prefix_tree_attention)(q, levels)
    for row in range(4):
        n, node = int(branch[row]), max(int(branch[row]), 0)
        n_keys = 6 + (int(length[n]) if n >= 0 else 0)
        keys, values = (jnp.concatenate([a[0], b[node]])[None, :n_keys] for a, b in ((root_k, k), (root_v, v)))
        want = flash_attention(q[row : row + 1], keys, values, Mask(causal=False))
        assert_close(as_dict(jax.tree.map(lambda x, row=row: x[row : row + 1], got)), as_dict(want), 2e-6)


def test_queries_in_the_width_of_hidden_states():
    q, key_weight, value_weight, hidden = draw((B, 1, H, K), (10, H, K), (10, H, V), (B, S, 10))
    mask = Mask(causal=False)

    def keys_and_values(q, key_weight, value_weight, hidden):
        k, v = jnp.einsum("bsd,dhk->bshk", hidden, key_weight), jnp.einsum("bsd,dhv->bshv", hidden, value_weight)
        return flash_attention(q, k, v, mask).o

    def run(f):
        arguments = q, key_weight, value_weight, hidden
        o, pull = jax.vjp(f, *arguments)
        return dict(zip(("o", "d_q", "d_k", "d_v", "d_x"), (o, *pull(jnp.sin(o))), strict=True))

    got = jax.jit(lambda: run(lambda *x: expanded_query_attention(*x, mask)))()
    assert_close(got, jax.jit(lambda: run(keys_and_values))(), 5e-6)


@pytest.mark.parametrize("size, maximum, serves", [(1.0, 2.0, True), (1.0, 70.0, False), (60.0, 0.0, False)])
def test_one_maximum_for_all(size, maximum, serves):
    q, k, v, here, there = cache()
    call = lambda attend, **options: jax.jit(
        lambda q, k, v: attend(q, k, v, Mask(), q_place=here, k_place=there, **options)
    )(size * q, k, v)
    got, served = call(unified_max_attention, maximum=maximum)
    assert bool(served) is serves
    assert_close(as_dict(got), as_dict(call(flash_attention)), 2e-6)


def test_one_maximum_and_a_row_that_sees_nothing():
    q, k, v, here, there = cache()
    there = there._replace(segment=there.segment.at[1].set(0))
    got, served = unified_max_attention(q, k, v, Mask(), q_place=here, k_place=there, maximum=0.0)
    assert served
    assert np.all(np.asarray(got.o[1]) == 0) and np.all(np.asarray(got.lse[1]) == -np.inf)


def test_errors():
    q, k, v, here, there = cache()
    with pytest.raises(ValueError, match=r"needs n_splits that divides the 24 keys, got n_splits=5; change it"):
        split_kv_attention(q, k, v, Mask(), q_place=here, k_place=there, n_splits=5)

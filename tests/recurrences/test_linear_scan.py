"""The two forms of the elementwise scan, of which a platform runs one, against each other and against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.recurrences.linear_scan import loop, loop_back, scan_tokens, tree, tree_back

T, N = 11, 5


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("forms", [(loop, tree), (loop_back, tree_back)], ids=["forward", "back"])
@pytest.mark.parametrize("n_tokens", [1, 2, T])
def test_a_tree_is_the_loop(forms, n_tokens):
    a = jax.nn.sigmoid(draw(n_tokens, N)).at[0, 0].set(0).at[-1, 1].set(0)
    in_order, in_levels = (jax.jit(form)(a, draw(n_tokens, N, seed=1), draw(N, seed=2)) for form in forms)
    np.testing.assert_allclose(in_levels, in_order, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_the_steps(shared):
    heads, key, value = 3, 4, 2
    key_axes = (T, 2, key) if shared else (T, 2, key, heads)
    a = jax.nn.sigmoid(draw(T, 2, key, value, heads, seed=3)).at[4].set(0)
    inputs = draw(*key_axes), draw(*key_axes, seed=1), draw(T, 2, value, heads, seed=2), a, draw(*a.shape[1:], seed=4)

    def by_steps(q, k, v, a, start):
        whole = lambda x: x[..., None] if shared else x
        outputs = []
        for t in range(T):
            start = a[t] * start + whole(k[t])[:, :, None] * v[t][:, None]
            outputs.append(jnp.sum(whole(q[t])[:, :, None] * start, axis=1))
        return jnp.stack(outputs), start

    loss = lambda f: lambda *x: sum(jnp.sum(jnp.sin(y)) for y in f(*x))
    found, wanted = (jax.jit(jax.value_and_grad(loss(f), argnums=range(5)))(*inputs) for f in (scan_tokens, by_steps))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, wanted)

"""The mixture of memories: against the paper's equations with a list of tokens per memory, its router, and its edges.

Its laws (splitting, decoding, causality, packing, sharding, ...) are in test_laws.py.
"""

import dataclasses
import functools
import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig, GatedDeltaProductConfig
from jaxmem.layers.gated_output import GatedOutput
from jaxmem.layers.griffin import GriffinConfig
from jaxmem.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from jaxmem.layers.linear_attention import RetNetConfig
from jaxmem.layers.mamba import MambaConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig, RouterUse, load_balancing_loss, route
from jaxmem.layers.rwkv7 import Rwkv7Config
from jaxmem.layers.state_space import LinearStateSpaceConfig

B, T, D = 2, 13, 8
INNER = GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=6, convolution_width=3, chunk_tokens=8)
PUBLISHED = MixtureOfMemoriesConfig(INNER)
CONFIGS = {
    "published": PUBLISHED,
    "single-kv": dataclasses.replace(PUBLISHED, single_kv=True),
    "top-1": dataclasses.replace(PUBLISHED, shared_memory=False, top_k=1),
    "all": dataclasses.replace(PUBLISHED, top_k=4, n_memories=4, shared_memory=False, single_kv=True),
}


def choices(config, p, x):
    """The memories every token of a row goes to, by plain sorting."""
    return np.argsort(-(np.float64(x) @ np.float64(p["router"])), axis=-1, kind="stable")[:, : config.top_k]


def equations(config, p, x, chosen):
    """One row, in the dtype that comes in: every memory is a Gated DeltaNet over the list of its own tokens."""
    probability = jax.nn.softmax(x @ p["router"], axis=-1)
    weight = jnp.take_along_axis(probability, chosen, axis=-1)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)

    o = jnp.zeros((len(x), config.inner.n_heads, config.inner.value_dim), x.dtype)
    for m in range(config.n_memories):
        mine = [t for t in range(len(x)) if m in chosen[t]]
        if mine:
            share = jnp.stack([weight[t, list(chosen[t]).index(m)] for t in mine])
            o = o.at[np.array(mine)].add(share[:, None, None] * read(config, p, x[np.array(mine)], m))
    if config.shared_memory:
        o = o + read(config, p, x, config.n_memories)

    o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + config.inner.norm_eps) * p["output"]["norm"]
    gate = jax.nn.silu(jnp.einsum("td,dhv->thv", x, p["output"]["gate"]))
    return jnp.einsum("thv,hvd->td", o * gate, p["output"]["out"])


def read(config, p, x, m):
    """What a memory with the projections m answers to tokens x [n, D] that it sees side by side."""
    m = 0 if config.single_kv else m
    unit = lambda a: a / jnp.sqrt(jnp.sum(a**2, -1, keepdims=True) + 1e-6)
    weight, width = p["projections"]["weight"], config.inner.convolution_width

    def convolved(name, weight):
        padded = jnp.pad(jnp.einsum("td,dhk->thk", x, weight), [(width - 1, 0), (0, 0), (0, 0)])
        return jax.nn.silu(sum(p["taps"][name][tap] * padded[tap : tap + len(x)] for tap in range(width)))

    q, k = unit(convolved("query", weight["query"])), unit(convolved("key", weight["key"][m]))
    v = convolved("value", weight["value"][m])
    g = -jnp.exp(p["parameters"]["a_log"]) * jax.nn.softplus(x @ weight["decay"][m] + p["parameters"]["dt_bias"])

    def step(state, token):
        q, k, v, g, beta = token
        state = jnp.exp(g)[:, None, None] * state
        u = beta[:, None] * (v - jnp.einsum("hkv,hk->hv", state, k))
        state = state + k[..., None] * u[:, None]
        return state, jnp.einsum("hkv,hk->hv", state, q) * config.inner.key_dim**-0.5

    empty = jnp.zeros((config.inner.n_heads, config.inner.key_dim, config.inner.value_dim), x.dtype)
    return jax.lax.scan(step, empty, (q, k, v, g, jax.nn.sigmoid(x @ weight["write"][m])))[1]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, p, x, weight):
    y, pull = jax.vjp(f, p, x)
    return y, pull(weight)


@functools.cache
def sample(name):
    """(config, f(parameters, x) that is the layer, parameters as a dict)."""
    config = CONFIGS[name]
    graph, state = nnx.split(jax.jit(lambda: config.make(D, rngs=nnx.Rngs(0)))())

    def layer(parameters, x):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, parameters)))(x)[0]

    return config, layer, nnx.to_pure_dict(state)


def relative_rms(got, want):
    """Absolute where what is wanted is 0 but for rounding, as the router's gradient when weights are always 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-2)


@pytest.mark.parametrize(
    "name", ["published", *(pytest.param(n, marks=pytest.mark.slow) for n in ("single-kv", "top-1", "all"))]
)
def test_values_and_gradients_against_the_equations(name):
    config, layer, p = sample(name)
    x, weight = np.random.default_rng(0).normal(size=(2, B, T, D)).astype(np.float32)
    got = value_and_gradients(layer, p, x, weight)
    chosen = [choices(config, p, row) for row in x]
    visited = {m for row in chosen for m in row.flat}
    assert visited == set(range(config.n_memories))

    def rows(p, x):
        return jnp.stack([equations(config, p, x[b], chosen[b]) for b in range(B)])

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (p, x, weight))
        want = jax.device_get(value_and_gradients(rows, *exact))
    errors = jax.tree.map(relative_rms, jax.device_get(got), want)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


INSIDE = {
    "gated delta net": INNER,
    "gated delta product": GatedDeltaProductConfig(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8),
    "kimi": KimiDeltaAttentionConfig(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8),
    "rwkv7": Rwkv7Config(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8, decay_rank=3, strength_rank=3, gate_rank=3),
    "retnet": RetNetConfig(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8),
    "mamba": MambaConfig(n_channels=6, n_states=3, dt_rank=2, chunk_tokens=8),
    "griffin": GriffinConfig(n_heads=2, head_dim=4, chunk_tokens=8),
    "linear state space": LinearStateSpaceConfig(n_channels=D, n_states=6, chunk_tokens=8),
}


@pytest.mark.parametrize(
    "inner",
    [pytest.param(c, id=n, marks=() if n == "gated delta net" else pytest.mark.slow) for n, c in INSIDE.items()],
)
def test_one_memory_is_the_recurrence_inside(inner):
    config = MixtureOfMemoriesConfig(inner, n_memories=1, top_k=1, shared_memory=False)

    @jax.jit
    def both(x):
        mixture, one = (c.make(D, rngs=nnx.Rngs(0)) for c in (config, inner))
        for kind in ("weight", "down", "bias", "mix"):
            for name, parameter in getattr(one.projections, kind).items():
                mine = getattr(mixture.projections, kind)[name][...]
                parameter[...] = mine[0] if mine.ndim > parameter[...].ndim else mine
        one.taps, one.parameters, one.output = mixture.taps, mixture.parameters, mixture.output
        ids = jnp.array([[1] * 5 + [2] * 8, [1] * 9 + [2] * 2 + [0] * 2])
        return mixture(x, segment_ids=ids), one(x, segment_ids=ids)

    x = jax.random.normal(jax.random.key(0), (B, T, D))
    (y, state), (y_one, state_one) = both(x)
    assert relative_rms(y, y_one) < 1e-6
    assert relative_rms(state.memories[:, 0], state_one.memory) < 1e-6
    for name, history in state_one.history.items():
        assert relative_rms(state.history[name][:, 0], history) < 1e-6


@dataclasses.dataclass(frozen=True)
class LinearRetNet(RetNetConfig):
    """With an output that is linear in what is read, so that memories' outputs add up."""

    def output(self, d_model, *, rngs):
        return GatedOutput(d_model, self.n_heads, self.value_dim, gate=None, norm=None, rngs=rngs)


SIDE_BY_SIDE = {"griffin": INSIDE["griffin"], "retnet": LinearRetNet(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8)}


@pytest.mark.parametrize(
    "inner", [pytest.param(c, id=n, marks=() if n == "griffin" else pytest.mark.slow) for n, c in SIDE_BY_SIDE.items()]
)
def test_memories_see_their_tokens_as_if_side_by_side(inner):
    """Also in what goes by position or by the first token: each document's tokens of each memory, handed to the recurrence
    alone, give what the mixture gives; whole, and in pieces with a state between, one of them a single token."""
    config = MixtureOfMemoriesConfig(inner, n_memories=3, top_k=2)
    ids = np.array([[1] * 6 + [2] * 7, [1] * 13])

    @jax.jit
    def make():
        mixture, one = (c.make(D, rngs=nnx.Rngs(0)) for c in (config, inner))
        return mixture, one, mixture.init_state(B)

    mixture, one, empty = make()
    ones = [jax.tree.map(lambda a: a, one) for _ in range(config.n_slots)]
    for m, layer in enumerate(ones):
        for kind in ("weight", "bias"):
            for name, parameter in getattr(mixture.projections, kind).items():
                spec = mixture.projections.specs[name]
                getattr(layer.projections, kind)[name][...] = parameter[...][m] if spec.per_memory else parameter[...]
        layer.taps, layer.parameters, layer.output = mixture.taps, mixture.parameters, mixture.output
    alone = jax.jit(lambda layer, x, real: layer(x, segment_ids=real)[0])

    x = jax.random.normal(jax.random.key(0), (B, T, D))
    want = np.zeros((B, T, D))
    for b in range(B):
        chosen = choices(config, {"router": mixture.router[...]}, x[b])
        probability = np.take_along_axis(np.asarray(jax.nn.softmax(x[b] @ mixture.router[...])), chosen, -1)
        weight = probability / probability.sum(-1, keepdims=True)
        for document, m in itertools.product(np.unique(ids[b]), range(config.n_slots)):
            is_shared = m == config.n_memories
            mine = [t for t in range(T) if ids[b, t] == document and (is_shared or m in chosen[t])]
            share = [1.0 if is_shared else weight[t, list(chosen[t]).index(m)] for t in mine]
            packed = np.zeros((1, T, D), np.float32)
            packed[0, : len(mine)] = x[b][np.array(mine, int)]
            y = alone(ones[m], packed, (np.arange(T) < len(mine)).astype(np.int32)[None])[0, : len(mine)]
            # Griffin's gate reads each token's own x, so that shares of o are shares of y
            want[b, mine] += np.array(share)[:, None] * np.asarray(y)

    call = jax.jit(lambda x, state, ids: mixture(x, state, segment_ids=ids))
    for cuts in ((0, T), (0, 4, 5, 9, T)):
        state, ys = empty, []
        for start, stop in itertools.pairwise(cuts):
            y, state = call(x[:, start:stop], state, ids[:, start:stop])
            ys.append(y)
        assert relative_rms(np.concatenate(ys, axis=1), want) < 1e-5


def test_a_memory_is_untouched_by_tokens_that_do_not_go_there():
    """Neither decayed nor shifted: tokens that all choose memory 1 leave 0, 2 and 3 bit by bit as they were."""
    config, _, _ = sample("published")
    layer = jax.jit(lambda: config.make(D, rngs=nnx.Rngs(0)))()
    call = jax.jit(lambda layer, x, state: layer(x, state))
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    _, before = call(layer, x, layer.init_state(B))
    layer.router[...] = jnp.zeros_like(layer.router[...]).at[0, 1].set(1.0).at[0, 3].set(0.5)  # 1 then 3, if x_0 > 0
    x = jnp.abs(x)
    for n_tokens in (T, 1):
        _, after = call(layer, x[:, :n_tokens], before)
        for m, touched in enumerate([False, True, False, True, True]):
            for a, b in ((after.memories, before.memories), (after.history["key"], before.history["key"])):
                assert bool(jnp.all(a[:, m] == b[:, m])) is not touched


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    logits=hnp.arrays(np.float32, (2, 5, 4), elements=st.sampled_from([-80.0, -1.0, 0.0, 0.5, 2.0, 90.0])),
    real=hnp.arrays(bool, (2, 5)),
)
def test_router_against_numpy(logits, real):
    """Ties go to the memory that comes first; far-apart logits neither overflow nor divide by zero."""
    memory, weight, use = routed(logits, real)
    exact = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    probability = exact / exact.sum(-1, keepdims=True)
    # what fp32 cannot tell apart ties: below its smallest normal number everything is 0
    told_apart = np.where(probability < np.finfo(np.float32).tiny, 0, probability).astype(np.float32)
    order = np.argsort(-told_apart, axis=-1, kind="stable")[..., :2]
    chosen = np.take_along_axis(probability, order, -1)
    np.testing.assert_array_equal(memory, order)
    np.testing.assert_allclose(weight, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(weight.sum(-1), 1.0, rtol=1e-6)
    one_hot = (order[..., None] == np.arange(4)).sum(-2)
    np.testing.assert_array_equal(use.chosen, (one_hot * real[..., None]).sum(1))
    np.testing.assert_allclose(use.probability, (probability * real[..., None]).sum(1), rtol=1e-5, atol=1e-30)


routed = jax.jit(functools.partial(route, top_k=2))


def test_router_works_in_float32():
    logits = jnp.array([[[4.0, 4.015625, 0.0]]], jnp.bfloat16)
    _, weight, use = routed(logits, jnp.ones((1, 1), bool))
    assert weight.dtype == use.probability.dtype == jnp.float32
    np.testing.assert_allclose(weight.sum(), 1.0, rtol=1e-6)


def mixtral_loss(logits, top_k):
    """The formula for logits [tokens, M] of one layer, as it is written for Mixtral."""
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choice = np.argsort(-probability, axis=-1, kind="stable")[:, :top_k]
    tokens_per_memory = np.stack([np.mean(choice == m, axis=0) for m in range(logits.shape[1])], axis=1)  # [k, M]
    return logits.shape[1] * np.sum(tokens_per_memory * probability.mean(0))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balancing_loss_against_mixtral(top_k):
    """Of three layers, each by itself, with padding that counts for nothing."""
    rng = np.random.default_rng(top_k)
    logits, real = rng.normal(size=(3, B, T, 4)).astype(np.float32), rng.random((B, T)) < 0.7
    use = jax.vmap(lambda logits: route(logits, jnp.asarray(real), top_k)[2])(logits)
    want = [mixtral_loss(np.float64(of_layer[real]), top_k) for of_layer in logits]
    np.testing.assert_allclose(load_balancing_loss(use, top_k), want, rtol=1e-6)


def test_load_balancing_loss_of_even_use_is_top_k_and_of_none_is_zero():
    even = RouterUse(jnp.full((6, 4), 3.0), jnp.full((6, 4), 1.5))
    np.testing.assert_allclose(load_balancing_loss(even, 2), 2.0, rtol=1e-6)
    none = RouterUse(jnp.zeros(4), jnp.zeros(4))
    value, gradient = jax.value_and_grad(load_balancing_loss)(none, 2)
    assert value == 0 and not np.any(gradient.probability) and not np.any(gradient.chosen)


def test_load_balancing_gradient_comes_through_probabilities_of_real_tokens_only():
    rng = np.random.default_rng(0)
    logits, real = jnp.asarray(rng.normal(size=(B, T, 4)), jnp.float32), jnp.asarray(rng.random((B, T)) < 0.7)
    gradient = jax.jit(jax.grad(lambda logits: load_balancing_loss(route(logits, real, 2)[2], 2)))(logits)

    _, _, use = route(logits, real, 2)
    counts = use.chosen.sum(0)
    n_real = real.sum()

    def through_probabilities(logits):
        probability = jax.nn.softmax(logits[real]).sum(0)
        return 4 * jnp.sum(counts * probability) / n_real**2

    np.testing.assert_allclose(gradient, jax.grad(through_probabilities)(logits), rtol=1e-5, atol=1e-8)
    assert not np.any(gradient[~real]) and np.all(np.any(gradient[real] != 0, axis=-1))


def test_router_use_adds_up_over_calls():
    config, _, _ = sample("published")
    layer = jax.jit(lambda: config.make(D, rngs=nnx.Rngs(0)))()
    call = jax.jit(lambda layer, x, ids, state: layer(x, state, segment_ids=ids)[1])
    x, ids = jax.random.normal(jax.random.key(0), (B, T, D)), jnp.array([[1] * T, [1] * 4 + [0] * (T - 4)])
    state = call(layer, x, ids, call(layer, x, ids, layer.init_state(B)))
    for use, share in ((state.router.chosen, config.top_k), (state.router.probability, 1)):
        np.testing.assert_allclose(use.sum(-1), [2 * T * share, 2 * 4 * share], rtol=1e-5)


def test_one_program_serves_all_routings_without_the_host():
    config, layer, p = sample("published")
    traces = []

    @jax.jit
    def call(p, x):
        traces.append(1)
        return layer(p, x)

    xs = [jnp.full((B, T, D), value).at[..., 0].set(jnp.arange(T)) for value in (-1.0, 0.0, 1.0)]
    use = {tuple(choices(config, p, np.asarray(x[0])).ravel()) for x in xs}
    with jax.transfer_guard("disallow"):
        ys = [call(p, x) for x in xs]
    assert len(use) > 1 and len(traces) == 1 and all(bool(jnp.all(jnp.isfinite(y))) for y in ys)


def test_more_choices_than_memories():
    text = "MixtureOfMemoriesConfig: needs top_k <= n_memories, got top_k=5 of n_memories=4; choose fewer or have more"
    with pytest.raises(ValueError, match=text):
        MixtureOfMemoriesConfig(top_k=5)


@pytest.mark.usefixtures("unchecked")
def test_segment_ids_of_another_length_are_refused():
    layer = nnx.eval_shape(lambda: PUBLISHED.make(D, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"MixtureOfMemories: needs segment_ids .* shape \(1, 5\), .* got .* \(1, 4\)"):
        jax.eval_shape(lambda x, ids: layer(x, segment_ids=ids), jnp.ones((1, 5, D)), jnp.ones((1, 4), jnp.int32))


def test_mixing_flops_count_chosen_memories():
    """And the convolutions of all but one of them, since 2 FLOPs per parameter count one."""
    convolution = 2 * (2 * 3 * (4 + 4 + 6))
    for config in CONFIGS.values():
        n = config.n_choices
        assert config.mixing_flops(D, 100) == n * INNER.mixing_flops(D, 100) + (n - 1) * convolution

"""The attention layer: one result however the sequence is cut, packed, padded, cached or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import Attention, AttentionConfig
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh

B, T, D = 2, 24, 16
CONFIGS = {
    "full": AttentionConfig(4, 2),
    "window": AttentionConfig(4, 2, window=5, qk_norm=True),
    "no rotary": AttentionConfig(2, head_dim=6, rope_theta=None),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PACKED = jnp.array([[1] * 7 + [2] * 4 + [3] * 13, [1] * 20 + [2] * 4])


def make(config) -> tuple[Attention, jax.Array]:
    return config.make(D, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (B, T, D))


def relative_rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30)


def assert_trees_close(got, want, tolerance=1e-5):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert relative_rms(a, b) < tolerance, f"{jax.tree_util.keystr(path)}: {relative_rms(a, b)}"


@jax.jit
def call(layer, x, state=None, segment_ids=None):
    return layer(x, state, segment_ids=segment_ids)


def in_pieces(layer, x, cuts, segment_ids=None, capacity=T):
    """(y, state) of calls on x[:, :cuts[0]], x[:, cuts[0]:cuts[1]], ..."""
    state = layer.init_state(len(x), capacity=capacity)
    ys = []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        ids = None if segment_ids is None else segment_ids[:, start:stop]
        y, state = layer(x[:, start:stop], state, segment_ids=ids)
        ys.append(y)
    return jnp.concatenate(ys, axis=1), state


@ALL
def test_step_by_step_is_parallel_and_scans(config):
    layer, x = make(config)
    want = call(layer, x)

    @jax.jit
    def decode(layer, x):
        def step(state, x):
            y, state = layer(x[:, None], state)
            return state, y[:, 0]

        state, y = jax.lax.scan(step, layer.init_state(B, capacity=T), x.swapaxes(0, 1))
        return y.swapaxes(0, 1), state

    assert_trees_close(decode(layer, x), want)


def test_a_window_decodes_far_beyond_its_cache():
    layer, _ = make(CONFIGS["window"])
    x = jax.random.normal(jax.random.key(2), (1, 61, D))
    state = layer.init_state(1)
    assert state.k.shape[1] == layer.config.window
    ys = []
    for start, stop in ((0, 1), (1, 31), (31, 32), (32, 60), (60, 61)):
        y, state = call(layer, x[:, start:stop], state)
        ys.append(y)
    y, whole = call(layer, x)
    assert_trees_close((jnp.concatenate(ys, axis=1), state), (y, whole))


def test_a_cache_serves_a_stream_of_documents_longer_than_itself():
    """Only documents have to fit: what a full cache overwrites is of documents that are over."""
    layer, x = make(CONFIGS["full"])
    y, _ = jax.jit(lambda x: in_pieces(layer, x, (6, 7, 8, 22), PACKED[:1], capacity=13))(x[:1])
    assert_trees_close(y, call(layer, x[:1], None, PACKED[:1])[0])


@ALL
def test_packed_is_separate(config):
    layer, x = make(config)
    packed, _ = call(layer, x, None, PACKED)
    separate = [call(layer, x[:1, a:b])[0] for a, b in ((0, 7), (7, 11), (11, 24))]
    assert_trees_close(packed[:1], jnp.concatenate(separate, axis=1))


@ALL
def test_padding_is_neutral(config):
    layer, x = make(config)
    lengths = (9, 0)
    ids = jnp.arange(T)[None] < jnp.array(lengths)[:, None]
    y, state = call(layer, x, layer.init_state(B, capacity=2 * T), ids.astype(jnp.int32))
    np.testing.assert_array_equal(state.length, lengths)
    assert np.all(np.asarray(y)[~np.asarray(ids)] == 0)
    more, _ = call(layer, x, state)
    for row, length in enumerate(lengths):
        want, _ = call(layer, jnp.concatenate([x[row : row + 1, :length], x[row : row + 1]], axis=1))
        assert_trees_close(jnp.concatenate([y[row, :length], more[row]]), want[0])
    _, after = call(layer, x[:, :1], state, jnp.zeros((B, 1), jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, after, state)


@ALL
def test_the_past_does_not_depend_on_the_future(config):
    layer, x = make(config)
    now = 10
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)[0][:, :now]))))(x)
    assert np.all(np.asarray(gradient[:, now:]) == 0) and np.all(np.any(np.asarray(gradient[:, :now]) != 0, axis=2))
    np.testing.assert_array_equal(call(layer, x.at[:, now:].add(1.0))[0][:, :now], call(layer, x)[0][:, :now])


def test_positions_turn_queries_and_keys():
    layer, x = make(CONFIGS["full"])
    run = jax.jit(lambda x, positions: layer(x, positions=positions)[0])
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    assert_trees_close(run(x, index + 100), call(layer, x)[0])
    assert relative_rms(run(x, 2 * index), call(layer, x)[0]) > 1e-2


def test_a_document_that_outgrows_the_cache_is_loud_and_alone():
    """Row 0 has one document of 24 tokens for 12 slots; the documents of row 1 fit."""
    layer, x = make(CONFIGS["full"])
    ids = jnp.stack([jnp.ones(T, jnp.int32), 1 + jnp.arange(T) // 12])
    x_nan = x.at[0, 12:].set(jnp.nan)  # as a layer below would hand it on
    want, _ = call(layer, x, None, ids)
    for cuts in ((), (11, 12, 13)):
        y, _ = jax.jit(lambda x, cuts=cuts: in_pieces(layer, x, cuts, ids, capacity=12))(x_nan)
        assert np.all(np.isnan(y[0, 12:]))
        assert_trees_close((y[0, :12], y[1]), (want[0, :12], want[1]))
    with pytest.raises(ValueError, match=r"needs a cache of at least 24 tokens .*, got capacity=12; pass a larger cap"):
        in_pieces(layer, x, (), ids, capacity=12)


def test_state_can_be_donated_and_keeps_its_structure():
    layer, x = make(CONFIGS["full"])
    state = layer.init_state(B, capacity=T, dtype=jnp.bfloat16)
    structure = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    donating = jax.jit(lambda layer, x, state: layer(x, state), donate_argnums=2)
    for n_tokens in (1, 5, 1):
        y, state = donating(layer, x[:, :n_tokens].astype(jnp.bfloat16), state)
        assert y.dtype == jnp.bfloat16
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == structure


def test_qk_norm_bounds_the_logits():
    """The normalised layer does not notice the size of its query and key weights."""
    layer, x = make(CONFIGS["window"])
    want, _ = call(layer, x)
    layer.query[...] *= 100.0
    layer.key[...] *= 100.0
    assert_trees_close(call(layer, x)[0], want)


def test_heads_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with use_mesh(mesh), pytest.raises(ValueError, match="needs 'kv_heads' divisible by the 2 devices"):
        AttentionConfig(6, 3, head_dim=4).make(D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: AttentionConfig(4, 3), "needs n_heads divisible by n_kv_heads, got n_heads=4, n_kv_heads=3"),
        (
            lambda: make(AttentionConfig(3)),
            "needs d_model divisible by n_heads, got d_model=16, n_heads=3; .* head_dim",
        ),
        (lambda: make(AttentionConfig(1, head_dim=5)), "needs an even head_dim for rotary embedding, got head_dim=5"),
        (lambda: make(CONFIGS["full"])[0].init_state(1), "needs a capacity for .* full attention, got capacity=None"),
        (lambda: make(CONFIGS["full"])[0].init_state(1, capacity=0), "needs capacity >= 1, got capacity=0"),
    ],
    ids=["kv heads", "d_model", "odd head", "no capacity", "zero capacity"],
)
def test_errors(build, text):
    with pytest.raises(ValueError, match="(?i)attention: " + text):
        build()


def test_mixing_flops_count_the_tokens_seen():
    def counted(config, tokens):
        window = config.window or tokens
        seen = sum(min(t + 1, window) for t in range(tokens))
        return 4 * config.n_heads * config.width(D) * seen // tokens

    for config in CONFIGS.values():
        for tokens in (1, 4, 5, 24):
            assert config.mixing_flops(D, tokens) == counted(config, tokens)

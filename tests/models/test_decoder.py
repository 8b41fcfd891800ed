"""The decoder: the scan is the loop it stands for, and the laws of its mixers are laws of the whole."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import Attention, AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemories, MixtureOfMemoriesConfig
from jaxmem.layers.recurrent import Recurrent
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh

B, T, VOCAB = 2, 12, 50
GDN = GatedDeltaNetConfig(2, 4, 4, chunk_tokens=8)
MIXERS = (MixtureOfMemoriesConfig(GDN), GDN, AttentionConfig(2), AttentionConfig(2, window=3))
PACKED = jnp.array([[1] * 5 + [2] * 7, [1] * 2 + [2] * 7 + [0] * 3])


def decoder(pattern=MIXERS, repeats=2, **options):
    return DecoderConfig(d_model=16, d_ffn=24, pattern=pattern, repeats=repeats, vocab_size=VOCAB, **options)


@cache
def make(config):
    return jax.jit(lambda: config.make(rngs=nnx.Rngs(0)))()


def make_tokens(seed=0, shape=(B, T)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int32))


def assert_close(got, want, tolerance=1e-5):
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def test_a_hybrid_is_one_line():
    config = decoder(3 * (GDN,) + (AttentionConfig(2),), repeats=3)
    model = nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))
    assert config.n_layers == 12
    assert [type(block.mixer) for block in model.blocks] == 3 * [Recurrent] + [Attention]
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(nnx.state(model.blocks, nnx.Param)))


@pytest.mark.slow
def test_no_two_layers_start_alike():
    blocks = make(decoder()).blocks
    weights = [getattr(block.mixer, "query", None) or block.mixer.projections.weight["query"] for block in blocks]
    queries = [np.asarray(weight[...]).reshape(2, -1) for weight in weights]
    starts = [tuple(layer[:5]) for stack in queries for layer in stack]
    assert len(set(starts)) == decoder().n_layers


def test_the_programs_size_does_not_grow_with_depth():
    def program(repeats):
        model = nnx.eval_shape(lambda: decoder(repeats=repeats).make(rngs=nnx.Rngs(0)))
        text = str(jax.make_jaxpr(lambda model, tokens: model(tokens)[0])(model, make_tokens()))
        return text.count(" = ")  # equations

    assert program(2) == program(20)


def unrolled(model, tokens, segment_ids):
    """What `Decoder.__call__` says, one layer after the other."""
    x, after = model.embedding(tokens), [[] for _ in model.blocks]
    for repeat in range(model.config.repeats):
        for place, stack in enumerate(model.blocks):
            block = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stack)
            mixed, state = block.mixer(block.mixer_norm(x), segment_ids=segment_ids)
            x = x + mixed
            x = x + block.ffn(block.ffn_norm(x))
            after[place].append(state)
    return model.norm(x), tuple(jax.tree.map(lambda *states: jnp.stack(states), *states) for states in after)


def test_the_scan_is_the_loop_in_values_states_and_gradients():
    config = decoder((GDN, AttentionConfig(2)))

    @partial(jax.jit, static_argnums=0)
    def run(call, model):
        def loss(model):
            x, state = call(model, make_tokens(), PACKED)
            return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(state[0].memory)), (x, state)

        return jax.grad(loss, has_aux=True)(model)

    got = run(lambda model, tokens, ids: model(tokens, segment_ids=ids), make(config))
    assert_close(got, run(unrolled, make(config)))


@pytest.fixture(scope="module")
def remats():
    """Per policy: gradients and values of a deeper model, and the bytes of intermediate arrays of its program."""
    found = {}
    for policy in ("nothing", "dots", "block"):
        config = decoder((AttentionConfig(2),), repeats=8, remat=policy)
        config = dataclasses.replace(config, d_ffn=512)
        model, tokens = make(dataclasses.replace(config, remat="nothing")), make_tokens(shape=(4, 128))
        model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda c=config: c.make(rngs=nnx.Rngs(0)))), nnx.state(model))
        program = jax.jit(jax.value_and_grad(lambda model, tokens: jnp.sum(jnp.sin(model(tokens)[0])))).lower(
            model, tokens
        )
        program = program.compile()
        value, gradients = program(model, tokens)
        found[policy] = (value, nnx.state(gradients)), program.memory_analysis().temp_size_in_bytes
    return found


@pytest.mark.parametrize("policy", ["dots", "block"])
def test_remat_changes_no_value_and_no_gradient(remats, policy):
    assert_close(remats[policy][0], remats["nothing"][0])


def test_remat_of_blocks_saves_the_memory_of_their_insides(remats):
    n_bytes = {policy: n for policy, (_, n) in remats.items()}
    assert n_bytes["block"] < 0.4 * n_bytes["nothing"] and n_bytes["block"] < n_bytes["dots"] < n_bytes["nothing"]


def test_prefill_and_decoding_are_the_whole():
    @jax.jit
    def run(model, tokens, segment_ids):
        empty = model.init_state(B, capacity=T)
        whole = model(tokens, empty, segment_ids=segment_ids)

        def step(state, token):
            token, segment_id = (x[:, None] for x in token)
            x, state = model(token, state, segment_ids=segment_id)
            return state, x[:, 0]

        start, state = model(tokens[:, :4], empty, segment_ids=segment_ids[:, :4])
        state, rest = jax.lax.scan(step, state, (tokens[:, 4:].T, segment_ids[:, 4:].T))
        return whole, (jnp.concatenate([start, rest.swapaxes(0, 1)], axis=1), state), empty

    (x, state), (x_pieces, state_pieces), empty = run(make(decoder()), make_tokens(), PACKED)
    real = PACKED != 0
    assert_close(x_pieces[real], x[real])
    assert_close(state_pieces, state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), empty) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


def test_packed_documents_are_separate_documents():
    @jax.jit
    def run(model, tokens):
        packed, _ = model(tokens, segment_ids=PACKED[:1])
        return packed, jnp.concatenate([model(tokens[:, :5])[0], model(tokens[:, 5:])[0]], axis=1)

    assert_close(*run(make(decoder()), make_tokens(shape=(1, T))))


def test_the_past_does_not_feel_the_future():
    tokens = jnp.arange(T)[None]  # every token once: the rows of its table are the places of the sequence

    @jax.jit
    def past_and_gradient(model, tokens):
        def past(model):
            x = model(tokens)[0][:, :5]
            return jnp.sum(jnp.sin(x)), x

        gradient, x = jax.grad(past, has_aux=True)(model)
        return x, gradient.embedding.table[...]

    x, of_rows = past_and_gradient(make(decoder()), tokens)
    reached = np.abs(of_rows).max(axis=1) > 0
    np.testing.assert_array_equal(reached, np.arange(64) < 5)
    other, _ = past_and_gradient(make(decoder()), tokens.at[:, 5:].set(49))
    np.testing.assert_array_equal(other, x)


@jax.jit
def call(model, tokens, state, segment_ids):
    return model(tokens, state, segment_ids=segment_ids)


def test_a_document_id_that_comes_back_is_a_new_document():
    """The state stands in document 2; ids that begin at 1 again find nothing of the old document 1."""
    model, again = make(decoder()), jnp.ones((B, T), jnp.int32)
    empty = jax.jit(lambda: model.init_state(B, capacity=3 * T))()
    _, state = call(model, make_tokens(), empty, PACKED)
    assert_close(call(model, make_tokens(1), state, again)[0], call(model, make_tokens(1), empty, again)[0])


def test_padding_in_front_of_tokens_is_loud_and_alone():
    """NaN in that row, and in all that is decoded behind it; what stands in padding is no token, whatever its id."""
    model, tokens = make(decoder()), make_tokens()
    empty = jax.jit(lambda: model.init_state(B, capacity=3 * T))()
    wrong = PACKED.at[0, :3].set(0)
    want, state = call(model, tokens, empty, PACKED)
    got, broken = call(model, jnp.where(wrong == 0, VOCAB + 7, tokens), empty, wrong)
    np.testing.assert_array_equal(got[1, :9], want[1, :9])
    assert np.all(np.isnan(got[0])) and not np.any(np.isnan(want))
    after, _ = call(model, tokens, broken, PACKED)
    np.testing.assert_array_equal(after[1], call(model, tokens, state, PACKED)[0][1])
    assert np.all(np.isnan(after[0]))
    with pytest.raises(ValueError, match=r"Decoder: needs segment_ids above 0 .* in row 0; move padding to the end"):
        model(tokens, empty, segment_ids=wrong)


@pytest.mark.usefixtures("unchecked")
def test_bytes_are_tokens():
    model = make(dataclasses.replace(decoder((AttentionConfig(2),), 1), vocab_size=256))
    tokens = np.array([[0, 200, 255, 7]], np.uint8)
    hidden = jax.jit(lambda model, tokens, ids: model(tokens, segment_ids=ids)[0])
    ids = jnp.array([[1, 1, 1, 0]])
    np.testing.assert_array_equal(hidden(model, tokens, ids), hidden(model, tokens.astype(np.int32), ids))


def test_calls_on_nothing():
    model = make(decoder())
    state = jax.jit(lambda: model.init_state(B, capacity=T))()
    hidden, after, uses = model.with_memory_use(make_tokens()[:, :0], state)
    assert hidden.shape == (B, 0, 16) and after is state and uses == (None,) * 4
    hidden, after = jax.eval_shape(lambda: model(make_tokens()[:0]))
    with use_mesh(make_mesh(MeshConfig(data=2, seq=2, model=2))):
        assert jax.eval_shape(lambda: model(make_tokens()[:0])[0]).shape == (0, T, 16)
    assert hidden.shape == (0, T, 16) and all(leaf.shape[:2] == (2, 0) for leaf in jax.tree.leaves(after))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tokens": make_tokens()[0]}, r"needs tokens \[B T\] of integers, got tokens of shape \(12,\)"),
        ({"tokens": np.zeros((B, T), np.float32)}, "got tokens of shape .* and dtype float32; pass token ids"),
        ({"tokens": None}, "got tokens of type NoneType"),
        ({"state": PACKED}, r"needs a state with one entry per mixer of the pattern, 4, got state of shape \(2, 12\)"),
        ({"state": ()}, "got state of type tuple; pass what init_state"),
        ({"segment_ids": PACKED[:, 1:]}, r"needs segment_ids \[B T\] .* got segment_ids of shape \(2, 11\)"),
        ({"positions": PACKED[0]}, r"needs positions \[B T\] .* got positions of shape \(12,\)"),
    ],
    ids=["rank", "floats", "none", "ids as state", "no state", "ids", "positions"],
)
def test_wrong_calls(arguments, text):
    model = nnx.eval_shape(lambda: decoder().make(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="Decoder: .*" + text):
        model(**({"tokens": make_tokens()} | arguments))


def test_a_state_of_another_batch_is_refused():
    model = make(decoder())
    state = jax.eval_shape(lambda: model.init_state(3, capacity=T))
    with pytest.raises(ValueError, match="needs the state of a batch of 2 rows .* instead of"):
        jax.eval_shape(lambda state: model(make_tokens(), state), state)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head(tied):
    config = decoder((AttentionConfig(2),), repeats=1, tie_embeddings=tied)
    model = make(config)
    table, head = np.asarray(model.embedding.table[...]), np.asarray(model.head)
    assert head.shape == (64, 16), "50 tokens in a multiple of 64 rows"
    assert np.array_equal(head, table) == tied
    x = model(make_tokens())[0]
    logits = model.logits(x)
    assert logits.shape == (B, T, VOCAB)
    assert_close(logits, np.asarray(x) @ head[:VOCAB].T)
    assert (0.5 < np.std(logits) < 2) != tied, "an untied head starts with logits of size 1, a tied one with small ones"


@pytest.mark.slow
def test_bf16_is_near_fp32_and_remembers_in_fp32():
    """All memories chosen: where rounding makes routers choose otherwise, values differ by any amount."""
    pattern = (dataclasses.replace(MIXERS[0], top_k=4), *MIXERS[1:])
    model = make(decoder(pattern))
    half = nnx.merge(nnx.graphdef(make(decoder(pattern, dtype="bfloat16"))), nnx.state(model))

    @jax.jit
    def run(model, tokens):
        x, state = model(tokens)
        return x, state, model.logits(x)

    (_x, _, logits), (x_half, state, logits_half) = run(model, make_tokens()), run(half, make_tokens())
    assert x_half.dtype == jnp.bfloat16 and logits_half.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(half, nnx.Param)))
    mixture, gdn, attention, _ = state
    assert mixture.memories.dtype == gdn.memory.dtype == jnp.float32 and attention.k.dtype == jnp.bfloat16
    assert_close(logits_half, logits, 0.1)  # 8 bits through 8 layers
    assert isinstance(half.blocks[0].mixer, MixtureOfMemories)


@pytest.mark.parametrize("pattern", [(), ("attention",), (AttentionConfig(2), None)], ids=str)
def test_a_pattern_holds_mixers(pattern):
    with pytest.raises(
        ValueError, match=r"DecoderConfig: needs a pattern of one or more mixer configs, got pattern=\("
    ):
        decoder(pattern)


def test_a_mesh_that_does_not_divide_the_heads_says_so():
    with use_mesh(make_mesh(MeshConfig(data=2, model=4))), pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: decoder().make(rngs=nnx.Rngs(0)))
    assert "needs 'heads' divisible by the 4 devices of mesh axes model, got heads=2" in str(error.value)


def test_full_attention_needs_a_capacity():
    with pytest.raises(ValueError, match="attention: needs a capacity for the cache of full attention"):
        make(decoder()).init_state(B)

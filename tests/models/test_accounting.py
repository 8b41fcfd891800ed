"""What a decoder is said to cost, against the arrays it has and the products that its program holds."""

import dataclasses
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.hgrn import HgrnConfig
from jaxmem.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from jaxmem.layers.linear_attention import SimpleGlaConfig
from jaxmem.layers.mamba import MambaConfig
from jaxmem.layers.memory import MemoryConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.rwkv7 import Rwkv7Config
from jaxmem.layers.tucker_keys import TuckerKeysConfig
from jaxmem.models.accounting import account, count_parameters, summary
from jaxmem.models.decoder import DecoderConfig

KEYS = ProductKeysConfig(n_slots=64, n_heads=2, top_k=3, key_dim=8)
T = 2048
BLOCK, WINDOW_BLOCK = T // 8, 128
"""Tokens per block of `flash_attention`, without and with a window."""
FULL, WINDOW = AttentionConfig(4, 2), AttentionConfig(4, window=96)
GDN = GatedDeltaNetConfig(4, 64, 64)
MOM = MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 64, 64))
PATTERNS = {
    "attention": (FULL,),
    "window": (WINDOW,),
    "gated delta net": (GDN,),
    "mixture": (MOM,),
    "mixture, one kv": (MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 64, 64), single_kv=True, shared_memory=False),),
    "simple gla": (SimpleGlaConfig(4, 64, 64),),
    "kimi": (KimiDeltaAttentionConfig(4, 64, 64),),
    "rwkv7": (Rwkv7Config(4, 64, 64),),
    "hybrid": (MOM, FULL, GDN, WINDOW),
}


def decoder(pattern, **options):
    return DecoderConfig(d_model=256, d_ffn=512, pattern=pattern, repeats=3, vocab_size=512, **options)


def build(config):
    """The model's shapes."""
    return nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))


def product_flops(jaxpr, while_trips):
    """FLOPs of all dot products of a jaxpr, a multiply-add being two; scans times their length.

    while_trips: how often the body of a `while` runs on average, which a jaxpr does not say.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
            total += 2 * width * equation.outvars[0].aval.size
        times = {"scan": equation.params.get("length"), "while": while_trips}.get(equation.primitive.name, 1)
        total += times * sum(
            product_flops(inner, while_trips) for inner in jax.extend.core.jaxprs_in_params(equation.params)
        )
    return total


def counted_flops(config, while_trips=0.0):
    """FLOPs per token of the products in the program of a forward pass with all logits."""
    model, tokens = build(config), jax.ShapeDtypeStruct((1, T), jnp.int32)
    program = jax.make_jaxpr(lambda model, tokens: model.logits(model(tokens)[0]))(model, tokens)
    return product_flops(program.jaxpr, while_trips) / T


def attention_flops(config):
    """FLOPs per token of the pairs of tokens that see each other, pair by pair."""
    ago = np.arange(T)[:, None] - np.arange(T)
    attentions = [mixer for mixer in config.pattern if isinstance(mixer, AttentionConfig)]
    pairs = [np.sum((ago >= 0) & (ago < (mixer.window or T))) for mixer in attentions]
    return config.repeats * sum(4 * config.d_model * int(n) / T for n in pairs)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_parameters_by_part_are_those_of_the_model(pattern):
    config = decoder(pattern, tie_embeddings=False)
    model, cost = build(config), account(config, T)
    assert cost.n_parameters == count_parameters(model)
    assert cost.parameters["embedding"] == cost.parameters["output head"] == 512 * 256
    assert cost.parameters["feed-forward"] == config.n_layers * 3 * 256 * 512
    assert cost.parameters["norms"] == (2 * config.n_layers + 1) * 256
    assert "output head" not in account(decoder(pattern), T).parameters


def test_parameters_of_mixers_stand_under_their_names():
    assert set(account(decoder(PATTERNS["hybrid"]), T).parameters) == {
        "embedding",
        "norms",
        "feed-forward",
        "attention",
        "gated delta net",
        "mixture of memories",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_state_bytes_are_those_of_a_real_state(pattern, dtype):
    config = decoder(pattern, dtype=dtype)
    model = build(config)
    state = jax.eval_shape(lambda: model.init_state(3, capacity=T))
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert 3 * sum(account(config, T).state_bytes.values()) == n_bytes


def test_state_bytes_by_hand():
    cost = account(decoder((FULL, WINDOW, GDN), dtype="bfloat16"), T)
    cursor = 2 * 4  # segment and position
    full = T * (2 * 2 * 64 * 2) + 4 + cursor
    window = 96 * (2 * 4 * 64 * 2) + 4 + cursor
    assert cost.state_bytes == {
        "attention": 3 * (full + window),
        "gated delta net": 3 * (4 * 64 * 64 * 4 + 3 * 4 * 192 * 2 + cursor),
    }


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_forward_flops_are_those_of_the_program(pattern):
    config = decoder(pattern)
    wanted = counted_flops(config) + attention_flops(config)
    assert account(config, T).forward_flops == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    "name, blocks",
    [("attention", (T // BLOCK + 1) / 2), ("window", 2 - WINDOW_BLOCK / T)],  # the first block has none before it
)
def test_attention_visits_little_more_than_the_pairs_that_see_each_other(name, blocks):
    config = decoder(tuple(dataclasses.replace(mixer, implementation="xla") for mixer in PATTERNS[name]))
    visited = counted_flops(config, while_trips=blocks)
    assert account(config, T).forward_flops < visited < 1.15 * account(config, T).forward_flops


def test_a_context_shorter_than_a_window_or_a_chunk_costs_no_more_than_itself():
    window, full = (account(decoder((mixer,)), 64).forward_flops for mixer in (WINDOW, AttentionConfig(4)))
    assert window == full
    assert account(decoder((GDN,)), 8).forward_flops < account(decoder((GDN,)), 64).forward_flops


MEMORIES = {
    "values": MemoryConfig(KEYS, output="swilu", gated=True),
    "experts": MemoryConfig(KEYS, expert="gelu"),
    "tucker": MemoryConfig(TuckerKeysConfig(n_slots=64, n_heads=2, top_k=3, key_dim=8), value_dim=6, output="linear"),
    "tucker, signed": MemoryConfig(TuckerKeysConfig(64, n_heads=2, top_k=3, key_dim=8, core_rank=3, search="signed")),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_costs_its_products(name):
    """Counted as the difference between 16 tokens and 8: what is made of parameters alone costs no token anything."""
    config = MEMORIES[name]
    layer = nnx.eval_shape(lambda: config.make(16, rngs=nnx.Rngs(0)))

    def of_tokens(n):
        x = jax.ShapeDtypeStruct((1, n, 16), jnp.float32)
        return product_flops(jax.make_jaxpr(lambda layer, x: layer(x))(layer, x).jaxpr, while_trips=0)

    counted = (of_tokens(16) - of_tokens(8)) / 8
    weights = {"query", "keys", "core", "gate", "out", "token_gate"}
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(layer, nnx.Param))
    multiplied = sum(a.size for path, a in leaves if path[-2].key in weights)
    assert counted == 2 * multiplied + config.lookup_flops(16)


def test_the_table_names_every_part():
    config = decoder(PATTERNS["hybrid"], remat="block")
    cost = account(config, T)
    text = repr(summary(config, T, name="hybrid"))
    lines = dict(re.split(r"  +(?=[\d,]+)", line.strip(), maxsplit=1) for line in text.splitlines()[1:])
    assert text.startswith("hybrid: 12 layers, d_model 256, float32\n")
    assert lines["parameters"] == f"{cost.n_parameters:,}"
    assert lines[f"state bytes at {T:,} tokens"] == f"{sum(cost.state_bytes.values()):,}"
    assert lines["training, remat block"] == f"{4 * cost.forward_flops:,}"
    for part, n in cost.parameters.items():
        assert re.search(rf"^  {part} +{n:,} +{n / cost.n_parameters:.1%}$", text, re.MULTILINE)


def test_elementwise_recurrences_cost_their_numbers():
    assert HgrnConfig(n_channels=6).mixing_flops(8, T) == 7 * 6
    assert MambaConfig(n_channels=6, n_states=4).mixing_flops(8, T) == 7 * 6 * 4

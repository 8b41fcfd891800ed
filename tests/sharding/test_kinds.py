"""What every parameter of the suite is, against a table; and that nothing that is done to parameters forgets it."""

import dataclasses
import fnmatch
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_laws import MIXERS

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.memory import MemoryConfig, memory_plus, peer, pkm, ultramem
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.tucker_keys import TuckerKeysConfig
from jaxmem.layers.word_experts import mowe
from jaxmem.models.decoder import DecoderConfig, stack_layers
from jaxmem.models.presets import PRESETS
from jaxmem.sharding import VECTOR, matrix, param
from jaxmem.sharding.kinds import Matrix, kind_of, sides
from jaxmem.training.optimizer import parameter_groups

normal = jax.nn.initializers.normal()
D = 16
WIDE = AttentionConfig(2)
EVERY_BIAS = {"query_bias": True, "query_norm": "layer", "key_norm": "rms"}
MEMORIES = {
    "pkm": pkm(64**2),
    "memory+": dataclasses.replace(memory_plus(64**2), gated=True, shared_table=False),
    "peer": peer(64**2),
    "ultramem": ultramem(64**2, 8),
    "biases": MemoryConfig(ProductKeysConfig(16, n_heads=2, top_k=2, key_dim=8, **EVERY_BIAS)),
    "biases, tucker": MemoryConfig(TuckerKeysConfig(16, n_heads=2, top_k=2, key_dim=8, **EVERY_BIAS)),
}
SHARED = memory_plus(64**2)
DECODERS = PRESETS | {
    "shared table": lambda: DecoderConfig(D, D, 2 * (WIDE,), memories=2 * (SHARED,), tie_embeddings=False),
    "word experts": lambda: DecoderConfig(D, D, (WIDE,), memories=(mowe(4, 2),)),
}
KINDS = {  # a matrix as [copies] inputs -> outputs, by the names of its axes; where families differ, each of theirs
    # decoder
    "embedding/table": "rows",
    "output": "rows",
    "ffn/gate": "embed -> ffn",
    "ffn/up": "embed -> ffn",
    "ffn/down": "ffn -> embed",
    "*norm/scale": "vector",
    "*norm/bias": "vector",
    # attention, fast weights
    "query": "embed -> heads key | embed -> None key",
    "key": "embed -> kv_heads key",
    "value": "embed -> kv_heads value | embed -> value",
    "gate": "embed -> 1",
    "gate_bias": "vector",
    "keys": "rows",
    "out": "heads value -> embed | value -> embed",
    # short convolution
    "weight": "vector",
    "taps/*": "vector",
    # projections of recurrences; in a mixture one for each memory
    "projections/mix/*": "vector",
    "projections/bias/*": "vector",
    "projections/down/*": "embed -> rank",
    "projections/weight/decay": "embed -> heads | rank -> heads key",
    "projections/weight/dt": "embed -> heads",
    "projections/weight/forget": "embed -> heads | embed -> heads key",
    "projections/weight/input": "embed -> heads | embed -> heads value",
    "projections/weight/erase": "embed -> heads key",
    "projections/weight/write": "embed -> heads | embed -> tap heads | embed -> heads value",
    "projections/weight/query": "embed -> heads key",
    "projections/weight/key": "embed -> heads key | embed -> tap heads key",
    "projections/weight/value": "embed -> heads value | embed -> tap heads value",
    "projections/weight/b": "embed -> heads key",
    "projections/weight/c": "embed -> heads key",
    "projections/weight/strength": "rank -> heads key",
    "projections/weight/gate": "rank -> heads value",
    "router": "embed -> memory",
    # small parameters of recurrences
    "parameters/a": "vector",
    "parameters/a_log": "vector",
    "parameters/a_imaginary": "vector",
    "parameters/b": "heads -> key | vector",  # Mamba's projection; LSSL's input vector
    "parameters/c": "heads -> key | vector",  # Mamba's projection; a vector for every channel of LSSL
    "parameters/c_real": "vector",
    "parameters/c_imaginary": "vector",
    "parameters/d": "vector",
    "parameters/dt_down": "heads -> rank",
    "parameters/dt_up": "rank -> heads",
    "parameters/recurrence": "[heads] key -> value",
    "parameters/admission": "[heads] key -> value",
    "parameters/*_bias": "vector",
    "parameters/lam": "vector",
    "parameters/log_dt": "vector",
    "parameters/norm": "vector",
    "parameters/erased": "vector",
    "parameters/kept": "vector",
    "parameters/bonus": "vector",
    "parameters/correction": "vector",
    "parameters/query_correction": "vector",
    # outputs of recurrences
    "output/norm": "vector",
    "output/gate": "embed -> heads value | rank -> heads value | heads -> embed",
    "output/gate_down": "embed -> rank",
    "output/gate_bias": "vector",
    "output/value": "heads -> embed",
    "output/out": "heads value -> embed",
    "output/out_bias": "vector",
    # memories
    "*table/values": "memory",
    "*table/inputs": "memory",
    "memory/keys/query": "embed -> heads None key",
    "memory/keys/bias": "vector",
    "memory/keys/keys": "rows",
    "memory/keys/core": "[heads] None -> None",
    "memory/gate": "embed -> value",
    "memory/gate_bias": "vector",
    "memory/token_gate": "embed -> 1",
    "memory/out": "value -> embed",
    "memory/out_bias": "vector",
}


def described(variable):
    """A kind as it is written in the table, where one matrix stands for those of all memories of a mixture."""
    kind = getattr(variable, "kind", None)
    if not isinstance(kind, Matrix):
        return str(kind)
    n_stacked = len(variable.shape) - len(variable.axes)
    inputs, outputs = (" ".join(str(variable.axes[dim - n_stacked]) for dim in dims) for dims in sides(variable))
    copies = " ".join(str(axis) for axis in variable.axes[: kind.n_copies] if axis != "memory")
    return f"{f'[{copies}] ' if copies else ''}{inputs} -> {outputs or '1'}"


def entry(name):
    """The entry of the table for a parameter: of its whole name, or of a pattern."""
    name = re.sub(r"^blocks/\d+/(mixer/)?", "", name)
    patterns = (pattern for pattern in KINDS if fnmatch.fnmatchcase(name, pattern))
    return KINDS.get(name) or KINDS.get(next(patterns, ""), "not in the table")


def variables(module):
    params = nnx.state(module, nnx.Param)
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return dict(zip(parameter_groups(params), leaves, strict=True))


def wrong(make, prefix=""):
    """The parameters whose kinds are not those of the table."""
    parameters = variables(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    found = {name: (described(v), entry(prefix + name)) for name, v in parameters.items()}
    assert found
    return {name: pair for name, pair in found.items() if pair[0] not in pair[1].split(" | ")}


def test_every_parameter_of_every_mixer_says_what_it_is():
    found = {name: wrong(lambda rngs, c=config: c.make(D, rngs=rngs)) for name, (config, _) in MIXERS.items()}
    assert not {name: params for name, params in found.items() if params}


def test_every_parameter_of_memories_says_what_it_is():
    found = {name: wrong(lambda rngs, c=config: c.make(D, rngs=rngs), "memory/") for name, config in MEMORIES.items()}
    assert not {name: params for name, params in found.items() if params}


def test_every_parameter_of_decoders_says_what_it_is():
    found = {name: wrong(lambda rngs, c=config(): c.make(rngs=rngs)) for name, config in DECODERS.items()}
    assert not {name: params for name, params in found.items() if params}


def test_a_parameter_that_says_nothing_or_is_not_in_the_table_is_found():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.gate = param(rngs, normal, (4,), ("embed",))
            self.new = param(rngs, normal, (4,), ("embed",), VECTOR)

    assert wrong(Layer) == {"gate": ("None", "embed -> 1"), "new": ("vector", "not in the table")}


# What is done to parameters keeps what they are.


def test_kinds_outlive_stacking_splitting_compilation_and_arithmetic():
    make = lambda rngs: nnx.List(
        [param(rngs, normal, (3, 4, 2, 5), ("memory", "embed", "heads", "key"), matrix(copies=1))]
    )
    alone = make(nnx.Rngs(0))
    stacked = jax.jit(lambda: stack_layers(6, nnx.Rngs(0), make))()
    graph, state = nnx.split(stacked)
    doubled = jax.tree.map(lambda x: 2 * x, state)
    merged = nnx.merge(graph, doubled)
    for layers in (stacked, state, doubled, merged, jax.eval_shape(lambda: doubled)):
        (variable,) = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, nnx.Variable))
        assert kind_of(variable) == matrix(copies=1) and sides(variable) == ((2,), (3, 4))
    assert sides(alone[0]) == ((1,), (2, 3))


@pytest.mark.parametrize(
    "shape, kind",
    [((4,), VECTOR), ((4, 3), matrix()), ((2, 4, 3), "rows")],
    ids=["one dimension", "two", "three"],
)
def test_without_a_word_dimensions_decide_and_stacked_layers_are_none(shape, kind):
    """Three dimensions could be heads of inputs or of outputs: no guess for Muon."""
    alone = nnx.Param(jnp.zeros(shape), axes=(None,) * len(shape))
    stacked = nnx.Param(jnp.zeros((7, *shape)), axes=(None,) * len(shape))
    assert kind_of(alone) == kind_of(stacked) == kind
    assert kind_of(nnx.Param(jnp.zeros(shape))) == kind


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "kind, message",
    [
        (
            matrix(3),
            r"param: needs a matrix of at least one input dimension within its 2, got kind=Matrix\(n_inputs=3, .*; count",
        ),
        (matrix(1, copies=2), "needs a matrix of at least one input dimension within its 2"),
        (matrix(0), "needs a matrix of at least one input dimension within its 2"),
        ("bias", r"param: needs kind to be matrix\(\), ROWS, MEMORY or VECTOR of .*, got kind='bias'; say what"),
        (jnp.float32, "param: needs kind to be matrix"),
    ],
)
def test_a_kind_that_cannot_be(kind, message):
    with pytest.raises(ValueError, match=message):
        param(nnx.Rngs(0), normal, (4, 6), ("embed", "ffn"), kind)

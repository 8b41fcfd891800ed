"""Folds over devices against folds on one, their gradients and errors; what they cost, counted in compiled programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.algebra import affine
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from jaxmem.layers.linear_attention import SimpleGlaConfig
from jaxmem.layers.mamba import MambaConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.layers.rwkv7 import Rwkv7Config
from jaxmem.layers.state_space import LinearStateSpaceConfig, StateSpaceConfig
from jaxmem.planning.replica_groups import is_alone
from jaxmem.sharding import MeshConfig, constrain, local, make_mesh, use_mesh
from jaxmem.sharding.folds import halo, prefix_fold, sequence_axis

K, V = 3, 4


def on_devices(n):
    return use_mesh(make_mesh(MeshConfig(data=1, seq=n), jax.devices()[:n]))


def prefixes(m, b):
    """The maps before each device, of one map [n, ...] per device."""

    def fold(m, b):
        element = affine.Segment(affine.Matrix(m[0]), b[0])
        nothing = affine.identity(affine.Matrix, (K, V))
        return jax.tree.map(lambda x: x[None], prefix_fold(affine.combine, nothing, element, sequence_axis()))

    axes = ("time", "key", "value")
    m, b = (constrain(x, *axes) for x in (m, b))
    return local(fold, in_axes=(axes, axes), out_axes=affine.Segment(affine.Matrix(axes), axes))(m, b)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_prefixes_of_maps_that_do_not_commute(n):
    rng = np.random.default_rng(n)
    m, b = (rng.normal(size=(n, K, width)).astype(np.float32) for width in (K, V))
    weight = [rng.normal(size=(n, K, width)).astype(np.float32) for width in (K, V)]

    def weighted(prefixes, m, b):
        segment = prefixes(m, b)
        return jnp.sum(segment.M.m * weight[0]) + jnp.sum(segment.B * weight[1])

    def one_by_one(m, b):
        folds = [affine.identity(affine.Matrix, (K, V))]
        for i in range(n - 1):
            folds.append(affine.combine(folds[-1], affine.Segment(affine.Matrix(m[i]), b[i])))
        return jax.tree.map(lambda *x: jnp.stack(x), *folds)

    want = jax.value_and_grad(functools.partial(weighted, one_by_one), (0, 1))(m, b)
    with on_devices(n):
        got = jax.jit(jax.value_and_grad(functools.partial(weighted, prefixes), (0, 1)))(m, b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_a_halo_needs_tokens_enough():
    tokens = ("batch", "time", "embed")
    reach = local(lambda x: halo(x, 3, sequence_axis()), in_axes=(tokens,), out_axes=tokens)
    with (
        on_devices(8),
        pytest.raises(ValueError, match="needs at least 3 tokens per device, .* got 2; use fewer devices"),
    ):
        reach(constrain(jnp.ones((1, 16, 2)), *tokens))


def exchanges(config, n_tokens):
    """(operation, bytes) of every exchange in the compiled forward and backward pass of a layer on 8 devices."""
    with on_devices(8):
        layer = jax.eval_shape(lambda: config.make(16, rngs=nnx.Rngs(0)))
        graph, parameters = nnx.split(layer)

        def loss(parameters, x):
            x = constrain(x, "batch", "time", "embed")
            y, state = nnx.merge(graph, parameters)(x)
            return jnp.sum(y**2) + sum(jnp.sum(a) for a in jax.tree.leaves(state) if a.dtype == jnp.float32)

        x = jax.ShapeDtypeStruct((2, n_tokens, 16), jnp.float32)
        text = jax.jit(jax.grad(loss, (0, 1))).lower(parameters, x).compile().as_text()
    kinds = "collective-permute|all-reduce|all-gather|reduce-scatter|all-to-all"
    exchange = rf"= (.*?) ({kinds})(?:-start)?\("
    text = "\n".join(line for line in text.splitlines() if not is_alone(line))  # of every device with itself
    bodies = re.findall(r"body=%([\w.-]+)", text)
    for computation in text.split("\n\n"):
        if computation.lstrip().startswith(tuple(f"%{body} " for body in bodies)):
            assert not re.search(exchange, computation), "an exchange in every turn of a loop"
    found = re.findall(exchange, text)
    n_bytes = lambda shapes: sum(
        4 * int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"(?:[fs]32|c64)\[([0-9,]*)\]", shapes)
    )
    return sorted((kind, n_bytes(shapes)) for shapes, kind in found)


DELTA = GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=6, chunk_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DELTA, MixtureOfMemoriesConfig(DELTA)], ids=["delta", "mixture"])
def test_exchanges_do_not_grow_with_the_sequence(config):
    """As many, of as many bytes, for 256 tokens as for 1024; none gathers the sequence."""
    short, long = exchanges(config, 256), exchanges(config, 1024)
    assert short == long and short
    largest = max(n for kind, n in long if kind != "all-reduce")  # gradients of parameters are reduced
    memories = 5 if isinstance(config, MixtureOfMemoriesConfig) else 1
    assert largest <= 2 * memories * max(DELTA.n_heads * 4 * (4 + 6), 3 * 2 * (4 + 4 + 6)) * 4
    assert not any(kind in ("all-gather", "all-to-all") for kind, _ in long)


SIZES = {"n_heads": 2, "key_dim": 4, "value_dim": 6, "chunk_tokens": 8}
OTHERS = {
    "scalar": SimpleGlaConfig(**SIZES),
    "per channel": KimiDeltaAttentionConfig(**SIZES),
    "low rank, shifted": Rwkv7Config(**SIZES, decay_rank=3, strength_rank=3, gate_rank=3),
    "elementwise": MambaConfig(n_channels=6, n_states=3, dt_rank=2, chunk_tokens=8),
    "invariant": LinearStateSpaceConfig(n_channels=16, n_states=6, chunk_tokens=8),
    "complex": StateSpaceConfig(n_channels=16, n_states=6, chunk_tokens=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_exchanges_of_every_kind_do_not_grow_with_the_sequence(config):
    short, long = exchanges(config, 256), exchanges(config, 1024)
    assert short == long and short
    assert not any(kind in ("all-gather", "all-to-all") for kind, _ in long)

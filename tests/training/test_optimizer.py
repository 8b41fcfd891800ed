"""Optimisers against numpy, the structural rules, Muon's spectrum, schedules by hand, meshes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmem.layers.embedding import Embedding
from jaxmem.layers.feed_forward import SwiGLU
from jaxmem.layers.norm import RMSNorm
from jaxmem.sharding import ROWS, VECTOR, MeshConfig, current_mesh, make_mesh, matrix, param, param_spec, use_mesh
from jaxmem.training.optimizer import (
    OptimizerConfig,
    group_norms,
    make_optimizer,
    make_schedule,
    matrix_dimensions,
    parameter_groups,
    without_kind,
)


class Model(nnx.Module):
    """One parameter of every kind that the rules tell apart."""

    def __init__(self, rngs):
        init = jax.nn.initializers.normal(0.1)
        self.embedding = Embedding(64, 8, rngs=rngs)
        self.ffn = SwiGLU(8, 16, rngs=rngs)
        self.norm = RMSNorm(8, rngs=rngs)
        self.query = param(rngs, init, (8, 2, 6), ("embed", "heads", "key"), matrix())
        self.out = param(rngs, init, (2, 6, 8), ("heads", "value", "embed"), matrix(2))
        self.dt_bias = param(rngs, init, (2, 6), ("heads", "key"), VECTOR)
        self.bias = param(rngs, init, (2, 2, 6), ("heads", None, "key"), VECTOR)  # of product keys' queries
        self.b = param(rngs, init, (12, 3), ("heads", "key"), matrix())  # Mamba's, of axes like dt_bias's
        self.a_log = param(rngs, init, (2,), ("heads",), VECTOR)
        self.token_gate = param(rngs, init, (8,), ("embed",), matrix())
        self.router = param(rngs, init, (8, 4), ("embed", "memory"), matrix())
        self.taps = param(rngs, init, (4, 2, 6), ("tap", "heads", "key"), VECTOR)
        self.per_memory = param(rngs, init, (4, 8, 2, 6), ("memory", "embed", "heads", "key"), matrix(copies=1))
        self.blocks = param(rngs, init, (2, 6, 6), ("heads", "key", "value"), matrix(copies=1))  # Griffin's gates
        self.stacked = nnx.Param(init(rngs.params(), (3, 8, 16)), axes=("embed", "ffn"))
        self.heads = nnx.Param(init(rngs.params(), (8, 2, 6)), axes=("embed", "heads", "key"))


SHAPES = {"query": (8, 12), "out": (12, 8), "per_memory": (4, 8, 12), "stacked": (3, 8, 16), "router": (8, 4)}
SHAPES |= {"ffn/gate": (8, 16), "ffn/up": (8, 16), "ffn/down": (16, 8), "b": (12, 3), "blocks": (2, 6, 6)}
"""Of the matrices, copies first."""
DECAYED = {*SHAPES, "embedding/table", "token_gate", "heads"}
"""Rows, a matrix with one output, and three dimensions that say nothing: not for Muon."""


@functools.cache
def initial_values():
    return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def parameters():
    """The model's parameters, always the same, in the layout of the mesh in force."""

    def placed(variable):
        value = np.asarray(variable[...])
        spec = None if current_mesh() is None else param_spec(variable.axes, value.shape)
        return variable.replace(jax.device_put(value, spec))

    return jax.tree.map(placed, initial_values(), is_leaf=lambda node: isinstance(node, nnx.Param))


def gradients_like(params, seed=0):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.device_put(numbers.normal(size=leaf.shape).astype(np.float32), leaf.sharding), params
    )


def named(tree):
    return dict(zip(parameter_groups(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def updates_of(config, params, n_steps=1):
    """The last of n updates, the parameters moving along."""
    optimizer = make_optimizer(config, 10, params)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return updates, state, optax.apply_updates(params, updates)

    for step in range(n_steps):
        updates, state, params = update(gradients_like(params, step), state, params)
    return updates


def test_adamw_against_numpy_for_three_steps():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=2, weight_decay=0.5, clip_norm=1.0)
    params = parameters()
    w = {name: array.astype(np.float64) for name, array in named(params).items()}
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in range(2))

    wanted = {}
    for step in range(3):
        g = {name: array.astype(np.float64) for name, array in named(gradients_like(params, step)).items()}
        norm = np.sqrt(sum(np.sum(np.square(array)) for array in g.values()))
        for name in w:
            clipped = g[name] / max(1.0, norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.95 * v[name] + 0.05 * clipped**2
            mean, square = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.5 * w[name] if name in DECAYED else 0.0
            wanted[name] = -0.1 * min(1.0, (step + 1) / 2) * (mean / (np.sqrt(square) + 1e-8) + decay)
            w[name] = w[name] + wanted[name]

    for name, update in named(updates_of(config, params, n_steps=3)).items():
        np.testing.assert_allclose(update, wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_and_rows_are_decayed_and_vectors_are_not(kind):
    params = parameters()
    config = OptimizerConfig(kind=kind, learning_rate=0.5, schedule="constant", weight_decay=0.1)
    optimizer = make_optimizer(config, 10, params)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(still, jax.jit(optimizer.init)(params), params)
    values = named(params)
    for name, update in named(updates).items():
        np.testing.assert_allclose(update, -0.05 * values[name] * (name in DECAYED), atol=1e-7, err_msg=name)


def test_muon_gives_every_matrix_a_flat_spectrum_and_the_rest_to_adam():
    params = parameters()
    options = dict(learning_rate=1.0, schedule="constant", weight_decay=0.0)
    updates = named(updates_of(OptimizerConfig(kind="muon", **options), params))
    adam = named(updates_of(OptimizerConfig(kind="adamw", **options), params))

    for name, update in updates.items():
        if name in SHAPES:
            matrices = update.reshape(SHAPES[name])
            singular = np.linalg.svd(matrices, compute_uv=False) / (0.2 * np.sqrt(max(matrices.shape[-2:])))
            assert np.all((singular > 0.5) & (singular < 1.3)), (name, singular)
            assert 0.1 < np.sqrt(np.mean(update**2)) < 0.25
        else:
            np.testing.assert_allclose(update, adam[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharded_equals_unsharded(kind):
    def some_parameters():
        params = parameters()
        return nnx.State({name: params[name] for name in ("embedding", "norm", "query", "out", "stacked")})

    config = OptimizerConfig(kind=kind, learning_rate=0.1, warmup_steps=2)
    wanted = named(updates_of(config, some_parameters(), n_steps=2))
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, model=2))):
        params = some_parameters()
        updates = updates_of(config, params, n_steps=2)
        for update, parameter in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert update.sharding.is_equivalent_to(parameter.sharding, update.ndim)
        got = named(updates)
    for name, update in wanted.items():
        np.testing.assert_allclose(got[name], update, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_a_tree_of_arrays_and_can_be_made_from_shapes(kind):
    params = parameters()
    shapes = jax.eval_shape(lambda: params)
    optimizer = make_optimizer(OptimizerConfig(kind=kind), 10, shapes)
    state = jax.jit(optimizer.init)(params)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.structure(jax.eval_shape(optimizer.init, shapes)) == treedef
    jax.eval_shape(optimizer.update, shapes, treedef.unflatten(leaves), shapes)


@pytest.mark.parametrize(
    "axes, shape, kind, wanted",
    [
        (("embed", "heads"), (8, 2), matrix(), ((0,), (1,))),
        (("heads", "value", "embed"), (2, 6, 8), matrix(2), ((0, 1), (2,))),
        (("memory", "embed", "kv_heads", "key"), (4, 8, 2, 6), matrix(copies=1), ((1,), (2, 3))),
        (("heads", "key", "value"), (2, 6, 6), matrix(copies=1), ((1,), (2,))),
        (("heads", "key", "value"), (5, 2, 6, 6), matrix(copies=1), ((2,), (3,))),
        (("embed",), (12, 8), matrix(), ((1,), ())),
        (("heads", "key"), (12, 3), VECTOR, None),
        (("vocab", "embed"), (64, 8), ROWS, None),
        ((None, None), (4, 3), None, ((0,), (1,))),
        ((None, "heads", "key"), (4, 2, 6), None, None),
        (("embed",), (12, 8), None, None),
    ],
    ids=str,
)
def test_matrix_dimensions(axes, shape, kind, wanted):
    assert matrix_dimensions(nnx.Param(jnp.zeros(shape), axes=axes, kind=kind)) == wanted


def test_parameters_that_do_not_say_what_they_are_are_told():
    params = parameters()
    assert without_kind(params) == (
        "parameters that do not say what they are, taken by their dimensions: stacked (matrices, as they have two: decayed, "
        "and given to Muon if that is the optimiser); heads (rows, as they have more: decayed, not given to Muon); "
        "param(..., kind=...) says it"
    )
    assert without_kind(nnx.State({"query": params["query"]})) is None


@pytest.mark.parametrize(
    "config, total_steps, wanted",
    [
        (OptimizerConfig(learning_rate=2.0, schedule="constant", warmup_steps=2), 5, {0: 1.0, 1: 2.0, 4: 2.0, 9: 2.0}),
        (
            OptimizerConfig(learning_rate=2.0, warmup_steps=2, final_fraction=0.5),
            10,
            {0: 1.0, 1: 2.0, 2: 2.0, 4: 1.5 + 0.5**1.5, 6: 1.5, 10: 1.0, 11: 1.0},
        ),
        (
            OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_steps=1, decay_fraction=0.4, final_fraction=0.0),
            10,
            {0: 2.0, 6: 2.0, 7: 1.5, 8: 1.0, 9: 0.5, 10: 0.0},
        ),
    ],
    ids=["constant", "cosine", "wsd"],
)
def test_schedules_by_hand(config, total_steps, wanted):
    rate = make_schedule(config, total_steps)
    for step, value in wanted.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-7, err_msg=f"{step=}")


def test_groups_say_where_a_gradient_is_not_finite():
    params = parameters()
    params["ffn"]["up"][...] = params["ffn"]["up"][...].at[0, 0].set(jnp.nan)
    norms = jax.jit(group_norms)(params)
    assert [name for name, norm in norms.items() if not np.isfinite(norm)] == ["ffn"]
    np.testing.assert_allclose(norms["norm"], np.sqrt(8), rtol=1e-6)
    assert parameter_groups(params)["query"] == "query"


def test_warm_up_and_decay_overlap_in_a_run_too_short_for_both():
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="wsd", decay_fraction=1.0), 2)
    assert [float(rate(step)) for step in range(2)] == pytest.approx([0.25, 0.5 * (1 - 0.9 / 2)])
    cosine = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 2)
    assert [float(cosine(step)) for step in range(2)] == pytest.approx([0.25, 0.5])


def test_a_schedule_needs_steps():
    with pytest.raises(ValueError, match="schedule: needs total_steps >= 1, got total_steps=0; train for some steps"):
        make_schedule(OptimizerConfig(), 0)


@pytest.mark.parametrize("leaf", [jnp.zeros((2, 2)), nnx.Param(jnp.zeros((2, 2)))], ids=["array", "param"])
def test_parameters_without_axes(leaf):
    with pytest.raises(ValueError, match=r"optimizer: needs parameters with logical axes, got .* without axes; make"):
        make_optimizer(OptimizerConfig(), 10, {"w": leaf})

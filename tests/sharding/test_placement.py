"""`param`, `constrain`, `einsum`, `local`: the identity without a mesh, the layouts of the rules with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.sharding import (
    MeshConfig,
    Rules,
    constrain,
    current_mesh,
    einsum,
    local,
    make_mesh,
    mesh_axes,
    named_sharding,
    param,
    param_spec,
    stored_like,
    use_mesh,
)

DATA = ("data", "fsdp")
X_AXES, WIDE = ("batch", "time", "embed"), ("batch", "time", "ffn")
INTO = ("embed", "ffn")
normal = jax.random.normal


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, model=2))


def spec_of(x) -> P:
    """The spec that JAX knows while tracing: what the next operation is checked against."""
    return jax.typeof(x).sharding.spec


def weight() -> nnx.Param:
    return param(nnx.Rngs(0), normal, (4, 6), INTO)


def test_a_parameter_is_fp32_knows_its_axes_and_does_not_depend_on_the_mesh(mesh):
    alone = weight()
    assert alone.dtype == jnp.float32 and alone.axes == INTO
    with use_mesh(mesh):
        born = [weight(), jax.jit(weight)()]
    for sharded in born:
        assert sharded.axes == INTO
        assert sharded[...].sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", "model")), 2)
        assert {shard.data.shape for shard in sharded[...].addressable_shards} == {(2, 3)}
        np.testing.assert_array_equal(sharded[...], alone[...])


def test_stacked_parameters_keep_the_layer_axis_whole(mesh):
    def stacked():
        keys = jax.random.split(jax.random.key(0), 3)
        return jax.vmap(lambda key: param(nnx.Rngs(params=key), normal, (4, 6), INTO))(keys)

    with use_mesh(mesh):
        parameter = jax.jit(stacked)()
        assert param_spec(parameter.axes, parameter.shape) == P(None, "fsdp", "model")
    assert parameter[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", "model")), 3)


@pytest.mark.parametrize("config", [None, MeshConfig()], ids=["alone", "mesh"])
def test_a_parameter_needs_an_axis_per_dimension(config):
    message = r"param: needs one logical axis per dimension, got shape=\(4, 6\) and axes=\('embed',\)"
    with use_mesh(config and make_mesh(config)), pytest.raises(ValueError, match=message):
        param(nnx.Rngs(0), normal, (4, 6), ("embed",))


@pytest.mark.parametrize(
    "make, axis, devices",
    [
        (lambda: param(nnx.Rngs(0), normal, (4, 3, 2), ("embed", "heads", "key")), "heads=3", 2),
        (lambda: param(nnx.Rngs(0), normal, (5, 2), ("embed", "ffn")), "embed=5", 2),
        (lambda: constrain(jnp.zeros((6, 2)), "batch", "time"), "batch=6", 4),
    ],
    ids=["heads", "embed", "batch"],
)
def test_dimensions_that_the_mesh_does_not_divide(mesh, make, axis, devices):
    name = axis.split("=")[0]
    message = f"needs '{name}' divisible by the {devices} devices of mesh axes .*, got {axis} .*; change {name} or the"
    with use_mesh(mesh), pytest.raises(ValueError, match=message):
        make()
    assert make().size  # any size will do without a mesh


def test_everything_is_the_identity_without_a_mesh():
    x, w = jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((4, 6))
    f = lambda x: x + 1
    assert constrain(x, *X_AXES) is x
    assert local(f, (X_AXES,), X_AXES)(x).sharding == x.sharding
    assert mesh_axes("batch", "heads") == ()
    np.testing.assert_array_equal(einsum("btd,df->btf", x, w, WIDE), jnp.einsum("btd,df->btf", x, w))
    assert stored_like(x, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_constrain_and_einsum_say_where_results_live(mesh):
    seen = {}

    @jax.jit
    def run(x, gate, down):
        x = constrain(x, *X_AXES)
        wide = einsum("btd,df->btf", x, gate, WIDE)
        y = einsum("btf,fd->btd", wide, down, X_AXES)
        seen.update(x=spec_of(x), wide=spec_of(wide), y=spec_of(y))
        return y

    numbers = np.random.default_rng(0)
    x, gate, down = (numbers.normal(size=s).astype(np.float32) for s in ((8, 3, 4), (4, 6), (6, 4)))
    with use_mesh(mesh):
        y = run(x, *(jax.device_put(w, param_spec(axes, w.shape)) for w, axes in ((gate, INTO), (down, INTO[::-1]))))
    assert seen == {"x": P(DATA, "seq", None), "wide": P(DATA, "seq", "model"), "y": P(DATA, "seq", None)}
    assert y.sharding.is_equivalent_to(named_sharding(mesh, *X_AXES), 3)
    np.testing.assert_allclose(y, x @ gate @ down, rtol=1e-5, atol=1e-5)


def test_einsum_takes_the_dtype_of_the_activation(mesh):
    x, w = jnp.ones((8, 3, 4), jnp.bfloat16), jnp.full((4, 6), 1 + 2**-12)
    for context in (None, mesh):
        with use_mesh(context):
            assert einsum("btd,df->btf", x, w, WIDE).dtype == jnp.bfloat16


def test_gradients_keep_the_layout_and_dtype_of_their_parameter(mesh):
    seen = {}

    @jax.jit
    def gradient(w, x):
        g = jax.grad(lambda w: jnp.sum(jnp.sin(einsum("btd,df->btf", constrain(x, *X_AXES), w, WIDE))))(w)
        seen["gradient"] = spec_of(g)
        return g

    x = jnp.sin(jnp.arange(96.0).reshape(8, 3, 4)).astype(jnp.bfloat16)
    wanted = gradient(weight()[...], x)
    with use_mesh(mesh):
        w = weight()[...]
        got = gradient(w, x)
    assert seen["gradient"] == P("fsdp", "model") and got.dtype == jnp.float32
    assert got.sharding.is_equivalent_to(w.sharding, 2)
    # Each of four devices rounds its part of the sum over tokens, up to 6, to the 8 bits of bf16.
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=6 * 2**-8)


def test_stored_like_puts_a_gradient_where_its_parameter_is(mesh):
    with use_mesh(mesh):
        w = weight()[...]
        stored = jax.jit(lambda w: stored_like(w, constrain(jnp.ones(w.shape, jnp.bfloat16), None, None)))(w)
    assert stored.dtype == jnp.float32 and stored.sharding.is_equivalent_to(w.sharding, 2)


def test_a_local_island_sees_one_shard_and_no_mesh(mesh):
    seen = {}

    def own(pair, scale):
        seen.update(x=pair["x"].shape, h=pair["h"].shape, mesh=current_mesh())
        outer = einsum("bth,d->btd", pair["h"], constrain(scale, "embed"), X_AXES)
        return {"x": pair["x"] + jax.lax.psum(outer, owners)}, pair["h"] * 2

    heads = ("batch", "time", "heads")
    with use_mesh(mesh):
        owners = mesh_axes("heads")
        assert owners == ("model",) and mesh_axes("batch", "vocab") == ("data", "fsdp", "model")
        island = local(own, ({"x": X_AXES, "h": heads}, ("embed",)), ({"x": X_AXES}, heads))
        x = constrain(jnp.ones((8, 3, 4)), *X_AXES)
        h = constrain(jnp.ones((8, 3, 2)), *heads)
        out, doubled = jax.jit(lambda x, h: island({"x": x, "h": h}, jnp.ones(4)))(x, h)
    assert (seen["x"], seen["h"], seen["mesh"]) == ((2, 3, 4), (2, 3, 1), None)
    np.testing.assert_array_equal(out["x"], np.full((8, 3, 4), 3.0))
    assert doubled.sharding.is_equivalent_to(named_sharding(mesh, *heads), 3)


def test_rules_of_the_users_choice_decide(mesh):
    rules = Rules(parameters={**Rules().parameters, "embed": (), "ffn": ("fsdp", "model")})
    with use_mesh(mesh, rules):
        w = jax.jit(lambda: param(nnx.Rngs(0), normal, (4, 8), ("embed", "ffn")))()
    assert w[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, ("fsdp", "model"))), 2)


def test_a_layer_runs_where_the_compiler_lays_out(mesh):
    def layer(x, w):
        return constrain(einsum("btd,df->btf", x, w, WIDE), *WIDE)

    x = jnp.sin(jnp.arange(96.0).reshape(8, 3, 4))
    wanted = layer(x, weight()[...])
    with use_mesh(mesh):
        out = named_sharding(mesh, *WIDE).spec
        y = jax.jit(jax.sharding.auto_axes(layer, out_sharding=out))(constrain(x, *X_AXES), weight()[...])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)

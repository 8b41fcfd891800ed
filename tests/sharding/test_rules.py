"""Rules: specs by hand, each error's text, and which mesh and rules are in force where."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmem.sharding import MESH_AXES, MeshConfig, Rules, current_mesh, current_rules, local, make_mesh, use_mesh

DATA = ("data", "fsdp")


@pytest.mark.parametrize(
    "axes, parameters",
    [
        (("vocab", "embed"), P("model", "fsdp")),
        (("embed", "heads", "key"), P("fsdp", "model", None)),
        (("memory", "embed", "kv_heads", "value"), P(None, "fsdp", "model", None)),
        (("ffn", "embed"), P("model", "fsdp")),
        (("tap", "heads", "value"), P(None, "model", None)),
        (("heads",), P("model")),
        ((None, "embed"), P(None, "fsdp")),
        ((), P()),
    ],
    ids=str,
)
def test_parameters_by_hand(axes, parameters):
    assert Rules().spec(axes, "parameters") == parameters


@pytest.mark.parametrize(
    "axes, activations",
    [
        (("batch", "time", "embed"), P(DATA, "seq", None)),
        (("batch", "time", "heads", "key"), P(DATA, "seq", "model", None)),
        (("batch", "time", "vocab"), P(DATA, "seq", "model")),
        (("batch", "memory", "heads", "key", "value"), P(DATA, None, "model", None, None)),
        (("vocab", "embed"), P("model", None)),
        ((None, None), P(None, None)),
    ],
    ids=str,
)
def test_activations_by_hand(axes, activations):
    assert Rules().spec(axes, "activations") == activations


def test_an_unknown_axis():
    with pytest.raises(ValueError) as error:
        Rules().spec(("batch", "hedas"), "activations")
    assert str(error.value).startswith(
        "sharding rules: needs a known logical axis for activations, got 'hedas' in ('batch', 'hedas'); "
        "use one of ['batch', 'embed', 'ffn', 'heads', "
    )
    assert str(error.value).endswith("or add it to Rules.activations")


def test_batch_is_no_axis_of_parameters():
    with pytest.raises(ValueError, match="needs a known logical axis for parameters, got 'batch'"):
        Rules().spec(("batch",), "parameters")


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(ValueError) as error:
        Rules().spec(("heads", "time", "ffn"), "activations")
    assert str(error.value) == (
        "sharding rules: needs each mesh axis at most once in an array, got 'model' for both 'heads' and 'ffn' in "
        "('heads', 'time', 'ffn'); change one of the two in Rules.activations"
    )


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (
            ("batch", "time"),
            (6, 16),
            "sharding rules: needs 'batch' divisible by the 4 devices of mesh axes dataxfsdp, got batch=6 in an array "
            "of shape (6, 16); change batch or the mesh",
        ),
        (
            ("batch", "time", "heads"),
            (8, 16, 3),
            "sharding rules: needs 'heads' divisible by the 2 devices of mesh axes model, got heads=3 in an array "
            "of shape (8, 16, 3); change heads or the mesh",
        ),
    ],
    ids=["batch", "heads"],
)
def test_a_mesh_that_does_not_divide_a_dimension(axes, shape, message):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with pytest.raises(ValueError) as error:
        Rules().spec(axes, "activations", shape, mesh)
    assert str(error.value) == message


def test_an_axis_for_every_dimension():
    with pytest.raises(ValueError, match=r"needs one logical axis per dimension, got \('batch',\) .* shape \(8, 4\);"):
        Rules().spec(("batch",), "activations", (8, 4), make_mesh())


def test_the_mesh_and_the_rules_of_the_innermost_use_mesh_are_in_force_and_given_back():
    outer, inner = make_mesh(), make_mesh(MeshConfig(data=1, model=8))
    rules = Rules(activations={**Rules().activations, "batch": ("data",)})
    assert current_mesh() is None
    with use_mesh(outer, rules):
        assert current_mesh().shape["data"] == 8 and current_rules() is rules
        with pytest.raises(KeyError), use_mesh(inner):
            assert current_mesh().shape["model"] == 8 and current_rules() == Rules()
            raise KeyError
        with use_mesh(None):
            assert current_mesh().shape["data"] == 8 and current_rules() is rules
        assert current_mesh().shape["data"] == 8 and current_rules() is rules
    assert current_mesh() is None and current_rules() == Rules()


def test_no_mesh_is_in_force_where_layouts_are_not_ours_to_name():
    seen = {}

    def look(where, x):
        seen[where] = current_mesh()
        return x

    with use_mesh(make_mesh()):
        x = jax.reshard(jnp.zeros(8), P(DATA))
        island = local(lambda x: look("island", x), (("batch",),), ("batch",))
        auto = jax.sharding.auto_axes(lambda x: look("auto", x), out_sharding=P(DATA))
        jax.jit(lambda x: look("jit", auto(island(x))))(x)
    assert seen["jit"] is not None and seen["island"] is None and seen["auto"] is None


@pytest.mark.parametrize(
    "names, kind, got",
    [
        (("data",), AxisType.Explicit, "{'data': 'Explicit'}"),
        (MESH_AXES, AxisType.Auto, "{'data': 'Auto', 'fsdp': 'Auto', 'seq': 'Auto', 'model': 'Auto'}"),
    ],
    ids=["names", "types"],
)
def test_another_kind_of_mesh(names, kind, got):
    mesh = jax.make_mesh((8, 1, 1, 1)[: len(names)], names, axis_types=(kind,) * len(names))
    with pytest.raises(ValueError) as error, use_mesh(mesh):
        pass
    assert str(error.value) == (
        f"use_mesh: needs the axes data, fsdp, seq, model, all explicit, got {got}; make the mesh with make_mesh"
    )

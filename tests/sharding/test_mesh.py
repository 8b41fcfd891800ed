"""The mesh: sizes, leftovers, axis types, and what each impossible mesh is told."""

import jax
import pytest
from jax.sharding import AxisType

from jaxmem.sharding import MESH_AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2, model=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(data=2, model=-1), (2, 1, 1, 4)),
        (MeshConfig(data=1, fsdp=4, model=2), (1, 4, 1, 2)),
    ],
    ids=str,
)
def test_all_axes_are_present_and_one_takes_the_devices_that_are_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Explicit,) * 4
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_over_some_devices():
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[2:6])
    assert mesh.devices.shape == (2, 2, 1, 1) and set(mesh.devices.flat) == set(jax.devices()[2:6])


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3}, {"data": 2}, {"data": 16}, {"fsdp": 3}, {"fsdp": 16}, {"data": 2, "fsdp": 2, "model": 4}],
    ids=str,
)
def test_sizes_must_multiply_to_the_number_of_devices(sizes):
    config = MeshConfig(**sizes)
    with pytest.raises(ValueError) as error:
        make_mesh(config)
    assert str(error.value) == (
        f"mesh: needs data x fsdp x seq x model = 8 devices, got {dict(zip(MESH_AXES, config.sizes))}; "
        "change the sizes or the number of devices"
    )


@pytest.mark.parametrize("sizes", [{"data": 0}, {"model": -1}, {"data": 1, "seq": 0}], ids=str)
def test_sizes_are_positive_but_for_one(sizes):
    with pytest.raises(ValueError, match=r"mesh: needs positive sizes with at most one -1 .*, got {'data': .*; change"):
        MeshConfig(**sizes)

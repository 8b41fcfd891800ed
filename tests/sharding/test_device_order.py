"""Rings on grids of chips that are not here."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmem.sharding.device_order import arrange, longest_hop, snake, wraps


def chips(*dims, kind="TPU v5"):
    places = np.ndindex(*dims[::-1])  # x counts fastest, as on TPUs
    return [
        SimpleNamespace(id=i, coords=place[::-1], core_on_chip=0, device_kind=kind, platform="tpu", process_index=0)
        for i, place in enumerate(places)
    ]


@pytest.mark.parametrize("dims", [(2, 2), (2, 5), (5, 2), (4, 4), (3, 4), (2, 2, 2), (3, 3, 4), (4, 3, 3), (4, 4, 8)])
def test_a_snake_is_a_closed_walk(dims):
    order = snake(dims)
    assert sorted(order) == list(range(np.prod(dims)))
    places = np.array(np.unravel_index(order, dims)).T
    np.testing.assert_array_equal(np.abs(places - np.roll(places, -1, axis=0)).sum(axis=-1), 1)


RINGS = {  # dims, kind, sizes, hop of the worst ring
    "a line that wraps": ((16, 16, 1), "TPU v5 lite", (16, 1, 16, 1), 1),
    "a line that does not": ((8, 8, 1), "TPU v5 lite", (8, 1, 8, 1), 1),
    "a whole slice": ((8, 8, 1), "TPU v6 lite", (1, 1, 64, 1), 1),
    "a torus": ((4, 4, 4), "TPU v5", (1, 1, 64, 1), 1),
    "beside others": ((4, 4, 8), "TPU v5", (2, 2, 16, 2), 1),
    "a box": ((2, 2, 4), "TPU v5", (1, 1, 8, 2), 1),
    "two rows of three": ((2, 3, 1), "TPU v5", (2, 1, 3, 1), 2),
}


@pytest.mark.usefixtures("unchecked")  # these are no real devices
@pytest.mark.parametrize("name", RINGS)
def test_neighbours_are_linked(name):
    dims, kind, sizes, hop = RINGS[name]
    devices = chips(*dims, kind=kind)
    mesh = arrange(devices, sizes, ring=2)
    assert mesh.shape == sizes and {device.id for device in mesh.flat} == set(range(len(devices)))
    rings = np.moveaxis(mesh, 2, -1).reshape(-1, sizes[2])
    wrapped = wraps(dims, flat="lite" in kind)
    places = [np.array([device.coords for device in ring]) for ring in rings]
    assert [longest_hop(ring, dims, wrapped) for ring in places] == [hop] * len(rings)

"""Groups of devices as XLA's programs write them, in every form, and of programs that this jax compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmem.planning.overlap import exchanged_bytes
from jaxmem.planning.replica_groups import is_alone, replica_groups

FORMS = {
    "{{0,1},{2,3}}": [(0, 1), (2, 3)],
    "{{3,1,0,2}}": [(3, 1, 0, 2)],
    "{}": [],
    "[1,4]<=[4]": [(0, 1, 2, 3)],
    "[4,1]<=[4]": [(0,), (1,), (2,), (3,)],
    "[2,4]<=[4,2]T(1,0)": [(0, 2, 4, 6), (1, 3, 5, 7)],
    "[4,2]<=[2,2,2]T(0,2,1)": [(0, 2), (1, 3), (4, 6), (5, 7)],
    "mesh['a'=4,'b'=2] {'a'}": [(0, 2, 4, 6), (1, 3, 5, 7)],
    "mesh['a'=4,'b'=2] {'b'}": [(0, 1), (2, 3), (4, 5), (6, 7)],
    "mesh['a'=2,'b'=2] {'b','a'}": [(0, 2, 1, 3)],  # the first axis outermost
    "mesh['a'=2,'b'=2,'c'=1] {'c'}": [(0,), (1,), (2,), (3,)],
    "mesh['a'=2,'b'=2] {}": [(0,), (1,), (2,), (3,)],
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}": [(3, 0), (1, 2)],
    "mesh['x'=8] {'x':(2)2}": [(0, 2), (1, 3), (4, 6), (5, 7)],  # the middle of 2 x 2 x 2
    "mesh['x'=8] {'x':(1)2}": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "mesh['x'=8] {'x':(4)2,'x':(1)2}": [(0, 4, 1, 5), (2, 6, 3, 7)],
}


@pytest.mark.parametrize("text, groups", FORMS.items(), ids=FORMS)
def test_every_form(text, groups):
    line = f"  %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert replica_groups(line) == groups
    assert is_alone(line) == (len(groups) > 1 and len(groups[0]) == 1)


def test_lines_without_groups():
    assert replica_groups("  %s = f32[16]{0} add(%x, %y)") is None
    shift = "  %p = f32[16]{0} collective-permute(%x), source_target_pairs="
    assert is_alone(shift + "{{0,0},{1,1}}") and not is_alone(shift + "{{0,1},{1,0}}")


@pytest.mark.parametrize("axes", [("a",), ("b",), ("b", "a"), ("c",)], ids="".join)
def test_groups_of_a_program_are_those_of_the_mesh(axes):
    """However this version of XLA writes them: devices that differ along `axes` alone, in the order of the axes."""
    mesh = jax.make_mesh((4, 2, 1), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P(), check_vma=False)
    def gathered(x):
        return jax.lax.all_gather(x, axes)

    text = gathered.lower(jnp.zeros((8, 8))).compile().as_text()
    lines = [line for line in text.splitlines() if " all-gather(" in line]
    if axes == ("c",):
        assert all(map(is_alone, lines)) and exchanged_bytes(text) == {}
        return
    (line,) = lines
    ids = np.array([d.id for d in mesh.devices.flat]).reshape(4, 2, 1)
    last = ids.transpose([i for i in range(3) if "abc"[i] not in axes] + ["abc".index(axis) for axis in axes])
    n_devices = int(np.prod([mesh.shape[axis] for axis in axes]))
    assert replica_groups(line) == [tuple(group) for group in last.reshape(-1, n_devices).tolist()]
    assert exchanged_bytes(text) == {"all-gather": [n_devices * 2 * 4 * 4]}

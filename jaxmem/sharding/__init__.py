"""One mesh, one set of rules, and the words layers use to place their arrays."""

from jaxmem.sharding.kinds import MEMORY, ROWS, VECTOR, matrix
from jaxmem.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from jaxmem.sharding.placement import (
    constrain,
    einsum,
    local,
    mesh_axes,
    n_shards_of,
    named_sharding,
    param,
    param_spec,
    stored_like,
    sum_over,
)
from jaxmem.sharding.rules import Rules, current_mesh, current_rules, use_mesh

__all__ = [
    "MEMORY",
    "MESH_AXES",
    "ROWS",
    "VECTOR",
    "MeshConfig",
    "Rules",
    "constrain",
    "current_mesh",
    "current_rules",
    "einsum",
    "local",
    "make_mesh",
    "matrix",
    "mesh_axes",
    "n_shards_of",
    "named_sharding",
    "param",
    "param_spec",
    "stored_like",
    "sum_over",
    "use_mesh",
]

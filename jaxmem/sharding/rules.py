"""Rules: which mesh axes split which logical axis, checked once, in one place.

Layers name what a dimension *is* ("batch", "heads", "embed"); only `Rules` knows where it goes. Parameters and
activations have a table each because `fsdp` splits the width of a stored parameter but the rows of an activation.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxmem.fields import checked
from jaxmem.sharding.mesh import MESH_AXES, Layout, MeshConfig

Axes = Sequence[str | None]
MeshAxes = tuple[str, ...]

_EVERYWHERE: Mapping[str, MeshAxes] = {
    **dict.fromkeys(("heads", "kv_heads", "ffn", "vocab"), ("model",)),
    **dict.fromkeys(("memory", "key", "value", "tap", "rank", "sub_keys"), ()),
}
_TABLES: Mapping[str, MeshAxes] = {"slots": (), "slot_width": ("fsdp",)}
"""Rows and columns of memory tables, which are read where they are stored."""


@dataclasses.dataclass(frozen=True)
@checked
class Rules:
    """Logical axis -> mesh axes, for parameters and for activations; () leaves a dimension whole.

    Raises: ValueError from `spec` for an unknown logical axis, for two dimensions of one array on the same mesh axis,
    for a number of axes that is not that of the dimensions, and for a dimension that its mesh axes do not divide.

    >>> tuple(Rules().spec(("batch", "time", "embed"), "activations"))
    (('data', 'fsdp'), 'seq', None)
    """

    parameters: Mapping[str, MeshAxes] = dataclasses.field(
        default_factory=lambda: {**_EVERYWHERE, **_TABLES, "embed": ("fsdp",)}
    )
    activations: Mapping[str, MeshAxes] = dataclasses.field(
        default_factory=lambda: {**_EVERYWHERE, **_TABLES, "embed": (), "batch": ("data", "fsdp"), "time": ("seq",)}
    )
    layout: Layout = "contiguous"
    """Which tokens a device holds where time is split (`jaxmem.sharding.layouts`); a balanced one is for attention only."""

    def spec(
        self,
        axes: Axes,
        kind: Literal["parameters", "activations"],
        shape: Sequence[int] | None = None,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> P:
        """The PartitionSpec of an array whose dimensions are `axes`; with shape and mesh, divisibility is checked."""
        if shape is not None and len(shape) != len(axes):
            raise ValueError(
                f"sharding rules: needs one logical axis per dimension, got {tuple(axes)} for an array of shape "
                f"{tuple(shape)}; name every dimension, None for one that stays whole"
            )
        table = getattr(self, kind)
        taken: dict[str, str | None] = {}
        entries = []
        for dim, axis in enumerate(axes):
            if axis is not None and axis not in table:
                raise ValueError(
                    f"sharding rules: needs a known logical axis for {kind}, got {axis!r} in {tuple(axes)}; "
                    f"use one of {sorted(table)} or add it to Rules.{kind}"
                )
            mesh_axes = table[axis] if axis is not None else ()
            for mesh_axis in mesh_axes:
                if mesh_axis in taken:
                    raise ValueError(
                        f"sharding rules: needs each mesh axis at most once in an array, got {mesh_axis!r} for both "
                        f"{taken[mesh_axis]!r} and {axis!r} in {tuple(axes)}; change one of the two in Rules.{kind}"
                    )
                taken[mesh_axis] = axis
            if shape is not None and mesh is not None:
                parts = math.prod(mesh.shape[name] for name in mesh_axes)
                if shape[dim] % parts:
                    raise ValueError(
                        f"sharding rules: needs {axis!r} divisible by the {parts} devices of mesh axes "
                        f"{'x'.join(mesh_axes)}, got {axis}={shape[dim]} in an array of shape {tuple(shape)}; "
                        f"change {axis} or the mesh"
                    )
            entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
        return P(*entries)


def rules_of(config: MeshConfig) -> Rules:
    """The rules that a mesh's config asks for."""
    columns = config.parameters if config.table_columns is None else config.table_columns
    tables = {"slots": config.table_rows, "slot_width": columns}
    rules = Rules()
    return Rules(
        parameters={**rules.parameters, **tables, "embed": config.parameters},
        activations={**rules.activations, **tables},
        layout=config.layout,
    )


_DEFAULT = Rules()
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=_DEFAULT)


def current_rules() -> Rules:
    """The rules in force: those of the innermost `use_mesh`, else the defaults."""
    return _rules.get()


def current_mesh() -> AbstractMesh | None:
    """The mesh in force, or None where layouts are not ours to name.

    That is outside any mesh, inside a `local` island, where arrays are already one shard, and inside
    `jax.sharding.auto_axes`, where the compiler lays them out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(mesh.axis_types) == {AxisType.Explicit} else None


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, rules: Rules = Rules()) -> Iterator[None]:
    """Run the body on `mesh` under `rules`; with None, on one device without any sharding.

    Raises: ValueError for a mesh with other axes than those of `make_mesh`.
    """
    if mesh is None:
        yield
        return
    if mesh.axis_names != MESH_AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        axes = {name: kind.name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)}
        raise ValueError(
            f"use_mesh: needs the axes {', '.join(MESH_AXES)}, all explicit, got {axes}; make the mesh with make_mesh"
        )
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)

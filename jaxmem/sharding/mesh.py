"""The one mesh: axes `data`, `fsdp`, `seq` and `model`, all always present, of size 1 when unused."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
from jax.sharding import AxisType, Mesh

from jaxmem.fields import Bounds, checked
from jaxmem.sharding.device_order import arrange

MESH_AXES = ("data", "fsdp", "seq", "model")
Layout = Literal["contiguous", "zigzag", "striped"]
Devices = Annotated[int, Bounds("[-1, inf)")]


@dataclasses.dataclass(frozen=True)
@checked
class MeshConfig:
    """How many devices stand along each mesh axis; at most one size may be -1, "all devices that are left"."""

    data: Devices = -1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: Devices = 1
    """Devices over which parameters *and* the batch are split; parameters are gathered when used."""
    seq: Devices = 1
    """Devices over which the sequence is split."""
    model: Devices = 1
    """Devices over which heads, ffn width and vocabulary are split."""
    layout: Layout = "contiguous"
    """Which tokens a device of `seq` holds (`jaxmem.sharding.layouts`); a balanced one is for attention only."""
    parameters: tuple[str, ...] = ("fsdp",)
    """Axes over which stored parameters are split by width; with "seq" too, many devices can share a batch of one row."""
    table_rows: tuple[str, ...] = ()
    """Axes over which memory tables are split by slots (`jaxmem.sharding.tables`)."""
    table_columns: tuple[str, ...] | None = None
    """Axes over which memory tables are split by width; None: those of `parameters`."""

    def __post_init__(self):
        sizes = self.sizes
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(
                "mesh: needs positive sizes with at most one -1 (the devices left over), "
                f"got {dict(zip(MESH_AXES, sizes, strict=True))}; change the sizes"
            )
        if not set(self.parameters) <= set(MESH_AXES) - {"model"}:
            raise ValueError(
                f"mesh: needs parameters to be split over some of data, fsdp and seq, got parameters={self.parameters}; "
                "change it"
            )
        tables = (*self.table_rows, *(self.parameters if self.table_columns is None else self.table_columns))
        if not set(tables) <= set(MESH_AXES) or len(set(tables)) < len(tables):
            raise ValueError(
                f"mesh: needs tables split over axes of {', '.join(MESH_AXES)}, each by rows or by columns, "
                f"got table_rows={self.table_rows}, table_columns={tables[len(self.table_rows) :]}; change one of them"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.data, self.fsdp, self.seq, self.model)


def mesh_sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """How many of `n_devices` stand along each axis.

    Raises: ValueError if the sizes do not multiply to that number.
    """
    fixed = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(n_devices // fixed if size == -1 else size for size in config.sizes)
    if math.prod(sizes) != n_devices:
        raise ValueError(
            f"mesh: needs data x fsdp x seq x model = {n_devices} devices, "
            f"got {dict(zip(MESH_AXES, config.sizes, strict=True))}; change the sizes or the number of devices"
        )
    return sizes


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all), every axis of explicit type; TPUs along `seq` stand in rings.

    Raises: ValueError if the sizes do not multiply to the number of devices.

    >>> make_mesh(MeshConfig(data=1), jax.devices()[:1]).axis_names
    ('data', 'fsdp', 'seq', 'model')
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    types = (AxisType.Explicit,) * len(MESH_AXES)
    of_rings = arrange(devices, sizes, MESH_AXES.index("seq")) if devices[0].platform == "tpu" else None
    if of_rings is not None:
        return Mesh(of_rings, MESH_AXES, axis_types=types)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)

"""Exchanges along a ring of devices, or of groups of neighbours; for use inside `local`."""

import dataclasses

import jax
from jax.sharding import Mesh

from jaxmem.typing import Array, PyTree, Shaped


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
    """Of `jax.jit`, for programs with rings along `seq`: under it, libtpu starts every exchange of a ring before the kernel
    that hides it, on each generation; without it, on v5p and v6e it does not, whatever the kernels' cost estimates say."""
    if mesh is None or mesh.shape["seq"] == 1 or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_tpu_enable_all_experimental_scheduler_features": "true"}


@dataclasses.dataclass(frozen=True)
class Ring:
    """n devices along a mesh axis as n / inside groups of neighbours; a device exchanges with its counterparts in the other
    groups (around the ring) or with the others of its own (inside)."""

    axis: str
    n_devices: int
    inside: int = 1

    def __post_init__(self):
        if self.n_devices % self.inside:
            raise ValueError(
                f"attention scheme: needs ulysses to divide the {self.n_devices} devices of the mesh axis {self.axis!r}, "
                f"got ulysses={self.inside}; change it or the mesh"
            )

    @property
    def size(self) -> int:
        """Groups."""
        return self.n_devices // self.inside

    @property
    def place_inside(self) -> Array:
        """Of this device in its group."""
        return jax.lax.axis_index(self.axis) % self.inside

    def onward(self, tree: PyTree) -> PyTree:
        """What the group before holds; the first gets the last's."""
        n = self.n_devices
        return jax.lax.ppermute(tree, self.axis, [(i, (i + self.inside) % n) for i in range(n)])

    def from_before(self, tree: PyTree, distance: int) -> PyTree:
        """What the group `distance` places earlier holds; 0 where there is none."""
        step = distance * self.inside
        return jax.lax.ppermute(tree, self.axis, [(i, i + step) for i in range(self.n_devices - step)])

    def gather(self, x: Shaped[Array, "B T *x"]) -> Shaped[Array, "B S *x"]:
        """Tokens of all groups."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True, axis_index_groups=self._around)

    def gather_inside(self, x: Shaped[Array, "B T *x"]) -> Shaped[Array, "B S *x"]:
        """Tokens of all devices of this group."""
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True, axis_index_groups=self._inside)

    def heads_for_tokens(self, x: Shaped[Array, "B T H K"]) -> Shaped[Array, "B S J K"]:
        """All heads of this device's tokens become H / inside heads of its group's tokens."""
        return jax.lax.all_to_all(x, self.axis, 2, 1, tiled=True, axis_index_groups=self._inside)

    def tokens_for_heads(self, x: Shaped[Array, "B S J K"]) -> Shaped[Array, "B T H K"]:
        """The inverse of `heads_for_tokens`."""
        return jax.lax.all_to_all(x, self.axis, 1, 2, tiled=True, axis_index_groups=self._inside)

    def own_heads(self, x: Shaped[Array, "*x"], axis: int) -> Shaped[Array, "*y"]:
        """Of an array that is the same on all devices of a group, this one's part along a dimension of heads."""
        n_heads = x.shape[axis] // self.inside
        return jax.lax.dynamic_slice_in_dim(x, self.place_inside * n_heads, n_heads, axis)

    @property
    def _inside(self) -> list[list[int]]:
        return [[first + i for i in range(self.inside)] for first in range(0, self.n_devices, self.inside)]

    @property
    def _around(self) -> list[list[int]]:
        return [[first + i for first in range(0, self.n_devices, self.inside)] for i in range(self.inside)]

"""The four words layers use to say where arrays live: `param`, `constrain`, `einsum`, `local`.

All are the identity (or plain jnp) without a mesh, so the same layer runs in a notebook and on a pod.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmem.sharding.kinds import Kind, checked
from jaxmem.sharding.rules import Axes, current_mesh, current_rules
from jaxmem.typing import Array, DTypeLike, Initializer, PyTree


def param(
    rngs: nnx.Rngs,
    init: Initializer,
    shape: tuple[int, ...],
    axes: Axes,
    kind: Kind | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param:
    """A parameter of the given shape whose dimensions are named `axes`, sharded from its birth under a mesh.

    Args:
      kind: what it is (`jaxmem.sharding.kinds`), for the optimiser; None: taken from the number of dimensions, see `kind_of`.

    Raises: ValueError for rngs that are no nnx.Rngs with a stream for parameters.
    """
    if not isinstance(rngs, nnx.Rngs) or not ("params" in rngs or "default" in rngs):
        got = f"rngs={rngs}" if isinstance(rngs, int) else f"rngs of type {type(rngs).__name__}"
        got = "one without a stream 'params' or 'default'" if isinstance(rngs, nnx.Rngs) else got
        raise ValueError(
            f"param: needs rngs to be an nnx.Rngs, from which parameters are drawn, got {got}; pass nnx.Rngs(0)"
        )
    if len(shape) != len(axes):
        raise ValueError(f"param: needs one logical axis per dimension, got shape={shape} and axes={tuple(axes)}")
    if min(shape, default=1) < 1:
        raise ValueError(
            f"param: needs dimensions of at least 1, got shape={shape} of {', '.join(map(str, axes))}; "
            "change d_model or the config"
        )
    value = init(rngs.params(), shape, jnp.dtype(dtype))
    mesh = current_mesh()
    if mesh is not None:
        value = jax.reshard(value, current_rules().spec(axes, "parameters", shape, mesh))
    said = {} if kind is None else {"kind": checked(kind, len(shape))}
    return nnx.Param(value, axes=tuple(axes), **said)


def param_spec(axes: Axes, shape: tuple[int, ...]) -> P:
    """The spec of a parameter, stacked over layers (one more leading dimension than `axes`) or not."""
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return current_rules().spec(axes, "parameters", shape, current_mesh())


def constrain(x: Array, *axes: str | None) -> Array:
    """x, laid out over the mesh as the logical `axes` of its dimensions say."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.reshard(x, current_rules().spec(axes, "activations", x.shape, mesh))


def einsum(subscripts: str, x: Array, weight: Array, out: Axes) -> Array:
    """einsum of an activation with a weight in the activation's dtype, the result laid out as the axes `out` say.

    >>> einsum("btd,df->btf", jnp.ones((1, 2, 3)), jnp.ones((3, 4)), ("batch", "time", "ffn")).shape
    (1, 2, 4)
    """
    weight = weight.astype(x.dtype)
    if current_mesh() is None:
        return jnp.einsum(subscripts, x, weight)
    return jnp.einsum(subscripts, x, weight, out_sharding=current_rules().spec(out, "activations"))


def local(function: Callable[..., PyTree], in_axes: PyTree, out_axes: PyTree) -> Callable[..., PyTree]:
    """`function` run by every device on its own shard; it must not mix dimensions that the rules split.

    The arrays that come in are laid out as in_axes say already, or `constrain` them first.

    Args:
      function: of positional array pytrees.
      in_axes: one tuple of logical axes per array, in the structure of the arguments (a prefix of it is enough).
      out_axes: the same for the result.
    """

    def spec(axes: Axes) -> P:
        return current_rules().spec(axes, "activations")

    def placed(*args):
        mesh = current_mesh()
        if mesh is None:
            return function(*args)
        in_specs, out_specs = (jax.tree.map(spec, axes, is_leaf=_is_axes) for axes in (tuple(in_axes), out_axes))
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*args)

    return placed


def _is_axes(node: PyTree) -> bool:
    return type(node) is tuple and all(axis is None or isinstance(axis, str) for axis in node)


def named_sharding(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
    """Where an activation with these logical axes lives on `mesh`; for inputs that are put there from the host."""
    return NamedSharding(mesh, current_rules().spec(axes, "activations"))


def mesh_axes(*axes: str) -> tuple[str, ...]:
    """The mesh axes that split these dimensions of an activation under the rules in force; none without a mesh."""
    if current_mesh() is None:
        return ()
    return tuple(name for axis in axes for name in current_rules().activations[axis])


def n_shards_of(*axes: str) -> int:
    """Devices between which these dimensions of an activation are split."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in mesh_axes(*axes))


def sum_over(x: Array, *axes: str) -> Array:
    """Inside `local`: the sum over the devices between which these logical axes are split; x itself if there are none."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = tuple(name for axis in axes for name in current_rules().activations[axis] if name in manual)
    return jax.lax.psum(x, names) if names else x


def stored_like(parameter: Array, gradient: Array) -> Array:
    """The gradient in the dtype and layout in which the parameter is stored."""
    if current_mesh() is not None:
        gradient = jax.reshard(gradient, jax.typeof(parameter).sharding.spec)
    return gradient.astype(parameter.dtype)

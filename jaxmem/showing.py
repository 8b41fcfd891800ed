"""How layers, models and states are shown: a tree with shapes, parameters and bytes in place of every number."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from flax import nnx


class Module(nnx.Module):
    """An nnx.Module with a short `repr`."""

    def __repr__(self) -> str:
        return tree_text(self)

    __str__ = __repr__


def tree_text(tree: Any) -> str:
    """A module, or a tuple or NamedTuple of arrays: its parts by name, shapes, parameters and bytes; equal neighbours once.

    >>> import jax.numpy as jnp
    >>> from typing import NamedTuple
    >>> class State(NamedTuple):
    ...     memory: jnp.ndarray
    ...     position: jnp.ndarray
    >>> print(tree_text(State(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))))
    State: 32 bytes
      memory    float32[2, 3]
      position  int32[2]
    """
    if hasattr(tree, "_fields") and next(_arrays(tree), None) is None:  # the axes of a state, say
        return f"{type(tree).__name__}({', '.join(f'{n}={v!r}' for n, v in zip(tree._fields, tree, strict=True))})"
    return "\n".join(_lines(type(tree).__name__, tree))


def _lines(title: str, node: Any) -> list[str]:
    arrays = list(_arrays(node))
    parameters = sum(array.size for array, is_parameter in arrays if is_parameter)
    sizes = [f"{parameters:,} parameters"] if parameters else []
    sizes.append(n_bytes(sum(array.size * array.dtype.itemsize for array, _ in arrays)))
    lines, children = [f"{title}: {', '.join(sizes)}"], list(_children(node))
    width = max((len(name) for name, child in children if _is_array(child)), default=0)
    for (_, body), alike in groupby(children, lambda item: (item[0].rstrip("0123456789"), _body(item[1]))):
        names = [name for name, _ in alike]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        lines.append(f"  {name:{width}}  {body[0]}" if len(body) == 1 else f"  {name}  {body[0]}")
        lines += [f"  {line}" for line in body[1:]]
    return lines


def _body(child: Any) -> tuple[str, ...]:
    if _is_array(child):
        return (f"{child.dtype}[{', '.join(map(str, child.shape))}]",)
    return tuple(_lines(type(child).__name__, child))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a node that are, or have, arrays; those of a list among them one by one."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        items = zip(node._fields, node, strict=True)
    elif isinstance(node, list | tuple | nnx.List):
        items = ((f"{i}", child) for i, child in enumerate(node))
    elif isinstance(node, dict):
        items = ((str(name), child) for name, child in node.items())
    elif isinstance(node, nnx.Module):
        items = ((name, child) for name, child in vars(node).items() if not name.startswith("_"))
    else:
        return
    for name, child in items:
        if isinstance(child, list | tuple | nnx.List) and not hasattr(child, "_fields"):
            yield from ((f"{name}.{i}", part) for i, part in _children(child))
        elif _is_array(child) or next(_arrays(child), None) is not None:
            yield name, child


def _arrays(node: Any) -> Iterator[tuple[Any, bool]]:
    """The arrays of a node, and whether each is a parameter."""
    if _is_array(node):
        yield node, isinstance(node, nnx.Param)
        return
    for _, child in _children(node):
        yield from _arrays(child)


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def n_bytes(n: int) -> str:
    """
    >>> n_bytes(1023), n_bytes(5 * 2**20), n_bytes(3 * 2**30)
    ('1,023 bytes', '5.0 MiB', '3.0 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n:,} bytes"

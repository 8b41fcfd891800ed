"""What a parameter is. It is said where the parameter is made, and decides what an optimiser does to it.

| kind | what it is | weight decay | Muon |
|---|---|---|---|
| `matrix()` | a linear map from its input to its output dimensions; copies are maps of their own | yes | yes, each map |
| `ROWS` | rows that are looked up or scored one by one: embeddings, output heads, sub-keys | yes | no, Adam |
| `MEMORY` | the rows of a memory | `OptimizerConfig.tables`, its own optimiser | no |
| `VECTOR` | all else: scales, biases, rates, filter taps, the dynamics of a state space | no | no, Adam |

A kind says nothing of the leading dimension that `stack_layers` adds: stacked layers are copies.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

VECTOR: Literal["vector"] = "vector"
ROWS: Literal["rows"] = "rows"
MEMORY: Literal["memory"] = "memory"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A linear map; its dimensions stand in the order copies, inputs, outputs."""

    n_inputs: int = 1
    n_copies: int = 0


Kind = Literal["vector", "rows", "memory"] | Matrix


class Sides(NamedTuple):
    """The dimensions of a matrix, those of stacked layers counted."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Empty: one number comes out."""


def matrix(n_inputs: int = 1, *, copies: int = 0) -> Matrix:
    """The kind of a linear map: `copies` leading dimensions of independent maps, then its inputs, then its outputs.

    [D, H, K] is matrix(), from D to H K; [H, V, D] is matrix(2), from H V to D; [M, D, H, K] is matrix(copies=1), M maps.
    """
    return Matrix(n_inputs, copies)


def checked(kind: Kind, n_dims: int) -> Kind:
    """The kind, if a parameter of so many dimensions can be of it.

    Raises: ValueError if not.
    """
    if isinstance(kind, Matrix):
        if kind.n_copies < 0 or not 1 <= kind.n_inputs <= n_dims - kind.n_copies:
            raise ValueError(
                f"param: needs a matrix of at least one input dimension within its {n_dims}, got kind={kind}; "
                "count copies, inputs and outputs, in this order"
            )
    elif not isinstance(kind, str) or kind not in (VECTOR, ROWS, MEMORY):
        raise ValueError(
            f"param: needs kind to be matrix(), ROWS, MEMORY or VECTOR of jaxmem.sharding.kinds, got kind={kind!r}; "
            "say what the parameter is"
        )
    return kind


def kind_of(variable: Any) -> Kind:
    """What a parameter is: as said where it was made, or, where nothing was said, by its dimensions.

    Without a word one dimension is a vector, two are a matrix, its input first, and more are rows: decayed, but not
    given to Muon, which would have to guess which of them are inputs. Stacked layers do not count, if there are `axes`.
    """
    kind = getattr(variable, "kind", None)
    if kind is not None:
        return kind
    n_dims = len(getattr(variable, "axes", variable.shape))
    return VECTOR if n_dims < 2 else Matrix() if n_dims == 2 else ROWS


def sides(variable: Any) -> Sides | None:
    """The dimensions of a matrix; None for all else."""
    kind = kind_of(variable)
    if not isinstance(kind, Matrix):
        return None
    n_dims = len(variable.shape)
    first = n_dims - len(getattr(variable, "axes", variable.shape)) + kind.n_copies
    return Sides(tuple(range(first, first + kind.n_inputs)), tuple(range(first + kind.n_inputs, n_dims)))


def is_memory(variable: Any) -> bool:
    """Whether a parameter holds the rows of a memory."""
    return getattr(variable, "kind", None) == MEMORY

"""How golden arrays are recorded. In a file, an array is named recording/group/name:

    inputs      what a function is given, the same in all cases
    decays      what else it is given, one per case (first axis): usual, strong and no decay; without any there is one case
    constants   what it is given and is not differentiated: flags, ids of documents
    outputs     o and, if there is one, the final state; one per case
    weights     random, of the outputs in a sum
    gradients   of that sum in inputs and decays; one per case

Names, layouts and default scales are those of the function of jaxmem with the recording's name; those of a layer's weights
are the public ones.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

STRENGTHS = (1, 40, 0)
B, T, H, K, V = 2, 19, 2, 4, 3  # small, to keep the files small

Draw = Callable[[np.random.Generator], np.ndarray]


def normal(*axes: int) -> Draw:
    return lambda rng: rng.normal(size=axes)


def uniform(low: float, high: float, *axes: int) -> Draw:
    return lambda rng: rng.uniform(low, high, axes)


def unit(*axes: int) -> Draw:
    """Vectors of length 1."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        vectors = rng.normal(size=axes)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    return draw


def per_strength(usual: Draw) -> Draw:
    """What is drawn times 1, 40 and 0, one after the other."""
    return lambda rng: np.multiply.outer(STRENGTHS, usual(rng))


def record(
    function: Callable[..., tuple[torch.Tensor, ...]],
    inputs: dict[str, Draw],
    decays: dict[str, Draw] | None = None,
    constants: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """What `function` makes of arrays drawn at random, and the gradients, by group/name."""
    rng = np.random.default_rng(0)
    draw = lambda kinds: {name: kind(rng).astype(np.float32) for name, kind in kinds.items()}
    inputs, decays, constants = draw(inputs), draw(decays or {}), constants or {}
    weights: dict[str, np.ndarray] = {}
    cases = []
    for case in range(len(STRENGTHS) if decays else 1):
        arrays = inputs | {name: a[case] for name, a in decays.items()}
        leaves = {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}
        found = function(**leaves, **{name: torch.tensor(a) for name, a in constants.items()})
        outputs = dict(zip(("o", "state"), found, strict=False))
        weights = weights or draw({name: normal(*a.shape) for name, a in outputs.items()})
        sum((torch.tensor(weights[name]) * a).sum() for name, a in outputs.items()).backward()
        gradients = {name: a.grad for name, a in leaves.items()}
        groups = {"outputs": outputs, "gradients": gradients}
        cases.append({f"{group}/{name}": a.detach() for group, these in groups.items() for name, a in these.items()})
    groups = {"inputs": inputs, "decays": decays, "constants": constants, "weights": weights}
    drawn = {f"{group}/{name}": a for group, these in groups.items() for name, a in these.items()}
    return drawn | {key: torch.stack([case[key] for case in cases]).numpy() for key in cases[0]}


def save(file: Path, recordings: dict[str, dict[str, np.ndarray]], *packages: str) -> None:
    """All recordings in one file, and the versions of the packages they were made with."""
    arrays = {f"{name}/{key}": a for name, found in recordings.items() for key, a in found.items()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in (*packages, "numpy")]
    np.savez_compressed(file, versions=np.array(versions), **arrays)

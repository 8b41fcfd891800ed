"""Reading the golden arrays that scripts in tests/golden have recorded."""

import functools
from pathlib import Path

import numpy as np


@functools.cache
def recordings(name: str) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """{recording: {group: {name: array}}} of a file; golden/recording.py says what the groups are."""
    found = {}
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        for key in set(arrays.files) - {"versions"}:
            recording, group, array = key.split("/")
            found.setdefault(recording, {}).setdefault(group, {})[array] = arrays[key]
    return found

"""Array aliases and the axis letters that every annotation and einsum in jaxmem uses.

B batch · T tokens, query time · S source tokens, key time · D model width · F ffn width · H query heads ·
G kv heads · K key/query width per head · V value width per head · C tokens per chunk · N chunks · W window ·
M memory slots · L layers · P places in a packed buffer.
Recurrent state is [B H K V], attention [B T H K] x [B S G K], masks [B T S] with True = attend.
"""

from collections.abc import Callable
from typing import Any

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Complex, Float, Int, Key, PRNGKeyArray, Shaped, UInt32

PyTree = Any
Initializer = Callable[..., Array]

__all__ = [
    "Array",
    "Bool",
    "Complex",
    "DTypeLike",
    "Float",
    "Initializer",
    "Int",
    "Key",
    "PRNGKeyArray",
    "PyTree",
    "Shaped",
    "UInt32",
]

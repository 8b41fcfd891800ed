"""What becomes of a recurrence's output: a norm, a gate that reads the layer's input, and a projection.

Cost per token: 4 H V D FLOPs with a gate, 2 H V D without. No state.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.sharding import VECTOR, constrain, einsum, matrix, param
from jaxmem.showing import Module
from jaxmem.typing import Array, Float

_TOKENS = ("batch", "time")


class GatedOutput(Module):
    """y = W_o (norm(o) * f(W_g x)), or with the gate before the norm, or without either.

    Args:
      gate: f; None: no gate.
      gate_rank: W_g through a bottleneck of this width.
      gate_bias: W_g x + b instead.
      out_bias: y + b instead.
      norm: over each head, over all heads together, over each of so many groups of neighbouring heads, or none.
      gate_first: norm(o * f(W_g x)), as in Mamba-2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        value_dim: int,
        *,
        gate: Callable[[Array], Array] | None = jax.nn.silu,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        out_bias: bool = False,
        norm: Literal["head", "all"] | int | None = "head",
        gate_first: bool = False,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.activation, self.norm_over, self.gate_first, self.eps = gate, norm, gate_first, eps
        normal = lambda width: nnx.initializers.truncated_normal(width**-0.5)
        heads = ("heads", "value")
        gate_width, gate_axis = (d_model, "embed") if gate_rank is None else (gate_rank, "rank")
        make_gate = gate is not None
        self.gate_down = (
            param(rngs, normal(d_model), (d_model, gate_rank), ("embed", "rank"), matrix())
            if make_gate and gate_rank
            else None
        )
        self.gate = (
            param(rngs, normal(gate_width), (gate_width, n_heads, value_dim), (gate_axis, *heads), matrix())
            if make_gate
            else None
        )
        bias = nnx.initializers.zeros, (n_heads, value_dim), heads, VECTOR
        self.gate_bias = param(rngs, *bias) if gate_bias else None
        shape, axes = ((value_dim,), ("value",)) if norm == "head" else ((n_heads, value_dim), heads)
        self.norm = None if norm is None else param(rngs, nnx.initializers.ones, shape, axes, VECTOR)
        self.out = param(rngs, normal(n_heads * value_dim), (n_heads, value_dim, d_model), (*heads, "embed"), matrix(2))
        self.out_bias = param(rngs, nnx.initializers.zeros, (d_model,), ("embed",), VECTOR) if out_bias else None

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        o = o.astype(x.dtype)
        if self.gate is not None:
            gate = x if self.gate_down is None else einsum("btd,dr->btr", x, self.gate_down[...], (*_TOKENS, "rank"))
            gate = einsum("btd,dhv->bthv", gate, self.gate[...], (*_TOKENS, "heads", "value"))
            gate = self.activation(gate if self.gate_bias is None else gate + self.gate_bias[...].astype(gate.dtype))
            o = self._normalize(o * gate) if self.gate_first else self._normalize(o) * gate
        else:
            o = self._normalize(o)
        y = einsum("bthv,hvd->btd", o, self.out[...], (*_TOKENS, "embed"))
        return y if self.out_bias is None else y + constrain(self.out_bias[...], "embed").astype(y.dtype)

    def _normalize(self, o: Array) -> Array:
        if self.norm is None:
            return o
        full = o.astype(jnp.promote_types(o.dtype, jnp.float32))
        if isinstance(self.norm_over, int):
            full = full.reshape(*o.shape[:-2], self.norm_over, -1, o.shape[-1])
        mean_square = jnp.mean(jnp.square(full), axis=-1 if self.norm_over == "head" else (-2, -1), keepdims=True)
        full = (full * jax.lax.rsqrt(mean_square + self.eps)).reshape(o.shape)
        return (full * self.norm[...]).astype(o.dtype)

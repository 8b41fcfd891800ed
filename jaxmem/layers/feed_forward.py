"""SwiGLU, the gated feed-forward layer.

    y = (silu(x @ gate) * (x @ up)) @ down        silu(z) = z * sigmoid(z)

Cost: 3 D F parameters, 6 D F forward FLOPs per token, one [B T F] activation that "model" splits along F.
Reference: Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 6.
"""

import jax
from flax import nnx

from jaxmem.layers.blockwise import in_blocks
from jaxmem.sharding import einsum, matrix, param
from jaxmem.showing import Module
from jaxmem.typing import Array, Float


class SwiGLU(Module):
    """y = (silu(x @ gate) * (x @ up)) @ down, in the dtype of x.

    >>> layer = SwiGLU(4, 8, rngs=nnx.Rngs(0))
    >>> layer(jax.numpy.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    def __init__(self, d_model: int, d_ffn: int, *, rngs: nnx.Rngs, block_tokens: int | None = None):
        """Weights of variance 1 / fan-in.

        Args:
          d_model: width D of input and output.
          d_ffn: width F between; 8/3 D has as many parameters as an ungated layer of width 4 D.
          rngs: `params` draws the weights.
          block_tokens: of a row and device, whose wide activations exist at once, see `in_blocks`; None: all.
        """
        self.block_tokens = block_tokens
        init = jax.nn.initializers.lecun_normal()
        self.gate = param(rngs, init, (d_model, d_ffn), ("embed", "ffn"), matrix())
        self.up = param(rngs, init, (d_model, d_ffn), ("embed", "ffn"), matrix())
        self.down = param(rngs, init, (d_ffn, d_model), ("ffn", "embed"), matrix())

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self._apply(x) if self.block_tokens is None else in_blocks(self._apply, x, self.block_tokens)

    def _apply(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = ("batch", "time", "ffn")
        gate = einsum("btd,df->btf", x, self.gate[...], wide)
        up = einsum("btd,df->btf", x, self.up[...], wide)
        return einsum("btf,fd->btd", jax.nn.silu(gate) * up, self.down[...], ("batch", "time", "embed"))

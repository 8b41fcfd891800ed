"""Memory layers: every token reads a few of very many learned slots, found by product keys.

    best k slots of each head h:  ids, s = product keys of W_q x          w = softmax(s), relu(s), sigmoid(s) or s, fp32
    y = sum_h sum_j w_hj v[ids_hj]                                        values
    y = sum_h sum_j w_hj act(u[ids_hj] . x) v[ids_hj]                     experts of one neuron each (PEER)
    out = y,  W_o y ("linear"),  or W_o (y * silu(W_g x + b_g)) + b_o ("swilu"),  and sigmoid(w . x) times that (gated)

A token reads by itself: no other token changes its output, so the layer needs no state, and stands where a feed-forward does.
All heads read one table [M V]. The table belongs to the layer, or is a `MemoryTable` that the caller passes in each call and
may pass to several layers; two models never share one unless they are given it.

Cost per token: that of the product keys, 2 H k V FLOPs of the values (and 2 H k D of the experts' inputs), H k rows of V
numbers read. Parameters: M V (and M D), of which a token reads H k rows. Under a mesh a table is split by columns or rows,
and read where it is (`jaxmem.sharding.tables`).

Reference: Lample et al. 2019, arXiv 1907.05242 (`pkm`); Berges et al. 2024, Memory Layers at Scale, arXiv 2412.09764
(`memory_plus`); He 2024, Mixture of A Million Experts, arXiv 2407.04153 (`peer`); Huang et al. 2024, Ultra-Sparse Memory
Network, arXiv 2411.12364 (`ultramem`); relu instead of softmax: Csordas et al. 2023, arXiv 2310.10837.
Where this differs from published code: the shared pool of Memory Layers at Scale is an attribute of a class there, so that
two models of one process share it unasked, here it is an argument; that code has none of the paper's normalisation of queries
and keys, here it is an option; PEER-pytorch keeps one expert per head whatever it is asked for when scores do not compete
(its default), here top_k is kept; product-key-memory forgets the weights when it concatenates heads, here heads are summed.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmem.fields import Count, checked
from jaxmem.layers.memory_table import Activation, MemoryTable, TableDtype, table_to_read
from jaxmem.layers.memory_usage import slot_weights
from jaxmem.layers.product_keys import ProductKeysConfig
from jaxmem.layers.tucker_keys import TuckerKeysConfig
from jaxmem.sharding import VECTOR, constrain, einsum, local, matrix, param
from jaxmem.sharding.tables import CHOICES, X
from jaxmem.showing import Module
from jaxmem.typing import Array, Bool, Float, Int

Score = Literal["softmax", "relu", "sigmoid", "linear"]
Output = Literal["plain", "linear", "swilu"]


@dataclasses.dataclass(frozen=True)
@checked
class MemoryConfig:
    """A memory layer; `pkm`, `memory_plus`, `peer` and `ultramem` are published ones."""

    keys: ProductKeysConfig = ProductKeysConfig()
    score: Score = "softmax"
    """What makes weights of scores: softmax over the k slots of a head, or each score by itself ("linear": as it is)."""
    expert: Activation | None = None
    """Slots are neurons with this activation, and have an input vector too; None: slots are values."""
    value_dim: Count | None = None
    """V: width of a value; None is d_model, which a plain output needs."""
    output: Output = "plain"
    gated: bool = False
    """Multiply the output by sigmoid(w . x), one number per token."""
    table_dtype: TableDtype = "float32"
    """Of the table as it is stored; rows are summed, and their gradients, in fp32."""
    shared_table: bool = False
    """The table is an argument of the call instead of a part of the layer."""
    placement: Literal["replace", "beside"] = "replace"
    """In a decoder's block: instead of the feed-forward, or added to it."""

    def width(self, d_model: int) -> int:
        """V in a model of width d_model."""
        width = d_model if self.value_dim is None else self.value_dim
        if width < 1 or (self.output == "plain" and width != d_model):
            raise ValueError(
                f"memory: needs value_dim=d_model for a plain output, and at least 1, got value_dim={width}, "
                f"d_model={d_model}; leave value_dim out or use another output"
            )
        return width

    def table_shape(self, d_model: int) -> tuple[int, int, int | None]:
        """Slots, width of a value, width of an expert's input vector."""
        return self.keys.n_slots, self.width(d_model), None if self.expert is None else d_model

    choice_axes = CHOICES

    @property
    def use_size(self) -> int:
        """Numbers that `use` gives: slots."""
        return self.keys.n_slots

    @property
    def choices(self) -> tuple[int, int]:
        """Heads, and slots that each reads per token."""
        return self.keys.n_heads, self.keys.top_k

    def numbers_read(self, d_model: int) -> int:
        """Numbers in the rows that a token reads: values, and experts' input vectors."""
        return self.keys.n_reads * (self.width(d_model) + (0 if self.expert is None else d_model))

    def lookup_flops(self, d_model: int) -> int:
        """Forward FLOPs per token that are not 2 x parameters: those of the rows that are read, and of finding them.

        >>> MemoryConfig(ProductKeysConfig(n_slots=16, n_heads=2, top_k=3)).lookup_flops(8)
        96
        """
        return 2 * self.numbers_read(d_model) + self.keys.search_flops

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Memory":
        return Memory(self, d_model, rngs=rngs)

    def make_table(self, d_model: int, *, rngs: nnx.Rngs) -> "MemoryTable":
        """A table that fits this layer, to be shared."""
        return MemoryTable(*self.table_shape(d_model), rngs=rngs, dtype=self.table_dtype)


def pkm(n_slots: int = 512**2) -> MemoryConfig:
    """The product-key memory of XLM; the paper normalises queries over the batch, which looks ahead, here each by itself."""
    return MemoryConfig(ProductKeysConfig(n_slots, query_norm="layer"))


def memory_plus(n_slots: int = 1024**2) -> MemoryConfig:
    """Memory+ of Memory Layers at Scale as released: swilu output and one pool for all memory layers of a model.

    The paper's smaller models normalise queries and keys too: query_norm and key_norm of `ProductKeysConfig`.
    """
    return MemoryConfig(ProductKeysConfig(n_slots, key_dim=512), output="swilu", shared_table=True)


def peer(n_experts: int = 1024**2) -> MemoryConfig:
    """PEER: a million experts of one neuron, 8 heads of 16; LayerNorm of queries instead of the paper's over the batch."""
    keys = ProductKeysConfig(n_experts, n_heads=8, top_k=16, query_norm="layer", query_bias=False)
    return MemoryConfig(keys, expert="gelu")


def ultramem(n_slots: int = 360**2, value_dim: int = 192) -> MemoryConfig:
    """UltraMem: keys scored through a Tucker core, weights without softmax, narrow values and W_o; for d_model 768.

    Not the whole of the paper's layer: see `tucker_keys` for what it leaves out. Train with `rank_penalty` of its core.
    """
    keys = TuckerKeysConfig(n_slots, n_heads=1, top_k=32, key_dim=384, query_bias=False)
    return MemoryConfig(keys, score="linear", value_dim=value_dim, output="linear")


_SCORES = ("batch", "time", "heads", None, None)


class Memory(Module):
    """The layer of the module docstring, in the dtype of x.

    >>> config = MemoryConfig(ProductKeysConfig(n_slots=16, n_heads=2, top_k=3, key_dim=8), shared_table=True)
    >>> layer, table = config.make(8, rngs=nnx.Rngs(0)), config.make_table(8, rngs=nnx.Rngs(1))
    >>> layer(jnp.ones((1, 5, 8)), table).shape
    (1, 5, 8)
    """

    def __init__(self, config: MemoryConfig, d_model: int, *, rngs: nnx.Rngs):
        self.config, self.d_model = config, d_model
        width = config.width(d_model)
        self.keys = config.keys.make(d_model, rngs=rngs)
        init, zeros = jax.nn.initializers.lecun_normal(), jax.nn.initializers.zeros
        swilu = config.output == "swilu"
        self.gate = param(rngs, init, (d_model, width), ("embed", "value"), matrix()) if swilu else None
        self.gate_bias = param(rngs, zeros, (width,), ("value",), VECTOR) if swilu else None
        plain = config.output == "plain"
        self.out = None if plain else param(rngs, init, (width, d_model), ("value", "embed"), matrix())
        self.out_bias = param(rngs, zeros, (d_model,), ("embed",), VECTOR) if swilu else None
        normal = jax.nn.initializers.normal(d_model**-0.5)
        self.token_gate = param(rngs, normal, (d_model,), ("embed",), matrix()) if config.gated else None
        self.table = None if config.shared_table else config.make_table(d_model, rngs=rngs)
        self.reads = nnx.data(None)
        """Where a training step finds what this layer passes back to its table (`jaxmem.layers.table_reads`)."""

    def __call__(
        self, x: Float[Array, "B T D"], table: MemoryTable | None = None, layer: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """What the tokens read.

        Args:
          x: tokens, each for itself.
          table: with `shared_table` the slots to read, else None.
          layer: which of a layer's own tables it reads, if these are a stack [L M V]; None: it has one.

        Raises: ValueError for a table that is missing, not asked for, or of other shapes.
        """
        table = table_to_read("memory", self, table)
        ids, weights = self.choose(x)
        layer = None if self.config.shared_table else layer
        y = table.read(x, ids, weights, self.config.expert, self.reads, layer).astype(x.dtype)
        if self.gate is not None:
            wide = ("batch", "time", "value")
            y = y * jax.nn.silu(einsum("btd,dv->btv", x, self.gate[...], wide) + self.gate_bias[...].astype(x.dtype))
        if self.out is not None:
            y = einsum("btv,vd->btd", y, self.out[...], X)
        if self.out_bias is not None:
            y = y + constrain(self.out_bias[...], "embed").astype(x.dtype)
        if self.token_gate is not None:
            gate = einsum("btd,d->bt", x.astype(jnp.float32), self.token_gate[...], ("batch", "time"))
            y = y * jax.nn.sigmoid(gate)[..., None].astype(x.dtype)
        return y

    def choose(self, x: Float[Array, "B T D"]) -> tuple[Int[Array, "B T H k"], Float[Array, "B T H k"]]:
        """The slots that tokens read, best first, and their fp32 weights; for `jaxmem.layers.memory_usage`."""
        return local(self._choose, in_axes=(_SCORES,), out_axes=(CHOICES, CHOICES))(self.keys(x))

    def use(self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None) -> Float[Array, "M"]:
        """The weight with which each slot is read, summed over real tokens: `slot_weights`."""
        return slot_weights(*self.choose(x), self.config.keys.n_slots, real)

    def _choose(self, scores: Float[Array, "B T H parts subkeys"]) -> tuple[Array, Array]:
        best = self.keys.choose(scores)
        return best.ids, weights_of(best.scores, self.config.score)


def weights_of(scores: Float[Array, "*batch k"], kind: Score) -> Float[Array, "*batch k"]:
    """Weights of the slots of each head, in fp32.

    >>> weights_of(jnp.array([1.0, 1.0, -jnp.inf]), "softmax").tolist(), weights_of(jnp.array([2.0, -1.0]), "relu").tolist()
    ([0.5, 0.5, 0.0], [2.0, 0.0])
    """
    scores = scores.astype(jnp.float32)
    kinds = {"softmax": jax.nn.softmax, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "linear": lambda scores: scores}
    return kinds[kind](scores)

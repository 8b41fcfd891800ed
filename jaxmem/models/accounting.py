"""What a decoder costs, without building it: parameters by part, state bytes per sequence, FLOPs per token."""

import dataclasses
import math
from collections import Counter

import jax
from flax import nnx

from jaxmem.fields import Count, check
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.models.presets import preset
from jaxmem.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Cost:
    """What `account` found."""

    parameters: dict[str, int]
    """Part -> number of parameters."""
    state_bytes: dict[str, int]
    """Mixer -> bytes that one sequence's state takes in all its layers."""
    forward_flops: int
    """Per token, mean over a context; a multiply-add is two. Training takes three times as many, four if the backward
    pass computes blocks again."""
    table_numbers_read: int = 0
    """Numbers in the rows of memory tables that a token reads in all layers, each counted once per read."""

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def n_active_parameters(self) -> int:
        """Parameters that act on one token: all, but of memory tables only the rows it reads, at most all of them."""
        tables = self.parameters.get("memory tables", 0)
        return self.n_parameters - tables + min(self.table_numbers_read, tables)


def account(config: DecoderConfig, context_tokens: int) -> Cost:
    """The cost of a decoder at a context of this many tokens. No array is made.

    >>> from jaxmem.models.presets import preset
    >>> sum(account(preset("quickstart"), 512).state_bytes.values()) > 0
    True
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # one sequence, whatever mesh there is
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        state = jax.eval_shape(lambda: model.init_state(1, capacity=context_tokens))
    parameters: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        parameters[_part(path, config)] += math.prod(leaf.shape)

    states: Counter[str] = Counter()
    for mixer, mixer_state in zip(config.pattern, state, strict=True):
        states[_name(mixer)] += _n_bytes(mixer_state)

    head = config.vocab_size * config.d_model
    looked_up = ("embedding", "output head", "memory tables")  # a token multiplies few of their rows, or none
    weights = sum(n for part, n in parameters.items() if part not in looked_up) + head
    mixing = sum(mixer.mixing_flops(config.d_model, context_tokens) for mixer in config.pattern)
    memories = [memory for memory in config.memories if memory is not None]
    mixing += sum(memory.lookup_flops(config.d_model) for memory in memories)
    read = sum(memory.numbers_read(config.d_model) for memory in memories)
    return Cost(
        dict(parameters),
        dict(states),
        2 * weights + config.repeats * mixing,
        table_numbers_read=config.repeats * read,
    )


def count_parameters(model: nnx.Module) -> int:
    """The number of parameters of a model, built or abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _n_bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(path, config: DecoderConfig) -> str:
    keys = [str(getattr(key, "key", key)) for key in path]
    if "table" in keys[:-1] and keys[0] != "embedding":
        return "memory tables"
    if keys[0] != "blocks":
        return {"embedding": "embedding", "output": "output head"}.get(keys[0], "norms")
    if keys[2] == "mixer":
        return _name(config.pattern[int(keys[1])])
    return {"ffn": "feed-forward", "memory": "memory keys and outputs"}.get(keys[2], "norms")


def _name(mixer) -> str:
    words = type(mixer).__name__.removesuffix("Config")
    return "".join(f" {c.lower()}" if c.isupper() else c for c in words).strip()


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` found; shown as a table."""

    name: str
    config: DecoderConfig
    cost: Cost
    context_tokens: int

    def __repr__(self) -> str:
        return "\n".join(_table(self.name, self.config, self.cost, self.context_tokens))


def summary(model: Decoder | DecoderConfig | str, context_tokens: int = 2048, name: str | None = None) -> Summary:
    """What a decoder costs, as a table; nothing is built or compiled.

    Args:
      model: one, its config, or the name of a preset.
      context_tokens: of the state of growing caches and of FLOPs.
      name: to show.

    >>> print(summary("quickstart", 512).cost.n_parameters)
    1058056
    """
    name = name or (model if isinstance(model, str) else "decoder")
    config = preset(model) if isinstance(model, str) else model.config if isinstance(model, Decoder) else model
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"summary: needs a decoder, its config or a preset's name, got {config!r}; pass one of these")
    context_tokens = check("summary", "context_tokens", context_tokens, Count)
    return Summary(name, config, account(config, context_tokens), context_tokens)


def _table(name: str, config: DecoderConfig, cost: Cost, context_tokens: int) -> list[str]:
    """In 44 columns, but for long names and large numbers."""
    share = lambda n, total: f"{n / total:.1%}"
    n, active, state = cost.n_parameters, cost.n_active_parameters, sum(cost.state_bytes.values())
    parts = sorted(cost.parameters.items(), key=lambda item: -item[1])
    training = cost.forward_flops * (4 if config.remat == "block" else 3)
    rows = [("parameters", n, ""), *((f"  {part}", size, share(size, n)) for part, size in parts)]
    rows += [("  active per token", active, share(active, n))] if active < n else []
    rows += [(f"state bytes at {context_tokens:,} tokens", state, "")]
    rows += [(f"  {mixer}", size, share(size, state)) for mixer, size in cost.state_bytes.items()]
    rows += [("FLOPs per token", cost.forward_flops, ""), (f"  training, remat {config.remat}", training, "")]
    wide, far = (max(len(text(row)) for row in rows) for text in (lambda row: row[0], lambda row: f"{row[1]:,}"))
    title = f"{name}: {config.n_layers} layers, d_model {config.d_model}, {config.dtype}"
    return [title, *(f"{label:{wide}} {number:{far},} {part:>6}".rstrip() for label, number, part in rows)]

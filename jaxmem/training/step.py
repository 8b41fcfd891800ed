"""One training step as a pure function: (state, batch) -> (state, metrics).

A batch has A parts of [B, T] tokens, whose gradients are added up. The target at t is the token at t+1 of the same segment;
the loss is the mean over targets of the whole batch, however it is split into parts or devices, plus the load-balancing loss
of each router (mean over routers and parts) and what keeps Tucker cores near rank 1. No array of a step is as long as the
sequence where devices share that, and none is as large as a memory table but tables and their moments, if these are updated
by rows.

If the loss, a gradient or an update is not finite, the state comes back as it was and `metrics.finite` is False.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmem.layers.cross_entropy import chunked_cross_entropy
from jaxmem.layers.mixture_of_memories import MixtureState, load_balancing_loss
from jaxmem.layers.tucker_keys import rank_penalty
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.sharding import constrain
from jaxmem.showing import tree_text
from jaxmem.training.data import Batch
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import group_norms, make_optimizer, make_schedule
from jaxmem.training.tables import TABLES, TableTraining, gradients_norm
from jaxmem.typing import Array, Bool, Float, Int, PyTree


class Shifted(NamedTuple):
    """A batch as steps take it: T tokens and the T that follow them, so that time can be split over devices."""

    tokens: Int[Array, "*parts B T"]
    segment_ids: Int[Array, "*parts B T"]
    targets: Int[Array, "*parts B T"]
    target_segments: Int[Array, "*parts B T"]
    target_bytes: Int[Array, "*parts B T"] | None = None
    """Bytes of text that the targets stand for, and those of pieces without any token; None: nobody counts them."""

    @property
    def counts(self) -> Bool[Array, "*parts B T"]:
        """True where the target is of the token's own segment: neither behind a segment's last token nor at padding."""
        return (self.target_segments == self.segment_ids) & (self.segment_ids != 0)


def shifted(batch: Batch) -> Shifted:
    """Of rows with T+1 tokens.

    >>> batch = {"tokens": jnp.arange(6), "segment_ids": jnp.array([1, 1, 2, 3, 3, 0])}
    >>> shifted(batch).targets.tolist(), shifted(batch).counts.tolist()
    ([1, 2, 3, 4, 5], [True, False, False, True, False])
    """
    tokens, segments, text = batch["tokens"], batch["segment_ids"], batch.get("bytes")
    if text is not None:
        text = np.concatenate(
            [text[..., :1] + text[..., 1:2], text[..., 2:]], axis=-1
        )  # a row's first token is no target
    return Shifted(tokens[..., :-1], segments[..., :-1], tokens[..., 1:], segments[..., 1:], text)


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Int[Array, ""]
    """Updates made."""
    params: nnx.State
    opt_state: PyTree

    __repr__ = tree_text


class StepMetrics(NamedTuple):
    """What one step tells; scalars, in fp32 but for counts of bytes."""

    nats: Float[Array, ""]
    """Sum over targets."""
    n_targets: Float[Array, ""]
    n_bytes: Int[Array, ""]
    """Of text, over all devices; exact below 2 GiB a step."""
    load_balance: Float[Array, ""]
    """Mean over the routers of their load-balancing losses, unweighted; top_k when all are even."""
    grad_norm: Float[Array, ""]
    """Before clipping; memory tables are apart."""
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    """Loss, gradients and updates are finite, so the step was made."""
    grad_norms: dict[str, Float[Array, ""]]
    """By parameter group; memory tables are one."""
    param_norms: dict[str, Float[Array, ""]]
    """By parameter group, before the step; without memory tables, which no step reads whole."""
    update_norms: dict[str, Float[Array, ""]]
    """By parameter group, of what is added to the parameters."""


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first step; jit it, so that every parameter is born where it lives."""
    model = config.model.make(rngs=nnx.Rngs(params=config.seed))
    params, memory = nnx.state(model, nnx.Param), TableTraining(config)
    others, tables = memory.split(params)
    opt_state = make_optimizer(config.optimizer, config.steps, others).init(others)
    return TrainState(jnp.zeros((), jnp.int32), params, (opt_state, memory.init(tables)) if tables else opt_state)


def merge(config: DecoderConfig, params: nnx.State) -> Decoder:
    """The decoder with these parameters."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), params)


def make_train_step(config: TrainConfig) -> Callable[[TrainState, Shifted], tuple[TrainState, StepMetrics]]:
    """The step of a run, to be jitted with its first argument donated."""
    schedule, memory = make_schedule(config.optimizer, config.steps), TableTraining(config)

    def loss_of_part(params, reads, tables, part: Shifted, n_targets):
        model = memory.attach(merge(config.model, nnx.merge_state(params, tables)), reads)
        hidden, state = model(part.tokens, segment_ids=part.segment_ids)
        sums = chunked_cross_entropy(
            hidden,
            model.head,
            part.targets,
            part.counts.astype(jnp.float32),
            vocab_size=config.model.vocab_size,
            z_loss=config.z_loss,
        )
        balance = balance_loss(config.model, state)
        loss = sums.loss_sum / n_targets + config.load_balance * balance / config.accumulate
        if config.core_rank_penalty:
            loss += config.core_rank_penalty * core_penalty(model) / config.accumulate
        return loss, (sums.nats_sum, balance / config.accumulate)

    def step(state: TrainState, batch: Shifted) -> tuple[TrainState, StepMetrics]:
        n_targets = jnp.maximum(jnp.sum(batch.counts, dtype=jnp.float32), 1.0)
        params, tables = memory.split(state.params)
        opt_state, of_tables = state.opt_state if tables else (state.opt_state, None)
        differentiated = jax.value_and_grad(loss_of_part, argnums=(0, 1), has_aux=True)

        def add_part(sums, part):
            part = jax.tree.map(lambda x: constrain(x, "batch", "time"), part)
            reads = memory.no_reads(*part.tokens.shape)
            (loss, told), (grads, reads) = differentiated(params, reads, tables, part, n_targets)
            return jax.tree.map(jnp.add, sums, (loss, told, grads)), reads

        zeros = (jnp.float32(0), (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
        if config.accumulate == 1:
            (loss, (nats, balance), grads), reads = add_part(zeros, jax.tree.map(lambda x: x[0], batch))
            reads = jax.tree.map(lambda x: x[None], reads)
        else:
            (loss, (nats, balance), grads), reads = jax.lax.scan(add_part, zeros, batch)

        grad_norm = optax.tree.norm(grads)
        updates, new_opt_state = make_optimizer(config.optimizer, config.steps, params).update(grads, opt_state, params)
        of_rows = memory.gradients(tables, reads)
        finite = jnp.all(jnp.isfinite(jnp.stack([loss, grad_norm, optax.tree.norm(updates), gradients_norm(of_rows)])))
        made = TrainState(state.step + 1, optax.apply_updates(params, updates), new_opt_state)
        kept = TrainState(state.step, params, opt_state)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), made, kept)
        norms = [group_norms(tree, depth=3) for tree in (grads, params, updates)]
        if tables:
            tables, of_tables, update_norm = memory.update(of_rows, of_tables, tables, finite)
            new = TrainState(new.step, nnx.merge_state(new.params, tables), (new.opt_state, of_tables))
            norms[0][TABLES], norms[2][TABLES] = gradients_norm(of_rows), update_norm
        told = StepMetrics(
            nats=nats,
            n_targets=n_targets,
            n_bytes=jnp.zeros((), jnp.int32) if batch.target_bytes is None else batch.target_bytes.sum(dtype=jnp.int32),
            load_balance=balance,
            grad_norm=grad_norm,
            learning_rate=schedule(state.step),
            finite=finite,
            grad_norms=norms[0],
            param_norms=norms[1],
            update_norms=norms[2],
        )
        return new, told

    return step


def router_use(state: PyTree) -> list[tuple[int, PyTree]]:
    """(place in the pattern, use of the routers [repeats, B, M]) of every mixture of memories in a decoder's state."""
    return [(place, layer.router) for place, layer in enumerate(state) if isinstance(layer, MixtureState)]


def core_penalty(model: Decoder) -> Float[Array, ""]:
    """`rank_penalty` of the keys that have a core, mean over their layers; 0 without any."""
    cores = [block.memory.keys.core for block in model.blocks if hasattr(getattr(block.memory, "keys", None), "core")]
    return sum((rank_penalty(core[...]) for core in cores), jnp.float32(0)) / max(len(cores), 1)


def balance_loss(config: DecoderConfig, state: PyTree) -> Float[Array, ""]:
    """The mean over all layers with a router of each one's own load-balancing loss, whether layers are written out or
    repeated; 0 without any."""
    losses = [load_balancing_loss(use, config.pattern[place].top_k) for place, use in router_use(state)]
    return jnp.mean(jnp.concatenate(losses)) if losses else jnp.float32(0)

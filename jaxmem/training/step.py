"""One training step as a pure function: (state, batch) -> (state, metrics).

A batch is tokens and segment ids, int32 [A, B, T+1]: A parts whose gradients are added up. The target at t is the token
at t+1 of the same segment; the loss is the mean over targets of the whole batch, however it is split into parts or
devices, plus the load-balancing loss of the routers (mean over parts).

If the loss, a gradient or an update is not finite, the state comes back as it was and `metrics.finite` is False.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmem.layers.cross_entropy import chunked_cross_entropy
from jaxmem.layers.mixture_of_memories import MixtureState, load_balancing_loss
from jaxmem.models.decoder import Decoder, DecoderConfig
from jaxmem.sharding import constrain
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import group_norms, make_optimizer, make_schedule
from jaxmem.typing import Array, Bool, Float, Int, PyTree


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Int[Array, ""]
    """Updates made."""
    params: nnx.State
    opt_state: PyTree


class StepMetrics(NamedTuple):
    """What one step tells; scalars in fp32."""

    nats: Float[Array, ""]
    """Sum over targets."""
    n_targets: Float[Array, ""]
    load_balance: Float[Array, ""]
    """Load-balancing loss, unweighted; top_k when even."""
    grad_norm: Float[Array, ""]
    """Before clipping."""
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    """Loss, gradients and updates are finite, so the step was made."""
    grad_norms: dict[str, Float[Array, ""]]
    """By parameter group."""
    param_norms: dict[str, Float[Array, ""]]
    """By parameter group, before the step."""
    update_norms: dict[str, Float[Array, ""]]
    """By parameter group, of what is added to the parameters."""


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first step; jit it, so that every parameter is born where it lives."""
    model = config.model.make(rngs=nnx.Rngs(params=config.seed))
    params = nnx.state(model, nnx.Param)
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def merge(config: DecoderConfig, params: nnx.State) -> Decoder:
    """The decoder with these parameters."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), params)


def make_train_step(
    config: TrainConfig,
) -> Callable[[TrainState, Int[Array, "A B T+1"], Int[Array, "A B T+1"]], tuple[TrainState, StepMetrics]]:
    """The step of a run, to be jitted with its first argument donated."""
    schedule = make_schedule(config.optimizer, config.steps)

    def loss_of_part(params, tokens, segment_ids, n_targets):
        model = merge(config.model, params)
        by_token = lambda x: constrain(x, "batch", "time")
        hidden, state = model(tokens[:, :-1], segment_ids=segment_ids[:, :-1])
        weights = by_token(target_weights(segment_ids))
        sums = chunked_cross_entropy(
            hidden,
            model.head,
            by_token(tokens[:, 1:]),
            weights,
            vocab_size=config.model.vocab_size,
            z_loss=config.z_loss,
        )
        balance = balance_loss(config.model, state)
        loss = sums.loss_sum / n_targets + config.load_balance * balance / config.accumulate
        return loss, (sums.nats_sum, balance / config.accumulate)

    def step(state: TrainState, tokens: Array, segment_ids: Array) -> tuple[TrainState, StepMetrics]:
        n_targets = jnp.maximum(jnp.sum(jax.vmap(target_weights)(segment_ids)), 1.0)

        def add_part(sums, part):
            part = (constrain(x, "batch", None) for x in part)  # T + 1 tokens cannot be split over devices
            (loss, told), grads = jax.value_and_grad(loss_of_part, has_aux=True)(state.params, *part, n_targets)
            return jax.tree.map(jnp.add, sums, (loss, told, grads)), None

        zeros = (jnp.zeros(()), (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
        if config.accumulate == 1:
            (loss, (nats, balance), grads), _ = add_part(zeros, (tokens[0], segment_ids[0]))
        else:
            (loss, (nats, balance), grads), _ = jax.lax.scan(add_part, zeros, (tokens, segment_ids))

        grad_norm = optax.tree.norm(grads)
        optimizer = make_optimizer(config.optimizer, config.steps, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        told = StepMetrics(
            nats=nats,
            n_targets=n_targets,
            load_balance=balance,
            grad_norm=grad_norm,
            learning_rate=schedule(state.step),
            finite=finite,
            grad_norms=group_norms(grads, depth=3),
            param_norms=group_norms(state.params, depth=3),
            update_norms=group_norms(updates, depth=3),
        )
        return new, told

    return step


def target_weights(segment_ids: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    """1 where the next token is of the same segment, 0 elsewhere: behind a segment's last token and at padding."""
    here, following = segment_ids[:, :-1], segment_ids[:, 1:]
    return ((following == here) & (here != 0)).astype(jnp.float32)


def router_use(state: PyTree) -> list[tuple[int, PyTree]]:
    """(place in the pattern, use of the routers [repeats, B, M]) of every mixture of memories in a decoder's state."""
    return [(place, layer.router) for place, layer in enumerate(state) if isinstance(layer, MixtureState)]


def balance_loss(config: DecoderConfig, state: PyTree) -> Float[Array, ""]:
    """Load-balancing loss, mean over the mixtures in the pattern; 0 without one."""
    losses = [load_balancing_loss(use, config.pattern[place].top_k) for place, use in router_use(state)]
    return sum(losses, jnp.zeros(())) / max(len(losses), 1)

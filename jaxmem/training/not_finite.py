"""A step that could not be made: which numbers were not finite first, in one sentence."""

import math

from jaxmem.training.experiment import TrainConfig
from jaxmem.training.step import StepMetrics
from jaxmem.training.tables import TABLES

MAX_ROWS = "optimizer.tables.max_rows"


class NotFinite(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message says when and where."""


def describe_not_finite(step: int, told: StepMetrics) -> str:
    """One sentence on what broke first: parameters that were not finite before the step, gradients, or updates."""
    kinds = {"parameters": told.param_norms, "gradients": told.grad_norms, "updates": told.update_norms}
    for what, norms in kinds.items():
        groups = [group for group, norm in norms.items() if not math.isfinite(norm)]
        if groups:
            where = f"the {what} of " + ("all groups" if len(groups) == len(norms) else ", ".join(groups))
            break
    else:
        where = "the loss alone, all parameters, gradients and updates are finite"
    too_many = f"; if the step read more rows of tables, raise {MAX_ROWS}" if TABLES in where else ""
    return (
        f"step {step}: needs a finite loss, gradients and updates, got loss={told.nats / max(told.n_targets, 1)}, "
        f"grad_norm={told.grad_norm}; not finite: {where}; the step was not made and the checkpoints before it are kept"
        + too_many
    )


def advice(config: TrainConfig, steps: list[int], command: str) -> str:
    """How to go on: with half the rate, from the last checkpoint or, where that has diverged already, from one before.

    Args:
      steps: of the checkpoints, oldest first.
      command: what started the run.
    """
    lower = f"{command} --resume --optimizer.learning-rate {config.optimizer.learning_rate / 2:g}"
    if not steps:
        return "there is none yet: lower optimizer.learning_rate or optimizer.clip_norm, and start anew with --out"
    earlier = (
        f"; if its state has diverged already, --from-step {steps[-2]} goes back further" if len(steps) > 1 else ""
    )
    return f"to go on from step {steps[-1]} with half the rate (or lower optimizer.clip_norm): {lower}{earlier}"

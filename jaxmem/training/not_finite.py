"""A step that could not be made: which numbers were not finite first, in one sentence."""

import math

from jaxmem.training.step import StepMetrics
from jaxmem.training.tables import TABLES


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
    too_many = "(or raise optimizer.tables.max_rows, if the step read more) " if TABLES in where else ""
    return (
        f"step {step}: needs a finite loss, gradients and updates, got loss={told.nats / max(told.n_targets, 1)}, "
        f"grad_norm={told.grad_norm}; not finite: {where}; the step was not made and the checkpoints before it are kept; "
        f"lower optimizer.learning_rate or optimizer.clip_norm {too_many}and start from the last one"
    )

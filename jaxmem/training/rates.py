"""Learning rates across a resume: what the last step had, what the next one will have, and what was chosen about it.

A schedule ends with its run. Resumed with another number of steps, a run has the schedule of that number as if it had
been so from the start (`on_new_steps="restate"`): a cosine that had come down goes up again, and wsd's decay moves to
the new end. Or it goes on from the rate it has reached ("continue"): a cosine falls from there over the steps that are
left, wsd keeps that rate until its decay at the new end, also if a decay had begun. What was chosen is part of the
config that checkpoints hold, so that a run that is interrupted again goes on exactly.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxmem.config import from_json
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig, rate_of

FIELDS = ("on_new_steps", "continued")
"""Fields of an `OptimizerConfig` that say what to do here, and may differ from those of the run that is resumed."""
SAME = 5e-3
"""Rates nearer to each other than this part of them are told as the same."""


def resumed(config: TrainConfig, saved: Mapping[str, Any], step: int) -> tuple[TrainConfig, list[str]]:
    """The config of a run that goes on, and sentences on its learning rates for the log.

    Args:
      config: as it was asked for.
      saved: the JSON config of the checkpoint, whose schedule was in force.
      step: updates that the checkpoint has made.
    """
    before, until_now = from_json(saved["optimizer"]), int(saved["steps"])
    after = continued(config.optimizer, config.steps, before, until_now, step)
    config = dataclasses.replace(config, optimizer=after)
    sentence = describe(after, config.steps, before, until_now, step)
    has_tables = any(memory is not None for memory in config.model.memories)
    return config, [sentence + ("; those of memory tables likewise" if has_tables else "")] if sentence else []


def continued(
    after: OptimizerConfig, steps: int, before: OptimizerConfig, until_now: int, step: int
) -> OptimizerConfig:
    """`after` with the steps at which the run was continued, the present one included if it is one.

    The same number of steps changes nothing. In warm-up there is nothing reached to go on from: the new schedule is taken.

    >>> config = OptimizerConfig(on_new_steps="continue")
    >>> continued(config, 200, config, 100, step=100).continued, continued(config, 100, config, 100, step=60).continued
    (((100, 100),), ())
    """
    if steps == until_now:
        return dataclasses.replace(after, continued=before.continued)
    if after.on_new_steps == "restate" or step < max(1, before.warmup_steps):
        return dataclasses.replace(after, continued=())
    earlier = tuple(leg for leg in before.continued if leg[0] < step)
    return dataclasses.replace(after, continued=(*earlier, (step, until_now)))


def describe(after: OptimizerConfig, steps: int, before: OptimizerConfig, until_now: int, step: int) -> str | None:
    """One sentence with the rate of the last step made and that of the next; None if all goes on as it was.

    >>> config = OptimizerConfig(learning_rate=1.0)
    >>> describe(config, 200, config, 100, step=100)[:92]
    'learning rate: 0.1 in step 100, the last one made, and 0.55 in step 101, 5.5 times as high: '
    """
    if not step or step >= steps:
        return None
    last, as_planned, new = (
        rate_of(before, until_now, step - 1),
        rate_of(before, until_now, step),
        rate_of(after, steps, step),
    )
    if steps == until_now and math.isclose(new, as_planned, rel_tol=SAME):
        return None
    said = f"learning rate: {last:.3g} in step {step}, the last one made, and {new:.3g} in step {step + 1}"
    goes_on = bool(after.continued) and after.continued[-1] == (step, until_now) and steps != until_now
    jumps = last > 0 and not goes_on and not math.isclose(new, as_planned, rel_tol=SAME)
    said += f", {new / last:.2g} times as high" if jumps else ""
    if steps == until_now:
        return f"{said}: optimizer.learning_rate or its schedule was changed"
    if goes_on:
        return f"{said}: it goes on from the rate reached, {_ahead(after, steps, step)}"
    said += f": the schedule is that of a run of {steps} steps now, not {until_now}, {_ahead(after, steps, step)}"
    if jumps and after.on_new_steps == "restate":
        choice = dataclasses.replace(after, on_new_steps="continue")
        other = continued(choice, steps, before, until_now, step)
        said += (
            f"; --optimizer.on-new-steps continue goes on from the rate reached instead, {_ahead(other, steps, step)}"
        )
    return said


def _ahead(config: OptimizerConfig, steps: int, step: int) -> str:
    """What lies ahead."""
    end, now = rate_of(config, steps, steps), rate_of(config, steps, step)
    if math.isclose(end, now, rel_tol=SAME):
        return f"and stays at {now:.3g} to the end"
    if config.schedule != "wsd":
        return f"and falls to {end:.3g} at the end"
    start = max(step, steps - max(1, round(config.decay_fraction * steps)))
    return f"and falls to {end:.3g} between step {start} and the end"

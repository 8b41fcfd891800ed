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
    """`after` with the rate that the run goes on from, if it goes on from one.

    The same number of steps changes nothing. In warm-up there is nothing reached to go on from: the new schedule is taken.

    >>> config = OptimizerConfig(on_new_steps="continue", final_fraction=0.5)
    >>> continued(config, 200, config, 100, step=110).continued, continued(config, 100, config, 100, step=60).continued
    ((110, 0.5), None)
    """
    if steps == until_now:
        return dataclasses.replace(after, continued=before.continued)
    if after.on_new_steps == "restate" or step < max(1, before.warmup_steps):
        return dataclasses.replace(after, continued=None)
    reached = rate_of(before, until_now, step - 1) / before.learning_rate
    return dataclasses.replace(after, continued=(step, reached))


def describe(after: OptimizerConfig, steps: int, before: OptimizerConfig, until_now: int, step: int) -> str | None:
    """One sentence with the rate of the last step made and that of the next; None if all goes on as it was.

    >>> config = OptimizerConfig(learning_rate=1.0)
    >>> describe(config, 200, config, 100, step=100)[:92]
    'learning rate: 0.1 in step 100, the last one made, and 0.55 in step 101, 5.5 times as high: '
    """
    if not step or step >= steps:
        return None
    last, new = rate_of(before, until_now, step - 1), rate_of(after, steps, step)
    as_planned = rate_of(before, until_now, step)
    if steps == until_now and _same(new, as_planned):
        return None
    goes_on = steps != until_now and after.continued is not None
    said = f"learning rate: {last:.3g} in step {step}, the last one made, and {new:.3g} in step {step + 1}"
    jumps = last > 0 and not _same(new, last if goes_on else as_planned)
    said += f", {new / last:.2g} times as high" if jumps else ""
    if steps == until_now:
        return f"{said}: optimizer.learning_rate or its schedule was changed"
    if goes_on:
        part = f"the part of optimizer.learning_rate that was reached, {after.continued[1]:.3g},"
        reached = part if after.learning_rate != before.learning_rate else "what was reached,"
        return f"{said}: it goes on from {reached} {_ahead(after, steps, step)}"
    said += f": the schedule is that of a run of {steps} steps now, not {until_now}, {_ahead(after, steps, step)}"
    if not jumps or after.on_new_steps == "continue":
        return said
    choice = continued(dataclasses.replace(after, on_new_steps="continue"), steps, before, until_now, step)
    if choice.continued is None:  # in warm-up nothing is reached
        return said
    goes_on_at = rate_of(choice, steps, step)
    where = "the rate reached" if _same(goes_on_at, last) else f"{goes_on_at:.3g}"
    said += f"; --optimizer.on-new-steps continue goes on from {where} instead, {_ahead(choice, steps, step)}"
    begun = until_now - max(1, round(before.decay_fraction * until_now))
    if before.schedule == "wsd" and before.continued is None and begun < step:
        said += f"; --from-step takes a checkpoint of step {begun} or before, where the decay had not begun"
    return said


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME)


def _ahead(config: OptimizerConfig, steps: int, step: int) -> str:
    """What lies ahead."""
    end, now = rate_of(config, steps, steps), rate_of(config, steps, step)
    if _same(end, now):
        return f"and stays at {now:.3g} to the end"
    if step < config.warmup_steps and not config.continued:
        return f"and rises to {rate_of(config, steps, config.warmup_steps):.3g} at step {config.warmup_steps}"
    if config.schedule != "wsd":
        return f"and falls to {end:.3g} at the end"
    start = max(step, steps - max(1, round(config.decay_fraction * steps)))
    return f"and falls to {end:.3g} between step {start} and the end"

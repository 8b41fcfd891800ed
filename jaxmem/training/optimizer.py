"""The optimiser: AdamW or Muon with a learning-rate schedule, and the structural rules of what each does to whom.

A step of either is

    g <- g min(1, clip_norm / |g|)        w <- w - lr(step) (direction(g) + weight_decay w)

with the decay on matrices and rows only. The direction is Adam's m / (sqrt(v) + eps), or for the matrices of Muon

    0.2 sqrt(max(in, out)) U V^T    where U S V^T is the momentum

whose entries have about the size of Adam's, so that one learning rate and one decay serve both.

What a parameter *is* was said where it was made, by its `kind` (`jaxmem.sharding.kinds`). A matrix knows its inputs, outputs
and copies; each copy, and each of stacked layers, is a matrix of its own. Rows that are looked up or scored one by one
(embedding, output head, sub-keys) are decayed and have Adam's direction. Vectors are never decayed and never orthogonalised:
norm scales, biases, a_log and dt_bias, convolution taps, the A and C of a state space. A matrix with a single output, as a
gate per token is, is decayed and Adam's: there is nothing to orthogonalise. Memory tables are a group apart
(`TableOptimizerConfig`).

References: Loshchilov and Hutter 2019, AdamW, arXiv:1711.05101; Jordan et al. 2024, Muon; Liu et al. 2025, Muon is
Scalable for LLM Training, arXiv:2502.16982, eq. 4 (the factor 0.2); Hu et al. 2024, MiniCPM, arXiv:2404.06395 (WSD).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jaxmem.fields import Bounds, Count, Decay, Fraction, Natural, NonNegative, Positive, checked
from jaxmem.sharding import VECTOR, current_mesh
from jaxmem.sharding.kinds import Matrix, kind_of, sides
from jaxmem.training.adam import scale_by_adam
from jaxmem.training.lazy_adam import lazy_adam
from jaxmem.typing import Array, Float, Int, PyTree

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024, "Muon": coefficients of x, x x^T x and (x x^T)^2 x."""
MUON_RMS = 0.2
"""Root mean square of the entries of Muon's direction, about that of Adam's."""

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
@checked
class TableOptimizerConfig:
    """How memory tables are updated; the schedule's form is that of the other parameters.

    Raises: ValueError for a value outside the range that its line states.
    """

    update: Literal["lazy", "dense"] = "lazy"
    """Adam of the rows that a step read, others stay as they are; or AdamW of whole tables, with dense gradients."""
    learning_rate: Positive = 1e-3
    """The highest; > 0."""
    weight_decay: NonNegative = 0.0
    """Of rows that are read (lazy) or of all (dense), per step and per unit of the learning rate; >= 0."""
    clip_norm: Positive | None = 1.0
    """Largest L2 norm of all tables' gradients together; > 0. None: they are not clipped."""
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    max_rows: Count | None = None
    """Most rows of a table that a step may read on each device that holds a part of it; a step that reads more is not made.
    Bounds memory: None takes the number of reads, each of which may be another row's."""


@dataclasses.dataclass(frozen=True)
@checked
class OptimizerConfig:
    """How parameters are updated.

    Raises: ValueError for a value outside the range that its line states.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    """Direction of matrices; everything else is AdamW's."""
    learning_rate: Positive = 3e-4
    """The highest, after warm-up; > 0."""
    warmup_steps: Natural = 0
    """Steps over which the rate rises linearly, the first of them at learning_rate / warmup_steps; >= 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: half a cosine; stable, then a linear decay; or constant."""
    decay_fraction: Annotated[float, Bounds("(0, 1]")] = 0.2
    """wsd: the part of all steps, at the end, over which the rate decays; in (0, 1]."""
    final_fraction: Fraction = 0.1
    """The rate at the end of cosine or wsd, as a part of learning_rate; in [0, 1]."""
    weight_decay: NonNegative = 0.1
    """Of matrices and rows, per step and per unit of the learning rate; >= 0."""
    b1: Decay = 0.9
    """Adam's decay of the mean of gradients; in [0, 1)."""
    b2: Decay = 0.95
    """Adam's decay of the mean of their squares; in [0, 1)."""
    eps: Positive = 1e-8
    """Adam's, added to the root of that mean; > 0."""
    momentum: Decay = 0.95
    """Muon's decay of the mean of gradients (Nesterov); in [0, 1)."""
    clip_norm: Positive | None = 1.0
    """Largest L2 norm of all gradients together; > 0. None: gradients are not clipped."""
    on_new_steps: Literal["restate", "continue"] = "restate"
    """Rates of a run that is resumed with another number of steps: those of a run of that number, which may jump; or on from
    the rate reached, down to the final one at the new end (`jaxmem.training.rates`)."""
    continued: tuple[int, float] | None = None
    """Kept by the run: the step at which it was last resumed to `continue`, the rate reached as a part of learning_rate."""
    tables: TableOptimizerConfig = TableOptimizerConfig()
    """Of memory tables, if there are any: a group apart, of which nothing above holds but the form of the schedule."""


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """The learning rate of step 0, 1, ... total_steps - 1, and the final one from there on.

        rate(step) = learning_rate * min(1, (step + 1) / warmup_steps) * shape(step)

    shape falls from 1 to final_fraction between the end of warm-up (cosine), or the last decay_fraction of all steps
    (wsd), and total_steps. In a run too short for both, as when an experiment is cut to a few steps to try it, warm-up
    and decay overlap. From the step at which the run was `continued` shape falls from what it had reached: a cosine over all
    steps that were left, wsd over the last decay_fraction of all, as far as they were left.

    Raises: ValueError if total_steps is not positive.

    >>> rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.0), 12)
    >>> [round(float(rate(step)), 2) for step in (0, 3, 4, 8, 12)]
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    if total_steps < 1:
        raise ValueError(f"schedule: needs total_steps >= 1, got total_steps={total_steps}; train for some steps")
    rate = _rate(config, total_steps)
    return lambda step: rate(jnp.asarray(step, jnp.float32), jnp)


def rate_of(config: OptimizerConfig, total_steps: int, step: int) -> float:
    """The same of one step, as a number."""
    return float(_rate(config, total_steps)(np.float64(step), np))


def _rate(config: OptimizerConfig, total_steps: int) -> Callable[[Any, Any], Any]:
    """The rate of a step, in jnp or numpy."""
    start, highest = config.continued or (config.warmup_steps, 1.0)
    warmup_steps = 1 if config.continued else max(1, config.warmup_steps)
    left = max(0, total_steps - start)
    decay_steps = {
        "cosine": left,
        "wsd": max(1, round(config.decay_fraction * total_steps)),
        "constant": 0,
    }[config.schedule]
    if config.continued:  # no part of a decay lies before that
        decay_steps = min(decay_steps, left)
    drop = highest - min(highest, config.final_fraction)

    def rate(step, xp):
        done = xp.clip((step - (total_steps - decay_steps)) / max(1, decay_steps), 0.0, 1.0)
        fall = {
            "cosine": (1 - xp.cos(xp.pi * done)) / 2,
            "wsd": done,
            "constant": 0.0,
        }[config.schedule]
        rise = xp.minimum(1.0, (step + 1) / warmup_steps)
        return config.learning_rate * rise * (highest - drop * fall)

    return rate


def make_optimizer(config: OptimizerConfig, total_steps: int, params: PyTree) -> optax.GradientTransformation:
    """The transformation from gradients to updates for parameters like `params`.

    Args:
      config: what to do.
      total_steps: updates of the whole run; the end of the schedule.
      params: a tree (`nnx.State`, module) of `nnx.Param`s with `axes`, arrays or their shapes. What the
        transformation is given later must have the same leaves in the same order.

    Returns: an optax transformation whose state has the dtype and sharding of the parameters.
    Raises: ValueError for a parameter without `axes`, and as `make_schedule`.
    """
    variables = jax.tree.leaves(params, is_leaf=_is_param)
    for variable in variables:
        if not hasattr(variable, "axes"):
            raise ValueError(
                f"optimizer: needs parameters with logical axes, got {type(variable).__name__} without axes; "
                "make parameters with jaxmem.sharding.param"
            )
    direction = scale_by_adam(config.b1, config.b2, config.eps)
    if config.kind == "muon":
        dimensions = [matrix_dimensions(variable) for variable in variables]
        labels = ["muon" if numbers and numbers.output_axis else "adamw" for numbers in dimensions]
        muon = _muon(config.momentum, [n for n, label in zip(dimensions, labels, strict=True) if label == "muon"])
        direction = optax.partition({"adamw": direction, "muon": muon}, lambda tree: _like(tree, labels))
    decayed = [kind_of(variable) != VECTOR for variable in variables]
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: _like(tree, decayed)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def make_table_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The transformation for memory tables: of gradients that are a `RowGradient` per table (lazy), or arrays (dense)."""
    c = config.tables
    rate = make_schedule(dataclasses.replace(config, learning_rate=c.learning_rate), total_steps)
    if c.update == "lazy":
        return lazy_adam(rate, c.b1, c.b2, c.eps, c.weight_decay, c.clip_norm)
    clip = optax.identity() if c.clip_norm is None else optax.clip_by_global_norm(c.clip_norm)
    adamw = optax.chain(
        scale_by_adam(c.b1, c.b2, c.eps),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(clip, adamw)


def matrix_dimensions(variable: nnx.Variable) -> MuonDimensionNumbers | None:
    """Which dimensions of a parameter are a matrix's input and output, those left being copies; None for any other kind.

    >>> matrix_dimensions(nnx.Param(jnp.zeros((12, 8, 2, 4)), axes=("embed", "heads", "key"), kind=Matrix()))  # 12 layers
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
    >>> matrix_dimensions(nnx.Param(jnp.zeros((2, 4)), axes=("heads", "key"), kind="vector"))
    """
    found = sides(variable)
    return None if found is None else MuonDimensionNumbers(found.inputs, found.outputs)


def without_kind(params: PyTree) -> str | None:
    """One sentence on the parameters that do not say what they are, and what they are taken for; None if all say it."""
    taken: dict[str, list[str]] = {}
    for name, variable in zip(parameter_groups(params), jax.tree.leaves(params, is_leaf=_is_param), strict=True):
        if getattr(variable, "kind", None) is None:
            kind = kind_of(variable)
            taken.setdefault("matrix" if isinstance(kind, Matrix) else kind, []).append(name)
    if not taken:
        return None
    rules = {
        "vector": "vectors, as they have one dimension: not decayed",
        "matrix": "matrices, as they have two: decayed, and given to Muon if that is the optimiser",
        "rows": "rows, as they have more: decayed, not given to Muon",
    }
    found = "; ".join(f"{', '.join(taken[kind])} ({rule})" for kind, rule in rules.items() if kind in taken)
    return f"parameters that do not say what they are, taken by their dimensions: {found}; param(..., kind=...) says it"


def _muon(momentum: float, dimensions: list[MuonDimensionNumbers]) -> optax.GradientTransformation:
    """Gradients of matrices -> 0.2 sqrt(max(in, out)) x the orthogonal factor of their Nesterov momentum."""

    def rescale(updates, params=None):
        def scaled(update, numbers):
            fan_in, fan_out = (math.prod(update.shape[dim] for dim in dims) for dims in numbers)
            return MUON_RMS * math.sqrt(max(fan_in, fan_out)) * update

        return jax.tree.map(scaled, updates, _like(updates, dimensions))

    orthogonalize = optax.contrib.scale_by_muon(
        ns_coeffs=np.array(NEWTON_SCHULZ, np.float32),  # a state of fp32 whatever jax_enable_x64 says
        beta=momentum,
        weight_dimension_numbers=lambda updates: _like(updates, dimensions),
    )
    return optax.chain(_sharded_by_compiler(orthogonalize), optax.stateless(rescale))


def _sharded_by_compiler(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, leaving the layout of what stands between inputs and outputs to the compiler.

    Newton-Schulz multiplies a matrix by its own transpose: under explicit axes both sides would claim one mesh axis.
    """

    def update(updates, state, params=None):
        if current_mesh() is None:
            return transform.update(updates, state, params)
        layouts = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(transform.update, out_sharding=layouts)(updates, state)

    return optax.GradientTransformation(transform.init, update)


def parameter_groups(tree: PyTree, depth: int = 2) -> dict[str, str]:
    """Path of every parameter -> its group, the first `depth` modules on that path.

    >>> parameter_groups({"blocks": {"mixer": {"norm": {"scale": 0}}}, "embedding": {"table": 0}})
    {'blocks/mixer/norm/scale': 'blocks/mixer', 'embedding/table': 'embedding'}
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_param)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return {name: "/".join(name.split("/")[:-1][:depth]) or name for name in names}


def group_norms(tree: PyTree, depth: int = 2) -> dict[str, Float[Array, ""]]:
    """L2 norm, in fp32, of each of the `parameter_groups` of parameters, gradients or updates.

    A group whose norm is not finite is the one in which something went wrong.
    """
    squares: dict[str, Array] = {}
    leaves = jax.tree.leaves(tree, is_leaf=_is_param)
    for group, leaf in zip(parameter_groups(tree, depth).values(), leaves, strict=True):
        square = sum(jnp.sum(jnp.square(array.astype(jnp.float32))) for array in jax.tree.leaves(leaf))
        squares[group] = squares.get(group, 0.0) + square
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _like(tree: PyTree, values: list) -> PyTree:
    """The values as leaves of a tree with the structure of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), values)

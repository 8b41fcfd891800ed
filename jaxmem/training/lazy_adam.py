"""Adam for tables of which a step reads a few rows: moments and values of those alone.

    m_r = b1 m_r + (1 - b1) g_r      v_r = b2 v_r + (1 - b2) g_r^2      for the rows r that were read
    values_r -= lr ((m_r / (1 - b1^t)) / (sqrt(v_r / (1 - b2^t)) + eps) + decay values_r)

t counts all steps. Rows that were not read keep their moments and values, unlike Adam's, whose moments fade at every step and
still move them. If all are read in every step the two are the same.

Cost per step: a few times the rows that were read, whatever the table's size, if state and table are donated. On a mesh each
device updates its own part of the rows (which `jaxmem.sharding.tables.gradient_of_rows` finds), and nothing is exchanged but
the norm that `clip_norm` needs.
Reference: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter 2019, arXiv 1711.05101 (decay); lazy as
TensorFlow's LazyAdam and, for t, as torch.optim.SparseAdam.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmem.pallas_kernels.memory_lookup import RowGradient
from jaxmem.sharding import constrain, local
from jaxmem.sharding.tables import TABLE
from jaxmem.training.adam import bias, moved
from jaxmem.typing import Array, Bool, Float, Int, PyTree


class LazyAdamState(NamedTuple):
    """Moments of the tables, in fp32, and which rows a checkpoint has to write."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree
    touched: PyTree | None = None
    """Per table, bool [M]: rows that were updated since somebody set them to False; None: nobody wants to know."""


def lazy_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """An optax transformation of trees whose gradients are a `RowGradient` per table; `apply_rows` adds its updates.

    Args:
      learning_rate: a number, or a schedule of the steps made.
      weight_decay: of rows that are read, times the learning rate.
      clip_norm: largest norm of all rows of all tables together, apart from any other parameters; None: any.

    >>> table = jnp.zeros((5, 1))
    >>> optimizer = lazy_adam(0.1)
    >>> gradient = RowGradient(jnp.array([3, 5]), jnp.array([[2.0], [0.0]]), jnp.array([1, 0]))
    >>> updates, state = optimizer.update(gradient, optimizer.init(table), table)
    >>> [round(x, 4) for x in apply_rows(table, updates)[:, 0].tolist()]
    [0.0, 0.0, 0.0, -0.1, 0.0]
    """
    return _adam_of_rows(learning_rate, b1, b2, lambda count: eps, weight_decay, clip_norm)


def sparse_adam(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """The same as torch.optim.SparseAdam does it: eps is added before the bias of v is corrected, as eps / sqrt(1 - b2^t)."""
    return _adam_of_rows(learning_rate, b1, b2, lambda count: eps / jnp.sqrt(bias(b2, count)), 0.0, None)


def _adam_of_rows(
    learning_rate: optax.ScalarOrSchedule,
    b1: float,
    b2: float,
    eps: Callable[[Array], Array | float],
    weight_decay: float,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    is_rows = lambda node: isinstance(node, RowGradient)

    def init(tables: PyTree) -> LazyAdamState:
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tables)
        of_rows = lambda x: constrain(jnp.ones(x.shape[:-1], bool), *[None] * (x.ndim - 2), "slots")
        every = jax.tree.map(of_rows, tables)
        return LazyAdamState(jnp.zeros((), jnp.int32), zeros(), zeros(), every)

    def update(gradients: PyTree, state: LazyAdamState, tables: PyTree | None = None):
        if tables is None and weight_decay:
            raise ValueError("lazy_adam: needs the tables for weight_decay, got none; pass them to update")
        count = optax.safe_increment(state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves, structure = jax.tree.flatten(gradients, is_leaf=is_rows)
        if clip_norm is not None:
            norm = optax.tree.norm([leaf.sums for leaf in leaves])
            factor = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
            leaves = [leaf._replace(sums=leaf.sums * factor) for leaf in leaves]

        def of_table(numbers, gradient: RowGradient, mu, nu, table):
            count, rate = numbers
            rows, g = gradient.rows, gradient.sums
            m, v = moved(_get(mu, rows), g, b1), moved(_get(nu, rows), g**2, b2)
            step = m / bias(b1, count) / (jnp.sqrt(v / bias(b2, count)) + eps(count))
            if weight_decay:
                step += weight_decay * _get(table, rows).astype(jnp.float32)
            return gradient._replace(sums=-rate * step), _set(mu, rows, m), _set(nu, rows, v)

        tables = state.mu if tables is None else tables
        trees = zip(*map(structure.flatten_up_to, (state.mu, state.nu, tables)), strict=True)
        out = lambda rows, table: (rows, table, table)
        run = functools.partial(_on_own_rows(of_table, out), (count, jnp.float32(rate)))
        new = [run(leaf, *arrays) for leaf, arrays in zip(leaves, trees, strict=True)]
        updates, mu, nu = (jax.tree.unflatten(structure, part) for part in zip(*new, strict=True))
        touched = None if state.touched is None else jax.tree.map(_touch, updates, state.touched, is_leaf=is_rows)
        return updates, LazyAdamState(count, mu, nu, touched)

    return optax.GradientTransformation(init, update)


def apply_rows(tables: PyTree, updates: PyTree) -> PyTree:
    """Tables with the updates of some of their rows, each in the table's dtype."""

    def add(_, update: RowGradient, table: Array) -> Array:
        return _set(table, update.rows, _get(table, update.rows).astype(jnp.float32) + update.sums)

    is_rows = lambda node: isinstance(node, RowGradient)
    run = functools.partial(_on_own_rows(add, lambda rows, table: table), ())
    return jax.tree.map(run, updates, tables, is_leaf=is_rows)


def _on_own_rows(function: Callable[..., PyTree], out: Callable[[PyTree, PyTree], PyTree]) -> Callable[..., PyTree]:
    """`function(numbers, rows, *tables)` on each device's own part of tables [M V], or stacked ones [L M V].

    Args:
      out: what it returns, made of the axes of rows and those of a table.
    """

    def placed(numbers: tuple[Array, ...], gradient: RowGradient, *tables: Array) -> PyTree:
        stacked = gradient.rows.ndim == 2
        axes = (None, *TABLE) if stacked else TABLE
        of_rows = RowGradient(axes[:-1], axes, axes[:-1])
        run = jax.vmap(function, in_axes=(None, *[0] * (1 + len(tables)))) if stacked else function
        of_tables = (axes if table.ndim == len(axes) else axes[:-1] for table in tables)
        in_axes = (((),) * len(numbers), of_rows, *of_tables)
        return local(run, in_axes=in_axes, out_axes=out(of_rows, axes))(numbers, gradient, *tables)

    return placed


def _touch(gradient: RowGradient, touched: Bool[Array, "*L M"]) -> Bool[Array, "*L M"]:
    mark = lambda _, g, touched: touched.at[g.rows].set(True, mode="drop", indices_are_sorted=True)
    return _on_own_rows(mark, lambda rows, table: table[:-1])((), gradient, touched)


def _get(x: Float[Array, "M V"], rows: Int[Array, "n"]) -> Float[Array, "n V"]:
    return x.at[rows].get(mode="fill", fill_value=0)


def _set(x: Float[Array, "M V"], rows: Int[Array, "n"], new: Float[Array, "n V"]) -> Float[Array, "M V"]:
    return x.at[rows].set(new.astype(x.dtype), mode="drop", indices_are_sorted=True)

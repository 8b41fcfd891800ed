"""Adam for tables of which a step reads a few rows: moments and values of those alone.

    m_r = b1 m_r + (1 - b1) g_r      v_r = b2 v_r + (1 - b2) g_r^2      for the rows r that were read
    values_r -= lr ((m_r / (1 - b1^t)) / (sqrt(v_r / (1 - b2^t)) + eps) + decay values_r)

t counts all steps. Rows that were not read keep their moments and values, unlike Adam's, whose moments fade at every step and
still move them. If all are read in every step the two are the same.

Cost per step: a few times the rows that were read, whatever the table's size, if state and table are donated.
Reference: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter 2019, arXiv 1711.05101 (decay); lazy as
TensorFlow's LazyAdam and, for t, as torch.optim.SparseAdam.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmem.pallas_kernels.memory_lookup import RowGradient
from jaxmem.typing import Array, Float, Int, PyTree


class LazyAdamState(NamedTuple):
    """Moments of the tables, in fp32."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


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
    is_rows = lambda node: isinstance(node, RowGradient)

    def init(tables: PyTree) -> LazyAdamState:
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tables)
        return LazyAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

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
        tables = leaves if tables is None else structure.flatten_up_to(tables)
        mus, nus, updates = structure.flatten_up_to(state.mu), structure.flatten_up_to(state.nu), []
        for i, (gradient, table) in enumerate(zip(leaves, tables, strict=True)):
            rows, g = gradient.rows, gradient.sums
            at = lambda x, rows=rows: x.at[rows].get(mode="fill", fill_value=0)
            mu, nu = b1 * at(mus[i]) + (1 - b1) * g, b2 * at(nus[i]) + (1 - b2) * g**2
            step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            if weight_decay:
                step += weight_decay * at(table).astype(jnp.float32)
            put = lambda x, new, rows=rows: x.at[rows].set(new, mode="drop", indices_are_sorted=True)
            mus[i], nus[i] = put(mus[i], mu), put(nus[i], nu)
            updates.append(gradient._replace(sums=-rate * step))
        rebuilt = (jax.tree.unflatten(structure, part) for part in (mus, nus))
        return jax.tree.unflatten(structure, updates), LazyAdamState(count, *rebuilt)

    return optax.GradientTransformation(init, update)


def apply_rows(tables: PyTree, updates: PyTree) -> PyTree:
    """Tables with the updates of some of their rows, each in the table's dtype."""
    add = lambda rows, table: _add(table, rows)
    return jax.tree.map(add, updates, tables, is_leaf=lambda node: isinstance(node, RowGradient))


def _add(table: Float[Array, "M V"], update: RowGradient) -> Float[Array, "M V"]:
    new = table.at[update.rows].get(mode="fill", fill_value=0).astype(jnp.float32) + update.sums
    return table.at[update.rows].set(new.astype(table.dtype), mode="drop", indices_are_sorted=True)

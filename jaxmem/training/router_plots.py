"""Whether routers have collapsed: how many memories each of them uses in effect, in words and over training.

    n = e^H,  H = -sum_m f_m log f_m,  f_m the share of a router's choices that went to memory m

n is M when choices are even and top_k when every token goes to the same top_k memories. A router counts as collapsed below
top_k + (M - top_k) / 4: of the memories that a collapsed router leaves idle, less than a quarter is in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from jaxmem.training.drawing import BLUE, GREY, MUTED, ORANGE, STYLE, label_ends, new_axes, step_axis, to_svg
from jaxmem.training.plots import Chart, Line

LEAST_IN_USE = 0.25
"""Of the memories that a collapsed router leaves idle."""
MOST_NAMED = 6
"""Layers that are named one by one."""
MOST_IN_A_LABEL = 3


class Router(NamedTuple):
    """What one layer's router did in an evaluation."""

    layer: str
    n_memories: int
    top_k: int
    effective: float
    """Memories in use, e^H; NaN without any choice."""

    @property
    def least(self) -> float:
        """Fewer in use are a collapse."""
        return self.top_k + LEAST_IN_USE * (self.n_memories - self.top_k)

    @property
    def has_collapsed(self) -> bool:
        return self.effective < self.least


def effective_memories(shares: Sequence[float]) -> float:
    """e^H of shares; NaN if there are none.

    >>> effective_memories([0.5, 0.5, 0.0])
    2.0
    """
    f = np.array(shares, dtype=float)
    if not f.sum() > 0:
        return float("nan")
    f = f[f > 0] / f.sum()
    return round(float(np.exp(-np.sum(f * np.log(f)))), 6)


def routers(line: Mapping[str, Any]) -> list[Router]:
    """Those of an "eval" line, in the order of depth."""
    use = line.get("router_use") or []
    names = line.get("router_layers") or range(len(use))
    top_k = line.get("router_top_k") or [1] * len(use)
    return [
        Router(str(name), len(shares), k, effective_memories(shares))
        for name, shares, k in zip(names, use, top_k, strict=True)
    ]


def collapse(line: Mapping[str, Any]) -> str | None:
    """One sentence that names the layers of an "eval" line whose routers have collapsed; None if there are none."""
    collapsed = [router for router in routers(line) if router.has_collapsed]
    if not collapsed:
        return None
    several = len(collapsed) > 1
    shown = ", ".join(
        f"layer {r.layer} ({r.effective:.2f} of {r.n_memories} memories in use)" for r in collapsed[:MOST_NAMED]
    )
    more = f" and {len(collapsed) - MOST_NAMED} more" if len(collapsed) > MOST_NAMED else ""
    least = sorted({r.least for r in collapsed})
    return (
        f"{len(collapsed)} of {len(routers(line))} routers {'have' if several else 'has'} collapsed: {shown}{more}; "
        f"fewer than {' or '.join(f'{n:.3g}' for n in least)} in use count as a collapse. "
        "A larger load_balance evens them out."
    )


@matplotlib.rc_context(STYLE)
def memories_in_use(evals: Sequence[Line]) -> Chart | None:
    """The memories that each router uses in effect, over training; collapsed routers stand out."""
    evals = [line for line in evals if line.get("router_use")]
    if not evals:
        return None
    last = routers(evals[-1])
    steps = np.array([line["step"] for line in evals])
    values = np.array([[router.effective for router in routers(line)] for line in evals])  # [evaluations, layers]
    figure, axes = new_axes()
    for router, of_layer in zip(last, values.T, strict=True):
        style = {"color": ORANGE, "zorder": 3} if router.has_collapsed else {"color": BLUE, "alpha": 0.5}
        axes.plot(steps, of_layer, marker="o", markersize=3, linewidth=1.3, clip_on=False, **style)
    collapsed = [router for router in last if router.has_collapsed]
    even = [router for router in last if not router.has_collapsed and np.isfinite(router.effective)]
    ends = []
    for group, text, colour in (
        (collapsed, _names(collapsed), ORANGE),
        (even, "the others" if collapsed else "all layers", BLUE),
    ):
        if group:
            ends.append((float(np.median([router.effective for router in group])), text, colour))
    shapes = {(router.n_memories, router.least) for router in last}
    if len(shapes) == 1:
        ((_, least),) = shapes
        axes.axhline(least, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        if not ends or min(abs(value - least) for value, _, _ in ends) > 0.1:
            ends.append((least, "collapse", MUTED))
    step_axis(axes, np.array([0, *steps]) if len(steps) == 1 else steps, "memories in use")
    axes.set_ylim(0.9, 0.1 + max(router.n_memories for router in last))
    label_ends(axes, ends)
    found = [router.effective for router in last if np.isfinite(router.effective)]
    sizes = " or ".join(str(m) for m in sorted({router.n_memories for router in last}))
    span = " to ".join(dict.fromkeys(f"{n:.2f}" for n in (min(found), max(found)))) if found else "none"
    return Chart(
        f"Routers: {f'{len(collapsed)} of {len(last)} collapsed' if collapsed else f'{span} of {sizes} memories in use'}",
        to_svg(figure, "memories_in_use"),
        f"e to the entropy of each layer's shares: {sizes} when even, top_k when all tokens go to the same. "
        + (collapse(evals[-1]) or "No router has collapsed at the last evaluation.")
        + _balance(evals[-1]),
    )


def _names(group: Sequence[Router]) -> str:
    """A label of some layers."""
    if len(group) > MOST_IN_A_LABEL:
        return f"{len(group)} layers"
    return f"layer{'s' if len(group) > 1 else ''} {', '.join(router.layer for router in group)}"


def _balance(line: Line) -> str:
    """What the load-balancing losses of the layers are."""
    losses = line.get("router_balance")
    if not losses:
        return ""
    even = " or ".join(str(k) for k in sorted(set(line.get("router_top_k") or [1])))
    return f" Load-balancing losses of the layers: {min(losses):.3g} to {max(losses):.3g}, {even} is even."

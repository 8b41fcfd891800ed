"""The figures of how evenly memories are read: over training, and slot by slot at its end; from `MemoryUse`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from jaxmem.training.drawing import (
    BLUE,
    GREY,
    MUTED,
    ORANGE,
    STYLE,
    WIDTH_IN,
    fit,
    label_ends,
    new_axes,
    step_axis,
    to_svg,
)
from jaxmem.training.plots import Chart, Line

HEIGHT_IN = 5.2  # of two panels
MOST_NAMES = 8  # in a legend
MARKERS, MARKED = "os^Dv", 5  # of layers in turn; of a curve by rank, every fifth point
MORE_TEXT = 1.2  # times as much text as before: the evaluation reaches more slots, and is no point of the curve
FAINTEST = 0.35  # opacity of the first layer


@matplotlib.rc_context(STYLE)
def memory_use(evals: Sequence[Line]) -> Chart | None:
    """Share of slots used and KL from uniform of each memory layer, over training."""
    evals = _with_memories(evals)
    if not evals:
        return None
    steps = np.array([line["step"] for line in evals])
    n_tokens = [line.get("n_tokens", 0) for line in evals]
    apart = len(evals) > 1 and n_tokens[-1] > MORE_TEXT * n_tokens[-2]
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key in ((upper, "share_used"), (lower, "kl_from_uniform")):
        values = np.array([line["memory_use"][key] for line in evals], dtype=float)  # [evaluations, layers]
        for style, of_layer in zip(_styles(evals[-1]), values.T, strict=True):
            joined = slice(None, -1 if apart else None)
            axes.plot(steps[joined], of_layer[joined], clip_on=False, zorder=3, **style)
            if apart:
                hollow = style | {"markerfacecolor": "none", "markersize": 5.5}
                axes.plot(steps[-1:], of_layer[-1:], clip_on=False, zorder=3, **hollow)
        _limits(axes, values)
        step_axis(axes, np.array([0, *steps]) if len(steps) == 1 else steps, "")
    upper.set(xlabel="", ylabel="share of slots used")
    upper.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    lower.set_ylabel("KL from uniform (nats)")
    figure.align_ylabels()
    _legend(figure, evals[-1])
    last = evals[-1]["memory_use"]
    reach = min(last["share_within_reach"])
    captions = [
        f"Top: slots, {_sizes(last)}, that held-out text read with any weight.",
        "Bottom: 0 is even use, ln(slots) a single slot.",
        f"Hollow: the last evaluation, {n_tokens[-1] / max(n_tokens[-2], 1):.3g} times as much text." if apart else "",
        f"So few reads reach at most {_percent(reach)} of the slots of a layer." if reach < 1 else "",
    ]
    kl = np.array(last["kl_from_uniform"], dtype=float)
    return Chart(
        f"Memories: {_span(last['share_used'], _percent)} of slots used, "
        f"{_span(kl[np.isfinite(kl)], lambda v: f'{v:.1f}')} nats from uniform",
        to_svg(figure, "memory_use"),
        " ".join(filter(None, captions)),
    )


@matplotlib.rc_context(STYLE)
def slots_by_rank(evals: Sequence[Line]) -> Chart | None:
    """Weight of the slots of each memory layer in the last evaluation, most used first, both axes logarithmic."""
    evals = _with_memories(evals)
    if not evals or not any(row[0] > 0 for row in evals[-1]["memory_use"]["weight_at_rank"]):
        return None
    last = evals[-1]["memory_use"]
    figure, axes = new_axes(height_in=3.8)
    drawn = []
    for style, ranks, weights in zip(_styles(evals[-1]), last["ranks"], last["weight_at_rank"], strict=True):
        ranks, weights = np.array(ranks, dtype=float), np.array(weights, dtype=float)
        used = weights > 0
        axes.plot(ranks[used], weights[used], markevery=MARKED, **style)
        drawn += [*weights[used]]
    low, high = max(min(drawn), 1e-4), max(*drawn, 1.0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlim=(1, max(last["n_slots"])), ylim=(low / 1.4, high * 1.4))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    axes.set(xlabel="slot, by rank of use (1 is the most used)", ylabel="weight read, relative to the mean slot")
    label_ends(axes, [(1.0, "even use", MUTED)])
    _legend(figure, evals[-1])
    top = [row[0] for row in last["weight_at_rank"] if row[0] > 0]
    return Chart(
        f"The busiest slot of a memory has {_span(top, lambda v: f'{v:,.0f}')} times the mean weight",
        to_svg(figure, "slots_by_rank"),
        f"At step {evals[-1]['step']:,}. A curve ends where slots were not read"
        + (f", or at {low:g}." if low > min(drawn) else "."),
    )


def _with_memories(evals: Sequence[Line]) -> list[Line]:
    return [line for line in evals if line.get("memory_use", {}).get("layers")]


def _styles(line: Line) -> list[dict]:
    """Of each layer's curve: the deeper, the stronger, with markers in turn; a shared table in its own colour."""
    layers = line["memory_use"]["layers"]
    n_own = sum(name != "shared" for name in layers)
    styles = [
        {"color": BLUE, "alpha": FAINTEST + (1 - FAINTEST) * (i + 1) / n_own, "marker": MARKERS[i % len(MARKERS)]}
        for i in range(n_own)
    ]
    shared = {"color": ORANGE, "marker": "o"}
    return [{"markersize": 3.5, "linewidth": 1.3} | style for style in [*styles, shared][: len(layers)]]


def _legend(figure: Figure, line: Line) -> None:
    """Names of the curves under the drawing; of many layers, those that stand evenly apart."""
    layers = line["memory_use"]["layers"]
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), MOST_NAMES)).round().astype(int))
    styles = _styles(line)
    name = lambda i: "shared table" if layers[i] == "shared" else f"layer {layers[i]}"
    handles = [Line2D([], [], label=name(i), **styles[i]) for i in shown]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, labelcolor=MUTED
    )


def _limits(axes: Axes, values: np.ndarray) -> None:
    """From 0, or on a logarithmic scale if the values span more than a factor of ten."""
    values = values[np.isfinite(values)]
    top = float(values.max(initial=0.0))
    if top > 10 * float(values.min(initial=math.inf)) > 0:
        fit(axes, values)
    else:
        axes.set_ylim(0, 1.08 * top or 1.0)


def _sizes(last: dict) -> str:
    """How many slots the layers have."""
    sizes = sorted(set(last["n_slots"]))
    return f"of {' or '.join(f'{n:,}' for n in sizes)}" if len(sizes) <= 2 else f"of {sizes[0]:,} to {sizes[-1]:,}"


def _span(values: Sequence[float], show) -> str:
    low, high = show(min(values, default=math.nan)), show(max(values, default=math.nan))
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share == 0 or share >= 0.01 else f"{100 * share:.1g}%"

"""The style of the report's figures and what they are drawn with.

The SVG holds no colour of its own: ink, grid and data are drawn in the stand-ins below, which become CSS variables of
the page, so that one drawing serves light and dark. Data colours are Okabe and Ito's, safe for the colour-blind.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID, CARD = "#1b1b1d", "#6b6b70", "#dcdce0", "#f7f7f8"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#a8a8ad"
CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    CARD: "--card",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREY: "--grey",
}
ON_CARD = {"facecolor": CARD, "edgecolor": "none", "pad": 0.8}  # box of a text that lines may cross

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
WIDTH_IN = 4.6  # narrow enough that its text stays readable on a phone
HEIGHT_IN = 2.9
MOST_POINTS = 800  # of a drawn curve: beyond, bins are drawn by their extremes
MOST_MEDIANS, LEAST_STEPS_OF_MEDIAN = 100, 4  # of a curve's running median
LABEL_GAP = 0.075  # between labels at the ends of curves, as a share of the axes' height


def new_axes(height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def running_median(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle step and median of consecutive parts of the run: without lag, and blind to single spikes."""
    n_parts = max(2, min(MOST_MEDIANS, len(steps) // LEAST_STEPS_OF_MEDIAN))
    parts = np.array_split(np.arange(len(steps)), n_parts)
    return np.array([steps[p].mean() for p in parts]), np.array([np.median(values[p]) for p in parts])


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points, spikes kept: the lowest and the highest point of every bin of steps."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept = [0, len(steps) - 1]
    for part in np.array_split(np.arange(len(steps)), MOST_POINTS // 2 - 1):
        kept += [part[np.argmin(values[part])], part[np.argmax(values[part])]]
    kept = np.unique(kept)
    return steps[kept], values[kept]


def curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> np.ndarray:
    """Draws every step faintly and the running median boldly; returns the medians."""
    middles, medians = running_median(steps, values)
    axes.plot(*thin(steps, values), color=colour, alpha=0.3, linewidth=0.7)
    axes.plot(middles, medians, color=colour)
    return medians


def fit(axes: Axes, values: Sequence[float] | np.ndarray) -> None:
    """Vertical limits around `values`; a logarithmic scale if they span more than a factor of ten."""
    low, high = float(np.min(values)), float(np.max(values))
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        plain_log_ticks(axes)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def plain_log_ticks(axes: Axes) -> None:
    """Numbers such as 0.02 and 300 in place of powers; between the decades only where these are few."""
    low, high = axes.get_ylim()
    subs = tuple(range(1, 10)) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, steps: np.ndarray, ylabel: str) -> None:
    axes.set(xlabel="step", ylabel=ylabel, xlim=(0 if steps[0] <= 0.5 * steps[-1] else steps[0], steps[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes (value, text, colour) right of the axes, each at its value's height, pushed apart to stay readable."""
    to_share = axes.transScale + axes.transLimits
    x = axes.get_xlim()[1]
    heights = [float(np.clip(to_share.transform((x, value))[1], 0, 1)) for value, _, _ in ends]
    order = np.argsort(heights)
    placed = np.array(heights)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + LABEL_GAP)
    if placed[-1] > 1:
        placed[-1] = 1
        for i in reversed(range(len(placed) - 1)):
            placed[i] = min(placed[i], placed[i + 1] - LABEL_GAP)
    for height, index in zip(placed, order, strict=True):
        _, text, colour = ends[index]
        leader = {"transform": axes.transAxes, "color": colour, "linewidth": 0.6, "clip_on": False}
        axes.plot([1.0, 1.018], [heights[index], height], **leader)
        axes.text(1.02, height, text, transform=axes.transAxes, va="center", color=colour, fontsize=8.5)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that takes its colours from the page; `name` keeps the ids of figures apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg

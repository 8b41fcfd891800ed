"""The figures of a run's report: each a function from the lines of metrics.jsonl to a `Chart`, or None without data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from jaxmem.training.drawing import (
    BLUE,
    GREY,
    GRID,
    INK,
    MUTED,
    ON_CARD,
    ORANGE,
    STYLE,
    WIDTH_IN,
    curve,
    fit,
    label_ends,
    new_axes,
    plain_log_ticks,
    step_axis,
    to_svg,
)

MOST_ANNOTATED_MEMORIES = 12

Line = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A figure of the report: what it shows in words, the drawing, and what a reader needs to know."""

    title: str
    svg: str
    caption: str


@matplotlib.rc_context(STYLE)
def compressors(bits_per_byte: int | float | None, results: Sequence[Line]) -> Chart | None:
    """The model's held-out bits per byte among the compressors', whole files above pieces."""
    if not results or bits_per_byte is None or not math.isfinite(bits_per_byte):
        return None
    figure, axes = new_axes(height_in=4.2)
    rows = [("model", bits_per_byte, BLUE)]
    for heading, key in (
        ("whole files", "bits_per_byte_whole"),
        (f"pieces of {results[0]['piece_bytes']:,} bytes", "bits_per_byte_pieces"),
        ("the same pieces, headers not counted", "bits_per_byte_pieces_headerless"),
    ):
        rows.append((heading, None, None))
        axes.vlines(bits_per_byte, len(rows) - 0.5, len(rows) + len(results) - 0.5, BLUE, (0, (3, 3)), linewidth=0.8)
        rows.extend((r["program"], r[key], GREY) for r in results)
    longest = max(value for _, value, _ in rows if value is not None)
    for y, (label, value, colour) in enumerate(rows):
        if value is None:
            axes.text(0, y + 0.12, label, va="center", color=MUTED, fontsize=8)
            continue
        axes.barh(y, value, height=0.68, color=colour)
        axes.text(value + 0.015 * longest, y, f"{value:.2f}", va="center", bbox=ON_CARD)
    ticks = [y for y, (_, value, _) in enumerate(rows) if value is not None]
    axes.set_yticks(ticks, [rows[y][0] for y in ticks], color=INK)
    axes.set(xlabel="held-out bits per byte", xlim=(0, 1.12 * longest), ylim=(len(rows) - 0.4, -0.6))
    axes.grid(False)
    axes.spines.left.set_visible(False)
    best = min(results, key=lambda r: r["bits_per_byte_whole"])
    return Chart(
        f"Held-out text: {bits_per_byte:.2f} bits per byte, {best['program']} needs {best['bits_per_byte_whole']:.2f}",
        to_svg(figure, "compressors"),
        "Shorter is better. Pieces are as long as the model's context, so their compressor sees no more of the past "
        "than the model does; but the model was trained on other text, and its parameters are not counted.",
    )


@matplotlib.rc_context(STYLE)
def loss(train: Sequence[Line], evals: Sequence[Line]) -> Chart | None:
    """Training loss, raw and smoothed, and held-out loss."""
    steps, values = _series(train, "loss")
    if len(steps) < 2:
        return None
    eval_steps, eval_values = _series(evals, "loss")
    figure, axes = new_axes()
    medians = curve(axes, steps, values, BLUE)
    ends = [(medians[-1], "training", BLUE)]
    if len(eval_steps):
        axes.plot(eval_steps, eval_values, color=ORANGE, marker="o", markersize=3)
        ends.append((eval_values[-1], "held out", ORANGE))
    fit(axes, [*medians, *eval_values, *np.quantile(values, [0.005, 0.995])])
    step_axis(axes, steps, "loss (nats per token)")
    label_ends(axes, ends)
    return Chart(
        f"Loss: {values[0]:.2f} to {medians[-1]:.2f} nats per token",
        to_svg(figure, "loss"),
        "Faint: every step. Bold: running median."
        + _of_other_text(evals)
        + _log_scale(axes)
        + _not_drawn(train, "loss"),
    )


@matplotlib.rc_context(STYLE)
def held_out(evals: Sequence[Line], results: Sequence[Line]) -> Chart | None:
    """Held-out bits per byte over training, with the compressors on whole files as the scale."""
    steps, values = _series(evals, "bits_per_byte")
    if len(steps) < 2:
        return None
    figure, axes = new_axes()
    axes.plot(steps, values, color=BLUE, marker="o", markersize=3)
    ends = [(values[-1], f"model {values[-1]:.2f}", BLUE)]
    for result in results:
        level = result["bits_per_byte_whole"]
        axes.axhline(level, color=GREY, linewidth=0.8, zorder=1)
        ends.append((level, f"{result['program']} {level:.2f}", MUTED))
    fit(axes, [*values, *(level for level, _, _ in ends)])
    step_axis(axes, steps, "held-out bits per byte")
    label_ends(axes, ends)
    best = int(np.argmin(values))
    return Chart(
        f"Held-out bits per byte: {values[0]:.2f} to {values[-1]:.2f}",
        to_svg(figure, "held_out"),
        f"Lowest at step {steps[best]:,}: {values[best]:.3f}."
        + (" Grey: compressors on whole files." if results else "")
        + _of_other_text(evals)
        + _log_scale(axes),
    )


@matplotlib.rc_context(STYLE)
def by_position(evals: Sequence[Line]) -> Chart | None:
    """Held-out bits per byte against how much context comes before, for the first, middle and last evaluation."""
    evals = [e for e in evals if np.isfinite(e.get("bits_per_byte_by_position", [math.nan])).any()]
    if not evals:
        return None
    figure, axes = new_axes()
    shown = sorted({0, (len(evals) - 1) // 2, len(evals) - 1})
    ends, seen = [], []
    for index in shown:
        values = np.array(evals[index]["bits_per_byte_by_position"], dtype=float)
        edges = np.array(evals[index]["position_edges"], dtype=float) + 1
        is_last = index == shown[-1]
        axes.stairs(values, edges, baseline=None, color=BLUE if is_last else GREY, linewidth=1.8 if is_last else 1.1)
        ends.append((values[-1], f"step {evals[index]['step']:,}", BLUE if is_last else MUTED))
        seen.extend(values[np.isfinite(values)])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.minorticks_off()
    axes.set(xlabel="position in context (tokens, the first is 1)", xlim=(edges[0], edges[-1]))
    axes.set_ylabel("held-out bits per byte")
    fit(axes, seen)
    label_ends(axes, ends)
    return Chart(
        f"{values[0]:.2f} bits per byte at the start of the context, {values[-1]:.2f} at its end",
        to_svg(figure, "by_position"),
        "A memory that works falls to the right, but for the noise of few bytes. Positions are on a logarithmic scale."
        + _of_other_text(evals),
    )


@matplotlib.rc_context(STYLE)
def router_use(evals: Sequence[Line]) -> Chart | None:
    """Heat map of the last evaluation's share of choices per layer and memory, coloured by ratio to uniform."""
    last = next((e for e in reversed(evals) if e.get("router_use")), None)
    if last is None:
        return None
    layers = last["router_use"]
    names = last.get("router_layers") or range(len(layers))
    n_memories = max(map(len, layers))
    is_annotated = n_memories <= MOST_ANNOTATED_MEMORIES
    figure = Figure(figsize=(WIDTH_IN, max(1.6, 0.8 + 0.3 * len(layers))), layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=(24, 1))
    _use_scale(scale)
    for row, shares in enumerate(layers):
        for memory, share in enumerate(shares):
            _use_cell(axes, memory, row, share * len(shares), gap=0.06)
            if is_annotated:
                axes.text(memory, row, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(layers)), [str(name) for name in names], color=INK)
    if is_annotated:
        axes.set_xticks(range(n_memories))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set(xlabel="memory", ylabel="layer", xlim=(-0.5, n_memories - 0.5), ylim=(len(layers) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    shares = [share for row in layers for share in row]
    uniform = " or ".join(f"1/{m} = {1 / m:.3g}" for m in sorted({len(row) for row in layers}))
    return Chart(
        f"Router: shares from {min(shares):.2f} to {max(shares):.2f}, uniform is {uniform}",
        to_svg(figure, "router_use"),
        f"Share of choices at step {last['step']:,}; a row sums to 1. Colour: how much more or less than uniform.",
    )


@matplotlib.rc_context(STYLE)
def gradient_norm(train: Sequence[Line]) -> Chart | None:
    """Global gradient norm of every step, on a logarithmic scale."""
    steps, values = _series(train, "grad_norm")
    steps, values = steps[values > 0], values[values > 0]
    if len(steps) < 2:
        return None
    figure, axes = new_axes()
    curve(axes, steps, values, BLUE)
    axes.set_yscale("log")
    plain_log_ticks(axes)
    step_axis(axes, steps, "gradient norm")
    peak = int(np.argmax(values))
    return Chart(
        f"Gradient norm: median {_to_digits(np.median(values))}, at most {_to_digits(values[peak])}",
        to_svg(figure, "gradient_norm"),
        f"Largest at step {steps[peak]:,}. The scale is logarithmic." + _not_drawn(train, "grad_norm"),
    )


@matplotlib.rc_context(STYLE)
def step_time(train: Sequence[Line]) -> Chart | None:
    """Wall time of every step, and how much of it was spent waiting outside the compiled step."""
    steps, step_s = _series(train, "step_s")
    if len(steps) < 2:
        return None
    wait_steps, wait_s = _series(train, "wait_s")
    figure, axes = new_axes()
    step_ms = 1e3 * step_s
    top_ms = 1.6 * float(np.quantile(step_ms, 0.95))
    medians = curve(axes, steps, step_ms, BLUE)
    ends = [(medians[-1], "step", BLUE)]
    if len(wait_steps):
        medians = curve(axes, wait_steps, 1e3 * wait_s, ORANGE)
        ends.append((medians[-1], "waiting", ORANGE))
    axes.set_ylim(0, top_ms)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    step_axis(axes, steps, "time per step (ms)")
    label_ends(axes, ends)
    n_above = int(np.sum(step_ms > top_ms))
    above = f" Above the scale: {n_above:,} {'step' if n_above == 1 else 'steps'}." if n_above else ""
    slowest = int(np.argmax(step_s))
    compiled = ", compilation included" if slowest == 0 else ""
    waiting = f", {wait_s.sum() / step_s.sum():.1%} of all time waiting" if len(wait_steps) else ""
    return Chart(
        f"Time per step: median {_to_digits(np.median(step_ms))} ms{waiting}",
        to_svg(figure, "step_time"),
        f"Waiting is what the compiled step did not take, such as data. Slowest: step {steps[slowest]:,} with "
        f"{step_s[slowest]:.3g} s{compiled}.{above}",
    )


def _use_cell(axes: Axes, column: int, row: int | float, ratio: float, gap: float = 0.0, height: float = 1.0) -> None:
    """One cell of the heat map: `ratio` to uniform use, colourless at 1, full colour from 4 up and from 1/4 down."""
    strength = 1.0 if ratio <= 0 else min(1.0, abs(math.log(ratio, 4)))
    corner, width, height = (column - 0.5 + gap / 2, row - (height - gap) / 2), 1 - gap, height - gap
    colour = ORANGE if ratio > 1 else BLUE
    axes.add_patch(Rectangle(corner, width, height, color=colour, alpha=0.7 * strength, linewidth=0))
    if gap:
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=GRID, linewidth=0.6))


def _use_scale(axes: Axes) -> None:
    """The colour scale of the heat map."""
    height = 0.125
    for exponent in np.arange(-1, 1 + height, height):
        _use_cell(axes, 0, exponent, 4.0**exponent, height=height)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["1/4", "half", "uniform", "double", "4-fold"])
    axes.set(xticks=[], xlim=(-0.5, 0.5), ylim=(-1 - height / 2, 1 + height / 2))
    axes.yaxis.tick_right()
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _series(lines: Iterable[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines in which `key` is a finite number."""
    pairs = [(r["step"], r[key]) for r in lines if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
    return np.array([s for s, _ in pairs], dtype=int), np.array([v for _, v in pairs], dtype=float)


def _of_other_text(evals: Sequence[Line]) -> str:
    """On the way a run may evaluate less text than at its end."""
    sizes = [line["n_bytes"] for line in evals if isinstance(line.get("n_bytes"), int)]
    if not sizes or min(sizes) == max(sizes):
        return ""
    return f" Held out: on {sizes[0]:,} bytes on the way, on {sizes[-1]:,} at the end."


def _log_scale(axes: Axes) -> str:
    return " The scale is logarithmic." if axes.get_yscale() == "log" else ""


def _not_drawn(lines: Iterable[Line], key: str) -> str:
    n_bad = sum(isinstance(r.get(key), float) and not math.isfinite(r[key]) for r in lines)
    return f" Not finite, so not drawn: {n_bad:,} steps." if n_bad else ""


def _to_digits(number: int | float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"

"""Charts of a run with matplotlib (extra `report`), as files or as SVG to put inside a page.

Matplotlib is imported inside the functions, so that the verbs work without it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from step35.errors import Step35Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[float], list[float]]
"""Steps and values."""

INK = "#1a2b3c"
"""Colour of text and axes; `svg` replaces it by the page's text colour, light or dark."""
COLOURS = ("#3b82f6", "#ef7f1a", "#10a37f", "#d6409f", "#8b5cf6", "#a3801a")
SIZE_INCHES = (5.6, 3.0)

SMOOTH_FROM = 100
"""Points from which a curve gets a running mean."""


def series(records: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> Series:
    """Return steps and values of records with the number `key`, or with item `index` of the list `key`."""
    steps, values = [], []
    for record in records:
        value = record.get(key)
        if index is not None:
            value = value[index] if isinstance(value, list) and index < len(value) else None
        if isinstance(value, int | float):
            steps.append(float(record.get("step", 0)))
            values.append(float(value) if math.isfinite(value) else math.nan)  # leaves a gap in the line
    return steps, values


def lines(
    title: str, curves: Mapping[str, Series], *, levels: Mapping[str, float] | None = None, ylabel: str = ""
) -> Figure:
    """Draw one curve per name over the steps, and each of `levels` as a dashed horizontal line.

    A long curve is drawn faintly, under its running mean.
    """
    figure, axes = _axes(title, "step", ylabel)
    for number, (name, (steps, values)) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], "." if len(values) < 30 else ""
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
            values = running_mean(values)
        axes.plot(steps, values, label=name, color=colour, linewidth=1.3, marker=marker)
    for number, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, label=name, color=INK, linewidth=1, linestyle=("--", ":")[number % 2])
    if len(curves) + len(levels or {}) > 1:
        axes.legend(fontsize=8, framealpha=0, labelcolor=INK)
    return figure


def running_mean(values: Sequence[float], width: int = 9) -> list[float]:
    """Return each value's mean with its neighbours, `width` in all; values that are not finite are left out."""
    means = []
    for place in range(len(values)):
        near = [v for v in values[max(0, place - width // 2) : place + width // 2 + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def heat_map(
    title: str,
    table: Sequence[Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Draw a table of numbers as colours, the first row at the top; `limits` are the ends of the colours."""
    figure, axes = _axes(title, xlabel, ylabel)
    image = axes.imshow(table, aspect="auto", interpolation="none", cmap="viridis", vmin=limits[0], vmax=limits[1])
    axes.grid(visible=False)
    axes.set_yticks(range(0, len(table), max(1, len(table) // 10)))
    bar = figure.colorbar(image)
    bar.ax.tick_params(colors=INK, labelsize=8)
    return figure


def spread(title: str, steps: Sequence[float], layers: Sequence[Sequence[Sequence[float]]], *, ylabel: str) -> Figure:
    """Draw for each layer the median over its experts as a line, in a band from minimum to maximum.

    `layers[layer][record][expert]`; one record a step.
    """
    figure, axes = _axes(title, "step", ylabel)
    for number, records in enumerate(layers):
        colour = COLOURS[number % len(COLOURS)]
        low, high = [min(experts) for experts in records], [max(experts) for experts in records]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, [median(experts) for experts in records], color=colour, label=f"layer {number}", marker=".")
    if len(layers) <= 12:
        axes.legend(fontsize=8, framealpha=0, labelcolor=INK)
    return figure


def bars(title: str, groups: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str) -> Figure:
    """Draw groups of bars side by side, positions counted from 1."""
    figure, axes = _axes(title, xlabel, ylabel)
    width = 0.8 / max(len(groups), 1)
    for number, (name, values) in enumerate(groups.items()):
        places = [place + (number - (len(groups) - 1) / 2) * width for place in range(1, len(values) + 1)]
        drawn = axes.bar(places, values, width, label=name, color=COLOURS[number % len(COLOURS)])
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, color=INK)
    axes.set_ymargin(0.25)  # room for the legend
    axes.set_xticks(range(1, max((len(values) for values in groups.values()), default=0) + 1))
    axes.legend(fontsize=8, framealpha=0, labelcolor=INK, loc="upper left", ncols=len(groups))
    return figure


def save(path: Path, figure: Figure) -> None:
    """Write the figure as an image; the suffix of `path` chooses its kind."""
    figure.savefig(path, dpi=150)


def svg(figure: Figure) -> str:
    """Return the figure as SVG for the body of a page: no prolog, no metadata, no address of any kind."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, so that it can be searched; a fixed salt makes equal charts equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "step35"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # known to HTML without being declared
    return text.replace(INK, "currentColor")


def require() -> None:
    """Raise `Step35Error` with the install command when matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise Step35Error('charts need matplotlib, which is not installed: pip install "step35[report]"') from None


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES)
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.15, top=0.9)  # much faster than a layout engine
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(visible=True, color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes

"""Forgetting against the size of the change of the weights, beside forgetting against learning: what a grid says of both."""

from __future__ import annotations

import itertools

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_null.recipes.report.figures import LOG_FROM, MARKERS, Picture, _figure, _png
from lora_null.recipes.report.grid_page import change, metric_pair
from lora_null.recipes.report.svg import COLORS, OTHER_COLORS, svg
from lora_null.recipes.report.table import metric_title
from lora_null.recipes.results import DISPLAY, Results


def magnitude_png(results: Results) -> bytes | None:
    """Forgetting against learning, and against the size of the change beside it; None where one is not known.

    Where methods lie on one curve at the right, size alone explains what they forget; where they lie apart, its
    directions do.
    """
    points = magnitude_points(results)
    return _png(_magnitudes(results, points)) if points else None


def magnitude_picture(results: Results) -> Picture | None:
    """The same for the page."""
    points = magnitude_points(results)
    if not points:
        return None
    alt = "Forgetting against learning at the left, against the size of the change of the weights at the right."
    return Picture([("", svg(_magnitudes(results, points), alt))])


def magnitude_points(results: Results) -> dict[str, list[tuple[float, float, float]]]:
    """Return each method's settings as (learned, forgotten, ‖ΔW‖/‖W0‖), means over the seeds, where all are known."""
    pair, points = metric_pair(results), {}
    for row in results.rows[1:] if pair else ():
        point = (change(results, row, pair[1]), change(results, row, pair[0]), row.magnitude and row.magnitude.total)
        if None not in point:
            points.setdefault(row.method, []).append(point)
    return points


def _magnitudes(results: Results, points: dict[str, list[tuple[float, float, float]]]) -> Figure:
    kept, task = metric_pair(results) or ("", "")
    figure, panels = _figure(8.0, 4.2, columns=2, sharey=True)
    forgotten = [y for of_method in points.values() for _, y, _ in of_method]
    logarithmic = min(forgotten) > 0 and max(forgotten) > LOG_FROM * min(forgotten)
    cycle = itertools.cycle(OTHER_COLORS)
    for index, (method, of_method) in enumerate(points.items()):
        learned, y, size = zip(*of_method)
        style = {"color": COLORS.get(method) or next(cycle), "marker": MARKERS[index % len(MARKERS)], "linestyle": ""}
        for axes, x in zip(panels, (learned, [100 * value for value in size])):
            axes.plot(x, y, markersize=6, markeredgecolor="white", label=DISPLAY.get(method, method), **style)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    if logarithmic:
        panels[0].set_yscale("log")
    panels[0].set_xlabel(f"learned: {metric_title(task)},\nimprovement on the base  →")
    panels[1].set_xlabel("size of the change: ‖ΔW‖ / ‖W₀‖, %,\nlogarithmic  →")
    panels[0].set_ylabel(f"forgotten: {metric_title(kept)}{', logarithmic' if logarithmic else ''}  →")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    return figure

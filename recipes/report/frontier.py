"""The picture of a grid: what each method forgets against what it learns, one panel a method."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from lora_null.recipes.report.figures import COLORS, FAINT, OTHER_COLORS, _darker, _figure, _png, _sentence, _wrapped
from lora_null.recipes.report.grid_page import Frontier, frontiers, metric_pair
from lora_null.recipes.report.table import metric_title
from lora_null.recipes.results import Results

LOG_FROM = 30  # a span of forgetting beyond this factor is drawn on a logarithmic axis


def frontier_png(results: Results) -> bytes:
    """Small multiples of all frontiers: means over the seeds, bars one standard error, the others in gray."""
    pair = metric_pair(results)
    drawn = [f for f in frontiers(results, *pair) if f.mean_path()] if pair else []
    if not drawn:
        return _png(_sentence("No runs of the grid have both a retention and a task metric yet."))
    return _png(_panels(drawn, *pair))


def _panels(drawn: list[Frontier], kept: str, task: str):
    wide = min(len(drawn), 3)
    tall = -(-len(drawn) // wide)
    figure, panels = _figure(8.0, 0.9 + 2.2 * tall, rows=tall, columns=wide, sharex=True, sharey=True)
    panels = np.atleast_1d(panels).ravel()
    forgotten = [y.value for f in drawn for _, y in f.mean_path()]
    logarithmic = min(forgotten) > 0 and max(forgotten) > LOG_FROM * min(forgotten)
    for index, (axes, frontier) in enumerate(zip(panels, drawn)):
        for other in drawn:  # LoRA, what all are compared with, dashed in its own color
            _draw(
                axes,
                other,
                COLORS["lora"] if other.method == "lora" else FAINT,
                behind=True,
                from_base=not logarithmic,
            )
        color = COLORS.get(frontier.method, OTHER_COLORS[index % len(OTHER_COLORS)])
        _draw(axes, frontier, color, behind=False, from_base=not logarithmic)
        axes.set_title(_wrapped(frontier.label, 18), fontsize=10, fontweight="bold", color=_darker(color), loc="left")
        if logarithmic:
            axes.set_yscale("log")
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes in panels[len(drawn) - wide : len(drawn)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(f"learned: {metric_title(task)}, improvement on the base  →", fontsize=10)
    scale = ", logarithmic" if logarithmic else ""
    figure.supylabel(f"forgotten: {metric_title(kept)}{scale}  →", fontsize=10)
    return figure


def _draw(axes: Axes, frontier: Frontier, color: str, *, behind: bool, from_base: bool) -> None:
    path = frontier.mean_path()
    x, y = ([point[i].value for point in path] for i in (0, 1))
    start = [0.0] if from_base else []
    dashed = "--" if behind and frontier.method == "lora" else "-"
    width, above = (1, 1 + (dashed == "--")) if behind else (2, 3)
    axes.plot([*start, *x], [*start, *y], dashed, color=color, linewidth=width, zorder=above)
    if behind:
        return
    errors = [[point[i].stderr or 0 for point in path] for i in (0, 1)]
    axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=color, markersize=5, elinewidth=1.2, zorder=4)

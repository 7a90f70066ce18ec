"""The pictures of a grid: frontiers of learning and forgetting, and forgetting against the size of the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_null.recipes.report.drawing import (
    COLORS,
    FAINT,
    GLYPHS,
    INK,
    Picture,
    axis_title,
    colors_of,
    escape_math,
    is_wide,
    markers_of,
    new_figure,
    png,
    readable,
    sentence,
    svg,
    wrapped,
)
from lora_null.recipes.report.equal_learning import change, frontiers, mean_path, metric_pair
from lora_null.recipes.report.table import metric_title
from lora_null.recipes.results import Estimate, Results, display_name

ACROSS: tuple[Literal["learned", "size"], ...] = ("learned", "size")  # of the panels of `Sizes`
NOTHING = "No runs of the grid have both a retention and a task metric yet."


@dataclass(frozen=True)
class DrawnFrontier:
    """A frontier as it is drawn: means over the seeds, (learned, forgotten), with their errors."""

    name: str
    label: str
    color: str
    points: list[tuple[Estimate, Estimate]]


@dataclass(frozen=True)
class Frontiers:
    """All methods' frontiers, and how their axes are."""

    paths: list[DrawnFrontier]
    titles: tuple[str, str]
    log: bool

    @classmethod
    def of(cls, results: Results) -> Frontiers | None:
        """Return the frontiers of a grid; None where no run has both metrics."""
        pair = metric_pair(results)
        found = [f for f in frontiers(results, *pair) if f.rows] if pair else []
        if pair is None or not found:
            return None
        colors = colors_of(f.name for f in found)
        paths = [DrawnFrontier(f.name, f.label, colors[f.name], mean_path(results, f, *pair)) for f in found]
        paths = [path for path in paths if path.points]
        if not paths:
            return None
        log = is_wide([y.value for path in paths for _, y in path.points])
        learned = f"learned: {metric_title(pair[1])}, improvement on the base"
        return cls(paths, (learned, f"forgotten: {metric_title(pair[0])}{', logarithmic' * log}"), log)

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """(color, line, text) of what the panels do not name themselves."""
        own = [(INK, "o-", "the panel's method: one dot a setting, bars one standard error")]
        lora = [(COLORS["lora"], "--", "LoRA")] if any(path.name == "lora" for path in self.paths) else []
        return [*own, *lora, ("#9ca3af", "-", "the other methods")]

    def draw_panel(self, axes: Axes, path: DrawnFrontier) -> None:
        """Draw one method's frontier, and the others' thin behind it: LoRA, what all are compared with, dashed."""
        start = [] if self.log else [0.0]
        for other in [*(other for other in self.paths if other is not path), path]:
            x, y = ([point[i].value for point in other.points] for i in (0, 1))
            is_lora, own = other.name == "lora", other is path
            color = path.color if own else COLORS["lora"] if is_lora else FAINT
            style = {"linewidth": 2, "zorder": 3} if own else {"linewidth": 1, "zorder": 1 + is_lora}
            axes.plot([*start, *x], [*start, *y], "--" if is_lora and not own else "-", color=color, **style)
        xerr, yerr = ([point[i].stderr or 0 for point in path.points] for i in (0, 1))
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="o", color=path.color, markersize=5, elinewidth=1.2, zorder=4)
        if self.log:
            axes.set_yscale("log")

    def set_limits(self, axes: Axes) -> None:
        """Set the same limits in panels that are drawn apart."""
        x, y = zip(*(point for path in self.paths for point in path.points))
        low, high = min(e.value - (e.stderr or 0) for e in x), max(e.value + (e.stderr or 0) for e in x)
        low = low if self.log else min(0, low)  # the base, at zero, is below a logarithmic picture
        axes.set_xlim(low - 0.05 * (high - low), high + 0.08 * (high - low))
        low, high = min(e.value for e in y), max(e.value + (e.stderr or 0) for e in y)
        if self.log:
            axes.set_ylim(low / 1.6, high * 1.6)
        else:
            low, high = min(0, low), max(0, high)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def frontier_png(results: Results) -> bytes:
    """Small multiples of all frontiers: means over the seeds, bars one standard error, the others in gray."""
    found = Frontiers.of(results)
    if found is None:
        return png(sentence(NOTHING))
    count, wide = len(found.paths), min(len(found.paths), 3)
    tall = -(-count // wide)
    figure, panels = new_figure(8.0, 1.2 + 2.2 * tall, rows=tall, columns=wide, sharex=True, sharey=True)
    panels = np.atleast_1d(panels).ravel()
    for axes, path in zip(panels, found.paths):
        found.draw_panel(axes, path)
        axes.set_title(wrapped(path.label, 18), fontsize=10, fontweight="bold", color=readable(path.color), loc="left")
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[count - wide : count]:
        axes.tick_params(labelbottom=True)
    across, up = found.titles
    figure.supxlabel(axis_title(across, 72), fontsize=10)
    figure.supylabel(axis_title(up, 36 if tall == 1 else 54), fontsize=10)
    handles = [
        panels[0].plot([], [], line, color=color, label=escape_math(text))[0] for color, line, text in found.legend
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return png(figure)


def frontier_picture(results: Results) -> Picture:
    """The same for the page, one drawing a panel."""
    found, drawings = Frontiers.of(results), []
    if found is None:
        return Picture([("", svg(sentence(NOTHING, narrow=True), NOTHING))])
    for path in found.paths:
        figure, axes = new_figure(2.3, 1.9, size=8)
        found.draw_panel(axes, path)
        found.set_limits(axes)
        points = "; ".join(f"learned {x.value:.3g}, forgotten {y.value:.3g}" for x, y in path.points)
        drawings.append((path.label, svg(figure, f"{path.label}: {points}.")))
    across, up = found.titles
    caption = f"Across, {across}; up, {up}. Lower and further right is better."
    return Picture(drawings, caption, panels=True, legend=found.legend)


class SizePoint(NamedTuple):
    """What a setting has learned and forgotten, and ‖ΔW‖ / ‖W0‖ in %."""

    learned: float
    forgotten: float
    size: float


@dataclass(frozen=True)
class Sizes:
    """What each method has learned and forgotten, and by how much it has changed the weights.

    Attributes:
        points: method → those of its settings.
        styles: method → color and marker.
        titles: of a point's three numbers, by their names.
        log: whether forgetting has a logarithmic axis.
    """

    points: dict[str, list[SizePoint]]
    styles: dict[str, tuple[str, str]]
    titles: dict[str, str]
    log: bool

    @classmethod
    def of(cls, results: Results) -> Sizes | None:
        """Return the sizes of a grid's changes; None where no run has both metrics and a size."""
        pair = metric_pair(results)
        points: dict[str, list[SizePoint]] = {}
        for row in results.rows[1:] if pair else ():
            learned, forgotten = change(results, row, pair[1]), change(results, row, pair[0])
            if learned is not None and forgotten is not None and row.magnitude:
                points.setdefault(row.method, []).append(SizePoint(learned, forgotten, 100 * row.magnitude.total))
        if pair is None or not points:
            return None
        colors = colors_of(points)
        log = is_wide([point.forgotten for of_method in points.values() for point in of_method])
        titles = {
            "learned": f"learned: {metric_title(pair[1])}, improvement on the base",
            "forgotten": f"forgotten: {metric_title(pair[0])}{', logarithmic' * log}",
            "size": "size of the change: ‖ΔW‖ / ‖W₀‖, %, logarithmic",
        }
        styles = dict(zip(points, zip(colors.values(), markers_of(list(colors.values())))))
        return cls(points, styles, titles, log)

    def draw_panel(self, axes: Axes, across: Literal["learned", "size"]) -> None:
        """Draw forgetting against what was learned, or against the size of the change."""
        for method, points in self.points.items():
            color, marker = self.styles[method]
            x, y = [getattr(point, across) for point in points], [point.forgotten for point in points]
            label = display_name(method)
            axes.plot(x, y, marker, markersize=6, markeredgecolor="white", color=color, label=escape_math(label))
        if self.log:
            axes.set_yscale("log")
        if across == "size":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())


def magnitude_png(results: Results) -> bytes | None:
    """Forgetting against learning, and against the size of the change beside it; None where one is not known.

    Where methods lie on one curve at the right, size alone explains what they forget; where they lie apart, its
    directions do.
    """
    found = Sizes.of(results)
    if found is None:
        return None
    figure, panels = new_figure(8.0, 4.2, columns=2, sharey=True)
    for axes, across in zip(panels, ACROSS):
        found.draw_panel(axes, across)
        axes.set_xlabel(axis_title(found.titles[across]))
    panels[0].set_ylabel(axis_title(found.titles["forgotten"]))
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    return png(figure)


def magnitude_picture(results: Results) -> Picture | None:
    """The same for the page, one drawing a panel."""
    found = Sizes.of(results)
    if found is None:
        return None
    drawings = []
    for across in ACROSS:
        figure, axes = new_figure(2.3, 1.9, size=8)
        found.draw_panel(axes, across)
        name = f"Across, {found.titles[across]}"
        drawings.append((name, svg(figure, f"{name}: the numbers are in the table of results.")))
    legend = [(color, GLYPHS[marker], display_name(name)) for name, (color, marker) in found.styles.items()]
    return Picture(drawings, f"Up, {found.titles['forgotten']}; one point a setting.", panels=True, legend=legend)

"""The pictures of the report, drawn off-screen and without global state, so that equal numbers give equal bytes.

The page has SVG, small enough to be read at the width of a phone and colored by variables of its style sheet, which follow
light and dark; `forgetting.png` and `card.png` are for readmes and for links to the page.
"""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from lora_null.recipes.report.grid_page import frontiers, mean_path, metric_pair
from lora_null.recipes.report.headline import Measure, forgetting, learning, times
from lora_null.recipes.report.svg import COLORS, FAINT, GOOD, INK, OTHER_COLORS, svg
from lora_null.recipes.report.table import metric_title, reference_row
from lora_null.recipes.results import Estimate, Results, TrainLog

MARKERS = "osD^vP"
NAMED = 5  # the most points that are named in the picture
LOG_FROM = 30  # a span of forgetting beyond this factor is drawn on a logarithmic axis
GLYPHS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}


def row_colors(results: Results) -> list[str]:
    """A color per row: fixed for the methods we know, from a cycle for others."""
    unknown = list(dict.fromkeys(row.method for row in results.rows if row.method not in COLORS))
    cycle = dict(zip(unknown, itertools.cycle(OTHER_COLORS)))
    return [COLORS.get(row.method) or cycle[row.method] for row in results.rows]


def row_markers(results: Results) -> list[str]:
    """A marker per row, which tells apart the rows of one method, since they share its color."""
    seen = [sum(other.method == row.method for other in results.rows[:i]) for i, row in enumerate(results.rows)]
    return [MARKERS[times % len(MARKERS)] for times in seen]


@dataclass(frozen=True)
class Picture:
    """Drawings of one thing for the page.

    Attributes:
        drawings: (name of the choice, SVG) of which one is seen at a time, or panels beside each other, each with its name.
        caption: how it is read.
        title: what is drawn, where the page does not say it.
        panels: whether the drawings are panels.
        legend: (color, marker or line, text) of what the drawings do not name themselves.
    """

    drawings: list[tuple[str, Markup]]
    caption: str = ""
    panels: bool = False
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    title: str = ""


def forgetting_png(results: Results) -> bytes:
    """The learning-forgetting plane; one measure alone is drawn as a strip, none as a sentence."""
    kept, learned = forgetting(results), learning(results)
    if kept and learned and plane_points(kept, learned):
        return _png(_plane(results, kept, learned))
    measures = [measure for measure in (kept, learned) if measure]
    return _png(_strips(results, measures) if measures else _sentence("No retention or task metric was measured."))


def forgetting_picture(results: Results) -> Picture:
    """The same for the page; the plane with a linear and, where nothing is at zero, a logarithmic axis of forgetting."""
    kept, learned = forgetting(results), learning(results)
    points = plane_points(kept, learned)
    if not (kept and learned and points):
        measures = [measure for measure in (kept, learned) if measure]
        figure = (
            _strips(results, measures, narrow=True) if measures else _sentence("Nothing was measured.", narrow=True)
        )
        return Picture([("", svg(figure, plane_alt(results)))])
    values = [y for _, y in points.values()]
    scales = ["linear"] if min(values) <= 0 else ["linear", "log"]
    if len(scales) == 2 and max(values) > LOG_FROM * min(values):
        scales.reverse()
    drawings = [
        (name, svg(_plane(results, kept, learned, narrow=True, log=name == "log"), plane_alt(results)))
        for name in scales
    ]
    labels, colors, markers = results.labels(), row_colors(results), row_markers(results)
    legend = [(COLORS["base"], "○", "base (nothing learned, nothing forgotten)")]
    legend += [(colors[i], GLYPHS[markers[i]], labels[i]) for i in points]
    caption = "Further right has learned more, lower has forgotten less: the better corner is the lower right one."
    if "log" in scales:
        caption += " On the logarithmic axis the base, at zero, is below the picture."
    return Picture(drawings, caption, legend=legend)


def plane_alt(results: Results) -> str:
    """What the plane shows, in words, for those who do not see it."""
    kept, learned = forgetting(results), learning(results)
    labels, points = results.labels(), plane_points(kept, learned)
    if not points:
        return "; ".join(f"{m.title}: {_values(labels, m)}" for m in (kept, learned) if m) or "No metric was measured."
    points_in_words = [f"{labels[i]}: {learned.title} {learned.text(i)}, {kept.title} {kept.text(i)}" for i in points]
    return (
        f"Learning against forgetting. {labels[0]}: {learned.title} {learned.text(0)}; "
        + "; ".join(points_in_words)
        + "."
    )


def _values(labels: list[str], measure: Measure) -> str:
    return ", ".join(f"{labels[i]} {measure.text(i)}" for i in sorted(measure.measured))


def distances(results: Results) -> list[tuple[int, str]]:
    """How far each method is from the reference in both directions, in words; a ratio is a distance from the base."""
    kept, learned, reference = forgetting(results), learning(results), reference_row(results)
    points = plane_points(kept, learned)
    if kept is None or learned is None or reference not in points:
        return []
    return [
        (i, f"{_along(learned, i, reference, 'learning', 'learned')}, {_moved(kept, points, i, reference)}")
        for i in points
        if i != reference
    ]


def _along(measure: Measure, i: int, reference: int, noun: str, verb: str) -> str:
    gap = measure.gap(i, reference)
    if gap is None:
        return f"{noun} not compared"
    if not gap.significant:
        return f"same {noun} within the error"
    return f"{verb} {'more' if (gap.mean > 0) == measure.higher_is_better else 'less'}"


def _moved(measure: Measure, points: Mapping[int, tuple[float, float]], i: int, reference: int) -> str:
    word = "moved" if measure.compared.lower().endswith("kl") else "lost"
    gap, ours, theirs = measure.gap(i, reference), points[i][1], points[reference][1]
    if gap is None:
        return f"{word}: not compared"
    if not gap.significant:
        return f"{word} the same within the error"
    less = (gap.mean > 0) == measure.higher_is_better
    if min(ours, theirs) <= measure.floor:
        return f"{'less' if less else 'more'} {word}"
    return f"{times(max(ours, theirs) / min(ours, theirs))} {'less' if less else 'more'} {word}"


def plane_points(kept: Measure | None, learned: Measure | None) -> dict[int, tuple[float, float]]:
    """Where each method with both measures lies: row -> (learned, forgotten), both counted from the base."""
    if kept is None or learned is None:
        return {}
    x_sign, y_sign = (1 if learned.higher_is_better else -1), (-1 if kept.higher_is_better else 1)
    points = {}
    for i in sorted(set(learned.measured) & set(kept.measured)):
        x, y = learned.change(i), kept.change(i)
        if x is not None and y is not None:
            points[i] = x_sign * x, y_sign * y
    return points


@dataclass(frozen=True)
class Path:
    """A frontier as it is drawn: means over the seeds with their errors."""

    name: str
    label: str
    color: str
    points: list[tuple[Estimate, Estimate]]


def _paths(results: Results, kept: str, task: str) -> list[Path]:
    found = [f for f in frontiers(results, kept, task) if f.rows]
    colors = dict(zip([f.name for f in found if f.name not in COLORS], itertools.cycle(OTHER_COLORS)))
    return [
        Path(f.name, f.label, COLORS.get(f.name) or colors[f.name], mean_path(results, f, kept, task)) for f in found
    ]


def frontier_png(results: Results) -> bytes:
    """Small multiples of all frontiers: means over the seeds, bars one standard error, the others in gray."""
    pair = metric_pair(results)
    paths = _paths(results, *pair) if pair else []
    if pair is None or not paths:
        return _png(_sentence("No runs of the grid have both a retention and a task metric yet."))
    wide = min(len(paths), 3)
    tall = -(-len(paths) // wide)
    figure, panels = _figure(8.0, 1.2 + 2.2 * tall, rows=tall, columns=wide, sharex=True, sharey=True)
    panels, logarithmic = np.atleast_1d(panels).ravel(), _is_log(paths)
    for axes, path in zip(panels, paths):
        _draw_panel(axes, path, paths, logarithmic)
        axes.set_title(_wrapped(path.label, 18), fontsize=10, fontweight="bold", color=_darker(path.color), loc="left")
    for axes in panels[len(paths) :]:
        axes.set_visible(False)
    for axes in panels[len(paths) - wide : len(paths)]:
        axes.tick_params(labelbottom=True)
    x_title, y_title = _frontier_titles(*pair, logarithmic)
    figure.supxlabel(x_title, fontsize=10)
    figure.supylabel(y_title, fontsize=10)
    handles = [
        panels[0].plot([], [], line, color=color, label=text)[0] for color, line, text in _frontier_legend(paths)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def frontier_picture(results: Results) -> Picture:
    """The same for the page, one drawing a panel."""
    pair = metric_pair(results)
    paths = _paths(results, *pair) if pair else []
    if pair is None or not paths:
        said = "No runs of the grid have both a retention and a task metric yet."
        return Picture([("", svg(_sentence(said, narrow=True), said))])
    logarithmic, drawings = _is_log(paths), []
    for path in paths:
        figure, axes = _figure(2.3, 1.9, size=8)
        _draw_panel(axes, path, paths, logarithmic)
        _limits_of_all(axes, paths, logarithmic)
        points = "; ".join(f"learned {x.value:.3g}, forgotten {y.value:.3g}" for x, y in path.points)
        drawings.append((path.label, svg(figure, f"{path.label}: {points}.")))
    across, up = _frontier_titles(*pair, logarithmic)
    caption = f"Across, {across.replace('  →', '')}; up, {up.replace('  →', '')}. Lower and further right is better."
    return Picture(drawings, caption, panels=True, legend=_frontier_legend(paths))


def _is_log(paths: Sequence[Path]) -> bool:
    forgotten = [y.value for path in paths for _, y in path.points]
    return min(forgotten) > 0 and max(forgotten) > LOG_FROM * min(forgotten)


def _frontier_titles(kept: str, task: str, logarithmic: bool) -> tuple[str, str]:
    scale = ", logarithmic" if logarithmic else ""
    return (
        f"learned: {metric_title(task)}, improvement on the base  →",
        f"forgotten: {metric_title(kept)}{scale}  →",
    )


def _frontier_legend(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    own = [(INK, "o-", "the panel's method: one dot a setting, bars one standard error")]
    lora = [(COLORS["lora"], "--", "LoRA")] if any(path.name == "lora" for path in paths) else []
    return [*own, *lora, ("#9ca3af", "-", "the other methods")]


def _draw_panel(axes: Axes, path: Path, paths: Sequence[Path], logarithmic: bool) -> None:
    for other in paths:  # LoRA, what all are compared with, dashed in its own color
        color = COLORS["lora"] if other.name == "lora" else FAINT
        _draw_path(axes, other, color, behind=True, from_base=not logarithmic)
    _draw_path(axes, path, path.color, behind=False, from_base=not logarithmic)
    if logarithmic:
        axes.set_yscale("log")


def _limits_of_all(axes: Axes, paths: Sequence[Path], logarithmic: bool) -> None:
    """The same limits in panels that are drawn apart."""
    x, y = zip(*(point for path in paths for point in path.points))
    low, high = min(0, *(e.value for e in x)), max(e.value + (e.stderr or 0) for e in x)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    low, high = min(e.value for e in y), max(e.value + (e.stderr or 0) for e in y)
    axes.set_ylim(*((low / 1.6, high * 1.6) if logarithmic else (min(0, low) - 0.05 * high, 1.08 * high)))


def curves_picture(results: Results, logs: Sequence[TrainLog], key: str, title: str) -> Picture | None:
    """A logged quantity against the step, one panel a method; None where no log has it.

    Args:
        logs: one per row of `results`, the base's included (it is empty).
        key: name of the logged quantity.
        title: what it is.
    """
    series = {i: log.series(key) for i, log in enumerate(logs) if log.series(key)[0]}
    if not series:
        return None
    labels, colors, drawings = results.labels(), row_colors(results), []
    smooth = {i: _moving_average(values) for i, (_, values) in series.items()}
    every = [value for _, values in series.values() for value in values]
    span = np.ptp(every) or 1
    for i, (steps, values) in series.items():
        figure, axes = _figure(2.3, 1.6, size=8)
        for j, (other_steps, _) in series.items():
            axes.plot(other_steps, smooth[j], color=FAINT, linewidth=1, zorder=1)
        axes.plot(steps, values, color=colors[i], linewidth=0.8, alpha=0.4, zorder=2)
        axes.plot(steps, smooth[i], color=colors[i], linewidth=2, zorder=3, marker="o" if len(steps) == 1 else None)
        axes.set_ylim(min(every) - 0.05 * span, max(every) + 0.05 * span)
        axes.set_xlabel("step", fontsize=8)
        drawings.append(
            (labels[i], svg(figure, f"{title} of {labels[i]}: {values[0]:.3g} first, {values[-1]:.3g} last."))
        )
    return Picture(drawings, panels=True, title=title)


def dial_png(found: tuple[Measure, Measure] | None, strengths: Sequence[float], label: str) -> bytes:
    """The frontier of one adapter: a point a strength, joined from the base on; bars are one standard error."""
    if found is None:
        return _png(_sentence("Only one of learning and forgetting was measured: there is no frontier to draw."))
    kept, learned = found
    points = plane_points(kept, learned)
    figure, axes = _figure(7.4, 4.6)
    scale = [_scale(measure) for measure in (learned, kept)]
    line = [(0.0, 0.0), *((x * scale[0], y * scale[1]) for x, y in points.values())]
    axes.plot(*zip(*line), color=COLORS["lora-null-v2"], linewidth=1.5, zorder=2)
    axes.plot(
        0, 0, marker="o", color="white", markeredgecolor=COLORS["base"], markeredgewidth=2, markersize=9, zorder=4
    )
    axes.annotate("base", (0, 0), xytext=(12, -5), textcoords="offset points", fontsize=10, color=INK)
    for i, (x, y) in points.items():
        errors = [factor * (m.estimates[i].stderr or 0) for factor, m in zip(scale, (learned, kept))]
        place = (x * scale[0], y * scale[1])
        axes.errorbar(
            *place, xerr=errors[0], yerr=errors[1], fmt="o", color=COLORS["lora-null-v2"], elinewidth=1, zorder=3
        )
        axes.annotate(f"{strengths[i]:g}", place, xytext=(6, -14), textcoords="offset points", fontsize=10, color=INK)
    direction = "rise" if learned.higher_is_better else "fall"
    axes.set_xlabel(f"Learned: {direction} of {learned.title} from the base{_unit(learned, change=True)}  →")
    axes.set_ylabel(f"Forgotten: {kept.title}{_unit(kept, change=True)}  →")
    axes.set_title(f"{label} by its strength", loc="left", fontweight="bold")
    return _png(figure)


def card_png(results: Results, headline: str) -> bytes:
    """What a link to the report shows elsewhere, 1200 × 630 pixels: the finding, and the picture where there is one."""
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    drawn = _draw_card(figure, results)
    width, rows = (36, 14) if drawn else (76, 12)
    lines = textwrap.wrap(headline.replace(" ± ", "\u00a0±\u00a0"), width, break_on_hyphens=False)
    lines = lines if len(lines) <= rows else [*lines[: rows - 1], "…"]
    name = escape_math(textwrap.shorten(f"{results.recipe} · {results.model}", 60 if drawn else 120))
    figure.text(
        0.045, 0.9, "What was learned, what was forgotten", fontsize=15, color=COLORS["lora-null-v2"], weight="bold"
    )
    figure.text(0.045, 0.845, name, fontsize=12, color="#6b7280")
    text = escape_math("\n".join(lines))
    figure.text(0.045, 0.79, text, fontsize=16, color=INK, weight="bold", va="top", linespacing=1.35)
    return _png(figure)


def _draw_card(figure: Figure, results: Results) -> bool:
    """Draw the plane, or a grid's frontiers, into the right half; return whether there is one."""
    if results.grid:
        pair = metric_pair(results)
        paths = _paths(results, *pair) if pair else []
        if pair is None or not paths:
            return False
        axes = _card_axes(figure)
        for path in paths:
            axes.plot(
                *([point[i].value for point in path.points] for i in (0, 1)), "o-", color=path.color, label=path.label
            )
        if _is_log(paths):
            axes.set_yscale("log")
        x_title, y_title = _frontier_titles(*pair, _is_log(paths))
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.legend(frameon=False, fontsize=10)
        return True
    kept, learned = forgetting(results), learning(results)
    points = plane_points(kept, learned)
    if kept is None or learned is None or not points:
        return False
    values = [y for _, y in points.values()]
    log = min(values) > 0 and max(values) > LOG_FROM * min(values)
    _draw_plane(_card_axes(figure), results, kept, learned, log=log)
    return True


def _card_axes(figure: Figure) -> Axes:
    axes = figure.add_axes((0.62, 0.13, 0.355, 0.79))
    _dress(axes, 11)
    return axes


def escape_math(text: str) -> str:
    """`$` would start a formula."""
    return text.replace("$", r"\$")


def _plane(results: Results, kept: Measure, learned: Measure, *, narrow: bool = False, log: bool = False) -> Figure:
    figure, axes = _figure(*((4.1, 3.5) if narrow else (7.4, 4.6)), size=9 if narrow else 10)
    _draw_plane(axes, results, kept, learned, log=log)
    if not narrow:
        axes.set_title("Learned much, forgot little: lower right is better", loc="left", fontweight="bold")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)
    return figure


def _draw_plane(axes: Axes, results: Results, kept: Measure, learned: Measure, *, log: bool) -> None:
    points = plane_points(kept, learned)
    _plane_limits(axes, kept, learned, points, log)
    _shade_good_corner(axes)
    labels, colors, markers = results.labels(), row_colors(results), row_markers(results)
    scale = [_scale(measure) for measure in (learned, kept)]
    if not log:
        white = {"color": "white", "markeredgecolor": COLORS["base"], "markeredgewidth": 2, "markersize": 9}
        axes.plot(0, 0, marker="o", linestyle="", label="base", zorder=4, **white)
    for i, (x, y) in points.items():
        errors = [factor * (m.estimates[i].stderr or 0) for factor, m in zip(scale, (learned, kept))]
        axes.errorbar(
            x * scale[0], y * scale[1], xerr=errors[0], yerr=errors[1], fmt=markers[i], color=colors[i], markersize=9,
            markeredgecolor="white", elinewidth=1.4, zorder=3, label=_wrapped(labels[i]),
        )  # fmt: skip
    _name_points(axes, {i: (x * scale[0], y * scale[1]) for i, (x, y) in points.items()}, labels, colors)
    _draw_distance(axes, results, kept, points, scale)
    direction = "rise" if learned.higher_is_better else "fall"
    axes.set_xlabel(f"Learned: {direction} of {learned.title}{_unit(learned, change=True)}  →")
    axes.set_ylabel(f"Forgotten: {kept.title}{_unit(kept, change=True)}{', log' if log else ''}  →")


def _name_points(
    axes: Axes, points: Mapping[int, tuple[float, float]], labels: Sequence[str], colors: Sequence[str]
) -> None:
    """Write the names beside the points, where there are few: the legend alone would have to be matched by color."""
    if len(points) > NAMED:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = {i: to_axes.transform(point) for i, point in points.items()}
    for i, (x, y) in placed.items():
        above = any(abs(x - u) < 0.3 and 0 <= v - y < 0.15 for j, (u, v) in placed.items() if j != i)
        side = "center" if above else "right" if x > 0.5 else "left"
        offset = (0, -8) if above else ({"right": -7, "left": 7}[side], 5)
        axes.annotate(
            _wrapped(labels[i]), points[i], offset, textcoords="offset points", ha=side, va="top" if above else "bottom",
            fontsize=9, color=colors[i], fontweight="bold", zorder=5,
        )  # fmt: skip


def _draw_distance(
    axes: Axes, results: Results, kept: Measure, points: Mapping[int, tuple[float, float]], scale: Sequence[int]
) -> None:
    """A dotted line from the reference's forgetting down to that of the method that forgot least, with the ratio."""
    reference, best = reference_row(results), min(points, key=lambda i: points[i][1])
    if reference not in points or best == reference or not kept.separated(best, reference):
        return
    (x, low), high = points[best], points[reference][1]
    axes.plot([x * scale[0]] * 2, [low * scale[1], high * scale[1]], ":", color=INK, linewidth=1.2, zorder=2)
    if low > kept.floor:
        middle = (low * high) ** 0.5 if axes.get_yscale() == "log" else (low + high) / 2
        right = x * scale[0] < np.mean(axes.get_xlim())
        axes.annotate(
            f"{times(high / low)} less", (x * scale[0], middle * scale[1]), (6 if right else -6, 0), color=INK,
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=9, zorder=5,
        )  # fmt: skip


def _scale(measure: Measure) -> int:
    return 100 if measure.unit in ("fraction", "points") else 1


def _plane_limits(
    axes: Axes, kept: Measure, learned: Measure, points: dict[int, tuple[float, float]], log: bool
) -> None:
    """Fit points and error bars, with the base at the corner: below it only what improved on it, and a margin."""
    for measure, values, set_limits in (
        (learned, [p[0] for p in points.values()], axes.set_xlim),
        (kept, [p[1] for p in points.values()], axes.set_ylim),
    ):
        scale = _scale(measure)
        errors = [measure.estimates[i].stderr or 0 for i in points]
        low = scale * min(0, *(v - e for v, e in zip(values, errors)))
        high = scale * max(0, *(v + e for v, e in zip(values, errors)))
        span = (high - low) or 1
        set_limits(low - 0.12 * span, high + 0.14 * span)
    if log:
        values = [_scale(kept) * y for _, y in points.values()]
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2.5, max(values) * 2)
    axes.axhline(0, color=FAINT, linewidth=1, zorder=1)
    axes.axvline(0, color=FAINT, linewidth=1, zorder=1)


def _shade_good_corner(axes: Axes) -> None:
    across, down = np.meshgrid(np.linspace(0, 1, 128), np.linspace(0, 1, 128))
    nearness = np.clip(1 - np.hypot(1 - across, 1 - down), 0, 1)
    fade = LinearSegmentedColormap.from_list("good", [(*to_rgb(GOOD), 0.0), (*to_rgb(GOOD), 0.28)])
    axes.imshow(
        nearness, extent=(0, 1, 0, 1), transform=axes.transAxes, cmap=fade, aspect="auto", origin="upper", zorder=0
    )
    axes.text(
        0.985, 0.02, "better: learned much, forgot little", transform=axes.transAxes, ha="right", va="bottom", color=GOOD,
        fontsize=9, fontstyle="italic", zorder=2,
    )  # fmt: skip


def _strips(results: Results, measures: list[Measure], *, narrow: bool = False) -> Figure:
    """Methods as rows, the measure along the axis: what is drawn where the plane lacks a side or the base."""
    rows = sorted({i for measure in measures for i in measure.measured})
    shape = {"rows": len(measures)} if narrow else {"columns": len(measures)}
    width, height = 4.3 if narrow else 8.0, (1.5 + 0.4 * len(rows)) * (len(measures) if narrow else 1)
    figure, panels = _figure(width, height, size=9 if narrow else 10, **shape)
    colors, markers, labels = row_colors(results), row_markers(results), results.labels()
    for axes, measure in zip(np.atleast_1d(panels), measures):
        scale = _scale(measure)
        for height, i in enumerate(reversed(rows)):
            if i in measure.measured:
                estimate = measure.estimates[i]
                value, error = estimate.value, estimate.stderr
                axes.errorbar(
                    scale * value, height, xerr=scale * (error or 0), fmt=markers[i], color=colors[i], markersize=9
                )
        note = ""
        if measure.estimates[0]:
            axes.axvline(scale * measure.estimates[0].value, color=COLORS["base"], linestyle="--", linewidth=1)
            note = "\n(dashed: the base)"
        axes.set_yticks(range(len(rows)), [_wrapped(labels[i]) for i in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        better = "→ higher is better" if measure.higher_is_better else "← lower is better"
        axes.set_xlabel(f"{measure.title}{_unit(measure)}  {better}{note}")
    return figure


def _draw_path(axes: Axes, path: Path, color: str, *, behind: bool, from_base: bool) -> None:
    x, y = ([point[i].value for point in path.points] for i in (0, 1))
    start = [0.0] if from_base else []
    dashed = "--" if behind and path.name == "lora" else "-"
    width, above = (1, 1 + (dashed == "--")) if behind else (2, 3)
    axes.plot([*start, *x], [*start, *y], dashed, color=color, linewidth=width, zorder=above)
    if behind:
        return
    errors = [[point[i].stderr or 0 for point in path.points] for i in (0, 1)]
    axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=color, markersize=5, elinewidth=1.2, zorder=4)


def _moving_average(values: Sequence[float]) -> np.ndarray:
    """Centered mean over a tenth of the curve, over what there is of the window at the ends."""
    reach = len(values) // 20
    padded = np.asarray(values, dtype=float)
    return np.array([padded[max(0, i - reach) : i + reach + 1].mean() for i in range(len(padded))])


def _sentence(text: str, *, narrow: bool = False) -> Figure:
    figure, axes = _figure(4.3 if narrow else 8.0, 1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, textwrap.fill(text, 40), ha="center", va="center", color=INK, fontsize=12)
    return figure


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, size: int = 10, **shared):
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, **shared)
    for axes in np.atleast_1d(panels).ravel():
        _dress(axes, size)
    return figure, panels


def _dress(axes: Axes, size: int) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=size)
    axes.xaxis.label.set(color=INK, fontsize=size)
    axes.yaxis.label.set(color=INK, fontsize=size)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _unit(measure: Measure, change: bool = False) -> str:
    """The unit in parentheses; a `change` of a percentage is in points."""
    percent = " (points)" if change else " (%)"
    return {"nats": " (nats)", "fraction": percent, "points": " (points)"}.get(measure.unit, "")


def _wrapped(text: str, width: int = 24) -> str:
    """Break a long name into lines, at a hyphen or space where there is one; `$` would start a formula."""
    lines = [""]
    text = text.replace("$", r"\$").replace(" = ", "\u00a0=\u00a0")
    for word in re.findall(r"[^- ]*[- ]?", text):
        for piece in [word[i : i + width] for i in range(0, len(word), width)]:
            lines[-1:] = [lines[-1] + piece] if len(lines[-1] + piece) <= width else [lines[-1], piece]
    return "\n".join(line.strip() for line in lines)


def _darker(color: str) -> str:
    """`color` dark enough to be read as text on white."""
    return to_hex([0.72 * channel for channel in to_rgb(color)])

"""The pictures of the report, drawn off-screen and without global state, so that equal numbers give equal bytes."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from lora_null.recipes.report.grid_page import Frontier, frontiers, metric_pair
from lora_null.recipes.report.headline import Measure, forgetting, learning
from lora_null.recipes.report.table import metric_title
from lora_null.recipes.results import Results, TrainLog

# One color a method, in every picture and table. From Okabe-Ito and Tol's muted palette, told apart by color-blind eyes.
COLORS = {
    "base": "#6b7280", "full": "#333333", "lora": "#d55e00", "lora-fa": "#882255", "pissa": "#cc79a7",
    "milora": "#e69f00", "corda": "#009e73", "roselora": "#999933", "lora-null-v1": "#56b4e9",
    "lora-null-v2": "#0072b2", "osf": "#44aa99", "mica": "#332288", "eva": "#a6761d", "lora-ga": "#117733",
}  # fmt: skip
OTHER_COLORS = ("#aa4499", "#6699cc", "#661100", "#88a000", "#7b6fd0", "#c0504d")
MARKERS = "osD^vP"
LOG_FROM = 30  # a span of forgetting beyond this factor is drawn on a logarithmic axis
INK, FAINT, GOOD = "#1f2937", "#d1d5db", "#15803d"


def row_colors(results: Results) -> list[str]:
    """A color per row: fixed for the methods we know, from a cycle for others."""
    unknown = list(dict.fromkeys(row.method for row in results.rows if row.method not in COLORS))
    cycle = dict(zip(unknown, itertools.cycle(OTHER_COLORS)))
    return [COLORS.get(row.method) or cycle[row.method] for row in results.rows]


def row_markers(results: Results) -> list[str]:
    """A marker per row, which tells apart the rows of one method, since they share its color."""
    seen = [sum(other.method == row.method for other in results.rows[:i]) for i, row in enumerate(results.rows)]
    return [MARKERS[times % len(MARKERS)] for times in seen]


def forgetting_png(results: Results) -> bytes:
    """The learning-forgetting plane; one measure alone is drawn as a strip, none as a sentence."""
    kept, learned = forgetting(results), learning(results)
    if kept and learned and plane_points(kept, learned):
        return _png(_plane(results, kept, learned))
    measures = [measure for measure in (kept, learned) if measure]
    return _png(_strips(results, measures) if measures else _sentence("No retention or task metric was measured."))


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


def frontier_png(results: Results) -> bytes:
    """Small multiples of all frontiers: means over the seeds, bars one standard error, the others in gray."""
    pair = metric_pair(results)
    drawn = [f for f in frontiers(results, *pair) if f.mean_path()] if pair else []
    if pair is None or not drawn:
        return _png(_sentence("No runs of the grid have both a retention and a task metric yet."))
    return _png(_panels(drawn, *pair))


def curves_png(results: Results, logs: Sequence[TrainLog], key: str, title: str) -> bytes | None:
    """Small multiples of a logged quantity against the step, one panel a method; None where no log has it.

    Args:
        logs: one per row of `results`, the base's included (it is empty).
        key: name of the logged quantity.
        title: label of the vertical axis.
    """
    series = {i: log.series(key) for i, log in enumerate(logs) if log.series(key)[0]}
    return _png(_curves(results, series, title)) if series else None


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


def _plane(results: Results, kept: Measure, learned: Measure) -> Figure:
    points = plane_points(kept, learned)
    figure, axes = _figure(7.4, 4.6)
    _plane_limits(axes, kept, learned, points)
    _shade_good_corner(axes)
    labels, colors, markers = results.labels(), row_colors(results), row_markers(results)
    scale = [_scale(measure) for measure in (learned, kept)]
    white = {"color": "white", "markeredgecolor": COLORS["base"], "markeredgewidth": 2, "markersize": 9}
    axes.plot(0, 0, marker="o", linestyle="", label="base", zorder=4, **white)
    for i, (x, y) in points.items():
        errors = [factor * (m.estimates[i].stderr or 0) for factor, m in zip(scale, (learned, kept))]
        axes.errorbar(
            x * scale[0], y * scale[1], xerr=errors[0], yerr=errors[1], fmt=markers[i], color=colors[i], markersize=10,
            markeredgecolor="white", elinewidth=1.4, zorder=3, label=_wrapped(labels[i]),
        )  # fmt: skip
    direction = "rise" if learned.higher_is_better else "fall"
    axes.set_xlabel(f"Learned: {direction} of {learned.title} from the base{_unit(learned, change=True)}  →")
    axes.set_ylabel(f"Forgotten: {kept.title}{_unit(kept, change=True)}  →")
    axes.set_title("Learned much, forgot little: lower right is better", loc="left", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)
    return figure


def _scale(measure: Measure) -> int:
    return 100 if measure.unit in ("fraction", "points") else 1


def _plane_limits(axes: Axes, kept: Measure, learned: Measure, points: dict[int, tuple[float, float]]) -> None:
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
        0.985, 0.02, "learned much, forgot little", transform=axes.transAxes, ha="right", va="bottom", color=GOOD,
        fontsize=10, fontstyle="italic", zorder=2,
    )  # fmt: skip


def _strips(results: Results, measures: list[Measure]) -> Figure:
    """Methods as rows, the measure along the axis: what is drawn where the plane lacks a side or the base."""
    rows = sorted({i for measure in measures for i in measure.measured})
    figure, panels = _figure(8.0, 1.5 + 0.4 * len(rows), columns=len(measures))
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


def _curves(results: Results, series: dict[int, tuple[list[float], list[float]]], title: str) -> Figure:
    wide = min(len(series), 4 if len(series) > 6 else 3)
    tall = -(-len(series) // wide)
    figure, panels = _figure(8.0, 0.6 + 1.9 * tall, rows=tall, columns=wide, sharex=True, sharey=True)
    labels, colors, panels = results.labels(), row_colors(results), np.atleast_1d(panels).ravel()
    smooth = {i: _moving_average(values) for i, (_, values) in series.items()}
    for axes, (i, (steps, values)) in zip(panels, series.items()):
        for j, (other_steps, _) in series.items():
            axes.plot(other_steps, smooth[j], color=FAINT, linewidth=1, zorder=1)
        axes.plot(steps, values, color=colors[i], linewidth=0.8, alpha=0.35, zorder=2)
        axes.plot(steps, smooth[i], color=colors[i], linewidth=2, zorder=3, marker="o" if len(steps) == 1 else None)
        axes.set_title(_wrapped(labels[i], 18), fontsize=10, fontweight="bold", color=_darker(colors[i]), loc="left")
    for axes in panels[len(series) :]:
        axes.set_visible(False)
    for axes in panels[len(series) - wide : len(series)]:
        axes.tick_params(labelbottom=True)  # the lowest of each column, where a panel is missing below
    figure.supxlabel("step", fontsize=10, color=INK)
    figure.supylabel(title, fontsize=10, color=INK)
    return figure


def _panels(drawn: list[Frontier], kept: str, task: str) -> Figure:
    wide = min(len(drawn), 3)
    tall = -(-len(drawn) // wide)
    figure, panels = _figure(8.0, 0.9 + 2.2 * tall, rows=tall, columns=wide, sharex=True, sharey=True)
    panels = np.atleast_1d(panels).ravel()
    forgotten = [y.value for f in drawn for _, y in f.mean_path()]
    logarithmic = min(forgotten) > 0 and max(forgotten) > LOG_FROM * min(forgotten)
    for index, (axes, frontier) in enumerate(zip(panels, drawn)):
        for other in drawn:  # LoRA, what all are compared with, dashed in its own color
            _draw_path(
                axes,
                other,
                COLORS["lora"] if other.method == "lora" else FAINT,
                behind=True,
                from_base=not logarithmic,
            )
        color = COLORS.get(frontier.method, OTHER_COLORS[index % len(OTHER_COLORS)])
        _draw_path(axes, frontier, color, behind=False, from_base=not logarithmic)
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


def _draw_path(axes: Axes, frontier: Frontier, color: str, *, behind: bool, from_base: bool) -> None:
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


def _moving_average(values: Sequence[float]) -> np.ndarray:
    """Centered mean over a tenth of the curve, over what there is of the window at the ends."""
    reach = len(values) // 20
    padded = np.asarray(values, dtype=float)
    return np.array([padded[max(0, i - reach) : i + reach + 1].mean() for i in range(len(padded))])


def _sentence(text: str) -> Figure:
    figure, axes = _figure(8.0, 1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=INK, fontsize=12)
    return figure


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **shared):
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, **shared)
    for axes in np.atleast_1d(panels).ravel():
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9ca3af")
        axes.tick_params(colors=INK, labelsize=10)
        axes.xaxis.label.set(color=INK, fontsize=11)
        axes.yaxis.label.set(color=INK, fontsize=11)
    return figure, panels


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

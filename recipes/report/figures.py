"""The pictures of the report, drawn off-screen and without global state, so that equal numbers give equal bytes.

The page has SVG, small enough to be read at the width of a phone and colored by variables of its style sheet, which follow
light and dark; `forgetting.png` and `card.png` are for readmes and for links to the page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lora_null.recipes.report.drawing import (
    COLORS,
    FAINT,
    GLYPHS,
    GOOD,
    INK,
    Picture,
    axis_title,
    colors_of,
    dress,
    escape_math,
    is_wide,
    lay_out,
    markers_of,
    new_figure,
    png,
    readable,
    sentence,
    svg,
    wrapped,
)
from lora_null.recipes.report.grid_figures import Frontiers
from lora_null.recipes.report.headline import Measure, forgetting, learning, times
from lora_null.recipes.report.table import reference_row, scale_of
from lora_null.recipes.results import Results, TrainLog, kind_of

NAMED = 5  # the most points that are named in the picture
AROUND = ((7, 5), (-7, 5), (0, -8), (0, 8), (7, -5), (-7, -5))  # where a name may be, in points from its own
DIAL_AROUND = ((8, -5), (0, -8), (0, 8))  # the same of a strength
# The same of the ratio, from the middle of its line.
BESIDE = ((6, 0), (-6, 0), (6, 14), (-6, 14), (6, -14), (-6, -14))
BASE = {"marker": "o", "linestyle": "", "label": "base", "color": "white", "markeredgecolor": COLORS["base"]}
BASE |= {"markeredgewidth": 2, "markersize": 9, "zorder": 4}


def row_colors(results: Results) -> list[str]:
    """A color per row, that of its method."""
    colors = colors_of(row.method for row in results.rows)
    return [colors[row.method] for row in results.rows]


def row_markers(results: Results) -> list[str]:
    """A marker per row, which tells apart the rows of one method and of methods whose colors are near."""
    return ["o", *markers_of(row_colors(results)[1:])]  # the base's is hollow


def forgetting_png(results: Results) -> bytes:
    """The learning-forgetting plane; one measure alone is drawn as a strip, none as a sentence."""
    kept, learned = forgetting(results), learning(results)
    if kept and learned and plane_points(kept, learned):
        return png(_plane(results, kept, learned))
    measures = [measure for measure in (kept, learned) if measure]
    return png(_strips(results, measures) if measures else sentence("No retention or task metric was measured."))


def forgetting_picture(results: Results) -> Picture:
    """The same for the page; the plane with a linear and, where nothing is at zero, a logarithmic axis of forgetting."""
    kept, learned = forgetting(results), learning(results)
    points = plane_points(kept, learned)
    if not (kept and learned and points):
        measures = [measure for measure in (kept, learned) if measure]
        nothing = sentence("Nothing was measured.", narrow=True)
        figure = _strips(results, measures, narrow=True) if measures else nothing
        return Picture([("", svg(figure, plane_alt(results)))])
    values = [y for _, y in points.values()]
    scales = ["linear"] if min(values) <= 0 else ["log", "linear"] if is_wide(values) else ["linear", "log"]
    drawn = ((name, _plane(results, kept, learned, narrow=True, log=name == "log")) for name in scales)
    drawings = [(name, svg(figure, plane_alt(results))) for name, figure in drawn]
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
    told = [f"{labels[0]}: {learned.title} {learned.text(0)}"]
    told += [f"{labels[i]}: {learned.title} {learned.text(i)}, {kept.title} {kept.text(i)}" for i in points]
    return f"Learning against forgetting. {'; '.join(told)}."


def _values(labels: list[str], measure: Measure) -> str:
    return ", ".join(f"{labels[i]} {measure.text(i)}" for i in sorted(measure.measured))


def distances(results: Results) -> list[tuple[int, str]]:
    """How far each method is from the reference in both directions, in words; a ratio is a distance from the base."""
    kept, learned, reference = forgetting(results), learning(results), reference_row(results)
    if kept is None or learned is None:
        return []
    points = {i: place for i, place in plane_points(kept, learned).items() if i in kept.ranked}
    if reference not in points:
        return []
    return [
        (i, f"{_along(learned, i, reference)}, {_moved(kept, points, i, reference)}") for i in points if i != reference
    ]


def _along(measure: Measure, i: int, reference: int) -> str:
    gap = measure.gap(i, reference)
    if gap is None or measure.untested([i, reference]):
        return "learning not compared"
    if not gap.significant:
        return "same learning within the error"
    return "learned more" if gap.favors(measure.higher_is_better) else "learned less"


def _moved(measure: Measure, points: Mapping[int, tuple[float, float]], i: int, reference: int) -> str:
    gap, ours, theirs = measure.gap(i, reference), points[i][1], points[reference][1]
    gained = max(ours, theirs) < 0  # of what was to be kept
    word = "moved" if kind_of(measure.comparison_name) == "kl" else "gained" if gained else "lost"
    if gap is None or measure.untested([i, reference]):
        return f"{word}: not compared"
    if not gap.significant:
        return f"{word} the same within the error"
    less = gap.favors(measure.higher_is_better)
    if min(ours, theirs) <= measure.noise_floor:
        return f"{word} {'less' if less != (word == 'gained') else 'more'}"
    return f"{word} {times(max(ours, theirs) / min(ours, theirs))} {'less' if less else 'more'}"


def plane_points(kept: Measure | None, learned: Measure | None) -> dict[int, tuple[float, float]]:
    """Where each method with both measures lies: row -> (learned, forgotten), both counted from the base."""
    if kept is None or learned is None:
        return {}
    points = {}
    for i in sorted(set(learned.measured) & set(kept.measured)):
        x, y = learned.change(i), kept.change(i)
        if x is not None and y is not None:
            points[i] = x, y
    return points


def curves_picture(results: Results, logs: Sequence[TrainLog], key: str, title: str) -> Picture | None:
    """A logged quantity against the step, one panel per method; None where no log has it.

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
    figure, axes = new_figure(2.3, 1.6, size=8)  # of all panels, which differ in what is drawn strongly
    for i, (steps, _) in series.items():
        axes.plot(steps, smooth[i], color=FAINT, linewidth=1, zorder=1)
    axes.set_ylim(min(every) - 0.05 * span, max(every) + 0.05 * span)
    axes.set_xlabel("step", fontsize=8)
    for i, (steps, values) in series.items():
        marker = "o" if len(steps) == 1 else None
        drawn = axes.plot(steps, values, color=colors[i], linewidth=0.8, alpha=0.4, zorder=2)
        drawn += axes.plot(steps, smooth[i], color=colors[i], linewidth=2, zorder=3, marker=marker)
        alt = f"{title} of {labels[i]}: {values[0]:.3g} first, {values[-1]:.3g} last."
        drawings.append((labels[i], svg(figure, alt)))
        for line in drawn:
            line.remove()
    return Picture(drawings, panels=True, title=title)


def dial_figure(
    kept: Measure | None, learned: Measure | None, strengths: Sequence[float], color: str, title: str = ""
) -> Figure | None:
    """The frontier of one adapter: a point a strength, joined from the base on; bars are one standard error.

    None unless both sides were measured. With a title it is for a file of its own, without one for the page. Strengths that
    cover others are in the table.
    """
    if kept is None or learned is None:
        return None
    points = _scaled(kept, learned)
    figure, axes = new_figure(*((7.4, 4.6) if title else (4.1, 3.2)), size=10 if title else 9)
    axes.plot(*zip((0, 0), *points.values()), color=color, linewidth=1.5, zorder=2)
    axes.plot(0, 0, **BASE)
    for i, place in points.items():
        axes.errorbar(*place, **_errors(kept, learned, i), fmt="o", color=color, elinewidth=1, zorder=3)
    axes.margins(0.1)
    _plane_titles(axes, kept, learned, since=" from the base")
    axes.set_title(title, loc="left", fontweight="bold")
    lay_out(figure)
    named = [((0.0, 0.0), "base"), *((points[i], f"{strengths[i]:g}") for i in reversed(points))]
    taken = [_boxes(axes, place, {"xerr": 0, "yerr": 0})[0] for place, _ in named]
    for place, text in named:
        box = _place(axes, text, place, DIAL_AROUND, taken, {"fontsize": 10 if title else 9, "color": INK})
        taken += [box] if box else []
    return figure


def card_png(results: Results, headline: str) -> bytes:
    """What a link to the report shows elsewhere, 1200 × 630 pixels: the finding, and the picture where there is one."""
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    drawn = _draw_card(figure, results)
    width, rows = (36, 14) if drawn else (76, 12)
    lines = textwrap.wrap(headline.replace(" ± ", "\u00a0±\u00a0"), width, break_on_hyphens=False)
    lines = lines if len(lines) <= rows else [*lines[: rows - 1], "…"]
    name = escape_math(textwrap.shorten(f"{results.recipe} · {results.model_title}", 60 if drawn else 120))
    bold = {"weight": "bold"}
    figure.text(0.045, 0.9, "What was learned, what was forgotten", fontsize=15, color=COLORS["lora-null-v2"], **bold)
    figure.text(0.045, 0.845, name, fontsize=12, color="#6b7280")
    text = escape_math("\n".join(lines))
    figure.text(0.045, 0.79, text, fontsize=16, color=INK, va="top", **bold, linespacing=1.35)
    return png(figure)


def _draw_card(figure: Figure, results: Results) -> bool:
    """Draw the plane, or a grid's frontiers, into the right half; return whether there is one."""
    kept, learned, found = forgetting(results), learning(results), Frontiers.of(results) if results.grid else None
    points = {} if results.grid else plane_points(kept, learned)
    if not found and not points:
        return False
    axes = figure.add_axes((0.62, 0.15, 0.355, 0.77))
    dress(axes, 11)
    if kept and learned and points:
        _draw_plane(axes, results, kept, learned, log=is_wide([y for _, y in points.values()]))
        if not _name_points(axes, results, kept, learned):
            axes.legend(loc="upper left", frameon=False, fontsize=9)
    for path in found.paths if found else ():
        x, y = ([point[i].value for point in path.points] for i in (0, 1))
        axes.plot(x, y, "o-", color=path.color, label=escape_math(path.label))
    if found:
        axes.set_yscale("log" if found.log else "linear")
        axes.set(xlabel=axis_title(found.titles[0]), ylabel=axis_title(found.titles[1]))
        axes.legend(frameon=False, fontsize=10)
    return True


def _plane(results: Results, kept: Measure, learned: Measure, *, narrow: bool = False, log: bool = False) -> Figure:
    lines = sum(1 + wrapped(label).count("\n") for label in results.labels()[1:])
    height = max(4.6, 0.9 + 0.19 * lines)  # for the legend beside it
    figure, axes = new_figure(*((4.1, 3.5) if narrow else (7.4, height)), size=9 if narrow else 10)
    _draw_plane(axes, results, kept, learned, log=log)
    if not narrow:
        axes.set_title("Learned much, forgot little: lower right is better", loc="left", fontweight="bold")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)
    _name_points(axes, results, kept, learned)
    return figure


def _draw_plane(axes: Axes, results: Results, kept: Measure, learned: Measure, *, log: bool) -> None:
    points = _scaled(kept, learned)
    _plane_limits(axes, kept, learned, points, log)
    _shade_good_corner(axes)
    labels, colors, markers = results.labels(), row_colors(results), row_markers(results)
    if not log:
        axes.plot(0, 0, **BASE)
    for i, place in points.items():
        axes.errorbar(
            *place, **_errors(kept, learned, i), fmt=markers[i], color=colors[i], markersize=9,
            markeredgecolor="white", elinewidth=1.4, zorder=3, label=wrapped(labels[i]),
        )  # fmt: skip
    _plane_titles(axes, kept, learned, scale=", log" if log else "")


def _scaled(kept: Measure, learned: Measure) -> dict[int, tuple[float, float]]:
    """Return `plane_points` in the axes' units, where fractions are percent."""
    points = plane_points(kept, learned)
    return {i: (scale_of(learned.unit) * x, scale_of(kept.unit) * y) for i, (x, y) in points.items()}


def _errors(kept: Measure, learned: Measure, i: int) -> dict[str, float]:
    """Return the error bars of what row `i` has changed, in the axes' units."""
    return {k: scale_of(m.unit) * (m.error(i) or 0) for k, m in (("xerr", learned), ("yerr", kept))}


def _plane_titles(axes: Axes, kept: Measure, learned: Measure, *, since: str = "", scale: str = "") -> None:
    direction = "rise" if learned.higher_is_better else "fall"
    axes.set_xlabel(axis_title(f"Learned: {direction} of {learned.title}{since}{_unit(learned, change=True)}"))
    axes.set_ylabel(axis_title(f"Forgotten: {kept.title}{_unit(kept, change=True)}{scale}"))


def _name_points(axes: Axes, results: Results, kept: Measure, learned: Measure) -> bool:
    """Write names, where there are few, and the ratio, where they cover nothing; return whether all names are there.

    It is the last thing that is drawn: where the points are is known only then. Other names are in the legend alone.
    """
    lay_out(axes.figure)
    points, labels, colors = _scaled(kept, learned), results.labels(), row_colors(results)
    boxes = {i: _boxes(axes, place, _errors(kept, learned, i)) for i, place in points.items()}
    taken = [marker for marker, _ in boxes.values()] + [text.get_window_extent() for text in axes.texts]
    ratio = _draw_distance(axes, results, kept, points)
    if ratio:
        ends = axes.transData.transform(ratio.ends)
        taken.append(Bbox([ends[0] - 2, ends[1] + 2]))
    unnamed = set(points)
    for i in points if len(points) <= NAMED else ():
        style = {"fontsize": 9, "color": readable(colors[i]), "fontweight": "bold"}
        to_left = axes.transAxes.inverted().transform(axes.transData.transform(points[i]))[0] > 0.5
        sides = sorted(AROUND, key=lambda side: to_left == (side[0] > 0))
        bars = [box for j, (_, of_bars) in boxes.items() if j != i for box in of_bars]
        box = _place(axes, wrapped(labels[i]), points[i], sides, [*taken, *bars], style)
        if box:
            taken.append(box)
            unnamed.discard(i)
    if ratio and ratio.text:
        bars = [box for _, of_bars in boxes.values() for box in of_bars]
        _place(axes, ratio.text, ratio.at, BESIDE, [*taken, *bars], {"fontsize": 9, "color": INK})
    return not unnamed


def _boxes(axes: Axes, place: tuple[float, float], errors: Mapping[str, float]) -> tuple[Bbox, list[Bbox]]:
    """Return what a point's marker and its two error bars cover, in pixels."""
    (x, y), reach = place, 5 * axes.figure.dpi / 72
    x_error, y_error = errors["xerr"], errors["yerr"]
    bottom = y - y_error if axes.get_yscale() == "linear" or y > y_error else axes.get_ylim()[0]
    ends = axes.transData.transform([(x, y), (x - x_error, y), (x + x_error, y), (x, bottom), (x, y + y_error)])
    marker = Bbox([ends[0] - reach, ends[0] + reach])
    return marker, [Bbox([ends[1] - 1, ends[2] + 1]), Bbox([ends[3] - 1, ends[4] + 1])]


def _place(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    sides: Sequence[tuple[int, int]],
    taken: Sequence[Bbox],
    style: Mapping[str, object],
) -> Bbox | None:
    """Write beside a point, at the first side that covers nothing of `taken`; return where, None if nowhere."""
    for x, y in sides:
        across, up = (
            ("left" if x > 0 else "right" if x else "center"),
            ("bottom" if y > 0 else "top" if y else "center"),
        )
        written = axes.annotate(
            text, point, (x, y), textcoords="offset points", ha=across, va=up, zorder=5, **style
        )  # fmt: skip
        written.set_in_layout(False)
        box, room = written.get_window_extent(), axes.bbox
        inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
        if inside and not box.count_overlaps(taken):
            return box
        written.remove()
    return None


class Distance(NamedTuple):
    """The dotted line of `_draw_distance`: its ends, what is written beside it, and where."""

    ends: tuple[tuple[float, float], tuple[float, float]]
    text: str
    at: tuple[float, float]


def _draw_distance(
    axes: Axes, results: Results, kept: Measure, points: Mapping[int, tuple[float, float]]
) -> Distance | None:
    """A dotted line from the reference's forgetting down to that of the method that forgot least, with the ratio."""
    reference, ranked = reference_row(results), [i for i in kept.ranked if i in points]
    if reference not in ranked or not kept.beats(best := ranked[0], reference):
        return None
    (x, low), high = points[best], points[reference][1]
    axes.plot([x, x], [low, high], ":", color=INK, linewidth=1.2, zorder=2)
    middle = (low * high) ** 0.5 if axes.get_yscale() == "log" else (low + high) / 2
    known = low > scale_of(kept.unit) * kept.noise_floor
    return Distance(((x, low), (x, high)), f"{times(high / low)} less" if known else "", (x, middle))


def _plane_limits(
    axes: Axes, kept: Measure, learned: Measure, points: Mapping[int, tuple[float, float]], log: bool
) -> None:
    """Fit points and error bars, the base at the corner: below it only what improved on it, and a margin for names."""
    across = 0.3 if len(points) <= NAMED else 0.14
    for axis, key, set_limits, room in ((0, "xerr", axes.set_xlim, across), (1, "yerr", axes.set_ylim, 0.14)):
        ends = [(place[axis], _errors(kept, learned, i)[key]) for i, place in points.items()]
        low, high = min(0, *(v - e for v, e in ends)), max(0, *(v + e for v, e in ends))
        span = (high - low) or 1
        set_limits(low - 0.12 * span, high + room * span)
    if log:
        values = [y for _, y in points.values()]
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
    figure, panels = new_figure(width, height, size=9 if narrow else 10, **shape)
    colors, markers, labels = row_colors(results), row_markers(results), results.labels()
    for axes, measure in zip(np.atleast_1d(panels), measures):
        scale = scale_of(measure.unit)
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
        axes.set_yticks(range(len(rows)), [wrapped(labels[i]) for i in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        better = "→ higher is better" if measure.higher_is_better else "← lower is better"
        axes.set_xlabel(f"{wrapped(f'{measure.title}{_unit(measure)}', 36)}  {better}{note}")
    return figure


def _moving_average(values: Sequence[float]) -> np.ndarray:
    """Centered mean over a tenth of the curve, over what there is of the window at the ends."""
    reach = len(values) // 20
    padded = np.asarray(values, dtype=float)
    return np.array([padded[max(0, i - reach) : i + reach + 1].mean() for i in range(len(padded))])


def _unit(measure: Measure, change: bool = False) -> str:
    """The unit in parentheses; a `change` of a percentage is in points."""
    percent = " (points)" if change else " (%)"
    return {"nats": " (nats)", "fraction": percent, "points": " (points)"}.get(measure.unit, "")

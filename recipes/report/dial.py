"""The dial of one adapter: what `dial.json` holds, its table, its picture, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup
from pydantic import BaseModel, Field

from lora_null.eval_harness import Metric
from lora_null.recipes.report.drawing import colors_of, default_look, escape_math, png, sentence, svg
from lora_null.recipes.report.figures import dial_figure
from lora_null.recipes.report.headline import Measure, forgetting, forgetting_of, learning
from lora_null.recipes.report.table import Table, build_table, escape_markdown
from lora_null.recipes.results import MIN_ROWS, Paired, Results, Row, display_name, metric_title, validated
from lora_null.utils.files import read_json, replacing, write_json, write_text

DIAL_FOLDER, FILE = "dial", "dial.json"
SCHEMA = 1


class DialPoint(BaseModel):
    """What the adapter does at one strength; 0 is the base."""

    strength: float
    metrics: dict[str, Metric]


class Dial(BaseModel):
    """A `dial.json`.

    Attributes:
        method: of the adapter, or the name of its folder.
        model: the base's name.
        points: by rising strength, the base first.
        seconds: that the evaluations took.
        paired: every point compared with the base, question by question; None in a file of a version that did not compare.
    """

    method: str
    model: str
    points: list[DialPoint] = Field(min_length=1)
    seconds: float = 0.0
    paired: list[Paired] | None = None

    def results(self) -> Results:
        """Return the points as rows of a comparison, so that one table and one choice of measures serve both."""
        base, *rest = self.points
        label = display_name(self.method)
        rows = [Row(method=label, variant=f"strength {p.strength:g}", metrics=p.metrics) for p in rest]
        rows = [Row(method="base", metrics=base.metrics), *rows]
        return Results(recipe="dial", model=self.model, rows=rows, paired=self.paired)

    def measures(self) -> tuple[Measure | None, Measure | None]:
        """Return what was kept and what was learned, one estimate a point; None of what was not measured."""
        results = self.results()
        return forgetting(results), learning(results)

    def shares(self) -> list[tuple[int, float, float]]:
        """Return (number, share of the learning, share of the forgetting) of the points between the base and the adapter.

        Shares are of what the adapter has as it was saved; none where it learned or forgot nothing, or where a share of
        right answers rose by no more than the error.
        """
        (kept, learned), full = self.measures(), self.full
        if kept is None or learned is None or full is None:
            return []
        gained, lost = learned.change(full), kept.change(full)
        if not gained or not lost or gained < 0 or lost < 0:
            return []
        if learned.unit == "fraction" and not learned.moved(full):  # a question or two
            return []
        found = []
        for i, point in enumerate(self.points):
            change, forgot = learned.change(i), kept.change(i)
            if 0 < point.strength < 1 and change is not None and forgot is not None:
                found.append((i, change / gained, forgot / lost))
        return found

    @property
    def full(self) -> int | None:
        """The number of the point at strength 1."""
        return next((i for i, point in enumerate(self.points) if point.strength == 1), None)

    def at(self, strength: float) -> DialPoint | None:
        """Return the point that was measured at a strength."""
        return next((point for point in self.points if abs(point.strength - strength) < 1e-9), None)


def dial_picture(dial: Dial, color: str) -> Markup | None:
    """Return the picture of a dial, for the page; None where it has no frontier."""
    figure = dial_figure(*dial.measures(), [point.strength for point in dial.points], color)
    shows = "learned against forgotten, one point a strength; the numbers are in the table below."
    return None if figure is None else svg(figure, f"{display_name(dial.method)}: {shows}")


@default_look
def write_dial(folder: Path, dial: Dial) -> None:
    """Write dial.json, dial.md and dial.png into a folder."""
    title, color = f"{escape_math(display_name(dial.method))} by its strength", colors_of([dial.method])[dial.method]
    figure = dial_figure(*dial.measures(), [point.strength for point in dial.points], color, title)
    missing = "Only one of learning and forgetting was measured: there is no frontier to draw."
    with replacing(folder / "dial.png") as temporary:
        temporary.write_bytes(png(figure or sentence(missing)))
    write_text(folder / "dial.md", markdown(dial))
    write_json(folder / FILE, {"schema": SCHEMA} | dial.model_dump())


def read_dial(method_folder: Path) -> Dial | None:
    """Return what lies in METHOD/dial; None where there is none."""
    path = method_folder / DIAL_FOLDER / FILE
    return validated(Dial, read_json(path), str(path)) if path.is_file() else None


def markdown(dial: Dial) -> str:
    """Return the table of the points, and the picture's place."""
    rows = [[escape_markdown(cell) for cell in row] for row in table_rows(dial)]
    lines = [f"# {escape_markdown(display_name(dial.method))} at several strengths", ""]
    lines += ["ΔW times the strength; 0 is the base, 1 the adapter as it was saved. ± is one standard error.", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "--:|" * len(rows[0])]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    return "\n".join([*lines, "", "![Learned against forgotten, one point a strength](dial.png)", ""])


def dial_table(dial: Dial) -> Table:
    """Return the metrics, a row for each strength."""
    columns = [column for column in build_table(dial.results()).columns if column.group]
    return Table([f"{point.strength:g}" for point in dial.points], columns)


def table_rows(dial: Dial) -> list[list[str]]:
    """Return the head and one row for each strength, as text."""
    table = dial_table(dial)
    head = ["Strength", *(column.heading for column in table.columns)]
    return [head, *([label, *(str(c.cells[i]) for c in table.columns)] for i, label in enumerate(table.labels))]


def dial_summary(dial: Dial, allowed: Mapping[str, float] = {}) -> str:
    """Say in a sentence what the frontier shows: how much of the learning is left where less is forgotten.

    With `allowed`, metric → how much of it may be forgotten: the largest strength that was measured and keeps all of it.
    """
    if len(dial.points) == 1:
        return "nothing but the base was measured"
    kept, learned = dial.measures()
    if allowed:
        return _largest_within(dial, allowed, learned)
    if kept is None or learned is None:
        return "only one side was measured: a frontier needs eval.retention and eval.task"
    lines = [
        f"{dial.points[i].strength:g}: {change:.0%} of the learning, {forgot:.0%} of the forgetting"
        for i, change, forgot in dial.shares()
    ]
    ends = dict.fromkeys((kept.text(1), kept.text(len(dial.points) - 1)))
    return "; ".join(lines) or f"{kept.title}: {' to '.join(ends)}"


def _largest_within(dial: Dial, allowed: Mapping[str, float], learned: Measure | None) -> str:
    results, strengths = dial.results(), [point.strength for point in dial.points]
    bounds = [(forgetting_of(results, [name]), at_most) for name, at_most in allowed.items()]
    for (name, _), (measure, _) in zip(allowed.items(), bounds):
        if results.metric(name).higher_is_better is None:
            return f"{metric_title(name)} has no known direction, so that nothing tells what is lost of it"
        if (rows := results.metric(name).n) < MIN_ROWS:
            return f"{measure.title} was measured on {rows} rows; a limit needs at least {MIN_ROWS}"
    within = [
        f"{measure.title} within {at_most * 100:g} points"
        if measure.unit == "points"
        else f"{measure.title} within {at_most:g}"
        for measure, at_most in bounds
    ]
    inside = [
        i
        for i, strength in enumerate(strengths)
        if strength and all((e := measure.estimates[i]) and e.upper <= at_most for measure, at_most in bounds)
    ]
    if not inside:
        return f"no strength that was measured keeps {' and '.join(within)}"
    best = max(inside, key=lambda i: strengths[i])
    values = [measure.text(best) for measure, _ in bounds] + (
        [f"{learned.title} {learned.text(best)}"] if learned else []
    )
    keeps = f"strength {strengths[best]:g} keeps {' and '.join(within)}"
    return f"{keeps} on the rows that it was chosen by: {', '.join(values)}"

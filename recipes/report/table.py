"""Turns results into the table of the paper: columns, cells, and the marks on best and second best.

A mark is a claim, and all claims of one table together are wrong in at most 5% of cases (`recipes/comparisons.py`).

The Markdown, HTML and terminal reports all draw this one table; none of them formats a number itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from lora_null.eval_harness.results import Role
from lora_null.recipes.comparisons import MEANS, averaged
from lora_null.recipes.results import Estimate, Results, Row, digits_to, kind_of, mean_in, metric_title, scale_of

MISSING = "–"
MOST_DIGITS = 6  # of a decimal fraction; what is smaller is written as a power of ten
ARROWS = {True: "↑", False: "↓", None: ""}  # the better direction, by `higher_is_better`


@dataclass(frozen=True)
class Cell:
    """One entry: the text, its standard error as text, and its rank in the column where the error allows one."""

    text: str
    error: str = ""
    mark: Literal["best", "second"] | None = None

    def __str__(self) -> str:
        return f"{self.text} ± {self.error}" if self.error else self.text


@dataclass
class Column:
    """A titled column: `arrow` is the better direction, `definition` one line for the legend."""

    title: str
    group: str
    definition: str
    cells: list[Cell]
    arrow: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title} {self.arrow}".strip()


@dataclass
class Table:
    """Rows are `labels`; `columns` hold one cell per row. Columns nobody measured are not there."""

    labels: list[str]
    columns: list[Column] = field(default_factory=list)

    def label_width(self, head: str) -> int:
        """Characters of a column of the labels under `head`, at most 24."""
        return min(24, max(map(len, [*self.labels, head])))

    def groups(self) -> list[tuple[str, int]]:
        """Runs of neighboring columns with the same group, as (group, number of columns)."""
        return [(group, len(list(run))) for group, run in groupby(self.columns, key=lambda column: column.group)]


def build_table(results: Results) -> Table:
    """The table of `results`: #params, retention, tasks, their average, drift, cost."""
    columns = [
        _plain("#Params", "", "number of trained parameters.", results, lambda r: format_count(r.trainable_params))
    ]
    for role in MEANS:
        columns += [_metric_column(results, name) for name in results.metric_names(role)]
        columns += _mean_column(results, role)
    columns += [
        _plain("Drift", "", "mean over the adapted layers of ‖ΔW X‖ / ‖W₀ X‖ on calibration inputs X.", results, lambda r: _percent(r.drift and r.drift.mean)),
        _plain("‖ΔW‖/‖W₀‖", "", "size of the change of the adapted weights as one, Frobenius norms.", results, lambda r: _percent(r.magnitude and r.magnitude.total)),
        _plain("Init / train / eval", "Cost", "wall-clock time of the initialization, of the training's steps (without probes, saves, and what else comes before the first step, as OPLoRA's SVDs do), and of the evaluation.", results, _times),
        _plain("Memory", "Cost", "peak accelerator or process memory.", results, _memory),
    ]  # fmt: skip
    return Table(results.labels(), [c for c in columns if any(cell.text != MISSING for cell in c.cells)])


def rank_marks(
    results: Results, estimates: Sequence[Estimate | None], name: str, higher_is_better: bool, role: Role = "task"
) -> list[Literal["best", "second"] | None]:
    """Mark the method that is better than every other, and below it the one that is better than all the rest.

    Of a grid's settings none is marked: that which learned least would win. Nor is a method that stands alone, or one
    that was not compared with each of the others, or that is the base again.
    """
    marks: list[Literal["best", "second"] | None] = [None] * len(results.rows)
    ranked = [row.is_ranked(forgetting=role == "retention") for row in results.rows]
    rest = {i for i, estimate in enumerate(estimates) if i and estimate and ranked[i]}
    if len({results.rows[i].variant for i in rest}) > 1:
        return marks
    for mark in ("best", "second"):
        gaps = {i: [results.difference(i, j, name) for j in rest - {i}] for i in rest}
        first = next((i for i in rest if all(gap and gap.favors(higher_is_better) for gap in gaps[i])), None)
        if first is None or len(rest) < 2:
            break
        marks[first] = mark
        rest.remove(first)
    return marks


def reference_row(results: Results, variant: str | None = None) -> int | None:
    """The row that the others are compared with at equal settings: LoRA, or the first method; None without a method."""
    rows = [i for i, row in enumerate(results.rows) if i and row.variant == variant]
    return next((i for i in rows if results.rows[i].method == "lora"), next(iter(rows), None))


def escape_markdown(text: object) -> str:
    """`text` as literal Markdown on one line, safe inside a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(str(text).split()))


def decimals(unit: str | None, estimates: Sequence[Estimate | None]) -> int:
    """Decimals that the standard errors warrant: one for a percentage known to a point or worse, else two; nats three.

    More where the smallest error would be printed as zero, or, without errors, the smallest value with less than two digits.
    """
    errors = [estimate.stderr for estimate in estimates if estimate and estimate.stderr]
    if unit in ("fraction", "points"):
        return 1 if errors and min(errors) >= 0.0095 else 2
    smallest = [2 * min(errors)] if errors else [abs(e.value) / 10 for e in estimates if e and e.value]
    return min(MOST_DIGITS, max(3, -math.floor(math.log10(min(smallest))))) if smallest else 3


def format_estimate(estimate: Estimate, unit: str | None, digits: int) -> Cell:
    """`estimate` as text; fractions and differences of fractions ("points") as percent, without the sign.

    An error of exactly zero is not shown: the value is known by definition, as the base's KL to itself.
    """
    scale = scale_of(unit)
    error = f"{scale * estimate.stderr:.{digits}f}" if estimate.stderr else ""
    text = f"{scale * estimate.value:.{digits}f}"
    if digits == MOST_DIGITS and ((float(text) == 0 and estimate.value) or (error and float(error) == 0)):
        shown = digits_to(estimate.value, estimate.stderr or estimate.value)
        return Cell(f"{scale * estimate.value:.{shown}g}", f"{scale * estimate.stderr:.1g}" if estimate.stderr else "")
    return Cell(text.removeprefix("-") if float(text) == 0 else text, error)


def format_column(estimates: Sequence[Estimate | None], unit: str | None) -> list[Cell]:
    """The cells of one column: percentages to the same decimals, nats each to what its own error warrants.

    A method that hardly moved has a KL, and an error, a hundred times smaller than the others'.
    """
    alike = unit in ("fraction", "points")
    return [
        format_estimate(e, unit, decimals(unit, estimates if alike else [e])) if e else Cell(MISSING)
        for e in estimates
    ]


def format_count(number: float | None) -> str:
    """A count as papers write it: 9.8M, 336M, 8,366M."""
    if number is None:
        return MISSING
    size, letter = next(((s, c) for s, c in ((1e6, "M"), (1e3, "K")) if number >= s), (1, ""))
    number = number / size
    return f"{number:,.0f}{letter}" if number >= 99.95 or not letter else f"{number:.1f}{letter}"


def _metric_column(results: Results, name: str) -> Column:
    metric = results.metric(name)
    estimates = [row.estimate(name) for row in results.rows]
    sizes = sorted({row.metrics[name].n for row in results.rows if name in row.metrics and row.metrics[name].n})
    size = f"; n = {'–'.join(f'{s:,}' for s in dict.fromkeys([sizes[0], sizes[-1]]))}" if sizes else ""
    column = Column(
        title=metric_title(name) + (" %" if metric.unit == "fraction" else ""),
        group=metric.role.capitalize(),
        definition=_definition(name, metric.unit) + size + _floor(results, name, metric.unit) + ".",
        cells=_marked_cells(results, estimates, metric.unit, name, metric.higher_is_better, metric.role),
        arrow=ARROWS[metric.higher_is_better],
    )
    for i, row in enumerate(results.rows):
        if estimates[i] is None and name in row.metrics:
            column.cells[i] = Cell("not finite")
        if row.diverged is not None:
            column.cells[i] = Cell("diverged")
    return column


def _definition(name: str, unit: str | None) -> str:
    kind = kind_of(name)
    if kind == "kl":
        return "KL(base ‖ method) of the next-token distributions over the answers (nats per token; 0 is the base)"
    if kind == "nll":
        return "negative log-likelihood of the reference answers (nats per token)"
    if kind in ("loss", "forgetting"):
        rose = "rise of the loss over the base's" if kind == "forgetting" else "loss"
        return f"{rose} on general text (nats per token), as PEFT's method comparison measures it"
    if name.endswith("reward accuracy"):
        return "percent of held-out pairs whose chosen answer has the higher reward (ties half; the base has 50)"
    if name.endswith("reward margin"):
        return "mean reward of the chosen less the rejected answers, beta · log(p / p of the base) each"
    if unit == "score":
        return "mean grade from 1 to 10"
    return {"fraction": "percent of the items answered right", "nats": "nats"}.get(unit, "score on its own scale")


def _floor(results: Results, name: str, unit: str | None) -> str:
    """The noise floor of a metric in words; nothing where it was not measured."""
    noise = results.noise.get(name)
    if noise is None:
        return ""
    return f"; noise floor {scale_of(unit) * noise:.1g}{' points' if unit == 'fraction' else ''}"


def _mean_column(results: Results, role: Role) -> list[Column]:
    """The mean of a role's fractions, where there are several: never of different units, nor of what is kept and learned."""
    names = averaged(results, role)
    if len(names) < 2 or results.metric(names[0]).unit != "fraction":
        return []
    estimates = [mean_in(row, names) for row in results.rows]
    titles = ", ".join(metric_title(name) for name in names)
    cells = _marked_cells(results, estimates, "fraction", MEANS[role], True, role)
    return [Column(f"{role.capitalize()} mean %", role.capitalize(), f"mean of {titles}.", cells, "↑")]


def _marked_cells(
    results: Results,
    estimates: list[Estimate | None],
    unit: str | None,
    name: str,
    higher_is_better: bool | None,
    role: Role,
) -> list[Cell]:
    cells = format_column(estimates, unit)
    marks = [None] * len(cells)
    if higher_is_better is not None:
        marks = rank_marks(results, estimates, name, higher_is_better, role)
    partial = _of_fewer_seeds(results)
    return [Cell(c.text, c.error + "†" * (i in partial and bool(c.error)), marks[i]) for i, c in enumerate(cells)]


def _of_fewer_seeds(results: Results) -> set[int]:
    """The rows of a grid of one seed, whose error counts the questions alone, where others have several seeds."""
    runs = {i: row.runs or 1 for i, row in enumerate(results.rows) if i}
    return {i for i, n in runs.items() if n == 1} if results.grid and max(runs.values(), default=1) > 1 else set()


def _plain(title: str, group: str, definition: str, results: Results, text) -> Column:
    return Column(title, group, definition, [Cell(text(row)) for row in results.rows])


def _percent(share: float | None) -> str:
    if share is None:
        return MISSING
    percent = 100 * share
    return f"{percent:.1f}%" if percent >= 0.1 or percent == 0 else f"{percent:.2g}%"


def _times(row: Row) -> str:
    phases = [row.seconds.init, row.seconds.train, row.seconds.eval]
    return " / ".join(map(time_text, phases)) if any(phase is not None for phase in phases) else MISSING


def time_text(seconds: float | None) -> str:
    """`seconds` in the unit that suits them, held together by a no-break space."""
    if seconds is None:
        return MISSING
    if seconds < 599.5:
        return f"{seconds:.0f}\u00a0s" if seconds >= 9.95 or not seconds else f"{seconds:.1f}\u00a0s"
    return f"{seconds / 60:.0f}\u00a0min" if seconds < 5970 else f"{seconds / 3600:.1f}\u00a0h"


def _memory(row: Row) -> str:
    return MISSING if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.1f} GiB"

"""The paper's own figures, to stand beside ours where model and task are the paper's. They enter no mean and no mark.

`paper_tables.csv` holds every row of the paper's tables. Its `reading` column says how far a row can be trusted as
read: "exact", "reconstructed" (a digit was illegible and follows from the printed average; the note says which), or
"unreadable". Retention and task metrics are percent, MT-Bench points.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_null.recipes.report.table import scale_of
from lora_null.recipes.results import Results, Row, display_name, kind_of

TABLES = Path(__file__).parent / "paper_tables.csv"
MODELS = {
    "meta-llama/Llama-2-7b-hf": "LLaMA-2-7B",
    "meta-llama/Meta-Llama-3-8B": "LLaMA-3-8B",
    "meta-llama/Llama-3.1-8B": "LLaMA-3.1-8B",
    "meta-llama/Llama-3.2-3B": "LLaMA-3.2-3B",
}
METHODS = {"full_ft": "full"}  # every other name is ours with underscores
# Our metric's name, up to a filter after a slash, → the paper's name of it.
METRICS = {
    "triviaqa": "TriviaQA", "nq_open": "NQ open", "webqs": "WebQS", "gsm8k": "GSM8K", "hendrycks_math": "MATH",
    "minerva_math": "MATH", "humaneval": "HumanEval", "mbpp": "MBPP", "mt_bench": "MTBench",
    "math": "MATH", "MT-Bench": "MTBench",
}  # fmt: skip
KEPT = ("TriviaQA", "NQ open", "WebQS")
AAAI_NOTE = (
    "Avg1 (Per): mean of TriviaQA, NQ open and WebQS, and its percentage of the base's; "
    "GM: geometric mean of Avg1 and the mean of the two tasks (columns of the paper's AAAI 2026 version)"
)
OWN_RULES = ("/math_verify", "/exact_match")  # how we score GSM8K and MATH beside the paper's rules
TASK_METRICS = {"math": {"GSM8K", "MATH"}, "code": {"HumanEval", "MBPP"}, "instruction": {"MTBench"}}


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's tables.

    Attributes:
        table: such as "1a".
        model, task_group, method: the paper's model and task group, our name of the method.
        rank: None for base and full.
        params: trained parameters as printed, such as "320M"; empty for the base.
        metrics: by the paper's name; those that cannot be read are not there.
        average: Avg as printed; None where it is not printed.
        reading: "exact", "reconstructed" or "unreadable".
        note: what is odd about the row.
    """

    table: str
    model: str
    task_group: str
    method: str
    rank: int | None
    params: str
    metrics: dict[str, float]
    average: float | None
    reading: str
    note: str

    @property
    def doubtful(self) -> bool:
        return self.reading != "exact"


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """Return every row of the paper's tables, in its order."""
    with open(TABLES, newline="", encoding="utf-8") as file:
        return tuple(_row(raw) for raw in csv.DictReader(file))


def _row(raw: dict[str, str]) -> PaperRow:
    values = {"TriviaQA": raw["triviaqa"], "NQ open": raw["nq_open"], "WebQS": raw["webqs"]}
    values |= {raw[f"task_metric_{i}_name"]: raw[f"task_metric_{i}"] for i in (1, 2)}
    return PaperRow(
        table=raw["table"],
        model=raw["model"],
        task_group=raw["task_group"],
        method=METHODS.get(raw["method"], raw["method"].replace("_", "-")),
        rank=int(raw["rank"]) if raw["rank"] else None,
        params=raw["params"],
        metrics={name: float(value) for name, value in values.items() if name and value},
        average=float(raw["avg"]) if raw["avg"] else None,
        reading=raw["reading"],
        note=raw["note"],
    )


def paper_average(metrics: Mapping[str, float], task_group: str) -> float | None:
    """Return the paper's Avg: the plain mean of the three retention metrics and of the group's task metrics, as they stand
    in the table, percent and MT-Bench's points alike; None where one is missing or the group has no Avg.

    It mixes units and roles, so it stands beside the paper's figures alone.
    """
    tasks = TASK_METRICS.get(task_group)
    return average_of(metrics, (*KEPT, *tasks)) if tasks else None


def paper_name(metric: str) -> str | None:
    """Return the paper's name of one of our metrics, None where it has none.

    Those are NLL, KL, other tasks, single turns of MT-Bench, and GSM8K and MATH by other rules than MetaMath's own.
    """
    if kind_of(metric) in ("nll", "kl") or " turn " in metric or metric.endswith(OWN_RULES):
        return None
    return METRICS.get(metric.split("/")[0].split(" ")[0])


def comparable(model: str, metrics: list[str], training_data: str = "") -> list[PaperRow]:
    """Return the paper's rows for a model and the tasks of which we measured a metric; else none.

    Args:
        model: hub id of the base.
        metrics: our metrics' names.
        training_data: what was trained on; the paper's UltraFeedback table has no metric of its task to know it by.
    """
    known = {paper_name(metric) for metric in metrics} - {None}
    measured = {group for group, names in TASK_METRICS.items() if names & known}
    if "ultrafeedback" in training_data.lower():
        measured.add("ultrafeedback")
    return [row for row in paper_rows() if row.model == MODELS.get(model) and row.task_group in measured]


def average_of(values: Mapping[str, float], names: Collection[str]) -> float | None:
    """Return the mean of the named values; None where one is missing, since fewer would not be comparable."""
    return sum(values[name] for name in names) / len(names) if names and values.keys() >= {*names} else None


def kept_share(values: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """Return Per of the AAAI version: the mean of the world knowledge (`KEPT`) in percent of the base's."""
    kept, before = average_of(values, KEPT), average_of(base, KEPT)
    return 100 * kept / before if kept is not None and before else None


def geometric_mean(values: Mapping[str, float], task_group: str) -> float | None:
    """Return GM of the AAAI version, √(Avg1 · Avg2), of percentages: world knowledge and the mean of the group's tasks."""
    kept, learned = average_of(values, KEPT), average_of(values, TASK_METRICS.get(task_group, ()))
    if kept is None or learned is None or "MTBench" in TASK_METRICS[task_group]:  # whose grades are no percentages
        return None
    return math.sqrt(kept * learned)


@dataclass(frozen=True)
class PaperTable:
    """The paper's rows beside ours, as text: `titles` of the columns, and for each row its label, then its cells.

    A cell is "paper / ours", either of which may be "–"; "?" marks a figure of a row that was not read exactly.
    """

    titles: list[str]
    rows: list[list[str]]
    notes: list[str]


def paper_table(results: Results) -> PaperTable | None:
    """Return the paper's figures for this model and task beside ours, matched by method and rank.

    Of another model ours stand alone where all that its columns count was measured; else there is None.
    """
    names = {name: paper_name(name) for role in ("retention", "task") for name in results.metric_names(role)}
    data = str(results.settings.get("training_data") or "")
    titles = [title for title in dict.fromkeys(names.values()) if title]
    known = comparable(results.model, list(names), data)
    rows = known or _rows_of_ours(results, titles)
    if not rows:
        return None
    used = ", ".join(name for name, known in names.items() if known)
    table, notes = [], [f"Ours: trained on {data or 'what the settings say'}; {used}", AAAI_NOTE]
    notes += [] if known else [f"The paper's tables have no {results.model_title}"]
    bases = {row.task_group: row.metrics for row in rows if row.method == "base"}
    for row in rows:
        rank = f" (r = {row.rank})" if row.rank else ""
        label = f"{display_name(row.method)}{rank}" + (f", table {row.table}" if row.table else "")
        matching = [r for r in results.rows if r.method == row.method and (r.rank == row.rank or not row.rank)]
        ours = matching[0] if len(matching) == 1 else None
        if len(matching) > 1:
            notes.append(f"{label}: ours has {len(matching)} settings, of which none is the paper's by itself")
        values, mark = _values(ours, names) if ours else {}, "?" if row.doubtful else ""
        cells = [f"{_text(row.metrics.get(title), mark)} / {_text(values.get(title))}" for title in titles]
        cells.append(f"{_text(row.average, mark)} / {_text(paper_average(values, row.task_group))}")
        theirs = _aaai(row.metrics, bases.get(row.task_group, {}), row.task_group, mark)
        own = _aaai(values, _values(results.base, names), row.task_group)
        table.append([label, *cells, *(f"{a} / {b}" for a, b in zip(theirs, own))])
        if row.doubtful:
            notes.append(f"{label}: {row.reading}; {row.note}")
    return PaperTable([*titles, "Avg", "Avg1 (Per)", "GM"], table, notes)


def _rows_of_ours(results: Results, titles: Collection[str]) -> list[PaperRow]:
    """Return a row without figures for each method and rank, where the knowledge and a group's tasks were all measured."""
    group = next((group for group, tasks in TASK_METRICS.items() if {*KEPT, *tasks} <= {*titles}), None)
    ours = dict.fromkeys((row.method, row.rank) for row in results.rows if group)
    return [PaperRow("", "", str(group), method, rank, "", {}, None, "exact", "") for method, rank in ours]


def _values(row: Row, names: Mapping[str, str | None]) -> dict[str, float]:
    """Return our figures of a row by the paper's names and on its scale; of several metrics of one task the first."""
    values: dict[str, float] = {}
    for name, title in names.items():
        found = row.estimate(name)
        if title and found and title not in values:
            values[title] = found.value * scale_of(row.metrics[name].unit)
    return values


def _aaai(values: Mapping[str, float], base: Mapping[str, float], task_group: str, mark: str = "") -> tuple[str, str]:
    share, kept = kept_share(values, base), _text(average_of(values, KEPT), mark)
    return f"{kept} ({share:.1f}%)" if share is not None else kept, _text(geometric_mean(values, task_group), mark)


def _text(value: float | None, mark: str = "") -> str:
    return "–" if value is None else f"{value:.2f}{mark}"

"""The part of a report that a grid of runs has: its headline, its tables at equal learning, and safe learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_null.recipes.comparisons import Evaluations
from lora_null.recipes.report.equal_learning import (
    RATE,
    MethodAtLevel,
    Target,
    change_with_error,
    equal_learning,
    frontiers,
    metric_pair,
    retention_metrics,
    runs_by_frontier,
)
from lora_null.recipes.report.headline import listed, p_text, times
from lora_null.recipes.report.table import format_column, metric_title
from lora_null.recipes.results import FROM_BASE, Estimate, Results, display_name, kind_of, variant_of

SAFE = 0.02  # of the base's value: how much worse a retention metric may be where a learning rate counts as safe
OF_SEEDS_ALONE = "over seeds alone, as the answers are not in this folder"


def grid_headline(results: Results, evaluations: Evaluations) -> str:
    """The finding at the middle level of LoRA's learning: who forgot less than LoRA, who more, who is not told apart."""
    pair = metric_pair(results)
    targets = equal_learning(results, *pair, evaluations) if pair else []
    if pair is None or not targets:
        lora = next((f for f in frontiers(results, *pair) if f.name == "lora" and f.points), None) if pair else None
        if pair and lora:
            every = " with every seed" if len(lora.points) > 1 else ""
            above = f"LoRA did not{every} learn more than the base knew ({metric_title(pair[1])})"
            return f"{above}, so there is no equal learning at which to compare forgetting."
        return "Forgetting at equal learning needs LoRA among the runs, with a task and a retention metric."
    kept, task = pair
    target = targets[len(targets) // 2]
    where = f" with {target.where}" if target.where else ""
    level = f"At the learning that LoRA reaches{where} ({metric_title(task)} {level_text(results, task, target)})"
    rows = sorted((row for row in target.rows if row.value), key=lambda row: row.value.value)
    alone = [] if has_answers(evaluations) else [f"Errors and p-values: {OF_SEEDS_ALONE}."]
    never = "".join(f" {sentence}" for sentence in [*_not_read(target), *alone])
    lora = next((row for row in rows if row.name == "lora"), None)
    if lora is None:
        return f"{level} no single seed of LoRA can be compared.{never}"
    common = "seeds" if alone else "questions or seeds"
    return f"{level}, {_against(rows, lora, metric_title(kept), results.metric(kept).unit, common)}{never}"


def diverged_rows(results: Results) -> str:
    """Say which settings of a grid have no figures because a run diverged; nothing where none did."""
    found = [label for label, row in zip(results.labels(), results.rows) if row.diverged is not None]
    return f"{listed(found)} diverged." if found else ""


def has_answers(evaluations: Evaluations) -> bool:
    """Return whether the answers of the base and of a method were found, by which errors count questions."""
    return 0 in evaluations and len(evaluations) > 1


def _not_read(target: Target) -> list[str]:
    """Say whose forgetting cannot be read at a level, and why."""
    below, beyond = (
        [r.label for r in target.rows if not r.value and r.beyond_first_run == more] for more in (False, True)
    )
    do = "does" if len(below) == 1 else "do"
    said = [f"{listed(below)} {do} not reach that level (by the estimates alone)."] if below else []
    their = "its" if len(beyond) == 1 else "their"
    return said + ([f"{listed(beyond)} learned more than that already in {their} first run."] if beyond else [])


def _against(rows: Sequence[MethodAtLevel], lora: MethodAtLevel, title: str, unit: str | None, common: str) -> str:
    others = [row for row in rows if row is not lora]
    less, more, same = ([row for row in others if row.p is not None and row.sign == sense] for sense in (-1, 1, 0))
    untested = [row for row in others if row.p is None]
    some = _some_seeds(lora)
    of_lora = f"{title} {_forgotten(lora.value, unit)}{some and f' ({some})'}"
    if rows == [lora]:
        said = f"LoRA forgot {of_lora}; no other method can be read there."
    elif untested == others:
        said = f"LoRA forgot {of_lora}; no other method could be compared with it."
    elif not less:
        said = f"no method forgot distinguishably less than LoRA: {of_lora}."
    else:
        # Values over other seeds are of other levels: first who is read with the most seeds, then who differs most.
        best, *rest = sorted(less, key=lambda row: (-row.reached, row.difference.value))
        ratio = best.lora.value / best.value.value if best.value.value > 0 else math.nan
        share = f", {times(ratio)} less" if ratio >= 1.1 else ""
        values = f"{_forgotten(best.value, unit)} against {_forgotten(best.lora, unit)}"
        tested = ", ".join(filter(None, [_some_seeds(best), p_text(best.p)]))
        said = f"{best.label} forgot less than LoRA: {title} {values}{share} ({tested})."
        said += f" So did {listed([row.label for row in rest])}." if rest else ""
    if more:
        said += f" {listed([row.label for row in more])} forgot more than LoRA."
    if same:
        said += f" Not distinguishable from LoRA: {listed([row.label for row in same])}."
    if untested:
        said += f" Not compared with LoRA (too few {common} in common): {listed([row.label for row in untested])}."
    return said


def level_text(results: Results, task: str, target: Target) -> str:
    """The task metric at a target's level, as it is measured."""
    base, better = results.base.estimate(task).value, 1 if results.metric(task).higher_is_better else -1
    value = base + better * target.learned
    return f"{100 * value:.1f}%" if results.metric(task).unit == "fraction" else f"{value:.3f}"


def _forgotten(estimate: Estimate, unit: str | None) -> str:
    return f"{format_column([estimate], unit)[0]}{' points' * (unit == 'fraction')}"


def grid_content(results: Results, evaluations: Evaluations) -> dict[str, object]:
    """Return what the templates show of a grid: tables of text, ready to print."""
    pair = metric_pair(results)
    diverged = [run for run in results.grid.cells if run.diverged is not None]
    kept = retention_metrics(results) if pair else []
    return {
        "done": len(results.grid.cells),
        "planned": results.grid.planned,
        "seeds": results.grid.seeds,
        "of_seeds_alone": None if has_answers(evaluations) else OF_SEEDS_ALONE,
        "tables": [
            *(_equal_tables(results, kept, pair[1], evaluations) if pair else ()),
            *(_safe_table(results, *pair) if pair else ()),
        ],
        "differing": [(key, ", ".join(map(str, values))) for key, values in results.grid.differing.items()],
        "diverged": [f"{display_name(r.method)} in {r.folder} at step {r.diverged}" for r in diverged],
    }


def _equal_tables(
    results: Results, kept: Sequence[str], task: str, evaluations: Evaluations
) -> list[dict[str, object]]:
    """A table for each level of learning, one row per method, its forgetting of every kind; who is not read there is listed."""
    each = [equal_learning(results, name, task, evaluations) for name in kept]
    units = [results.metric(name).unit for name in kept]
    tables = []
    for targets in zip(*each):
        where = ", ".join(filter(None, ["LoRA", targets[0].where]))
        methods = list(zip(*(target.rows for target in targets)))
        of_lora = next(rows for rows in methods if rows[0].name == "lora")
        tables.append(
            {
                "title": f"{metric_title(task)} {level_text(results, task, targets[0])} ({where})",
                "columns": [metric_title(name) for name in kept],
                "rows": [[m[0].label, *map(_equal_text, m, units, of_lora)] for m in methods if m[0].value],
                "note": " ".join(_not_read(targets[0])),
            }
        )
    return tables


def _safe_table(results: Results, kept: str, task: str) -> list[dict[str, object]]:
    """One row a frontier: the learning rates at which no retention metric is worse by more than SAFE, and what is learned.

    KL is no such metric: it tells that predictions moved, not that they got worse. No table where only KL was measured.
    Nor is what is counted from the base, which has 0 and no share of it: a rise of the loss is judged as the loss.
    """
    judged = [name for name in results.directed_names("retention") if kind_of(name) not in FROM_BASE]
    rates_of = {variant_of(run.point): run.point[RATE] for run in results.grid.cells if RATE in run.point}
    unit = results.metric(task).unit
    if not judged or not rates_of:
        return []

    def is_safe(i: int) -> bool:
        pairs = ((change_with_error(results, i, name), results.base.estimate(name)) for name in judged)
        return all(moved.value <= SAFE * abs(base.value) for moved, base in pairs if moved and base)

    rows = []
    for f in frontiers(results, kept, task):
        tried = {variant_of(run.point) for run in runs_by_frontier(results)[f.name]}  # diverged ones too
        safe = [i for i in f.rows if change_with_error(results, i, task) and is_safe(i)]
        best = max(safe, key=lambda i: change_with_error(results, i, task).value, default=None)
        learned = None if best is None else results.rows[best].estimate(task)
        of_safe = ", ".join(f"{rates_of[results.rows[i].variant]:g}" for i in safe) or "none"
        rows.append([f.label, f"{of_safe} ({len(safe)} of {len(tried)})", *map(str, format_column([learned], unit))])
    columns = ["safe", f"best {metric_title(task)} among them"]
    note = f"Safe: no retention NLL or accuracy is more than {SAFE:.0%} worse than the base's, by the estimates alone."
    return [{"title": "Safe learning rates", "columns": columns, "rows": rows, "note": note}]


def _some_seeds(row: MethodAtLevel) -> str:
    """How many seeds a row's values are of, where these are not all of the grid's."""
    return f"{row.reached} of {row.seeds} seeds" if row.reached < row.seeds else ""


def _equal_text(row: MethodAtLevel, unit: str | None, lora: MethodAtLevel) -> str:
    """A cell; over fewer seeds than LoRA's own cell, with LoRA's value over the same."""
    if row.value is None:
        return "–"
    of_lora = f"LoRA {_forgotten(row.lora, unit)} there" if row.lora and row.lora != lora.value else ""
    some = ", ".join(filter(None, [_some_seeds(row), of_lora]))
    test = f", {p_text(row.p)}" if row.p is not None else ""
    return f"{_forgotten(row.value, unit)}{some and f' ({some})'}{test}"

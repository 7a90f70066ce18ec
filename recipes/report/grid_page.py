"""What a grid of runs says: each method's learning–forgetting frontier, and forgetting at equal learning.

A frontier is the path from the untouched base (nothing learned, nothing forgotten) through a method's runs in the order
of the swept values. Forgetting at a given learning is read off the first stretch of that path that reaches it, linearly
between its two ends, for each seed alone; the mean over the seeds and its standard error are reported. A method that
does not reach it has no value there: nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from lora_null.recipes.report.headline import listed, task_metric
from lora_null.recipes.report.table import metric_title, separated, show_all
from lora_null.recipes.results import DISPLAY, Estimate, Paired, Results, Row, settings_text


@dataclass(frozen=True)
class Frontier:
    """One method's runs: `points[seed]` are (learned, forgotten) from the base on, in the order of the swept values.

    Learned and forgotten are counted from the base, upward. `errors[seed]` are the evaluation's standard errors, None
    where unknown. `diverged` counts the runs that have no values.
    """

    method: str
    points: dict[int, list[tuple[float, float]]]
    errors: dict[int, list[tuple[float, float] | None]]
    diverged: int

    @property
    def label(self) -> str:
        return DISPLAY.get(self.method, self.method)

    def mean_path(self) -> list[tuple[Estimate, Estimate]]:
        """The means over the seeds with their standard errors, point by point; only points that every seed has."""
        paths = [path[1:] for path in self.points.values()]
        if not paths or len({len(path) for path in paths}) > 1:
            return []
        return [(_over_seeds([p[0] for p in point]), _over_seeds([p[1] for p in point])) for point in zip(*paths)]


@dataclass(frozen=True)
class AtEqual:
    """A method's forgetting at a given learning: `value` over the seeds that reach it, `reached` of `seeds` do."""

    method: str
    value: Estimate | None
    reached: int
    seeds: int
    difference: Estimate | None = None  # from LoRA, seed by seed
    p: float | None = None  # of that difference, adjusted over the methods by Holm

    @property
    def label(self) -> str:
        return DISPLAY.get(self.method, self.method)


@dataclass(frozen=True)
class Target:
    """A level of learning: what LoRA reaches in the mean with one of the swept values."""

    learned: float
    where: str
    rows: list[AtEqual]


def retention_metrics(results: Results) -> list[str]:
    """Return the names of what is read at equal learning: every KL on retention, or all of retention if there is none.

    Then the KLs on the new task's own prompts, a measure of forgetting too.
    """
    kept, learned = results.directed_names("retention"), results.metric_names("task")
    of_kept, of_learned = ([n for n in names if n.lower().split()[-1] == "kl"] for names in (kept, learned))
    return (of_kept or kept) + of_learned


def metric_pair(results: Results) -> tuple[str, str] | None:
    """Return the names of the (retention, task) metrics that the frontier is drawn of."""
    kept, task = retention_metrics(results), task_metric(results)
    return (kept[0], task) if kept and task else None


def frontiers(results: Results, kept: str, task: str) -> list[Frontier]:
    """Return a frontier for each method of the grid, in the order of its rows."""
    methods = dict.fromkeys(run.method for run in results.grid.cells)
    return [_frontier(results, name, kept, task) for name in methods]


def _frontier(results: Results, method: str, kept: str, task: str) -> Frontier:
    runs = [run for run in results.grid.cells if run.method == method]
    points: dict[int, list[tuple[float, float]]] = {}
    errors: dict[int, list[tuple[float, float] | None]] = {}
    for run in sorted(runs, key=lambda run: tuple(_sortable(value) for value in run.point.values())):
        point = tuple(change(results, run, name) for name in (task, kept))
        if None in point:
            continue
        points.setdefault(run.seed, [(0.0, 0.0)]).append(point)
        stderrs = (run.estimate(task).stderr, run.estimate(kept).stderr)
        errors.setdefault(run.seed, [(0.0, 0.0)]).append(None if None in stderrs else stderrs)
    return Frontier(method, points, errors, sum(run.diverged is not None for run in runs))


def change(results: Results, run: Row, name: str) -> float | None:
    """Return how far a run moved from the base: upward for a task learned, and for knowledge forgotten."""
    metric, before, after = results.metric(name), results.base.estimate(name), run.estimate(name)
    if before is None or after is None:
        return None
    better = 1 if metric.higher_is_better else -1
    gain = better * (after.value - before.value)
    return gain if metric.role == "task" and metric.higher_is_better is not None else -gain


def _sortable(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _over_seeds(values: Sequence[float]) -> Estimate:
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), error)


def reach(
    path: Sequence[tuple[float, float]], errors: Sequence[tuple[float, float] | None], learned: float
) -> Estimate | None:
    """Return the forgetting where a path first reaches `learned`, None where it never does.

    On the stretch from (x0, y0) to (x1, y1): y = (1 − w) y0 + w y1 with w = (learned − x0) / (x1 − x0). Its variance, of
    the two evaluations alone, is that of y − slope · x at the two ends, weighted by (1 − w)² and w².
    """
    for ((x0, y0), e0), ((x1, y1), e1) in itertools.pairwise(zip(path, errors)):
        if x0 < learned <= x1:
            w, slope = (learned - x0) / (x1 - x0), (y1 - y0) / (x1 - x0)
            error = None
            if e0 is not None and e1 is not None:
                variance = [ey**2 + (slope * ex) ** 2 for ex, ey in (e0, e1)]
                error = math.sqrt((1 - w) ** 2 * variance[0] + w**2 * variance[1])
            return Estimate((1 - w) * y0 + w * y1, error)
    return None


def equal_learning(results: Results, kept: str, task: str) -> list[Target]:
    """Return forgetting at equal learning, at what LoRA reaches with each swept value, the least first.

    A level is LoRA's mean over the seeds, or less where one of its seeds never learns that much.
    """
    every = frontiers(results, kept, task)
    lora = next((frontier for frontier in every if frontier.method == "lora"), None)
    targets = []
    for where, (learned, _) in zip(_swept(results, "lora"), lora.mean_path() if lora else []):
        level = min([learned.value, *(max(x for x, _ in path) for path in lora.points.values())])
        if level > 0:
            rows = _at(every, lora, level)
            adjusted = holm([row.p for row in rows])
            targets.append(Target(level, where, [replace(row, p=p) for row, p in zip(rows, adjusted)]))
    return sorted(targets, key=lambda target: target.learned)


def _swept(results: Results, method: str) -> list[str]:
    """The variants of a method's rows in the order of its frontier."""
    runs = [run for run in results.grid.cells if run.method == method and run.metrics]
    runs.sort(key=lambda run: tuple(_sortable(value) for value in run.point.values()))
    return list(dict.fromkeys(settings_text(run.point) for run in runs))


def _at(every: Sequence[Frontier], lora: Frontier, learned: float) -> list[AtEqual]:
    read = {f.method: {s: reach(path, f.errors[s], learned) for s, path in f.points.items()} for f in every}
    theirs = {seed: value.value for seed, value in read[lora.method].items() if value}
    rows = []
    for frontier in every:
        found = {seed: value for seed, value in read[frontier.method].items() if value}
        values = [value.value for value in found.values()]
        value = None
        if values:
            value = _over_seeds(values) if len(values) > 1 else next(iter(found.values()))
        shared = [seed for seed in found if seed in theirs] if frontier.method != "lora" else []
        gaps = [found[seed].value - theirs[seed] for seed in shared]
        p = float(stats.ttest_1samp(gaps, 0).pvalue) if len(gaps) > 1 and np.std(gaps) > 0 else None
        gap = _over_seeds(gaps) if gaps else None
        rows.append(AtEqual(frontier.method, value, len(values), len(read[frontier.method]), gap, p))
    return rows


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values adjusted for their number by Holm's step-down; None stays None and is not counted."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    adjusted, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | int | None]:
    """Compare two methods on the same questions and seeds.

    With D = ours − theirs, the error of its mean combines what varies with the question and what varies with the seed,
    SE² = Var_q(mean over seeds) / Q + Var_s(mean over questions) / S, which counts their interaction twice and so is
    never too small; t with Satterthwaite's degrees of freedom. Of one seed only what varies with the question is known.

    Args:
        ours, theirs: (seeds, questions), the metric of each question.

    Returns:
        {"mean", "stderr", "p", "questions", "seeds"}; two-sided p, None where nothing varies.
    """
    D = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    S, Q = D.shape
    variances = [(D.mean(axis=0).var(ddof=1) / Q, Q - 1)] if Q > 1 else []
    variances += [(D.mean(axis=1).var(ddof=1) / S, S - 1)] if S > 1 else []
    variance = sum(value for value, _ in variances)
    found = {"mean": float(D.mean()), "stderr": None, "p": None, "questions": Q, "seeds": S}
    if variances and variance > 0 and math.isfinite(variance):
        freedom = variance**2 / sum(value**2 / df for value, df in variances)
        found["stderr"] = math.sqrt(variance)
        found["p"] = float(2 * stats.t.sf(abs(D.mean()) / math.sqrt(variance), freedom))
    return found


def grid_headline(results: Results) -> str:
    """The finding at the middle level of LoRA's learning: who forgot least, by how much, who is not told apart."""
    pair = metric_pair(results)
    targets = equal_learning(results, *pair) if pair else []
    if pair is None or not targets:
        done = f"{len(results.grid.cells)} of {results.grid.planned} runs are done"
        return f"{done}; forgetting at equal learning needs LoRA among them, with a task and a retention metric."
    kept, task = pair
    target = targets[len(targets) // 2]
    level = f"At the learning that LoRA reaches with {target.where} ({metric_title(task)} {level_text(results, task, target)})"
    rows = sorted((row for row in target.rows if row.value), key=lambda row: row.value.value)
    missing = [row.label for row in target.rows if not row.value]
    never = f" Not reached by {listed(missing)}." if missing else ""
    lora = next((row for row in rows if row.method == "lora"), None)
    if lora is None:
        return f"{level} no single seed of LoRA can be compared.{never}"
    if rows[0] is lora:
        return f"{level}, no method forgot less than LoRA ({metric_title(kept)} {_pm(lora.value)}).{never}"
    return f"{level}, {_winner(rows, lora, metric_title(kept))}{never}"


def _winner(rows: Sequence[AtEqual], lora: AtEqual, title: str) -> str:
    best = rows[0]
    less = 100 * (1 - best.value.value / lora.value.value) if lora.value.value > 0 else 0
    share = f", {less:.0f}% less" if 0 < less < 99.5 else ", over 99% less" if less else ""
    test = f", paired over {best.reached} seeds p = {best.p:.2g}" if best.p is not None else ""
    ties = [row.label for row in rows[1:] if row is not lora and not separated(best.value, row.value)]
    tied = f" {listed(ties)} {'is' if len(ties) == 1 else 'are'} not distinguishable from it." if ties else ""
    worse = [row.label for row in rows if row is not lora and row.value.value > lora.value.value]
    worse = [row.label for row in rows if row.label in worse and separated(row.value, lora.value)]
    more = f" {listed(worse)} forgot more than LoRA." if worse else ""
    return f"{best.label} forgot least: {title} {_pm(best.value)} against LoRA's {_pm(lora.value)}{share}{test}.{tied}{more}"


def level_text(results: Results, task: str, target: Target) -> str:
    """The task metric at a target's level, as it is measured."""
    base, better = results.base.estimate(task).value, 1 if results.metric(task).higher_is_better else -1
    value = base + better * target.learned
    return f"{100 * value:.1f}%" if results.metric(task).unit == "fraction" else f"{value:.3f}"


def _pm(estimate: Estimate) -> str:
    return str(show_all([estimate], "nats")[0])


def grid_content(results: Results) -> dict[str, object]:
    """Return what the templates show of a grid: tables of text, ready to print."""
    pair = metric_pair(results)
    diverged = [run for run in results.grid.cells if run.diverged is not None]
    return {
        "done": len(results.grid.cells),
        "planned": results.grid.planned,
        "seeds": results.grid.seeds,
        "tables": [_equal_table(results, kept, pair[1]) for kept in retention_metrics(results)] if pair else [],
        "paired": [_paired_row(entry) for entry in results.grid.paired if entry.metric in (pair or ())],
        "differing": [(key, ", ".join(map(str, values))) for key, values in results.grid.differing.items()],
        "diverged": [f"{DISPLAY.get(r.method, r.method)} in {r.folder} at step {r.diverged}" for r in diverged],
    }


def _equal_table(results: Results, kept: str, task: str) -> dict[str, object]:
    """One row a method: its forgetting at each level of learning."""
    targets = equal_learning(results, kept, task)
    rows = zip(*(target.rows for target in targets))
    return {
        "title": metric_title(kept),
        "levels": [f"{metric_title(task)} {level_text(results, task, t)} (LoRA, {t.where})" for t in targets],
        "rows": [(of_method[0].label, [_equal_text(row) for row in of_method]) for of_method in rows],
    }


def _equal_text(row: AtEqual) -> str:
    if row.value is None:
        return "not reached"
    some = f" ({row.reached} of {row.seeds} seeds)" if row.reached < row.seeds else ""
    test = f", p = {row.p:.2g}" if row.p is not None else ""
    return f"{_pm(row.value)}{some}{test}"


def _paired_row(entry: Paired) -> tuple[str, str, str, str, str]:
    difference = Estimate(entry.mean, entry.stderr)
    p = "–" if entry.p is None else "< 0.001" if entry.p < 0.001 else f"{entry.p:.3f}"
    label = DISPLAY.get(entry.method, entry.method)
    return (label, settings_text(entry.point) or "–", metric_title(entry.metric), _pm(difference), p)

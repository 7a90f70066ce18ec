"""Each method's learning–forgetting frontier in a grid of runs, and forgetting at equal learning.

A frontier is the path from the untouched base (nothing learned, nothing forgotten) through a method's runs from the lowest
learning rate to the highest, one for each of its other settings, or through all its runs in the order of the swept values
where learning rates are not swept. Forgetting at a given learning is read off the first stretch of that path that reaches
it, linearly between its two ends, for each seed alone. What is read off is linear in the runs' means over questions, so
every question's part in it is known: errors count questions and seeds, and the difference from LoRA is paired by both
(`eval_harness/statistics.py`). The level is LoRA's own, of the same seed and questions, and moves with them: easier questions
raise it as they raise what every method has learned, which is no difference in forgetting. A method that does not reach a level has
no value there, nor has one whose runs all learned more: from the base to a method's first run KL rises with about the
square of what is learned, not linearly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_null.eval_harness.statistics import (
    LEVEL,
    Spread,
    crossed_variance,
    holm,
    influence,
    is_mean_of_samples,
    stack,
    t_tests,
)
from lora_null.recipes.comparisons import Evaluations
from lora_null.recipes.report.headline import task_metric
from lora_null.recipes.results import (
    Estimate,
    Results,
    Row,
    Run,
    change_error,
    display_name,
    kind_of,
    settings_text,
    variant_of,
)

RATE = "training.learning_rate"
# Below this share of what its first run learned a path is not interpolated: 1% less learned is 7% less KL.
FIRST_RUN_SHARE = 0.99
# What each question adds to (learned, forgotten); None: not known.
Influences = tuple[np.ndarray | None, np.ndarray | None]
Level = tuple[float, np.ndarray | None]  # what was learned, and what each question adds to it


@dataclass(frozen=True)
class Frontier:
    """One method's runs: `points[seed]` are (learned, forgotten) from the base on, in the order of the swept values.

    Learned and forgotten are counted from the base, upward. `influences[seed]` say what each question adds to them, and
    `rows` are the rows that average over the seeds, in the same order. `name` is the method's, with the settings of its second and later frontiers, such as "lora (weight_decay 3)".
    """

    name: str
    points: dict[int, list[tuple[float, float]]]
    influences: dict[int, list[Influences]]
    rows: list[int]

    @property
    def label(self) -> str:
        return _label(self.name)


@dataclass(frozen=True)
class Interpolated:
    """What is read off a path at a level of learning: the forgetting, and what each question adds to it."""

    value: float
    influences: list[np.ndarray]

    def __sub__(self, other: Interpolated) -> Interpolated:
        return Interpolated(self.value - other.value, [a - b for a, b in zip(self.influences, other.influences)])


@dataclass(frozen=True)
class MethodAtLevel:
    """A frontier's forgetting at a given learning: `value` over the seeds that reach it, `reached` of the grid's `seeds` do.

    If LoRA reaches it with some of them, the others are left out, and `lora` is LoRA's value over the same seeds,
    `difference` the difference of the two, and `p` its p-value, adjusted over the table by Holm.
    `beyond_first_run` is whether there is no value because the first run learned more already.
    """

    name: str
    value: Estimate | None
    reached: int
    seeds: int
    lora: Estimate | None = None
    difference: Estimate | None = None
    p: float | None = None
    beyond_first_run: bool = False

    @property
    def label(self) -> str:
        return _label(self.name)

    @property
    def sign(self) -> int:
        """-1 if it forgot less than LoRA, 1 if more, 0 if that cannot be told."""
        known = self.difference is not None and self.p is not None and self.p < LEVEL
        return int(np.sign(self.difference.value)) if known and self.difference else 0


@dataclass(frozen=True)
class Target:
    """A level of learning: what LoRA reaches with one of the swept values; `learned` is its mean over the seeds."""

    learned: float
    where: str
    rows: list[MethodAtLevel]


def retention_metrics(results: Results) -> list[str]:
    """Return the names of what is read at equal learning: every KL on retention, or all of retention if there is none.

    Then the KLs on the new task's own prompts, a measure of forgetting too.
    """
    kept, learned = results.directed_names("retention"), results.metric_names("task")
    of_kept, of_learned = ([n for n in names if kind_of(n) == "kl"] for names in (kept, learned))
    return (of_kept or kept) + of_learned


def metric_pair(results: Results) -> tuple[str, str] | None:
    """Return the names of the (retention, task) metrics that the frontier is drawn of."""
    kept, task = retention_metrics(results), task_metric(results)
    return (kept[0], task) if kept and task else None


def frontiers(results: Results, kept: str, task: str, evaluations: Evaluations | None = None) -> list[Frontier]:
    """Return the frontiers of the grid's methods, in the order of its rows; `evaluations` are those behind them."""
    return [
        _frontier(results, name, runs, kept, task, evaluations or {})
        for name, runs in runs_by_frontier(results).items()
    ]


def runs_by_frontier(results: Results) -> dict[str, list[Run]]:
    """Return the runs of each frontier by its name; of LoRA's, the first in the grid is what others are compared with."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in results.grid.cells:
        others = {key: value for key, value in run.point.items() if key != RATE} if RATE in run.point else {}
        groups.setdefault(run.method, {}).setdefault(settings_text(others), []).append(run)
    return {
        f"{method} ({settings})" if i else method: runs
        for method, by_settings in groups.items()
        for i, (settings, runs) in enumerate(by_settings.items())
    }


def _label(name: str) -> str:
    method, bracket, settings = name.partition(" (")
    return display_name(method) + bracket + settings


def _frontier(
    results: Results, name: str, runs: Sequence[Run], kept: str, task: str, evaluations: Evaluations
) -> Frontier:
    frontier = Frontier(name, {}, {}, [])

    def rising(run: Run) -> list[tuple]:
        return [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in run.point.values()]

    for run in sorted(runs, key=rising):
        point = tuple(change(results, run, metric) for metric in (task, kept))
        if None in point:
            continue
        if not run.is_base_again:  # the base is where every path begins, and no first run
            frontier.points.setdefault(run.seed, [(0.0, 0.0)]).append(point)
            influences = tuple(_influence(results, run, metric, evaluations) for metric in (task, kept))
            frontier.influences.setdefault(run.seed, [(None, None)]).append(influences)
        i = _row_of(results, run)
        if i is not None and i not in frontier.rows:
            frontier.rows.append(i)
    return frontier


def _row_of(results: Results, run: Run) -> int | None:
    """Return the number of the row that averages over a run and those of other seeds."""
    place = (run.method, variant_of(run.point))
    return next((i for i, row in enumerate(results.rows) if (row.method, row.variant) == place), None)


def _influence(results: Results, run: Run, name: str, evaluations: Evaluations) -> np.ndarray | None:
    """Return what each question adds to a run's `change`, paired with the base; None where that is not known."""
    after, before = (evaluations.get(i, {}).get(run.seed) for i in (_row_of(results, run), 0))
    if before is None or after is None or not all(is_mean_of_samples(one, name) for one in (before, after)):
        return None
    gaps = np.array(after.samples[name], dtype=float) - np.array(before.samples[name], dtype=float)
    return _sign(results, name) * influence(gaps, after.weights.get(name))


def _sign(results: Results, name: str) -> int:
    """1 if a rise of the metric is learning, or forgetting; -1 if a fall is."""
    metric = results.metric(name)
    if metric.higher_is_better is None:
        return 1  # how far the model moved on the new task: neither good nor bad, counted as forgetting
    return (1 if metric.higher_is_better else -1) * (1 if metric.role == "task" else -1)


def mean_path(results: Results, frontier: Frontier, kept: str, task: str) -> list[tuple[Estimate, Estimate]]:
    """Return (learned, forgotten) of a method's rows, means over the seeds, with errors over questions and seeds.

    A row that lacks one of them, as where a judge gave no grade for a seed, is left out.
    """
    pairs = ((change_with_error(results, i, task), change_with_error(results, i, kept)) for i in frontier.rows)
    return [(learned, forgotten) for learned, forgotten in pairs if learned and forgotten]


def change_with_error(results: Results, i: int, name: str) -> Estimate | None:
    moved = change(results, results.rows[i], name)
    before, after = (results.rows[k].estimate(name) for k in (0, i))
    if moved is None or before is None or after is None:
        return None
    return Estimate(moved, change_error(before, after, results.difference(i, 0, name)))


def change(results: Results, run: Row, name: str) -> float | None:
    """Return how far a run moved from the base: upward for a task learned, and for knowledge forgotten."""
    before, after = results.base.estimate(name), run.estimate(name)
    return None if before is None or after is None else _sign(results, name) * (after.value - before.value)


def forgetting_at(
    path: Sequence[tuple[float, float]],
    learned: float,
    influences: Sequence[Influences] = (),
    level_influence: np.ndarray | None = None,
) -> Interpolated | None:
    """Return the forgetting where a path first reaches `learned`, None where it never does, or long before its first run.

    On the stretch from (x0, y0) to (x1, y1): y = (1 − w) y0 + w y1 with w = (learned − x0) / (x1 − x0). A change of the
    ends and of the level moves it by (1 − w) (dy0 − slope dx0) + w (dy1 − slope dx1) + slope d learned, which gives each
    question's part. `level_influence` is what each question adds to `learned`, None where that is a number by itself.
    """
    for k, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(path)):
        if x0 < learned <= x1:
            if k == 0 and learned < FIRST_RUN_SHARE * x1:
                return None
            w, slope = (learned - x0) / (x1 - x0), (y1 - y0) / (x1 - x0)
            of_runs = influences[max(k, 1) : k + 2]  # the base is the same for all
            if not of_runs or any(one is None for pair in of_runs for one in pair):
                return Interpolated((1 - w) * y0 + w * y1, [])  # half of what questions add would pass for the whole
            ends = list(zip((1 - w, w), influences[k : k + 2]))
            sets = [
                [share * factor * one for share, pair in ends if (one := pair[axis]) is not None]
                for axis, factor in ((1, 1.0), (0, -slope))
            ]
            if level_influence is not None:
                sets[1].append(slope * level_influence)
            return Interpolated((1 - w) * y0 + w * y1, [np.sum(known, axis=0) for known in sets if known])
    return None


def equal_learning(results: Results, kept: str, task: str, evaluations: Evaluations | None = None) -> list[Target]:
    """Return forgetting at equal learning, at what LoRA reaches with each swept value, the least first.

    Every seed is read where LoRA's run of the same seed has learned as much. The p-values are adjusted for all methods and
    levels together.
    """
    every = frontiers(results, kept, task, evaluations)
    lora = next((frontier for frontier in every if frontier.name == "lora"), None)
    targets = []
    for where, levels in _levels(results, task, evaluations or {}).items() if lora else ():
        learned = [level for level, _ in levels.values()]
        if min(learned) > 0:
            rows = _compare_at(every, lora, levels, len(results.grid.seeds))
            targets.append(Target(float(np.mean(learned)), where, rows))
    adjusted = iter(holm([math.nan if row.p is None else row.p for target in targets for row in target.rows]))
    targets = [replace(t, rows=[replace(row, p=_known(next(adjusted))) for row in t.rows]) for t in targets]
    return sorted(targets, key=lambda target: target.learned)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _levels(results: Results, task: str, evaluations: Evaluations) -> dict[str, dict[int, Level]]:
    """Return what LoRA learned by the swept values, and by seed."""
    levels: dict[str, dict[int, Level]] = {}
    for run in runs_by_frontier(results)["lora"]:
        learned = change(results, run, task)
        if learned is not None:
            influence_of_questions = _influence(results, run, task, evaluations)
            levels.setdefault(settings_text(run.point), {})[run.seed] = learned, influence_of_questions
    return levels


def _compare_at(
    every: Sequence[Frontier], lora: Frontier, levels: Mapping[int, Level], seeds: int
) -> list[MethodAtLevel]:
    read = {
        f.name: {
            seed: reading
            for seed, path in f.points.items()
            if seed in levels
            and (reading := forgetting_at(path, levels[seed][0], f.influences[seed], levels[seed][1]))
        }
        for f in every
    }
    theirs = read[lora.name]
    both = {f.name: {seed: r for seed, r in read[f.name].items() if seed in theirs} for f in every}
    gaps: dict[str, Spread] = {}
    together: dict[frozenset[int], list[str]] = {}  # by the seeds that a method shares with LoRA
    for f in every:
        shared = {seed: r - theirs[seed] for seed, r in both[f.name].items()}
        if shared and f is not lora:
            gaps[f.name] = spread_of(shared)
            of_one_seed = len(lora.points) == len(f.points) == 1
            if len(shared) > 1 or of_one_seed:  # one of several seeds says nothing of how seeds differ
                together.setdefault(frozenset(shared), []).append(f.name)
    tested = {name: told for names in together.values() for name, told in _tested(gaps, names)}
    rows = []
    for f in every:
        ours, (stderr, p) = both[f.name] or read[f.name], tested.get(f.name, (None, None))
        value, of_lora = _mean_of(ours), _mean_of({seed: theirs[seed] for seed in both[f.name]})
        gap = Estimate(float(gaps[f.name].mean), stderr) if f.name in gaps else None
        beyond = value is None and any(
            x >= levels[seed][0] for seed, path in f.points.items() if seed in levels for x, _ in path
        )
        rows.append(MethodAtLevel(f.name, value, len(ours), seeds, of_lora, gap, p, beyond))
    return rows


def _tested(gaps: Mapping[str, Spread], names: Sequence[str]) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Yield for methods of the same seeds, which are tested together, (error of their difference from LoRA, p)."""
    difference = t_tests(stack([gaps[name] for name in names]), len(names) + 1)
    yield from ((n, (_known(e), _known(p))) for n, e, p in zip(names, difference.stderr, difference.p))


def _mean_of(readings: Mapping[int, Interpolated]) -> Estimate | None:
    spread = spread_of(readings) if readings else None
    return spread and Estimate(float(spread.mean), float(spread.stderr) or None)


def spread_of(readings: Mapping[int, Interpolated]) -> Spread:
    """Return the mean of the seeds' readings and how it varies with questions and seeds."""
    values, sets = [reading.value for reading in readings.values()], zip(*(r.influences for r in readings.values()))
    return crossed_variance(np.array(values), [np.array(influences) for influences in sets])

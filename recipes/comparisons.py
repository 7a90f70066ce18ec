"""Which methods differ: every two rows of a table on the same questions and seeds, all tests adjusted together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_null.eval_harness import Evaluation
from lora_null.eval_harness.probe import Point
from lora_null.eval_harness.results import Role
from lora_null.eval_harness.statistics import (
    DISCORDANT,
    Spread,
    crossed_variance,
    holm,
    influence,
    is_mean_of_samples,
    mean_and_error,
    stack,
    t_tests,
    weighted_mean,
)
from lora_null.recipes.config.run_folder import whole_of
from lora_null.recipes.results import EVAL_FILE, Estimate, Paired, Results, kind_of, variant_of

Evaluations = Mapping[int, Mapping[int, Evaluation]]  # row → seed → what was measured
MEANS: dict[Role, str] = {"retention": "mean retention", "task": "mean task"}


def read_evaluations(folder: Path, results: Results, *, base: Path | None = None) -> Evaluations:
    """Read the evaluations behind the rows from a run's folder, with the samples of groups; the base's stands for every seed.

    A method without one (not evaluated, diverged) is not there. `base` is the folder of the base's; by default that of the
    run, or of the whole that it is a part of.
    """
    found: dict[int, dict[int, Evaluation]] = {}
    runs = results.grid.cells if results.grid else []
    seeds = results.grid.seeds if results.grid else [results.seed or 0]
    for i, row in enumerate(results.rows):
        if i == 0:
            files = dict.fromkeys(seeds, (base or whole_of(folder) / "base") / EVAL_FILE)
        elif not results.grid:
            files = {seeds[0]: folder / row.method / EVAL_FILE}
        else:
            own = [run for run in runs if (run.method, variant_of(run.point)) == (row.method, row.variant)]
            files = {run.seed: folder / run.folder / run.method / EVAL_FILE for run in own}
        if row.diverged is None:
            read = {seed: Evaluation.read(file) for seed, file in files.items() if file.is_file()}
            found[i] = {seed: with_samples_of_groups(evaluation) for seed, evaluation in read.items()}
    return {i: by_seed for i, by_seed in found.items() if by_seed}


def with_samples_of_groups(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose `samples` hold those of lm-eval's groups too."""
    return replace(evaluation, samples=evaluation.samples | evaluation.group_samples)


def noise_of(evaluations: Evaluations) -> dict[str, float]:
    """Return by how much each metric of the base changes when it is measured again in other batches."""
    return next((evaluation.noise for evaluation in evaluations.get(0, {}).values()), {})


def compared_means(results: Results) -> dict[str, tuple[str, ...]]:
    """Return what is compared: each metric with a direction, and for each role the mean of those that may be averaged."""
    means: dict[str, tuple[str, ...]] = {}
    for role in MEANS:
        names = results.directed_names(role)
        means |= {name: (name,) for name in names}
        together = averaged(results, role)
        if len(together) > 1:
            means[MEANS[role]] = tuple(together)
    return means


def averaged(results: Results, role: Role) -> list[str]:
    """Return the metrics of a role that may be averaged: fractions of which more is better, the first of each task, whose
    others measure the same answers by another rule; without fractions, those of the unit, sense and kind of the first.
    """
    names = results.directed_names(role)
    metrics = {name: results.metric(name) for name in names}
    of_task: dict[str, str] = {}
    for name in names:
        if metrics[name].unit == "fraction" and metrics[name].higher_is_better:
            of_task.setdefault(name.partition("/")[0], name)
    kinds = {name: (metrics[name].unit, metrics[name].higher_is_better, kind_of(name)) for name in names}
    return list(of_task.values()) or [name for name in names if kinds[name] == kinds[names[0]]]


def compare(results: Results, evaluations: Evaluations) -> list[Paired]:
    """Compare every two rows of equal settings and seeds, and each with the base, on every metric.

    Rows of other seeds, as an unfinished grid has them, are not compared: the test would be of other means than the rows'.

    `p` belongs to one test alone, `p_adjusted` to it among all that are returned (Holm). A metric is compared only
    where its value is the mean of its samples, so that value, error and test are of one quantity. Differences from the base
    vary more with the question than those of two methods, so their ratio of variances (`t_tests`) is one of its own.
    """
    groups: dict[tuple, list[tuple[Paired, Spread]]] = {}
    for name, names in compared_means(results).items():
        for i, j in itertools.combinations(range(len(results.rows)), 2):
            theirs, ours = evaluations.get(i, {}), evaluations.get(j, {})
            seeds = [seed for seed in ours if seed in theirs]
            alike = results.rows[i].variant == results.rows[j].variant and theirs.keys() == ours.keys()
            comparable = bool(seeds) and (i == 0 or alike)
            if comparable and (pair := _pair(results, evaluations, name, names, i, j, seeds)):
                groups.setdefault((name, i == 0, results.rows[j].variant, frozenset(seeds)), []).append(pair)
    compared = [pair for group in groups.values() for pair in _tested(group)]
    adjusted = holm([math.nan if pair.p is None else pair.p for pair in compared])
    return [
        pair.model_copy(update={"p_adjusted": None if math.isnan(p) else float(p)})
        for pair, p in zip(compared, adjusted)
    ]


def _tested(group: Sequence[tuple[Paired, Spread]]) -> Iterator[Paired]:
    """Yield the comparisons of one metric at one setting and the same seeds with their errors and p-values."""
    methods = {row for pair, _ in group for row in (pair.row, pair.against)} - {0}
    difference = t_tests(stack([spread for _, spread in group]), max(2, len(methods)))
    for (pair, _), stderr, p in zip(group, difference.stderr, difference.p):
        known = bool(np.isfinite(stderr))
        yield pair.model_copy(update={"stderr": float(stderr), "p": float(p)} if known else {})


def set_errors(results: Results, evaluations: Evaluations) -> None:
    """Set the errors of a grid's rows to those over questions and seeds together, where a row has several seeds."""
    for i, by_seed in evaluations.items():
        row = results.rows[i]
        for name, metric in row.metrics.items() if i and len(by_seed) > 1 else ():
            if all(is_mean_of_samples(evaluation, name) for evaluation in by_seed.values()):
                values = np.array([evaluation.samples[name] for evaluation in by_seed.values()])
                weights = next(iter(by_seed.values())).weights.get(name)
                error = crossed_variance(weighted_mean(values, weights), [influence(values, weights)]).stderr
                row.metrics[name] = replace(metric, stderr=float(error) if np.isfinite(error) else 0.0)


def paired_gain(
    measure: str,
    one: Evaluation,
    other: Evaluation | Point,
    leave_out: frozenset[int] = frozenset(),
    discordant: float = DISCORDANT,
) -> Estimate:
    """Return by how much `one` is better than `other`, paired by question, as `mean_and_error` weighs these.

    Rows in `leave_out` do not count. To the error of what is right or wrong `discordant` is added as in `crossed_variance`: equal
    answers of a few rows are not proof.
    """
    sign = 1 if one.metrics[measure].higher_is_better else -1
    change = sign * (np.array(one.samples[measure]) - np.array(other.samples[measure]))
    keep = [i for i in range(len(change)) if i not in leave_out]
    weights = np.array(one.weights.get(measure, np.ones(len(change))), dtype=float)
    value, error = mean_and_error(change[keep], weights[keep])
    if one.metrics[measure].unit == "fraction" and error is not None:
        error = math.sqrt(error**2 + discordant / (len(keep) * (len(keep) - 1)))
    return Estimate(value, error)


def _pair(
    results: Results, evaluations: Evaluations, name: str, names: Sequence[str], i: int, j: int, seeds: Sequence[int]
) -> tuple[Paired, Spread] | None:
    """Return row j minus row i over the seeds and its spread, None where they have not been asked the same questions."""
    sets = list(_gaps([(evaluations[j][seed], evaluations[i][seed]) for seed in seeds], names, against_base=i == 0))
    if len(sets) < len(names):
        return None
    fractions = all(results.metric(n).unit == "fraction" for n in names)
    share = 1 / len(names)
    estimates = share * sum(weighted_mean(gaps, weights) for gaps, weights in sets)
    influences = [share * influence(gaps, weights) for gaps, weights in sets]
    spread = crossed_variance(estimates, influences, discordant=DISCORDANT * share**2 if fractions else 0.0)
    questions = sum(gaps.shape[-1] for gaps, _ in sets)
    paired = Paired(row=j, against=i, metric=name, mean=float(spread.mean), questions=questions, seeds=len(seeds))
    return paired, spread


def _gaps(
    pairs: Sequence[tuple[Evaluation, Evaluation]], names: Sequence[str], *, against_base: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield for each metric (ours − theirs, [seeds, questions]; weights), where it can be compared question by question."""
    for name in names:
        if not all(is_mean_of_samples(evaluation, name) for pair in pairs for evaluation in pair):
            continue
        ours, theirs = ([pair[k].samples[name] for pair in pairs] for k in (0, 1))
        weights = [evaluation.weights.get(name) for pair in pairs for evaluation in pair]
        if len({len(values) for values in (*ours, *theirs)}) > 1 or any(other != weights[0] for other in weights):
            continue
        gaps = np.array(ours, dtype=float) - np.array(theirs, dtype=float)
        if against_base and kind_of(name) == "kl":
            continue  # a distance from the base: it cannot be negative, and only the noise floor says what is zero
        yield gaps, None if weights[0] is None else np.array(weights[0], dtype=float)

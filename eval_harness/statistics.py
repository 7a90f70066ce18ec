"""The statistics of this package: means over questions, paired differences between models, and tests of many at once.

Everything works on one number for each question, and the same estimate, error and test hold for every metric:

    R = Σ w x / Σ w                                  the mean over questions x, weighted by their tokens w where x is per token
    u = w / mean(w) · (x − R)                        what one question adds to R, the linearized ratio estimator
    SE² = Σ u² / (n (n − 1))                         clustered by question, since the tokens of one answer depend on each other

The weights of all models on one set of questions are equal, so the difference of two models' means is the mean of the
differences, and its error comes from the differences alone. Leading axes are independent tables, computed together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes half a second to import

if TYPE_CHECKING:
    from lora_null.eval_harness.results import Evaluation, TaskResult

LEVEL = 0.05  # of the familywise error of all claims of one table
DISCORDANT = 2.0  # squared differences of one question more that was won and one that was lost


class Spread(NamedTuple):
    """A mean over seeds with the two variances of it: over questions, and over seeds (NaN of a single seed).

    `questions` and `seeds` count the fewest of each.
    """

    mean: np.ndarray
    over_questions: np.ndarray
    over_seeds: np.ndarray
    questions: int
    seeds: int

    @property
    def stderr(self) -> np.ndarray:
        """SE² = Var over questions + Var over seeds. The interaction of questions and seeds is counted in both terms, so on
        average the error is not too small."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self.over_questions + np.nan_to_num(self.over_seeds))


class TTest(NamedTuple):
    """A difference with its standard error, the degrees of freedom of that error, and the two-sided p of t = mean / SE."""

    mean: np.ndarray
    stderr: np.ndarray
    df: int
    p: np.ndarray


def weighted_mean(values: np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Return R over the last axis, [..., questions] → [...]."""
    return np.average(values, axis=-1, weights=weights)


def is_mean_of_samples(found: TaskResult | Evaluation, name: str) -> bool:
    """Return whether a metric's value is the mean of its samples, which a perplexity is not."""
    samples, metric = found.samples.get(name), found.metrics.get(name)
    if not samples or metric is None or not np.all(np.isfinite(samples)):
        return False
    mean = float(weighted_mean(np.array(samples, dtype=float), found.weights.get(name)))
    return math.isclose(mean, metric.value, rel_tol=1e-6, abs_tol=1e-9)


def influence(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return u, of which every question adds u / n to the error of R: [..., questions] → [..., questions]."""
    centered = np.asarray(values, dtype=float) - weighted_mean(values, weights)[..., None]
    return centered if weights is None else centered * (np.asarray(weights) / np.mean(weights))


def mean_and_error(
    values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float | None]:
    """Return (R, SE) of one model on one metric; the error of a single question is None."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    error = np.sqrt(np.square(influence(values, weights)).sum() / (n * (n - 1))) if n > 1 else None
    return float(weighted_mean(values, weights)), None if error is None else float(error)


def crossed_variance(estimates: np.ndarray, influences: Sequence[np.ndarray], discordant: float = 0.0) -> Spread:
    """Return the mean over seeds and how it varies with questions and with seeds.

    Questions and seeds are crossed random effects (every seed is asked the same questions), estimated by moments: the
    variance over questions is Σ over sets of questions of Var_q(mean of u over seeds) / Q, that over seeds Var_s / S.

    Args:
        estimates: one for each seed, [..., seeds].
        influences: for each set of questions that the estimates are computed from, [..., seeds, questions]. Sets of equally
            many are taken for the same questions, such as two metrics of them, and added up question by question, which
            counts how they vary together. Of independent sets the products that this brings in are 0 in the mean.
        discordant: a sum of squares to add to every set's: DISCORDANT for differences of what is right or wrong. Where few
            questions differ, their spread says little about itself: the error then counts one question more that was won
            and one that was lost, which agrees with the exact (McNemar's) test. So two models with equal answers have an
            error too.
    """
    estimates = np.asarray(estimates, dtype=float)
    seeds, shape = estimates.shape[-1], estimates.shape[:-1]
    sets: dict[int, list[np.ndarray]] = {}
    for u in influences:
        sets.setdefault(u.shape[-1], []).append(u)
    sets.pop(1, None)
    over_questions = sum(
        (
            (np.square(sum(alike).mean(axis=-2)).sum(axis=-1) + len(alike) * discordant) / (n * (n - 1))
            for n, alike in sets.items()
        ),
        np.zeros(shape),
    )
    over_seeds = estimates.var(axis=-1, ddof=1) / seeds if seeds > 1 else np.full(shape, np.nan)
    return Spread(estimates.mean(axis=-1), over_questions, over_seeds, min(sets, default=0), seeds)


def t_tests(spread: Spread, methods: int) -> TTest:
    """Test differences between methods, of one metric at one setting, [..., pairs].

    Of one seed, t has questions − 1 degrees of freedom, and a test speaks of the models that were trained, not of another
    seed. Of several, two to five seeds tell too little of their own spread: a pair whose seeds agree by chance would look
    certain, and between equal methods something would be claimed in up to half of all tables (two seeds, degrees of
    freedom by Satterthwaite). So the spread over seeds is taken relative to that over questions, in the mean of all pairs, or the pair's
    own where that is larger; it has (methods − 1)(seeds − 1) degrees of freedom. Two methods that answer nearly alike can
    differ a hundred times more with the seed than with the question, which alone would raise the mean for all: it is
    taken for no more than the median of all pairs says it is. Where nothing is known of the questions there is no such ratio:
    each pair is tested by its own seeds alone, of which t has seeds − 1.
    """
    variance, df = spread.over_questions, spread.questions - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        if spread.seeds > 1:
            ratio = np.where(variance > 0, spread.over_seeds / variance, np.nan)
            common = _common_ratio(ratio, spread.seeds - 1)
            variance = variance + np.maximum(spread.over_seeds, common * variance)
            fewest = (methods - 1) * (spread.seeds - 1)
            df = spread.seeds - 1 if spread.questions == 0 else min(df, fewest)
        stderr = np.where(np.isfinite(variance) & (variance > 0), np.sqrt(variance), np.nan)
        p = 2 * special.stdtr(df, -np.abs(spread.mean) / stderr)
    return TTest(spread.mean, stderr, df, p)


def _common_ratio(ratio: np.ndarray, df: int) -> np.ndarray:
    """Return the ratio taken for all pairs (last axis kept as length 1): the mean of the finite ratios, at most what their
    median implies, as those of equal pairs are as χ² / df; 0 where none is finite.
    """
    known = np.isfinite(ratio)
    ratio = np.where(known, ratio, np.where(known.any(axis=-1, keepdims=True), np.nan, 0.0))
    chi2_median = 2 * special.gammaincinv(df / 2, 0.5)
    median = np.nanmedian(ratio, axis=-1, keepdims=True) * df / chi2_median
    return np.minimum(np.nanmean(ratio, axis=-1, keepdims=True), median)


def stack(spreads: Sequence[Spread]) -> Spread:
    """Return several spreads, of equally many seeds, along a new last axis."""
    arrays = (
        np.stack([np.asarray(getattr(spread, name)) for spread in spreads], axis=-1) for name in Spread._fields[:3]
    )
    return Spread(*arrays, min(spread.questions for spread in spreads), spreads[0].seeds)


def holm(p_values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return p-values adjusted by Holm's step-down for all on the last axis; NaN stays and is not counted.

    Calling significant what is below 0.05 afterwards errs anywhere on the axis in at most 5% of cases, however the tests
    depend on each other.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, axis=-1)  # NaN last
    known = np.sum(~np.isnan(p), axis=-1, keepdims=True)
    ordered = np.minimum(1.0, np.take_along_axis(p, order, axis=-1) * (known - np.arange(p.shape[-1])))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(ordered, axis=-1), axis=-1)
    return adjusted

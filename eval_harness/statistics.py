"""The statistics of this package: means over questions, paired differences between models, and tests of many at once.

Everything works on one number for each question, and the same estimate, error and test hold for every metric:

    R = Σ w x / Σ w                                  the mean over questions x, weighted by their tokens w where x is per token
    u = w / mean(w) · (x − R)                        what one question adds to R, the linearized ratio estimator
    SE² = Σ u² / (n (n − 1))                         clustered by question, since the tokens of one answer depend on each other

The weights of all models on one set of questions are equal, so the difference of two models' means is the mean of the
differences, and its error comes from the differences alone. Leading axes are independent tables, computed together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05  # of the familywise error of all claims of one table


class Difference(NamedTuple):
    """A difference with its standard error, the degrees of freedom of that error, and the two-sided p of t = mean / SE."""

    mean: np.ndarray
    stderr: np.ndarray
    freedom: np.ndarray
    p: np.ndarray


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return R over the last axis, [..., questions] → [...]."""
    return np.average(values, axis=-1, weights=weights)


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


def two_level(estimates: np.ndarray, influences: Sequence[np.ndarray], discordant: float = 0.0) -> Difference:
    """Return the mean over seeds with an error that counts the questions and the seeds.

    Questions and seeds are crossed random effects (every seed is asked the same questions), estimated by moments:
    SE² = Σ over sets of questions Var_q(mean of u over seeds) / Q + Var_s(estimates) / S. Their interaction is in both
    terms, so the error is never too small. The degrees of freedom are the fewest of any term: with two to five seeds,
    Satterthwaite's claim differences between equal methods in up to half of all tables, because a spread that happens to
    be small raises the freedom with it. Of one seed only what varies with the question is known, and a test speaks of
    the models that were trained, not of another seed.

    Args:
        estimates: one for each seed, [..., seeds].
        influences: for each set of questions that the estimates are computed from, [..., seeds, questions].
        discordant: a sum of squares to add to the first set's, see `paired_difference`.

    Returns:
        Arrays of shape [...]; error and p are NaN where nothing varies.
    """
    estimates = np.asarray(estimates, dtype=float)
    seeds = estimates.shape[-1]
    parts = []
    for i, u in enumerate(influences):
        n = u.shape[-1]
        if n > 1:
            squares = np.square(u.mean(axis=-2)).sum(axis=-1) + (discordant if i == 0 else 0.0)
            parts.append((squares / (n * (n - 1)), n - 1))
    if seeds > 1:
        parts.append((estimates.var(axis=-1, ddof=1) / seeds, seeds - 1))
    mean, variance = estimates.mean(axis=-1), sum((value for value, _ in parts), np.zeros(estimates.shape[:-1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        stderr = np.where(np.isfinite(variance) & (variance > 0), np.sqrt(variance), np.nan)
        freedom = np.full(variance.shape, min((df for _, df in parts), default=0))
        p = 2 * stats.t.sf(np.abs(mean) / stderr, freedom)
    return Difference(mean, stderr, freedom, p)


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray | None = None, *, fraction: bool = False
) -> Difference:
    """Compare two models that were asked the same questions, of the same seeds.

    Args:
        ours, theirs: [..., seeds, questions].
        weights: [questions], the same for both.
        fraction: the values are right or wrong. Where few questions differ, their spread says little about itself: the
            error then counts one question more that was won and one that was lost, which agrees with the exact
            (McNemar's) test. So two models with equal answers have an error too.

    Returns:
        ours − theirs; see `two_level`.
    """
    gaps = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    estimates = weighted_mean(gaps, weights)
    return two_level(estimates, [influence(gaps, weights)], discordant=2.0 if fraction else 0.0)


def all_pairs(
    values: np.ndarray, weights: np.ndarray | None = None, *, fraction: bool = False
) -> tuple[list[tuple[int, int]], Difference]:
    """Compare every two models on one metric.

    Args:
        values: [..., models, seeds, questions].
        weights, fraction: as in `paired_difference`.

    Returns:
        The pairs (i, j) with i < j, and the differences of model i from model j, [..., pairs].
    """
    pairs = list(itertools.combinations(range(values.shape[-3]), 2))
    found = [
        paired_difference(values[..., i, :, :], values[..., j, :, :], weights, fraction=fraction) for i, j in pairs
    ]
    return pairs, Difference(*(np.stack(column, axis=-1) for column in zip(*found)))


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

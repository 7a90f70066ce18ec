"""What the report claims is true: errors against plain formulas, and simulated tables of equal and of different methods.

`python tests/report/test_statistics.py` prints the simulation's table.
"""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from lora_null.eval_harness import Evaluation
from lora_null.eval_harness.results import Metric
from lora_null.eval_harness.statistics import (
    LEVEL,
    Spread,
    TTest,
    crossed_variance,
    holm,
    influence,
    mean_and_error,
    stack,
    t_tests,
    weighted_mean,
)
from lora_null.recipes.comparisons import compare, read_evaluations
from lora_null.recipes.grid import mean_row
from lora_null.recipes.report.headline import headline
from lora_null.recipes.report.table import build_table, rank_marks
from lora_null.recipes.results import Grid, Results, Row, parse_results

TABLES = 20_000
SEED_EFFECT = 0.1  # the errors over 128 questions are about 0.05


# --- one estimand: value, error and test of the same mean over tokens ---


def test_the_mean_over_tokens_and_its_clustered_error():
    sums, counts = np.array([2.0, 9.0, 4.0, 1.0]), np.array([1, 3, 4, 2])
    ratio = 16 / 10
    residuals = [2 - ratio * 1, 9 - ratio * 3, 4 - ratio * 4, 1 - ratio * 2]
    value, stderr = mean_and_error(sums / counts, counts)
    assert value == pytest.approx(ratio)
    assert stderr == pytest.approx((4 / 3 * sum(r * r for r in residuals)) ** 0.5 / 10)
    value, stderr = mean_and_error(sums)  # where all count alike it is the ordinary standard error
    assert value == pytest.approx(np.mean(sums)) and stderr == pytest.approx(stats.sem(sums))
    assert mean_and_error(sums[:1] / counts[:1], counts[:1]) == (2.0, None)


def test_a_difference_of_means_is_the_mean_of_the_differences():
    generator = np.random.default_rng(0)
    a, b, weights = generator.normal(size=(1, 30)), generator.normal(size=(1, 30)), generator.integers(1, 9, 30)
    found = difference(a, b, weights=weights)
    assert found.mean == pytest.approx(weighted_mean(a[0], weights) - weighted_mean(b[0], weights))
    assert found.stderr == pytest.approx(mean_and_error((a - b)[0], weights)[1])


def paired_difference(ours, theirs, weights=None, *, fraction=False):
    """ours − theirs, [..., seeds, questions], of models that were asked the same questions."""
    gaps = ours - theirs
    return crossed_variance(
        weighted_mean(gaps, weights), [influence(gaps, weights)], discordant=2.0 if fraction else 0.0
    )


def all_pairs(values, weights=None, *, fraction=False):
    """Compare every two models, [..., models, seeds, questions]: the pairs (i, j), and model i − model j."""
    pairs = list(itertools.combinations(range(values.shape[-3]), 2))
    found = [
        paired_difference(values[..., i, :, :], values[..., j, :, :], weights, fraction=fraction) for i, j in pairs
    ]
    return pairs, t_tests(stack(found), values.shape[-3])


def difference(ours, theirs, *, methods=2, **options):
    """One comparison alone."""
    return TTest(
        *(x[0] if np.ndim(x) else x for x in t_tests(stack([paired_difference(ours, theirs, **options)]), methods))
    )


def test_of_one_seed_it_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(1, 40)) + 0.3, generator.normal(size=(1, 40))
    found = difference(a, b)
    assert found.p == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)
    assert found.stderr == pytest.approx(stats.sem(a[0] - b[0])) and found.df == 39


def test_questions_and_seeds_by_hand():
    gaps = np.random.default_rng(2).normal(size=(3, 20)) + np.array([[0.5], [0.0], [0.2]])
    questions, seeds = gaps.mean(0).var(ddof=1) / 20, gaps.mean(1).var(ddof=1) / 3
    found = difference(gaps, np.zeros_like(gaps), methods=4)
    assert found.stderr == pytest.approx(math.sqrt(questions + seeds)) and found.df == 3 * 2
    assert found.p == pytest.approx(2 * stats.t.sf(abs(gaps.mean()) / found.stderr, 6))
    # Beside another pair that varies more with the seed, for what it varies with the question, it gets its part of that.
    wild = Spread(np.array(0.3), np.array(questions), np.array(3 * seeds), 20, 3)
    both = t_tests(stack([paired_difference(gaps, np.zeros_like(gaps)), wild]), 4)
    assert both.stderr == pytest.approx(np.sqrt([questions + 2 * seeds, questions + 3 * seeds]))
    # One that varies with the seed alone counts no more than the median says; that of χ² with two degrees of freedom is 2 log 2.
    alike = Spread(np.array(0.3), np.array(questions / 1e6), np.array(seeds), 20, 3)
    three = t_tests(stack([paired_difference(gaps, np.zeros_like(gaps)), wild, alike]), 4)
    assert three.stderr[0] == pytest.approx(math.sqrt(questions + 3 * seeds / math.log(2)))


def test_of_seeds_alone_each_pair_is_tested_by_its_own():
    """Many methods beside it do not make three seeds tell more than three seeds do."""
    gaps = np.random.default_rng(1).normal(size=(6, 3)) + 1
    found = t_tests(stack([crossed_variance(own, []) for own in gaps]), methods=7)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0, axis=1).pvalue) and found.df == 2


def test_two_metrics_of_the_same_questions_vary_together():
    """The mean of two forms of a question has the error of a question's own mean, not that of twice as many questions."""
    gaps = np.random.default_rng(0).normal(size=(1, 2, 30)) + np.random.default_rng(1).normal(size=30)
    sets = [influence(form) / 2 for form in gaps.swapaxes(0, 1)]
    found = crossed_variance(gaps.mean((1, 2)), sets)
    assert math.sqrt(found.over_questions) == pytest.approx(stats.sem(gaps[0].mean(0)))
    apart = [sets[0], sets[1][:, :20]]  # which are not of the same questions
    parts = [np.square(u).sum() / (u.size * (u.size - 1)) for u in apart]
    assert crossed_variance(gaps.mean((1, 2)), apart).over_questions == pytest.approx(sum(parts))


def test_a_pair_that_answers_nearly_alike_does_not_hide_the_others():
    """Two settings of one method differ by little: their few differences vary more with the seed than with the question."""
    generator = np.random.default_rng(0)
    clear = [Spread(np.array(-0.5), np.array(1e-2), np.array(1e-3 * x), 64, 2) for x in generator.chisquare(1, 6)]
    alike = Spread(np.array(1e-3), np.array(1e-8), np.array(1e-5), 64, 2)
    with_it, without = t_tests(stack([*clear, alike]), 8), t_tests(stack(clear), 7)
    assert with_it.stderr[:-1] == pytest.approx(without.stderr, rel=0.2)
    assert (with_it.p[:-1] < 0.005).all() and with_it.p[-1] > 0.5


def test_nothing_is_claimed_where_nothing_varies():
    same = difference(np.ones((2, 3)), np.ones((2, 3)))
    assert np.isnan(same.p) and np.isnan(same.stderr)
    assert np.isnan(difference(np.ones((1, 1)), np.zeros((1, 1))).p)
    equal = difference(np.ones((1, 50)), np.ones((1, 50)), fraction=True)
    assert equal.p == 1 and equal.stderr > 0  # equal answers to 50 questions: not known exactly


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (6, 0), (9, 1), (8, 1), (14, 3), (30, 12), (25, 14)])
def test_fractions_agree_with_mcnemars_exact_test(won, lost):
    """Where few answers differ, a t-test alone would call 4 of 4 significant."""
    ours = np.array([[1.0] * won + [0.0] * lost + [1.0] * 200])
    theirs = np.array([[0.0] * won + [1.0] * lost + [1.0] * 200])
    exact = stats.binomtest(won, won + lost).pvalue
    assert (difference(ours, theirs, fraction=True).p < 0.05) == (exact < 0.05)


def test_holm():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == []
    many = holm([[0.01, 0.04], [0.5, 0.001]])
    assert many == pytest.approx(np.array([[0.02, 0.04], [0.5, 0.002]]))


# --- simulated tables ---


def answers(kind, generator, tables, methods, seeds, questions):
    """One column of simulated tables, [tables, methods, seeds, questions]: equal methods on questions of their own."""
    shape = (tables, methods, seeds, questions)
    hard = generator.normal(size=(tables, 1, 1, questions))
    by_method = np.array([1.0, 3.0, *[1.0] * (methods - 2)])[
        :, None, None
    ]  # one whose seeds differ more than the others'
    seed = SEED_EFFECT * by_method * generator.normal(size=(tables, methods, seeds, 1)) if seeds > 1 else 0.0
    if kind == "right or wrong":  # 20% of the answers are open between the methods
        decided = generator.random((tables, 1, 1, questions))
        return np.where(decided < 0.8, decided < 0.3, generator.random(shape) < 0.5).astype(float)
    if kind == "KL":  # all positive, a few questions large
        return np.exp(0.8 * hard + 0.6 * generator.normal(size=shape) + seed)
    return 3 + hard + 0.5 * generator.normal(size=shape) + seed


COLUMNS = ("NLL", "KL", "right or wrong")


def simulate(methods, seeds, questions, *, gain=0.0, tables=TABLES, seed=0):
    """Share of simulated tables in which something is claimed, in which a best is marked, and which the last method leads.

    `gain` is what the last method is better by in every column, in standard deviations of a paired difference.
    """
    generator, chunk = np.random.default_rng(seed), 1_000
    claimed = marked = led = separate = 0
    for _ in range(tables // chunk):
        found = []
        for kind in COLUMNS:
            x = answers(kind, generator, chunk, methods, seeds, questions)
            weights = None if kind == "right or wrong" else generator.integers(1, 9, questions)
            if gain:
                better = kind == "right or wrong"
                step = gain * np.std(x[:, 0] - x[:, 1])
                x[:, -1] += np.where(generator.random(x[:, -1].shape) < step, 1 - x[:, -1], 0) if better else -step
            pairs, gaps = all_pairs(x, weights, fraction=kind == "right or wrong")
            found.append((gaps.p, gaps.mean * (1 if kind == "right or wrong" else -1)))
            value, error = weighted_mean(x.mean(2), weights), x.mean(2).std(-1, ddof=1) / questions**0.5
            separate += _apart(value * (1 if kind == "right or wrong" else -1), error).sum() / len(COLUMNS)
        p, sign = (np.concatenate([column[k] for column in found], axis=-1) for k in (0, 1))
        adjusted = holm(p)
        claimed += (adjusted < LEVEL).any(-1).sum()
        best = np.stack(
            [_best(adjusted, sign, pairs, methods, c) for c in range(len(COLUMNS))], 1
        )  # [tables, columns, methods]
        marked += best.any((1, 2)).sum()
        led += best[:, :, -1].mean(1).sum()
    return claimed / tables, marked / tables, led / tables, separate / tables


def _best(adjusted, sign, pairs, methods, column):
    """Which method beats every other in a column, [tables, methods]."""
    wins = np.zeros((len(adjusted), methods))
    for k, (i, j) in enumerate(pairs, start=column * len(pairs)):
        known = adjusted[:, k] < LEVEL
        wins[:, i] += known & (sign[:, k] > 0)
        wins[:, j] += known & (sign[:, k] < 0)
    return wins == methods - 1


def _apart(value, error):
    """The rule before: the best is farther from the second than both errors together."""
    order = np.argsort(-value, axis=-1)
    (a, b), (x, y) = (np.take_along_axis(v, order, -1)[:, :2].T for v in (value, error))
    return a - b > np.hypot(x, y)


@pytest.mark.parametrize(("methods", "seeds", "questions"), [(3, 1, 32), (3, 1, 128), (3, 2, 64), (4, 5, 32)])
def test_equal_methods_are_told_apart_in_at_most_5_percent_of_tables(methods, seeds, questions):
    claimed, marked, _, _ = simulate(methods, seeds, questions)
    assert marked <= claimed <= 0.05 + 2 * (0.05 * 0.95 / TABLES) ** 0.5


def test_a_better_method_is_found():
    claimed, _, led, _ = simulate(3, 1, 128, gain=0.4, tables=2_000)
    assert claimed > 0.95 and led > 0.6


def test_the_report_draws_the_simulated_claims():
    """A table through the report's own code gives the marks that the simulation counts."""
    generator, methods, questions = np.random.default_rng(5), 3, 64
    columns = {kind: answers(kind, generator, 1, methods, 1, questions)[0] for kind in COLUMNS}
    columns["NLL"][2] -= 0.6
    weights = {"NLL": np.arange(1.0, questions + 1), "KL": None, "right or wrong": None}
    found, rows = {}, [{"method": "base"}]
    for i in range(methods):
        metrics = {}
        for kind, x in columns.items():
            fraction = kind == "right or wrong"
            value, error = mean_and_error(x[i, 0], weights[kind])
            metrics[kind] = Metric(value, error, questions, fraction, "task", "fraction" if fraction else "nats")
        samples = {kind: x[i, 0].tolist() for kind, x in columns.items()}
        found[i + 1] = {0: Evaluation(metrics, {}, 0.0, samples, {"NLL": weights["NLL"].tolist()})}
        rows.append({"method": f"m{i}", "metrics": {k: asdict(m) for k, m in metrics.items()}})
    results = parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows})
    results.paired = compare(results, found)
    p = [all_pairs(x, weights[kind], fraction=kind == "right or wrong")[1].p for kind, x in columns.items()]
    assert [pair.p for pair in results.paired] == pytest.approx(list(np.concatenate(p)))
    assert [pair.p_adjusted for pair in results.paired] == pytest.approx(list(holm(np.concatenate(p))))
    assert rank_marks(results, [row.estimate("NLL") for row in results.rows], "NLL", False)[3] == "best"


def test_a_base_without_a_right_answer_is_compared_and_a_distance_from_it_is_not():
    def one(right, distance, worse):
        samples = {"gsm8k": right, "NQ kl": distance, "text forgetting": worse}
        metrics = {
            name: Metric(float(np.mean(x)), 0.1, 8, name == "gsm8k", "task", "nats") for name, x in samples.items()
        }
        return Evaluation(metrics, {}, 0.0, samples)

    found = {0: {0: one([0.0] * 8, [0.0] * 8, [0.0] * 8)}, 1: {0: one([1.0, 0.0] * 4, [0.1, 0.2] * 4, [0.3, 0.4] * 4)}}
    rows = [
        {"method": name, "metrics": {k: asdict(m) for k, m in found[i][0].metrics.items()}}
        for i, name in enumerate(("base", "lora"))
    ]
    results = parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows})
    assert {pair.metric for pair in compare(results, found)} == {"gsm8k", "text forgetting"}


def test_what_is_not_the_mean_of_its_samples_is_not_compared():
    """A perplexity, or nats per token of an evaluation that kept no token counts."""

    def one(value):
        metrics = {"perplexity": Metric(math.exp(value), 0.1, 3, False, "task", "perplexity")}
        return Evaluation(metrics, {}, 0.0, {"perplexity": [value, value + 1, value - 1]})

    found = {1: {0: one(1.0)}, 2: {0: one(2.0)}}
    rows = [
        {"method": "base"},
        *({"method": f"m{i}", "metrics": {k: asdict(v) for k, v in found[i][0].metrics.items()}} for i in (1, 2)),
    ]
    results = parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows})
    assert compare(results, found) == []


def test_a_group_is_compared_by_its_members_documents(tmp_path):
    rows = []
    for name, values in (("base", [0.0, 1.0] * 8), ("lora", [1.0] * 16)):
        metrics = {"mmlu": Metric(float(np.mean(values)), 0.1, 16, True, "retention")}
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(
            Evaluation(metrics, {}, 0.0, group_samples={"mmlu": values}).to_json()
        )
        rows.append({"method": name, "metrics": {"mmlu": asdict(metrics["mmlu"])}})
    results = parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows})
    (pair,) = compare(results, read_evaluations(tmp_path, results))
    assert (pair.metric, pair.mean, pair.questions) == ("mmlu", 0.5, 16)


def test_a_base_does_not_make_equal_methods_look_apart():
    """All methods differ from the base mostly by the question, and from each other by the seed."""
    generator = np.random.default_rng(3)
    seeds, base, gained = range(5), generator.normal(size=64), generator.normal(size=64)

    def one(x):
        return Evaluation({"NLL": Metric(float(x.mean()), 0.1, 64, False, "task", "nats")}, {}, 0.0, {"NLL": list(x)})

    noise = 0.1 * generator.normal(size=(4, 5, 64)) + 0.1 * generator.normal(size=(4, 5, 1))
    found = {i + 1: {seed: one(base - gained + own[seed]) for seed in seeds} for i, own in enumerate(noise)}
    shown = {"NLL": asdict(found[1][0].metrics["NLL"])}
    rows = [{"method": name, "metrics": shown} for name in ("base", "m0", "m1", "m2", "m3")]
    results = parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows})
    alone = {(pair.row, pair.against): pair.p for pair in compare(results, found)}
    beside = compare(results, found | {0: {seed: one(base) for seed in seeds}})
    assert {(pair.row, pair.against): pair.p for pair in beside if pair.against} == pytest.approx(alone)
    assert len(alone) == 6 and len(beside) == 10


def of_seeds(values, seeds):
    """An unfinished grid of one setting: results and evaluations of m0, m1, … by the seeds that each has."""

    def one(x):
        return Evaluation({"NLL": Metric(float(x.mean()), 0.1, 40, False, "task", "nats")}, {}, 0.0, {"NLL": list(x)})

    found = {i + 1: {seed: one(values[i, seed]) for seed in own} for i, own in enumerate(seeds)}
    rows = [
        mean_row([Row(method=f"m{i - 1}", metrics=evaluation.metrics) for evaluation in by_seed.values()], None)
        for i, by_seed in found.items()
    ]
    grid = Grid(seeds=[0, 1, 2], planned=3 * len(rows), cells=[])
    results = Results(recipe="r", model="m", rows=[Row(method="base"), *rows], grid=grid)
    results.paired = compare(results, found)
    return results


def test_methods_of_other_seeds_are_not_compared():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(5, 3, 40)) + generator.normal(size=(5, 3, 1))  # [methods, seeds, questions]
    seeds = ([0, 1, 2], [0, 1], [0, 1, 2], [1, 2], [0, 1])
    pairs = of_seeds(values, seeds).paired
    assert [(pair.row, pair.against) for pair in pairs] == [(3, 1), (5, 2)]
    for pair in pairs:
        own = seeds[pair.row - 1]
        alone = difference(values[pair.row - 1][own], values[pair.against - 1][own])
        assert (pair.seeds, pair.p) == (len(own), pytest.approx(float(alone.p)))


def test_the_worse_of_two_values_is_not_marked_best_by_a_seed_in_which_it_is_the_better_one():
    values = np.array([[0.10, 0.02, 0.02], [0.05, 0.0, 0.0]])[:, :, None] + 1e-3 * np.sin(np.arange(80)).reshape(
        2, 1, 40
    )
    results = of_seeds(values, ([0, 1, 2], [0]))
    (column,) = [column for column in build_table(results).columns if column.title == "NLL"]
    assert [cell.mark for cell in column.cells] == [None] * 3
    said = "learning was not compared question by question over the same seeds, so no method is called best: NLL from 0.04"
    assert said in headline(results)
    whole = of_seeds(values, ([0, 1, 2], [0, 1, 2]))
    assert "compared question by question" not in headline(whole)


if __name__ == "__main__":
    print(
        "| methods | seeds | questions | gain | something claimed | a best marked | best in a column found | unpaired rule |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for m, s, q in ((3, 1, 32), (3, 1, 128), (9, 1, 128), (3, 2, 128), (3, 3, 128), (3, 5, 128), (9, 3, 128)):
        for g in (0.0, 0.2, 0.4, 0.8):
            said = simulate(m, s, q, gain=g, tables=TABLES if not g else 4_000)
            print(
                f"| {m} | {s} | {q} | {g} | " + " | ".join(f"{100 * share:.1f}%" for share in said) + " |", flush=True
            )

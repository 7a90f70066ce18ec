"""The report says what the numbers say, and no more."""

import itertools
import json
import math
import re
import struct
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from rich.console import Console
from scipy import stats

from lora_null.eval_harness.results import Metric
from lora_null.eval_harness.statistics import holm
from lora_null.recipes.environment import environment
from lora_null.recipes.report import print_table, write_report
from lora_null.recipes.report.drawing import COLORS, DARK_CARD, ON_DARK, contrast, distance, palette, wrapped
from lora_null.recipes.report.figures import (
    _plane,
    card_png,
    curves_picture,
    distances,
    forgetting_picture,
    forgetting_png,
    row_colors,
    row_markers,
)
from lora_null.recipes.report.headline import (
    against_reference,
    forgetting,
    headline,
    learning,
    task_metric,
    times,
    verdicts,
)
from lora_null.recipes.report.table import (
    build_table,
    decimals,
    escape_markdown,
    format_column,
    format_count,
    format_estimate,
    rank_marks,
)
from lora_null.recipes.results import (
    Estimate,
    Paired,
    Row,
    Seconds,
    load_log,
    load_results,
    parse_results,
    read_row,
    write_results,
    write_row,
)
from lora_null.trainer.methods import METHODS
from lora_null.utils.errors import UserError


def kl(value, stderr=0.01):
    return {"nq kl": metric(value, stderr, "retention", "nats")}


def nll(value, stderr=0.01):
    return {"gsm8k nll": metric(value, stderr, "task", "nats")}


def share(name, value, stderr=0.01, role="retention"):
    return {name: metric(value, stderr, role, "fraction", True)}


def metric(value, stderr, role, unit, higher_is_better=False):
    return {
        "value": value,
        "stderr": stderr,
        "n": 500,
        "higher_is_better": higher_is_better,
        "role": role,
        "unit": unit,
    }


def raw(**methods):
    """A results.json of one row per keyword, `lora_null_v1={…metrics…}`, the base's first."""
    rows = [
        {
            "method": name.replace("_", "-"),
            "rank": None if name == "base" else 32,
            "trainable_params": None if name == "base" else 9_773_056,
            "adapter_params": None if name == "base" else 9_773_056,
            "metrics": metrics,
            "drift": None if name == "base" else {"mean": 0.008, "max": 0.04},
            "seconds": {"init": None, "train": None, "eval": 34.0},
            "tokens_per_second": None,
            "peak_memory_bytes": None,
        }
        for name, metrics in methods.items()
    ]
    return {
        "schema": 1,
        "recipe": "quickstart",
        "model": "org/model",
        "seed": 0,
        "environment": {"python": "3.11"},
        "settings": {"learning_rate": 3e-4},
        "rows": rows,
    }


def measured(**changes):
    """The measured quick start, with `changes` to it."""
    rows = {
        "base": kl(0.0, 0.0) | nll(1.530),
        "lora": kl(0.127) | nll(0.982),
        "lora_null_v1": kl(0.119) | nll(0.890),
        "lora_null_v2": kl(0.049, 0.004) | nll(0.957),
    }
    return raw(**(rows | changes))


def paired(results):
    """The comparisons that two independent errors would give, of single metrics and of means of fractions."""
    rows, found = results["rows"], []
    means = {
        f"mean {role}": [
            n for n, m in rows[-1].get("metrics", {}).items() if m["role"] == role and m["unit"] == "fraction"
        ]
        for role in ("retention", "task")
    }
    singles = {name: [name] for row in rows for name in row.get("metrics", {})}
    for name, names in (singles | {k: v for k, v in means.items() if len(v) > 1}).items():
        for i, j in itertools.combinations(range(len(rows)), 2):
            both = [[rows[k].get("metrics", {}).get(n) for n in names] for k in (i, j)]
            if None in (*both[0], *both[1]) or any(m["stderr"] is None for m in (*both[0], *both[1])):
                continue
            gap = sum(b["value"] - a["value"] for a, b in zip(*both)) / len(names)
            error = math.hypot(*(m["stderr"] for side in both for m in side)) / len(names)
            if error > 0 and not (i == 0 and name.endswith("kl")):
                entry = {
                    "row": j,
                    "against": i,
                    "metric": name,
                    "mean": gap,
                    "stderr": error,
                    "questions": 9,
                    "seeds": 1,
                }
                found.append(entry | {"p": 2 * stats.norm.sf(abs(gap) / error)})
    adjusted = holm([entry["p"] for entry in found])
    return [entry | {"p_adjusted": float(p)} for entry, p in zip(found, adjusted)]


def parsed(results):
    return parse_results(results | {"paired": paired(results)})


def say(**methods):
    return headline(parsed(raw(**methods)))


def write(folder, results):
    (folder / "results.json").write_text(json.dumps(results | {"paired": paired(results)}))
    write_report(folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


# --- marks ---


def estimates(*pairs):
    return [pair and Estimate(*pair) for pair in pairs]


def marks(*pairs, higher_is_better=False):
    """The marks of methods with these values and errors."""
    measured = {f"method-{i}": share("x", *pair) if pair else {} for i, pair in enumerate(pairs)}
    results = parsed(raw(base={}, **measured))
    return rank_marks(results, [row.estimate("x") for row in results.rows], "x", higher_is_better)[1:]


def test_marks_only_what_is_better_than_every_other():
    # The error of a difference is 0.021 here, and three tests are adjusted together: 0.10 against 0.15 has p = 0.018.
    assert marks((0.10, 0.015), (0.13, 0.015), (0.5, 0.015)) == [None, None, None]
    assert marks((0.10, 0.015), (0.15, 0.015), (0.5, 0.015)) == ["best", "second", None]
    assert marks((0.10, 0.015), (0.20, 0.015), (0.21, 0.015)) == ["best", None, None]


def test_no_best_while_any_other_may_be_as_good():
    # The next is clear of the best, but the worst is measured so badly that it may be the best: no mark, as the headline.
    assert marks((0.10, 0.01), (0.20, 0.01), (0.25, 0.5)) == [None, None, None]


def test_marks_follow_the_better_direction():
    assert marks((0.1, 0.01), (0.3, 0.01), (0.2, 0.01), higher_is_better=True) == [None, "best", "second"]


def test_no_mark_without_a_comparison_or_a_rival():
    assert marks((0.1, None), (0.9, None)) == [None, None]
    assert marks((0.1, 0.01)) == [None]
    assert marks(None, (0.1, 0.01), (0.5, 0.01)) == [None, "best", None]


def test_the_base_is_never_marked():
    table = build_table(parsed(measured()))
    assert all(column.cells[0].mark is None for column in table.columns)
    column = next(column for column in table.columns if column.title == "NQ KL")
    assert [cell.mark for cell in column.cells] == [None, None, None, "best"]  # LoRA and v1 are within error


# --- cells ---


def test_numbers_as_the_errors_warrant():
    assert decimals("fraction", estimates((0.3, 0.021))) == 1
    assert decimals("fraction", estimates((0.3, 0.004))) == 2
    assert str(format_estimate(Estimate(0.3421, 0.021), "fraction", 1)) == "34.2 ± 2.1"
    assert str(format_estimate(Estimate(0.9571, 0.0121), "nats", 3)) == "0.957 ± 0.012"
    assert format_estimate(Estimate(-0.00001, None), "nats", 3).text == "0.000"
    assert decimals("nats", estimates((0.005, 0.0003))) == 4  # "± 0.000" would claim too much
    assert decimals("nats", estimates((0.0008, 0.00003))) == 5
    assert decimals("nats", estimates((0.1, 1e-12))) == 6


def test_a_small_value_without_an_error_is_not_printed_as_the_bases_zero():
    """The KL of a single question, or at the lowest strength of a dial."""
    column = estimates((0.0, 0.0), (4e-4,), (-3e-5, 0.0), (1e-9,), (0.0456,), (4.5,))
    texts = ["0.000", "0.00040", "-0.000030", "1e-09", "0.046", "4.500"]
    assert list(map(str, format_column(column, "nats"))) == texts
    tiny = estimates((1e-9, 3e-10), (4.3e-6, 1e-7), (1.00000021, 4e-8), (0.0, 1e-9))
    texts = ["1e-09 ± 3e-10", "4.3e-06 ± 1e-07", "1.00000021 ± 4e-08", "0 ± 1e-09"]  # an error is never 0.000000
    assert list(map(str, format_column(tiny, "nats"))) == texts
    assert (times(1e9), times(3e5)) == ("over 1,000,000 ×", "300,000 ×")


def test_nats_are_shown_each_to_its_own_error_percentages_alike():
    column = [Estimate(0.177, 0.010), None, Estimate(0.00178, 0.00002)]
    assert list(map(str, format_column(column, "nats"))) == ["0.177 ± 0.010", "–", "0.00178 ± 0.00002"]
    assert list(map(str, format_column([Estimate(0.5, 0.1), Estimate(0.4, 0.001)], "fraction"))) == [
        "50.00 ± 10.00",
        "40.00 ± 0.10",
    ]


def test_times_do_not_jump_in_coarseness():
    results = measured()
    for row, seconds in zip(results["rows"][1:], (95.4, 100.4, 9000.0)):
        row["seconds"] = {"init": 9.3, "train": seconds, "eval": None}
    column = next(column for column in build_table(parsed(results)).columns if "train" in column.title)
    texts = [str(cell).replace("\u00a0", " ") for cell in column.cells[1:]]
    assert texts == ["9.3 s / 95 s / –", "9.3 s / 100 s / –", "9.3 s / 2.5 h / –"]


@pytest.mark.parametrize(
    ("number", "text"), [(None, "–"), (9_773_056, "9.8M"), (336e6, "336M"), (8366e6, "8,366M"), (460_800, "461K")]
)
def test_counts_as_in_the_paper(number, text):
    assert format_count(number) == text


def test_missing_stays_missing(tmp_path):
    html, text = write(tmp_path, measured(lora=nll(0.982)))
    assert "| LoRA | 9.8M | – | **" not in text and re.search(r"\| LoRA \| 9\.8M \| – \| 0\.982", text)
    assert "nan" not in text.lower() and "None" not in text + html
    assert "No value of KL to base on NQ for LoRA." in text


def test_a_value_that_is_not_finite_is_said_and_not_ranked(tmp_path):
    results = measured(lora=kl(float("nan")) | nll(0.982))
    assert "not finite" in [cell.text for column in build_table(parsed(results)).columns for cell in column.cells]
    assert "No value of KL to base on NQ for LoRA." in write(tmp_path, results)[1]


def means(metrics):
    """The columns of means: title, group and the cell of the method."""
    table = build_table(parsed(raw(base=metrics, lora=metrics)))
    return [(c.group, str(c.cells[1])) for c in table.columns if c.title == f"{c.group} mean %"]


def test_means_are_of_one_unit_and_one_role():
    kept = share("nq_open", 0.2) | share("webqs", 0.1) | {"nq nll": metric(4.0, 0.1, "retention", "nats")}
    learned = share("gsm8k", 0.4, role="task")
    assert means(kept | learned) == [("Retention", "15.00 ± 0.71")]
    assert means(kept | learned | share("mbpp", 0.2, role="task")) == [
        ("Retention", "15.00 ± 0.71"),
        ("Task", "30.00 ± 0.71"),
    ]
    assert means(share("nq_open", 0.2) | learned) == []


def test_a_task_with_several_metrics_counts_once_in_the_mean():
    several = {name: share(name, value, role="task") for name, value in (("math/verified", 0.4), ("math/string", 0.1))}
    assert means(several["math/verified"] | several["math/string"] | share("mbpp", 0.3, role="task")) == [
        ("Task", "35.00 ± 0.71")
    ]


def test_no_mean_over_a_missing_value():
    both = share("nq_open", 0.2) | share("webqs", 0.4)
    table = build_table(parsed(raw(base=both, lora=share("nq_open", 0.2), pissa=both)))
    assert [str(cell) for c in table.columns if c.title == "Retention mean %" for cell in c.cells][1] == "–"


def test_labels_tell_rows_of_one_method_apart():
    results = measured()
    results["rows"] += [results["rows"][3] | {"rank": 64}, results["rows"][1] | {"variant": "long"}]
    assert parsed(results).labels() == [
        "base", "LoRA", "LoRA-Null-v1", "LoRA-Null-v2 (r = 32)", "LoRA-Null-v2 (r = 64)", "LoRA (long)"
    ]  # fmt: skip


def test_none_or_all_right_is_not_known_exactly():
    right = share("gsm8k", 0.0, role="task")
    right["gsm8k"] |= {"stderr": 0.0, "n": 16}
    results = parsed(raw(base=right, lora={"gsm8k": right["gsm8k"] | {"value": 1.0}}))
    for row in results.rows:  # one right and one wrong answer more: p = 1/18
        assert row.estimate("gsm8k").stderr == pytest.approx((1 / 18 * 17 / 18 / 16) ** 0.5)
    assert parsed(measured()).base.estimate("nq kl") == (0.0, 0.0)  # by definition


# --- headline ---


def test_learning_is_read_where_it_shows():
    """Not from the first column, where a small model answers nothing right before and after."""
    none = share("gsm8k", 0.0, role="task")
    none["gsm8k"]["stderr"] = 0.0
    results = raw(base=none | nll(1.5), lora=none | nll(0.9), pissa=none | nll(0.8))
    assert task_metric(parsed(results)) == "gsm8k nll"
    assert "PiSSA learned most: GSM8K NLL 0.800" in headline(parsed(results))
    dialed = parsed(results)
    dialed.paired = []  # as of a dial, where nothing is compared
    assert task_metric(dialed) == "gsm8k nll"
    some = share("gsm8k", 0.3, role="task")
    assert task_metric(parsed(raw(base=none | nll(1.5), lora=some | nll(0.9)))) == "gsm8k"
    assert task_metric(parsed(raw(base=none, lora=none))) == "gsm8k"  # nothing shows: the first
    assert task_metric(parsed(raw(base=kl(0), lora=kl(1)))) is None


def test_headline_of_the_measured_run():
    said = headline(parsed(measured()))
    assert said.startswith(
        "LoRA-Null-v2 forgot least: KL to base on NQ 0.049 ± 0.004 against LoRA's 0.127 ± 0.010 (61% less), "
        "with learning not distinguishable (GSM8K NLL 0.957 ± 0.010 against 0.982 ± 0.010)."
    )
    assert "LoRA-Null-v1 learned most: GSM8K NLL 0.890 ± 0.010 against LoRA's 0.982 ± 0.010." in said


def test_headline_when_lora_wins_both():
    said = say(base=kl(0, 0) | nll(1.5), lora=kl(0.1) | nll(0.8), lora_null_v1=kl(0.3) | nll(0.9))
    assert said.startswith("LoRA forgot least: KL to base on NQ 0.100 ± 0.010 against LoRA-Null-v1's 0.300 ± 0.010")
    assert said.endswith("and learned more (GSM8K NLL 0.800 ± 0.010 against 0.900 ± 0.010). LoRA also learned most.")


def test_headline_tells_that_the_best_keeper_learned_less():
    said = say(base=kl(0, 0) | nll(1.5), lora=kl(0.3) | nll(0.8), lora_null_v2=kl(0.1) | nll(1.4))
    assert "LoRA-Null-v2 forgot least" in said and "but learned less (GSM8K NLL 1.400" in said
    assert "LoRA learned most" in said


def test_headline_within_the_error():
    said = say(base=kl(0, 0) | nll(1.5), lora=kl(0.127) | nll(0.98), lora_null_v1=kl(0.119) | nll(0.975))
    assert "Forgetting is not distinguishable between the methods" in said
    assert "Learning is not distinguishable between the methods" in said
    assert "least" not in said and "most" not in said


def test_where_others_differ_only_the_best_is_not_told():
    rows = {"lora": kl(0.100, 0.05), "pissa": kl(0.120, 0.001), "lora_null_v1": kl(0.190, 0.001)}
    said = say(base=kl(0, 0), **rows)
    assert said.startswith(
        "No method can be called best in forgetting: LoRA is not distinguishable from any other; KL to"
    )


def test_methods_that_answer_alike_were_compared():
    found = parsed(measured(lora_null_v1=kl(0.3) | nll(0.982)))
    gap = next(p for p in found.paired if (p.row, p.against, p.metric) == (2, 1, "gsm8k nll"))
    gap.mean, gap.p, gap.p_adjusted = 0.0, None, None
    assert "not compared" not in headline(found)
    gap.mean = 0.1  # of a single question
    assert "The methods' learning was not compared question by question, so no method is called best" in headline(
        found
    )


def test_headline_names_who_ties_with_the_best():
    said = headline(parsed(measured(lora_null_v1=kl(0.052) | nll(0.890))))
    assert "LoRA-Null-v2 forgot least" in said and "LoRA-Null-v1 is not distinguishable from LoRA-Null-v2." in said


def test_headline_without_comparisons_claims_nothing():
    said = say(base=kl(0, None), lora=kl(0.3, None), lora_null_v2=kl(0.1, None))
    assert said.startswith(
        "The methods' forgetting was not compared question by question, so no method is called best"
    )
    assert "forgot least" not in said


def test_nobody_learned_most_when_none_is_above_the_base():
    """A method that merely lost least is not praised for learning."""
    task = {
        name: share("gsm8k", value, role="task") for name, value in {"base": 0.5, "lora": 0.3, "pissa": 0.5}.items()
    }
    results = parsed(raw(**task))
    assert headline(results).startswith("No method learned more than the base knew (50.0 ± 1.0%) beyond the error")
    kept = say(base=kl(0, 0) | task["base"], lora=kl(0.3) | task["lora"], pissa=kl(0.1) | task["pissa"])
    assert "learned more (" not in kept and "(67% less), at GSM8K 50.0 ± 1.0% against 30.0 ± 1.0%." in kept
    assert "learned most" not in headline(results) and verdicts(results)[0].winners == []
    assert "LoRA learned most" in say(**(task | {"lora": share("gsm8k", 0.6, role="task")}))


def test_ratios_go_no_further_than_the_measurement():
    assert "(370 × less)" in say(base=kl(0, 0), lora=kl(0.3), pissa=kl(0.0008, 0.00003))
    assert "(100% less)" in say(base=kl(0, 0), lora=kl(0.3), pissa=kl(0.0, 0.0))
    results = parsed(raw(base=kl(0, 0), lora=kl(0.3), pissa=kl(0.0008, 0.00003)))
    results.noise = {"nq kl": 0.001}
    assert "(no more than the noise of the measurement)" in headline(results)
    two = {"lora": (0.30, 0.40), "pissa": (0.496, 0.496)}
    rows = {name: share("nq", value) | share("webqs", other) for name, (value, other) in two.items()}
    results = parsed(raw(base=share("nq", 0.5) | share("webqs", 0.5), **rows))
    results.noise = {"nq": 1 / 64, "webqs": 1 / 64}
    assert forgetting(results).noise_floor == 1 / 64


def test_headline_of_one_method():
    said = say(base=kl(0, 0) | nll(1.5), lora=kl(0.1) | nll(0.8))
    assert (
        said == "LoRA: KL to base on NQ 0.100 ± 0.010. LoRA: GSM8K NLL 1.500 ± 0.010 before and 0.800 ± 0.010 after."
    )
    assert "not distinguishable" in say(base=nll(1.5), lora=nll(1.495))


def test_headline_of_the_base_alone_and_without_metrics():
    assert say(base=kl(0, 0)) == "Only the untouched base was evaluated: there is no method to compare yet."
    assert say(base={}, lora={}).startswith("Forgetting was not measured")


def test_a_method_that_diverged_is_in_the_headline():
    raw_results = measured(lora={})
    raw_results["rows"][1]["diverged"] = 35
    said = headline(parsed(raw_results))
    assert said.endswith(" LoRA diverged at step 35.") and "No value" not in said
    alone = headline(parsed(raw_results | {"rows": raw_results["rows"][:2]}))
    assert alone.startswith("LoRA diverged at step 35. Forgetting was not measured: no method has a value")


def test_headline_without_retention_or_task():
    without_retention = say(base=nll(1.5), lora=nll(0.8), pissa=nll(1.0))
    assert "LoRA learned most" in without_retention and "Forgetting was not measured" in without_retention
    without_task = say(base=kl(0, 0), lora=kl(0.3), pissa=kl(0.1))
    assert "PiSSA forgot least" in without_task and "Learning was not measured" in without_task


def test_forgetting_is_the_mean_loss_of_retention_where_no_kl_was_measured():
    before = share("triviaqa", 0.60) | share("nq_open", 0.20) | {"nq nll": metric(4.2, 0.1, "retention", "nats")}
    after = share("triviaqa", 0.50) | share("nq_open", 0.16)
    results = parsed(raw(base=before, lora=after, lora_null_v1=before))
    assert forgetting(results).estimates[1].value == pytest.approx(0.07)  # fractions alone: no sum with nats
    assert headline(results).startswith("LoRA-Null-v1 forgot least: mean loss of retention")
    assert "7.0 ± 1.0 points" in headline(results)


def test_a_change_has_the_error_of_the_difference_or_of_both_where_it_was_not_paired():
    before = share("nq_open", 0.2, 0.03) | nll(2.0, 0.3)
    after = share("nq_open", 0.1, 0.04) | nll(1.0, 0.4)
    apart = parse_results(raw(base=before, lora=after, pissa=after) | {"paired": []})
    kept, learned = forgetting(apart), learning(apart)
    assert kept.estimates[1].stderr == pytest.approx(0.05) and kept.error(1) == pytest.approx(0.05)
    assert learned.error(1) == pytest.approx(0.5)
    gap = {"row": 1, "against": 0, "metric": "gsm8k nll", "mean": -1.0, "stderr": 0.01, "questions": 9, "seeds": 1}
    assert learning(apart.model_copy(update={"paired": [Paired(**gap)]})).error(1) == 0.01


def test_the_table_of_differences_says_what_a_mean_is_of_its_unit_and_its_better_direction():
    before = {f"{name} nll": metric(2.0, 0.1, "retention", "nats") for name in ("facts", "trivia")}
    after = {name: entry | {"value": 2.1} for name, entry in before.items()}
    gap = {"row": 2, "against": 1, "metric": "mean retention", "mean": 0.1, "stderr": 0.02, "p_adjusted": 0.01}
    results = parse_results(
        raw(base=before, lora=before, pissa=after) | {"paired": [gap | {"questions": 9, "seeds": 1}]}
    )
    (line,) = against_reference(results)
    assert line == ("PiSSA", "–", "mean retention (facts NLL, trivia NLL) ↓", "0.100 ± 0.020", "adjusted p = 0.01")


def test_retention_without_a_base_is_compared_as_it_is():
    results = parsed(raw(base={}, lora=share("nq_open", 0.1), pissa=share("nq_open", 0.3)))
    assert forgetting(results).higher_is_better
    assert headline(results).startswith("PiSSA forgot least: NQ open 30.0")


def test_verdicts_name_rows():
    kept, learned = verdicts(parsed(measured()))
    assert (kept.winners, learned.winners) == ([3], [2])
    assert learning(parsed(measured())).measured == [2, 3, 1]


# --- files ---


def test_report_is_one_file_that_loads_nothing(tmp_path):
    html, text = write(tmp_path, measured())
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s]+)""", html)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "<script src" not in html and "@import" not in html and len(html) < 1_500_000
    assert re.search(r'aria-label="Learning against forgetting\. [^"]*LoRA-Null-v2: [^"]*0\.049', html)
    assert 'scope="row"' in html and 'scope="col"' in html
    assert "![Learning against" in text and "(forgetting.png)" in text
    assert 'from_pretrained(base, "lora-null-v2/adapter")' in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "forgetting.png",
        "card.png",
    }


def test_keyboard_and_screen_readers(tmp_path):
    """What axe-core checks in a browser, as far as the page's text tells it."""
    results = measured() | {"environment": {"command": "python -m lora_null.recipes quickstart"}, "answers": ANSWERS}
    (tmp_path / "recipe.yaml").write_text("name: quickstart\n")
    write_log(tmp_path / "lora", [{"step": step, "loss": 1 / step} for step in range(1, 9)])
    html, _ = write(tmp_path, results)
    page = Page()
    page.feed(html)
    assert page.names.count("main") == page.names.count("h1") == page.names.count("title") == 1
    assert 'lang="en"' in html and page.levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(page.levels))
    assert len(page.ids) == len(set(page.ids))  # also those of the drawings
    for name, attributes in page.tags:
        given = dict(attributes)
        if name == "svg" and given.get("aria-hidden") != "true":
            assert given["role"] == "img" and given["aria-label"]
        if name == "img":
            assert given["alt"]
        if name == "input":
            assert ("label", ("for", given["id"])) in page.labels
        if given.get("class") == "scroll" or name == "pre":
            assert given["tabindex"] == "0" and given["role"] == "region" and given["aria-label"]
        if name == "button":
            assert given["type"] == "button" and given["aria-label"] and given["data-of"] in page.ids
        if name == "th":
            assert given["scope"] in ("row", "col", "colgroup")
    regions = [dict(a)["aria-label"] for _, a in page.tags if dict(a).get("role") == "region"]
    assert len(regions) == len(set(regions))


class Page(HTMLParser):
    """The tags of a page, in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.names, self.ids, self.levels, self.labels = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        self.names.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.levels += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        self.labels += [("label", attribute) for attribute in attrs] if tag == "label" else []


ANSWERS = {
    "task": "NQ",
    "metric": "nq kl",
    "labels": ["base", "LoRA"],
    "questions": [
        {
            "question": "who wrote emma",
            "right": "Jane Austen",
            "change": 0.31,
            "why": "largest change",
            "answers": ["Jane <i>", "42"],
        },
        {"question": "what is 1|2", "right": "x", "change": 0.02, "why": "median change", "answers": ["same", "same"]},
    ],
}


def test_questions_are_answered_side_by_side(tmp_path):
    html, text = write(tmp_path, measured() | {"answers": ANSWERS})
    assert "Jane &lt;i&gt;" in html and "<dt>LoRA</dt><dd>42</dd>" in html and "Jane Austen" in html
    assert html.count("(as the base)") == 1  # the second question
    assert r"what is 1\|2 (median change, 0.02 nats)" in text and "| 42 |" in text


def test_answers_have_the_color_of_their_method(tmp_path):
    """Also where a grid's rows, of several settings, are named otherwise."""
    results = measured() | {"answers": ANSWERS}
    results["rows"][1]["variant"] = "lr 0.01"
    html, _ = write(tmp_path, results)
    assert f'<div style="border-color: var(--c{COLORS["lora"][1:]})"><dt>LoRA</dt>' in html


def test_the_table_of_differences_has_no_empty_column(tmp_path):
    html, text = write(tmp_path, measured())
    assert '<th scope="col" class="left">Metric</th>' in html and "Settings</th>" not in html
    assert "| Method | Metric | Difference | p |\n|:--|:--|--:|--:|" in text
    results = measured()
    for row in results["rows"][1:]:
        row["variant"] = "lr 0.01"
    html, text = write(tmp_path, results)
    assert '<th scope="col" class="left">Settings</th>' in html and "| Method | Settings | Metric |" in text


LEFT_NOTHING = {"measure": "nq kl", "at_most": 0.1, "then": "rewind", "strength": 1, "step": 0, "steps": 9}
LEFT_NOTHING |= {"value": 0.0, "n": 9, "kept": True}


def test_the_base_again_did_not_forget_least():
    """A budget that left nothing of the training: KL 0 is no merit of the method."""
    raw_results = measured(lora_null_v1=kl(0.0, 0.0) | nll(1.530))
    raw_results["rows"][2]["budget"] = LEFT_NOTHING
    said = headline(parsed(raw_results))
    assert "LoRA-Null-v2 forgot least" in said and "No value" not in said
    assert "LoRA-Null-v1 is the base again: the budget left nothing of its training." in said
    alone = parsed(raw_results | {"rows": raw_results["rows"][:3:2]})
    assert headline(alone) == "LoRA-Null-v1 is the base again: the budget left nothing of its training."


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("names", [["v2"], ["v1", "v2"]])
def test_a_budget_that_is_not_kept_is_said_wherever_a_method_is_named(tmp_path, names, repaired):
    raw_results = measured()
    beyond = {"at_most": 0.01, "value": 0.05, "then": "repair", "weight": 100.0, "steps": 0, "kept": False}
    for row in raw_results["rows"][-len(names) :]:
        row["budget"] = LEFT_NOTHING | beyond
        row["method"] += "-repaired" * repaired
    told, end = "NQ KL 0.05 nats per token", ", repaired" * repaired
    labels, join = [f"LoRA-Null-{name}{end}" for name in names], "; and " if repaired else " and "
    by = f"The budget of forgetting is NOT kept by {labels[-1]} ({told}, at most 0.01 allowed)."
    if len(names) > 1:
        each = join.join(f"{label} ({told})" for label in labels)
        by = f"The budget of forgetting is NOT kept by {each}, where at most 0.01 is allowed."
    said = headline(parsed(raw_results))
    assert said.startswith(by) and f"LoRA-Null-v2{end} forgot least" in said
    kept, learned = verdicts(parsed(raw_results))
    assert kept.detail.endswith(f". The budget of forgetting is NOT kept by LoRA-Null-v2{end}.")
    assert ("NOT kept by LoRA-Null-v1" in learned.detail) == ("v1" in names)
    alone = parsed(raw_results | {"rows": raw_results["rows"][::3]})
    assert headline(alone).startswith(f"The budget of forgetting is NOT kept by LoRA-Null-v2{end} (")
    html, md = write(tmp_path, raw_results)
    them = join.join(labels)
    next_step = (
        f"The budget of forgetting is NOT kept by {them}: lower training.learning_rate, calibrate on more texts"
    )
    assert f"<strong>Next:</strong> {next_step}" in html and "budget.then=scale" in md
    assert f"**Next:** {escape_markdown(next_step)}" in md
    for label in labels:
        account = f"{told} on 9 rows that no probe used, at most 0.01 allowed (repaired at weight 100)."
        assert f"<strong>{label}: the budget is NOT kept</strong>, {account}" in html
        assert f"- **{label}: the budget is NOT kept**, {account}" in md


@pytest.mark.parametrize("kept, keeps", [(True, "keeps it"), (False, "does not keep it either")])
def test_a_trained_adapter_beyond_the_budget_is_named_with_its_repaired_one(kept, keeps):
    raw_results = raw(
        base=kl(0.0, 0.0) | nll(1.530),
        lora=kl(0.127) | nll(0.982),
        lora_null_v1=kl(0.119) | nll(0.890),
        lora_null_v1_repaired=kl(0.049, 0.004) | nll(0.957),
    )
    held = {"at_most": 0.05, "value": 0.04, "then": "repair", "weight": 0.1, "steps": 0, "kept": kept}
    raw_results["rows"][3]["budget"] = LEFT_NOTHING | held
    beyond, results = f"beyond the budget; LoRA-Null-v1, repaired {keeps}", parsed(raw_results)
    assert f"LoRA-Null-v1 ({beyond}) learned most: " in headline(results)
    least, most = verdicts(results)
    assert most.detail.endswith(f". LoRA-Null-v1 is {beyond}.") and "beyond" not in least.detail
    del raw_results["rows"][3]["budget"]["weight"]  # of a run that has not repaired because of the budget
    assert "beyond the budget" not in headline(parsed(raw_results))


def test_the_base_again_has_no_mark_and_no_place_among_the_distances():
    raw_results = measured(lora_null_v1=kl(0.0, 0.0) | nll(1.530))
    for i in (2, 1):  # then LoRA too, from which distances are counted
        raw_results["rows"][i] |= {"budget": LEFT_NOTHING, "metrics": kl(0.0, 0.0) | nll(1.530)}
        results = parsed(raw_results)
        column = next(column for column in build_table(results).columns if column.title == "NQ KL")
        assert [cell.mark for cell in column.cells] == [None, None, None, "best" if i == 2 else None]
        named = [row for row, _ in distances(results)]
        drawn = [text.get_text() for text in _plane(results, forgetting(results), learning(results)).axes[0].texts]
        assert (named, "2.6 × less" in drawn) == (([3], True) if i == 2 else ([], False))


def test_distances_from_the_reference_are_named():
    results = parsed(measured(lora_null_v2=kl(0.0005, 0.00004) | nll(0.985)))
    assert distances(results)[1] == (3, "same learning within the error, moved 250 × less")
    assert "moved 250 × less" not in str(distances(parse_results(measured())))  # nothing was compared
    for pair in results.paired:  # of one question, which has no error
        pair.p = pair.p_adjusted = None
    assert distances(results)[1] == (3, "learning not compared, moved: not compared")


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_of_an_accuracy_has_the_sign_of_a_loss(several):
    def kept(value):
        return share("nq_open", value, 0.005) | (share("webqs", value, 0.005) if several else {})

    rows = {"lora": kept(0.3) | nll(0.9), "lora_null_v2": kept(0.39) | nll(0.9)}
    found = parsed(raw(base=kept(0.4) | nll(1.5), **rows))
    assert distances(found)[0] == (2, "same learning within the error, lost 10 × less")
    assert "LoRA-Null-v2 forgot least" in headline(found)
    assert "paired difference -9.00 ± " in verdicts(found)[0].detail.replace("−", "-")


def test_a_recipe_is_named_where_it_is(tmp_path):
    raw_results = measured()
    raw_results["environment"]["command"] = "lora-null train quickstart"
    assert "is `recipe.yaml`" not in write(tmp_path, raw_results)[1]
    (tmp_path / "recipe.yaml").write_text("name: quickstart\n")
    assert "is `recipe.yaml`" in write(tmp_path, raw_results)[1]


def test_a_model_in_a_folder_is_shown_by_its_name(tmp_path):
    """The page and its card are sent to others; what loads the adapter again names the folder."""
    html, text = write(tmp_path, measured() | {"model": "/home/me/models/SmolLM2"})
    assert '<p class="run">SmolLM2, seed 0.' in html and "\nSmolLM2, seed 0\n" in text
    assert 'from_pretrained("/home/me/models/SmolLM2")' in text
    assert parse_results(measured()).model_title == "org/model"


@pytest.mark.parametrize(("threads", "said"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_one_thread_is_one(threads, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert environment()["device"] == said


def test_what_improved_was_not_lost():
    def found(*values):
        rows = {name: share("nq", value) | nll(0.9) for name, value in zip(("lora", "lora_null_v2"), values)}
        return distances(parsed(raw(base=share("nq", 0.1) | nll(1.5), **rows)))[0][1]

    assert found(0.5, 0.2).endswith(", gained less") and found(0.2, 0.5).endswith(", gained more")
    assert found(0.5, 0.5).endswith(", gained the same within the error")
    assert found(0.5, 0.05).endswith(", lost more")


def test_the_plane_has_a_linear_and_a_logarithmic_axis():
    far = parsed(measured(lora_null_v2=kl(0.0005, 0.00004) | nll(0.95)))
    assert [name for name, _ in forgetting_picture(far).drawings] == ["log", "linear"]
    assert [name for name, _ in forgetting_picture(parsed(measured())).drawings] == ["linear", "log"]
    unmoved = parsed(measured(lora_null_v2=kl(0.0, 0.0) | nll(0.95)))
    assert [name for name, _ in forgetting_picture(unmoved).drawings] == ["linear"]


def test_the_card_is_1200_by_630():
    card = card_png(parsed(measured()), "A headline $x$ " * 40)
    assert is_picture(card) and struct.unpack(">II", card[16:24]) == (1200, 630)


def test_everything_is_escaped(tmp_path):
    results = measured()
    results["model"] = "<script>alert(1)</script>"
    results["rows"][1]["method"] = "<b>|x|_$y$"
    results["settings"]["note"] = "<img src=http://example.com>"
    html, text = write(tmp_path, results)
    assert "<script>alert" not in html and "<img src=http" not in html and "&lt;b&gt;|x|" in html
    assert "<b>|x|" not in html  # in what the page includes too
    assert r"\<b\>\|x\|\_\$y\$" in text and r"\<img" in text
    assert escape_markdown("a\nb|c") == r"a b\|c"


def test_markdown_marks_and_columns(tmp_path):
    _, text = write(tmp_path, measured())
    rows = [line for line in text.split("## Against")[0].splitlines() if line.startswith("|")]
    assert rows[0].startswith(r"| Method | \#Params | NQ KL ↓ | GSM8K NLL ↓ | Drift |")
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1
    assert "| **0.049 ± 0.004** | 0.957 ± 0.010 |" in rows[-1] and "**0.890 ± 0.010**" in rows[-2]
    _, text = write(tmp_path, measured(lora_null_v2=kl(0.049, 0.004) | nll(0.93)))
    assert "<u>0.930 ± 0.010</u>" in text
    assert text[text.index(rows[0]) - 2 : text.index(rows[0])] == "\n\n"  # else it is no table


def test_full_fine_tuning_has_no_adapter_to_load(tmp_path):
    results = raw(base=nll(1.5), full=nll(0.8))
    results["rows"][1]["adapter_params"] = None
    assert "PeftModel" not in "".join(write(tmp_path, results))


def test_rebuilding_gives_the_same_bytes(tmp_path):
    write_log(tmp_path / "lora", [{"step": step, "loss": 1 / step, "drift_mean": 0.01} for step in range(1, 9)])
    write(tmp_path, measured())
    names = ("report.md", "report.html", "forgetting.png", "card.png")
    before = [(tmp_path / name).read_bytes() for name in names]
    theirs = {"font.size": 30, "savefig.bbox": "tight", "text.usetex": True, "lines.linewidth": 9}
    with matplotlib.rc_context(theirs):  # of a matplotlibrc, on a machine without LaTeX
        write_report(tmp_path)
        assert matplotlib.rcParams["font.size"] == 30
    assert before == [(tmp_path / name).read_bytes() for name in names]


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "report.html").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        write(tmp_path, measured())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- pictures and logs ---


def is_picture(png):
    return png.startswith(b"\x89PNG") and len(png) > 5_000


@pytest.mark.parametrize(
    "results",
    [
        measured(),
        raw(base=kl(0, 0) | nll(1.5), lora=kl(0.1, None) | nll(1.6, None)),  # unlearned, no errors
        raw(base=nll(1.5), lora=nll(0.8), pissa=nll(0.9)),  # no retention
        raw(base={}, lora=nll(0.8) | share("nq_open", 0.2)),  # no base
        raw(base={}, lora={}),
        raw(base=kl(0, 0) | nll(1.5)),
        raw(base=kl(0, 0) | nll(1.5), **{f"method_{i}": kl(0.1) | nll(1) for i in range(8)}),  # all in one place
    ],
    ids=["measured", "unlearned", "no retention", "no base", "nothing", "base alone", "eight"],
)
def test_a_picture_is_always_drawn(results):
    assert is_picture(forgetting_png(parsed(results)))


def test_a_long_or_odd_name_is_drawn():
    assert is_picture(forgetting_png(parsed(measured(**{"x" * 80 + " $\\frac{": kl(0.1) | nll(0.9)}))))


def test_two_dollars_in_a_metrics_name_are_no_formula(tmp_path):
    name = "cost_$100_and_$200_"
    rows = {
        "base": share(name, 0.5) | nll(1.5),
        "lora": share(name, 0.4) | nll(0.9),
        "mine": share(name, 0.3) | nll(0.8),
    }
    assert is_picture(forgetting_png(parsed(raw(**rows)))) and is_picture(card_png(parsed(raw(**rows)), "said"))
    assert forgetting_picture(parsed(raw(**rows)))


def test_a_long_legend_leaves_the_plane_its_room():
    rows = {f"a method with a name of two lines {i}": kl(0.01 * (i + 1)) | nll(1 - 0.01 * i) for i in range(30)}
    results = parsed(raw(base=kl(0, 0) | nll(1.5), **rows))
    figure = _plane(results, forgetting(results), learning(results))
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().height > 0.6


@pytest.mark.parametrize("narrow", [False, True])
def test_the_axis_titles_of_long_names_stay_inside(narrow):
    name = "general knowledge (German), from a folder of notes kl"
    rows = {"base": kl(0, 0) | nll(1.5), "lora": kl(0.2) | nll(0.9), "lora_null_v2": kl(0.01) | nll(0.9)}
    results = parsed(raw(**{row: {name: of["nq kl"], "gsm8k nll": of["gsm8k nll"]} for row, of in rows.items()}))
    figure = _plane(results, forgetting(results), learning(results), narrow=narrow, log=True)
    figure.draw_without_rendering()
    titles = [axis.label.get_window_extent() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)]
    for box in titles:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not titles[0].overlaps(titles[1])


def test_a_row_that_was_not_measured_takes_no_marks_away():
    results = raw(base=kl(0, 0) | nll(1.5), lora=kl(0.5) | nll(0.9), mine=kl(0.1) | nll(0.8), gone={})
    results["rows"][3]["variant"] = "in math"
    cells = next(column for column in build_table(parsed(results)).columns if "KL" in column.heading).cells
    assert cells[2].mark == "best"


def test_colors_belong_to_methods():
    assert row_colors(parsed(measured()))[1:] == [COLORS[m] for m in ("lora", "lora-null-v1", "lora-null-v2")]
    colors = row_colors(parsed(raw(base={}, mine={}, lora={}, yours={})))
    assert len(set(colors)) == 4


def test_all_methods_are_told_apart_in_light_and_in_dark():
    assert set(COLORS) == set(ON_DARK) and set(METHODS) <= set(COLORS)
    assert min(distance(a, b) for a, b in itertools.combinations(COLORS.values(), 2)) >= 20
    assert min(contrast(color, DARK_CARD) for color in ON_DARK.values()) >= 4.5


def test_markers_tell_near_colors_apart():
    rows = {f"mine_{i}": kl(0.1) | nll(0.9) for i in range(8)}  # more than there are colors for methods of one's own
    results = parsed(raw(base=kl(0, 0) | nll(1.5), lora=kl(0.1) | nll(0.9), lora_null_v2=kl(0.1) | nll(0.9), **rows))
    drawn = list(zip(row_colors(results), row_markers(results)))[1:]
    assert len({marker for _, marker in drawn[:9]}) == 9
    near = [(a, b) for (c, a), (d, b) in itertools.combinations(drawn, 2) if distance(c, d) < 20]
    assert near and all(a != b for a, b in near)
    raw_results = measured()
    raw_results["rows"] += [raw_results["rows"][1] | {"variant": f"rank {rank}"} for rank in range(4)]
    markers = row_markers(parse_results(raw_results))
    assert len({markers[1], *markers[4:]}) == 5  # of one method


def test_names_in_the_plane_cover_nothing_and_can_be_read():
    near = measured(lora_null_v1=kl(0.051) | nll(0.956), milora=kl(0.05) | nll(0.957), replay=kl(0.124) | nll(0.98))
    close = {f"method_{i}": kl(0.1 + i / 1e4) | nll(1) for i in range(5)}
    for raw_results, known in ((measured(), 3), (near, 3), (raw(base=kl(0, 0) | nll(1.5), **close), 2)):
        results = parsed(raw_results)
        figure = _plane(results, forgetting(results), learning(results))
        figure.draw_without_rendering()
        texts, labels = figure.axes[0].texts, {wrapped(label) for label in results.labels()}
        names = [text for text in texts if text.get_text() in labels]
        assert len(names) >= known
        for one, other in itertools.combinations(texts, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent())
        for name in names:
            assert contrast(name.get_color(), "#ffffff") >= 4.5
            assert {f"--c{name.get_color()[1:]}"} <= {variable for variable, _, _ in palette(row_colors(results))}


def write_log(folder, entries, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def test_log_of_a_killed_and_resumed_run(tmp_path):
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0, "drift_mean": None}]
    write_log(tmp_path, entries, '{"step": 3, "lo')
    log = load_log(tmp_path / "train_log.jsonl")
    assert log.series("loss") == ([1, 2], [2.0, 1.0]) and log.series("drift_mean") == ([], [])
    assert log.unreadable == 1
    assert load_log(tmp_path / "missing.jsonl").entries == []


def test_the_speed_leaves_out_the_probes_before_the_last_count_of_tokens(tmp_path):
    probes = [{"step": step, "probe/seconds": 5.0} for step in (0, 10, 25)]
    write_log(tmp_path, [*probes, {"step": 10, "tokens": 300}, {"step": 20, "tokens": 600, "seconds": 40.0}])
    assert load_log(tmp_path / "train_log.jsonl").tokens_per_second == 600 / (40 - 2 * 5)


def test_curves_are_drawn_for_those_who_have_a_log(tmp_path):
    results = parsed(measured())
    write_log(tmp_path / "lora", [{"step": step, "loss": 1.0} for step in range(40)])
    logs = [load_log(tmp_path / row.method / "train_log.jsonl") for row in results.rows]
    assert [label for label, _ in curves_picture(results, logs, "loss", "Loss").drawings] == ["LoRA"]
    assert curves_picture(results, logs, "drift_mean", "Drift") is None
    html, text = write(tmp_path, measured())
    assert "No training log for LoRA-Null-v1, LoRA-Null-v2" in html and html.count("<figure>") == 2
    assert "No training log for LoRA-Null-v1, LoRA-Null-v2" in text


# --- terminal ---


def printed(results, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(parsed(results), console)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_table_fits_and_holds_everything(width):
    text = printed(measured(), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert all(word in text for word in ("LoRA-Null-v2", "0.049 ± 0.004", "9.8M", "0.8%"))


def test_terminal_takes_names_literally():
    assert "[bold]x[/nope]" in printed(measured(**{"[bold]x[/nope]": kl(0.2)}), 200)


# --- mistakes ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "the whole file"),
        ('{"schema": 2, "recipe": "a", "model": "b", "rows": [{"method": "base"}]}', "schema 2 needs the version"),
        ('{"schema": 2, "environment": {"lora_null": "0.9.1"}}', "schema 2 needs lora-null 0.9.1, which wrote it"),
        ('{"recipe": "a", "model": "b", "rows": [{"method": "base"}]}', "schema None needs the version"),
        ('{"schema": 1, "recipe": "a", "model": "b", "rows": []}', "rows"),
        ('{"schema": 1, "recipe": "a", "model": "b", "rows": [{"method": "lora"}]}', "untouched base"),
        ('{"schema": 1, "recipe": "a", "model": "b", "rows": [{"method": "base", "rank": "x"}]}', "rows.0.rank"),
    ],
)
def test_a_malformed_file_is_a_mistake_in_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError) as error:
        load_results(tmp_path)
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# --- one writer, one reader ---


def test_results_come_back_as_they_were_written(tmp_path):
    """Nothing is added that was not set, nothing is lost, and the schema stands first."""
    for number, results in enumerate((measured(), measured(full=nll(0.8)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_results(folder, parse_results(results))
        written = json.loads((folder / "results.json").read_text())
        assert written == results and next(iter(written)) == "schema"
        assert load_results(folder) == parse_results(results)


def test_a_row_comes_back_as_it_was_written(tmp_path):
    metric = Metric(0.5, None, 8, True, "task", "fraction")
    row = Row(method="lora", rank=4, diverged=None, metrics={"gsm8k": metric}, seconds=Seconds(init=1.0, train=2.0))
    assert read_row(tmp_path) is None
    write_row(tmp_path, row)
    assert read_row(tmp_path) == row and read_row(tmp_path).metrics["gsm8k"] == metric
    assert set(json.loads((tmp_path / "row.json").read_text())) == {"method", "rank", "diverged", "metrics", "seconds"}
    (tmp_path / "row.json").write_text('{"method": "lora", "rank": "x"}')
    with pytest.raises(UserError, match=r"row\.json: rank"):
        read_row(tmp_path)
    (tmp_path / "row.json").write_text('{"method"')
    with pytest.raises(UserError, match="damaged"):
        read_row(tmp_path)


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_row(tmp_path, Row(method="lora", tokens_per_second=float("nan")))
    assert not list(tmp_path.iterdir())


def test_a_number_beyond_any_measurement_does_not_break_the_pictures(tmp_path):
    _, text = write(tmp_path, measured(pissa=kl(1e300, 1e300) | nll(0.9)))
    assert "| PiSSA | 9.8M | not finite | 0.900 ± 0.010 |" in text


def test_a_metric_without_a_direction_is_shown_and_not_ranked(tmp_path):
    def odd(value):
        return {"odd": metric(value, 0.01, "task", "odd_score", None)}

    results = raw(base=odd(1.0), lora=odd(5.0), pissa=odd(9.0))
    assert learning(parse_results(results)) is None
    _, text = write(tmp_path, results)
    assert "| odd |" in text and "9.000 ± 0.010" in text and "**9" not in text and "learned most" not in text

"""The parts of the report that only a grid, or only one of the paper's models, has."""

import json
import re
import shutil
from pathlib import Path
from statistics import fmean, geometric_mean

from test_grid import made

from lora_null.recipes.report import paper, print_table, write_report
from lora_null.recipes.report.grid_page import grid_content
from lora_null.recipes.report.paper import comparable, paper_average, paper_name, paper_rows, paper_table
from lora_null.recipes.results import load_results, parse_results, write_results

STUDY = Path(__file__).parents[1] / "benchmarks/study"
LLAMA = "meta-llama/Llama-2-7b-hf"


def percent(value, role):
    return {"value": value, "stderr": 0.01, "n": 100, "higher_is_better": True, "role": role, "unit": "fraction"}


def paper_run(model=LLAMA, **changes):
    metrics = {"nq_open": percent(0.0999, "retention"), "gsm8k/strict-match": percent(0.4, "task")} | changes
    rows = [{"method": "base", "metrics": metrics}, {"method": "lora-null-v2", "rank": 128, "metrics": metrics}]
    return {"schema": 1, "recipe": "math", "model": model, "rows": rows}


def cells_of(table):
    return {label: cells for label, *cells in table.rows}


def test_every_row_of_the_paper_is_read():
    rows = paper_rows()
    assert len(rows) == 116 and {row.reading for row in rows} == {"exact", "reconstructed", "unreadable"}
    row = next(r for r in rows if (r.table, r.method, r.rank) == ("1a", "lora-null-v2", 235))
    assert row.metrics == {"TriviaQA": 51.2, "NQ open": 9.7, "WebQS": 6.94, "GSM8K": 44.95, "MATH": 6.34}
    assert all(row.note for row in rows if row.doubtful)


def test_the_papers_average_is_reproduced_in_every_row_that_can_be_read():
    """88 of the 93 whose metrics are all legible, to a hundredth; of the other five the csv says what does not follow."""
    printed = [(row, paper_average(row.metrics, row.task_group)) for row in paper_rows() if row.average is not None]
    known = [(row, mean) for row, mean in printed if mean is not None]
    odd = [row for row, mean in known if abs(row.average - mean) > 0.0101]
    assert (len(printed), len(known), len(odd)) == (97, 93, 5)
    assert all(row.note for row in odd)


def test_names():
    assert paper_name("gsm8k/strict-match") == "GSM8K" and paper_name("nq_open") == "NQ open"
    assert paper_name("math/string_match") == "MATH" and paper_name("math/math_verify") is None
    assert paper_name("gsm8k/metamath_rule") == "GSM8K" and paper_name("gsm8k/exact_match") is None
    assert paper_name("MT-Bench") == "MTBench" and paper_name("MT-Bench turn 2") is None
    assert paper_name("nq_open kl") is None and paper_name("GSM8K nll") is None and paper_name("arc_easy") is None


def test_of_several_settings_none_is_ours():
    found = parse_results(paper_run())
    v2 = next(row for row in found.rows if row.method == "lora-null-v2" and row.rank == 128)
    found.rows.append(v2.model_copy(update={"variant": "lr 0.001"}))
    table = paper_table(found)
    label = "LoRA-Null-v2 (r = 128), table 1a"
    assert cells_of(table)[label][0] == "9.78 / –" and any("ours has 2 settings" in note for note in table.notes)


def test_the_papers_figures_stand_beside_ours_and_doubtful_ones_are_marked(tmp_path):
    found = parse_results(paper_run())
    table = paper_table(found)
    assert table.titles == ["NQ open", "GSM8K", "Avg", "Avg1 (Per)", "GM"]
    cells = cells_of(table)
    assert cells["LoRA-Null-v2 (r = 128), table 1a"] == [
        "9.78 / 9.99",
        "39.65 / 40.00",
        "22.61 / –",
        "22.53 (87.5%) / –",
        "22.63 / –",
    ]
    assert cells["LoRA-Null-v2 (r = 235), table 1a"] == [
        "9.70 / –",
        "44.95 / –",
        "23.83 / –",
        "22.61 (87.8%) / –",
        "24.08 / –",
    ]
    other = cells_of(paper_table(parse_results(paper_run("meta-llama/Meta-Llama-3-8B"))))
    assert other["LoRA (r = 128), table 2a"][1] == "72.86? / –"
    (tmp_path / "results.json").write_text(json.dumps(paper_run()))
    write_report(tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text()
        assert "Beside the paper" in page and "39.65 / 40.00" in page
    assert "44.95" not in (tmp_path / "report.md").read_text().split("Beside the paper")[0]  # in no mean, no mark


def test_the_columns_of_the_aaai_version():
    """Avg1, its share of the base's and GM against the standard library, from the paper's own figures and from ours."""
    raw = json.loads(json.dumps(paper_run()))  # whose rows share their metrics
    ours = {"triviaqa": 0.5, "nq_open": 0.1, "webqs": 0.06}
    for row, scale in ((raw["rows"][0], 1.25), (raw["rows"][1], 1.0)):
        row["metrics"] |= {name: percent(value * scale, "retention") for name, value in ours.items()}
        row["metrics"] |= {"math/string_match": percent(0.05 / scale, "task")}
    cells = cells_of(paper_table(parse_results(raw)))
    theirs = next(r for r in paper_rows() if (r.table, r.method, r.rank) == ("1a", "lora-null-v2", 128)).metrics
    base = next(r for r in paper_rows() if (r.table, r.method) == ("1a", "base")).metrics
    kept, before = (fmean([row[name] for name in ("TriviaQA", "NQ open", "WebQS")]) for row in (theirs, base))
    gm = geometric_mean([kept, fmean([theirs["GSM8K"], theirs["MATH"]])])
    assert cells["LoRA-Null-v2 (r = 128), table 1a"][-2:] == [
        f"{kept:.2f} ({100 * kept / before:.1f}%) / 22.00 (80.0%)",
        f"{gm:.2f} / {geometric_mean([22.0, fmean([40.0, 5.0])]):.2f}",
    ]
    assert cells["base, table 1a"][-1].startswith("– /")  # the base has no task figures
    raw["model"] = "google/gemma-3-1b-pt"  # which no table of the paper's has
    alone = paper_table(parse_results(raw))
    assert cells_of(alone)["LoRA-Null-v2 (r = 128)"][-2:] == [
        "– / 22.00 (80.0%)",
        f"– / {geometric_mean([22.0, fmean([40.0, 5.0])]):.2f}",
    ]
    assert "The paper's tables have no google/gemma-3-1b-pt" in alone.notes
    assert (
        paper.kept_share({"TriviaQA": 1.0}, base) is None and paper.kept_share(base, dict.fromkeys(base, 0.0)) is None
    )
    assert paper.geometric_mean(base | {"MTBench": 5.0}, "instruction") is None  # no percentage
    assert paper.average_of({}, ()) is None


def test_nothing_of_the_paper_where_model_or_task_is_another():
    assert paper_table(parse_results(paper_run("org/model"))) is None
    assert comparable(LLAMA, ["nq_open"]) == []
    assert {row.task_group for row in comparable(LLAMA, ["humaneval"])} == {"code"}
    assert {row.table for row in comparable(LLAMA, ["triviaqa"], "HuggingFaceH4/ultrafeedback_binarized")} == {"4"}


def test_a_grids_settings_are_not_marked_best(tmp_path):
    raw = paper_run()
    raw["rows"].append(raw["rows"][1] | {"method": "lora", "metrics": {"nq_open": percent(0.01, "retention")}})
    gap = {"row": 1, "against": 2, "metric": "nq_open", "mean": 0.0899, "stderr": 0.01, "p": 1e-9, "p_adjusted": 1e-8}
    raw["paired"] = [gap | {"questions": 100, "seeds": 1}]
    (tmp_path / "results.json").write_text(json.dumps(raw))
    write_report(tmp_path)
    assert "**10.0 ± 1.0**" in (tmp_path / "report.md").read_text()
    raw["grid"] = {"seeds": [0], "planned": 9, "cells": []}
    (tmp_path / "results.json").write_text(json.dumps(raw))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<strong>Bold</strong>" in page and "No row is marked best here" not in page  # of one setting
    assert "0 of 9 runs are done." in page
    raw["rows"][2]["variant"] = "lr 0.1"
    (tmp_path / "results.json").write_text(json.dumps(raw))
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "**10.0" not in page and "0 of 9 runs are done" in page
    assert "One table for each level of learning that LoRA reached" in page
    page = (tmp_path / "report.html").read_text()
    assert "No row is marked best here" in page and "<strong>Bold</strong>" not in page
    assert load_results(tmp_path).grid.planned == 9


def test_what_an_unfinished_grid_compares_with_is_named(tmp_path):
    raw = paper_run()
    v2, gap = raw["rows"][1], {"metric": "nq_open", "mean": 0.01, "stderr": 0.01, "p": 0.5, "p_adjusted": 0.5}
    raw["rows"] = [raw["rows"][0], v2 | {"variant": "a"}, v2 | {"method": "nb-lora", "variant": "a"}]
    raw["paired"] = [gap | {"row": 2, "against": 1, "questions": 100, "seeds": 1}]
    raw["grid"] = {"seeds": [0], "planned": 9, "cells": []}

    def page():
        (tmp_path / "results.json").write_text(json.dumps(raw))
        write_report(tmp_path)
        return (tmp_path / "report.md").read_text()

    assert "Each row minus LoRA-Null-v2 at the same settings" in page()
    raw["rows"].append(v2 | {"method": "lora", "variant": "b"})
    assert "Each row minus LoRA (where it was not run: LoRA-Null-v2) at the same settings" in page()


def test_our_average_by_the_papers_definition_stands_beside_the_papers():
    changes = {"triviaqa": percent(0.5, "retention"), "webqs": percent(0.07, "retention")}
    table = paper_table(parse_results(paper_run(**changes, **{"math/string_match": percent(0.06, "task")})))
    ours = (9.99 + 50 + 7 + 40 + 6) / 5
    column = table.titles.index("Avg")
    assert cells_of(table)["LoRA-Null-v2 (r = 128), table 1a"][column].endswith(f" / {ours:.2f}")


def test_a_rate_that_diverged_was_tried(tmp_path, capsys):
    points = {"lora": [[(1.5, 1.01), (1.0, 1.03)]], "mine": [[(1.4, 0.99), (0.9, 1.019)], [(1.4, 0.99)]]}
    found = made(points, base=(2.0, 1.0), kept="q nll", diverged={("mine", 2)})
    table = grid_content(found, {})["tables"][-1]
    assert table["rows"][1][:2] == ["mine", "1 (1 of 2)"]
    assert table["note"].endswith("worse than the base's, by the estimates alone.")
    found.rows[-1].diverged = 3
    print_table(found)
    assert f"{found.labels()[-1]} diverged." in " ".join(capsys.readouterr().out.split())


def test_a_grid_without_its_answers_says_that_errors_are_of_seeds_alone(tmp_path):
    points = {"lora": [[(1.5, 0.1), (1.0, 0.3)]] * 2, "mine": [[(1.4, 0.05), (0.9, 0.2)]] * 2}
    write_results(tmp_path, made(points))
    write_report(tmp_path)
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert text.count("over seeds alone, as the answers are not in this folder") >= 2  # headline, paragraph
        assert "paired with LoRA by seed," in text and "all 0 differences" not in text


def test_the_letters_of_every_drawing_follow_the_page(tmp_path):
    """matplotlib leaves black out and has a second way of naming a font, so that letters stayed dark on the dark page."""
    shutil.copy(STUDY / "rivals.json", tmp_path / "results.json")
    write_report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    drawings = re.findall(r"<svg viewBox.*?</svg>", html, re.DOTALL)
    letters = [style for drawing in drawings for style in re.findall(r'<text style="([^"]*)"', drawing)]
    assert len(letters) > 50 and all("var(--sans)" in style for style in letters) and "DejaVu" not in html
    assert "figure svg text { fill: var(--ink); }" in html
    assert all("fill: var(--" in style for style in letters if "fill" in style)
    for title in ("Across, learned: GSM8K NLL, improvement on the base", "Across, size of the change: ‖ΔW‖ / ‖W₀‖, %"):
        assert html.count(f'<p class="panel">{title}') == 1

"""What a report says beyond one finished run: what to do next, runs that go on, several runs on one page."""

import json
import re
import shutil
from dataclasses import asdict

import pytest

from lora_null.__main__ import main
from lora_null.eval_harness import Evaluation, Metric
from lora_null.recipes.config.run_folder import MARK
from lora_null.recipes.report.after_table import next_step, sequence_tables
from lora_null.recipes.report.dial import Dial, DialPoint, dial_summary, write_dial
from lora_null.recipes.report.drawing import COLORS
from lora_null.recipes.report.headline import headline
from lora_null.recipes.report.render import write_report
from lora_null.recipes.results import (
    Budget,
    Results,
    Row,
    SequenceResults,
    TrainLog,
    Transfer,
    load_results,
    write_results,
    write_row,
)
from lora_null.utils.files import beside, locked


def metrics(nll, kl, other=None):
    found = {
        "NQ kl": Metric(kl, 0.001, 50, False, "retention", "nats"),
        "sums nll": Metric(nll, 0.01, 50, False, "task", "nats"),
    }
    if other is not None:
        found["NQ other form kl"] = Metric(other, 0.001, 50, False, "retention", "nats")
    return found


def results(method="lora", nll=1.0, kl=0.1, other=None):
    rows = [
        Row(method="base", metrics=metrics(2.0, 0.0, other and 0.0)),
        Row(method=method, metrics=metrics(nll, kl, other)),
    ]
    return Results(recipe="r", model="m", rows=rows)


def log(values):
    entries = [
        {"step": 10 * i, "probe/NQ nll": 3 - v, "probe/NQ kl": 0.01 * i, "probe/sums nll": v, "probe/sums kl": 0.1 * i}
        for i, v in enumerate(values)
    ]
    return TrainLog(entries)


FLAT = [2.0, 1.2, 1.05, 1.01, 1.0, 1.0, 1.0, 1.0, 1.0]
ENOUGH = "nothing is to be gained by an earlier end; of another learning rate or a longer schedule they tell nothing."


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2], "Raise the learning rate of LoRA, or train longer"),
        ([2.0, 1.2, 1.0, 1.1, 1.2, 1.4, 1.5], "Stop LoRA earlier: sums NLL was lowest at step 20"),
        (FLAT, ENOUGH),
        ([2.0, 1.6, 1.0, 0.99], ENOUGH),
        (
            [2.0, 2.4, 2.9, 3.1, 5.0],
            "Lower the learning rate of LoRA: sums NLL was never below its 2 of step 0 and is 5",
        ),
        ([2.0, 2.01, 2.03, 2.02], "Lower the learning rate of LoRA"),
        ([2.0, 2.0, 2.0, 2.0, 2.0], "Raise the learning rate of LoRA: sums NLL was never below its 2 of step 0"),
        ([2.0, 1.0, 1.0], "No curve was measured that tells"),
    ],
)
def test_the_curve_of_what_is_learned(tmp_path, curve, said):
    assert said in next_step(results(), tmp_path, [TrainLog([]), log(curve)])


STILL_FALLS = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2]


def test_what_a_budget_has_ended_is_not_to_train_on(tmp_path):
    held = {"measure": "NQ kl", "at_most": 0.1, "then": "stop", "steps": 100, "kept": True}
    unbroken = {"reached": None, "strength": 1.0, "step": 100}
    for how in (unbroken | {"reached": 40}, unbroken | {"strength": 0.3}, unbroken | {"weight": 0.1}):
        found = results()
        if "weight" in how:  # the adapter that was trained has the log, its repaired one the budget
            found.rows.append(Row(method="lora-repaired", metrics=metrics(1.1, 0.05)))
        found.rows[-1].budget = Budget.model_construct(**held, **how)
        said = next_step(found, tmp_path, [TrainLog([]), log(STILL_FALLS), TrainLog([])][: len(found.rows)])
        assert said.startswith("The budget held every method back")


def test_a_rate_that_diverged_is_to_be_lowered(tmp_path):
    found = results()
    found.rows[1].diverged = 35
    said = next_step(found, tmp_path, [TrainLog([]), log(STILL_FALLS)])
    assert said == "Lower the learning rate of LoRA: it diverged at step 35."


@pytest.mark.parametrize("gain, told_of", [(0.02, False), (0.4, True)])
def test_learning_within_its_error_has_no_shares(gain, told_of):
    def points(right, kl):
        return {
            "NQ kl": Metric(kl, 0.001, 50, False, "retention", "nats"),
            "sums": Metric(right, 0.05, 50, True, "task", "fraction"),
        }

    values = [(0.0, 0.2, 0.0), (0.6, 0.2 + gain, 0.03), (1.0, 0.2 + gain, 0.1)]
    dial = Dial(method="lora", model="m", points=[DialPoint(strength=s, metrics=points(a, k)) for s, a, k in values])
    assert bool(dial.shares()) == told_of


def test_a_strength_that_keeps_the_learning(tmp_path):
    points = [(0.0, 2.0, 0.0), (0.6, 1.04, 0.03), (1.0, 1.0, 0.1)]
    dial = Dial(method="lora", model="m", points=[DialPoint(strength=s, metrics=metrics(n, k)) for s, n, k in points])
    write_dial(tmp_path / "lora" / "dial", dial)
    said = next_step(results(), tmp_path, [TrainLog([]), log(FLAT)])
    assert said.startswith("Take strength 0.6 of LoRA: it keeps 96% of the learning at 30% of the forgetting")
    write_results(tmp_path, results())
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert (
        "LoRA by its strength" in page
        and "Take strength 0.6" in page
        and "Take strength 0.6" in (tmp_path / "report.md").read_text()
    )
    drawing = re.search(
        r'<svg [^>]*aria-label="LoRA: learned against forgotten, one point a strength.*?</svg>', page, re.DOTALL
    )
    assert f"var(--c{COLORS['lora'][1:]})" in drawing[0] and all(f">{s:g}</text>" in drawing[0] for s in (0.6, 1))
    assert "<img" not in page and (tmp_path / "lora" / "dial" / "dial.png").is_file()


def test_no_share_of_a_learning_that_was_none(tmp_path):
    """A task that got worse, and a strength at which it got a little less so."""
    points = [(0.0, 1.0, 0.0), (0.6, 1.9, 0.05), (1.0, 2.0, 0.1)]
    dial = Dial(method="lora", model="m", points=[DialPoint(strength=s, metrics=metrics(n, k)) for s, n, k in points])
    write_dial(tmp_path / "lora" / "dial", dial)
    worse = Results(
        recipe="r",
        model="m",
        rows=[Row(method="base", metrics=metrics(1.0, 0.0)), Row(method="lora", metrics=metrics(2.0, 0.1))],
    )
    assert "Take strength" not in next_step(worse, tmp_path, [TrainLog([]), TrainLog([])])
    assert "%" not in dial_summary(dial)


def test_other_texts_to_calibrate_on(tmp_path):
    for method, kl, more in (("lora-null-v2", 0.01, "20 ×"), ("lora-repaired", 0.0011, "180 ×")):
        said = next_step(results(method, kl=kl, other=0.2), tmp_path, [TrainLog([]), log(FLAT)])
        assert said.startswith("Calibrate on more texts like those of NQ other form: LoRA")
        assert f" forgets {more} as much there (0.2 nats per token) as on NQ." in said
    assert "nothing is to be gained" in next_step(
        results("lora", kl=0.01, other=0.2), tmp_path, [TrainLog([]), log(FLAT)]
    )


def test_without_curves_nothing_is_claimed(tmp_path):
    said = next_step(results(), tmp_path, [TrainLog([]), TrainLog([])])
    assert "For an adapter of this run: lora-null dial RUN/METHOD measures it" in said
    assert "lora-null repair RUN/METHOD takes its forgetting out" in said


def test_what_a_run_has_measured_and_repaired_is_not_what_to_do_next(tmp_path):
    """A run that repairs is probed before and after its training."""
    found = results()
    found.rows.append(found.rows[1].model_copy(update={"method": "lora-repaired"}))
    said = next_step(found, tmp_path, [TrainLog([]), log([2.0, 1.0]), TrainLog([])])
    assert said == (
        "No curve was measured that tells what to do next. For an adapter of this run: lora-null dial RUN/METHOD measures it "
        "at other strengths. For the next run: a smaller eval.probe.every (probes at 2 steps are no curve) or eval.strengths."
    )
    write_dial(tmp_path / "lora" / "dial", Dial(method="lora", model="m", points=[DialPoint(strength=0, metrics={})]))
    without_losses = TrainLog([{"step": 0, "probe/NQ kl": 0.0}])
    said = next_step(found, tmp_path, [TrainLog([]), without_losses, TrainLog([])])
    assert said.endswith("what to do next. For the next run: eval.probe of a task's NLL.")


def test_a_sequences_fractions_are_percent_everywhere():
    cell = Metric(0.4, 0.02, 50, True, "task", "fraction")
    changes = {"lost": [(0.051, 0.02)], "ahead": [(-0.03, None)], "backward": (-0.051, 0.02), "average": 0.4}
    found = results().model_copy(
        update={
            "sequence": SequenceResults(
                tasks=["a", "b"],
                metrics=["a", "b"],
                base={"a": cell, "b": cell},
                transfers=[Transfer(method="lora", matrix=[[cell, cell]] * 2, **changes)],
            )
        }
    )
    shown = sequence_tables(found)
    assert shown["head"][-2:] == ["forgotten by the end ↓", "gained before training on it ↑"]
    assert [row[-2:] for row in shown["tables"][0]["rows"]] == [["+5.1 ± 2.0", ""], ["", "-3.0"]]
    assert shown["tables"][0]["rows"][0][1] == "40.0 ± 2.0" and shown["summary"] == [
        ["LoRA", "-5.1 ± 2.0", "–", "40.0"]
    ]


def test_a_sequences_tables_have_units_and_directions():
    def cell(value):
        return Metric(value, 0.01, 50, False, "task", "nats")

    found = results()
    found.sequence = SequenceResults(
        tasks=["sums", "names"],
        metrics=["sums nll", "names nll"],
        base={"sums nll": cell(2.0), "names nll": cell(3.0)},
        transfers=[
            Transfer(
                method="lora",
                matrix=[[cell(1.0), cell(1.27)]] * 2,
                lost=[(0.27, None)],
                ahead=[(0.1, None)],
                average=1.27,
            )
        ],
        knowledge={"lora": {"NQ kl": [Metric(0.02, 0.001, 50, False, "retention", "nats")] * 2}},
    )
    found.base.metrics["NQ kl"] = Metric(0.0, 0.0, 50, False, "retention", "nats")
    shown = sequence_tables(found)
    assert shown["transfers"] == ["Backward transfer, nats ↑", "Forward transfer, nats ↑", "Mean at the end, nats ↓"]
    assert shown["summary"][0][-1] == "1.270"
    assert shown["tables"][0]["rows"][0][:2] == ["sums NLL, nats ↓", "2.000 ± 0.010"]
    assert shown["tables"][0]["rows"][-1][:3] == ["NQ KL, nats ↓", "0.000", "0.020 ± 0.001"]
    assert headline(found).endswith("Learning here is that of sums alone.")


def test_tasks_of_several_units_are_told_to_have_no_mean(tmp_path):
    cells = [Metric(0.4, 0.02, 50, True, "task", unit) for unit in ("nats", "fraction")]
    transfers = [Transfer(method="lora", matrix=[cells, cells], lost=[(0.1, None)], ahead=[(0.2, None)])]
    tasks = {"tasks": ["a", "b"], "metrics": ["a", "b"], "base": dict(zip("ab", cells)), "transfers": transfers}
    write_results(tmp_path, results().model_copy(update={"sequence": SequenceResults(**tasks)}))
    write_report(tmp_path)
    for page in ("report.md", "report.html"):
        said = (tmp_path / page).read_text()
        assert "Here these are of several units (fraction, nats), of which there is no mean (–)." in said


def unfinished(folder):
    """A run that has evaluated the base, finished one method and begun another."""
    (folder / "base").mkdir(parents=True)
    names = "{name: r, model: {name_or_path: m}, method: {name: [lora, pissa, lora-fa]}, seed: 0}"
    (folder / "recipe.yaml").write_text(names)
    evaluation = {
        "metrics": {n: asdict(m) for n, m in metrics(2.0, 0.0).items()},
        "settings": {},
        "seconds": 1.0,
        "samples": {},
    }
    (folder / "base" / "eval.json").write_text(json.dumps(evaluation))
    write_row(folder / "lora", Row(method="lora", metrics=metrics(1.0, 0.1)))
    lines = [{"step": s, "loss": 3 - s / 9, "probe/sums nll": 2 - s / 9} for s in range(1, 6)]
    (folder / "pissa").mkdir()
    (folder / "pissa" / "train_log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo'
    )
    return folder


def test_a_run_that_goes_on_is_reported_and_stays_unfinished(tmp_path, capsys):
    folder = unfinished(tmp_path / "run")
    (left := beside(folder / "unfinished.html")).touch()
    with locked(folder):  # by the run, whose file it may be
        assert main(["report", str(folder)]) == 0 and left.is_file()
    assert main(["report", str(folder)]) == 0 and not left.exists()
    page = (folder / "unfinished.md").read_text()
    assert "**Not finished: 1 of 3 methods. LoRA: KL to base on NQ" in page
    assert "PiSSA (not finished, at step 5)" in page and "| LoRA " in page and "LoRA-FA" not in page
    assert "Next:" not in page  # whose curve still falls: what to do next is to let it end
    assert not (folder / "report.html").exists() and not (folder / "results.json").exists()
    assert capsys.readouterr().out.strip().endswith("unfinished.html")


def test_before_any_method_ends_nothing_is_said_of_a_budget(tmp_path):
    """Of a run that has not evaluated its base either: of all of no methods anything is true."""
    folder = unfinished(tmp_path / "run")
    for gone, said in (
        (("lora", "pissa"), "Only the untouched base was evaluated"),
        (("base",), "Nothing was evaluated"),
    ):
        for name in gone:
            shutil.rmtree(folder / name)
        assert main(["report", str(folder)]) == 0
        page = (folder / "unfinished.md").read_text()
        assert f"**Not finished: 0 of 3 methods. {said}" in page and "Next:" not in page


def test_several_runs_on_one_page(tmp_path, capsys):
    one, other = unfinished(tmp_path / "a" / "run"), tmp_path / "b" / "run"
    write_results(other, results(nll=0.9, kl=0.2))
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    for row in ("LoRA (a/run)", "PiSSA (a/run, not finished, at step 5)", "LoRA (b/run)"):
        assert f"| {row.replace('_', chr(92) + '_')} |" in page
    assert "**Not finished: a/run." in page and "Next:" not in page
    html = (tmp_path / "page" / "report.html").read_text()
    assert "(Holm)" not in page + html and "Bold" not in html  # as nothing was compared question by question
    (tmp_path / "page" / "logs" / "9").mkdir(parents=True)
    (left := beside(tmp_path / "page" / "report.html")).touch()
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "page")]) == 0  # written again
    assert not left.exists()
    assert not (tmp_path / "page" / "logs" / "9").exists()  # of a row that is no longer there
    (other / "recipe.yaml").write_text("model: {name_or_path: m}")
    write_results(other, results(nll=0.9, kl=0.2).model_copy(update={"model": "the/folder/of/m"}))
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "page")]) == 0
    (other / "recipe.yaml").unlink()
    write_results(other, results(nll=0.9, kl=0.2))
    (tmp_path / "file").touch()
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "file")]) == 2
    assert "--out: cannot write to" in capsys.readouterr().err
    write_results(other, results().model_copy(update={"model": "another"}))
    for words, message in (
        ([str(one), str(other)], "have different bases (m, another)"),
        ([str(one), str(one)], "is named twice"),
        ([str(one), str(tmp_path / "nowhere")], "no such folder"),
    ):
        assert main(["report", *words, "--out", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
    write_results(other, results().model_copy(update={"rows": [Row(method="base", metrics=metrics(2.5, 0.0))]}))
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "new")]) == 2
    assert "measured sums nll differently (the base has 2 on 50, 2.5 on 50)" in capsys.readouterr().err


def test_the_settings_of_a_finished_run_and_of_one_that_goes_on_are_compared_alike(tmp_path):
    one, other = unfinished(tmp_path / "one"), tmp_path / "other"
    text = (one / "recipe.yaml").read_text()
    (one / "recipe.yaml").write_text(f"{text[:-1]}, training: {{learning_rate: 0.01, optim: sgd, max_length: 64}}}}")
    settings = {"learning_rate": 0.01, "max_length": 32, "batch": 4}
    write_results(other, results().model_copy(update={"settings": settings, "seed": 1}))
    assert main(["report", str(one), str(other), "--out", str(tmp_path / "page")]) == 0
    shown = load_results(tmp_path / "page").settings
    assert shown == {"learning_rate": 0.01, "differs: max_length": "64; 32", "differs: seed": "0; 1"}


def test_a_page_of_several_runs_has_every_base_and_no_adapter_that_is_not_there(tmp_path):
    of_run = {"a": ["NQ kl"], "b": ["NQ kl", "sums nll"], "c": ["other nll"]}
    known = metrics(2.0, 0.0) | {"other nll": Metric(3.0, 0.01, 50, False, "task", "nats")}
    for run, names in of_run.items():
        measured = {name: known[name] for name in names}
        rows = [Row(method="base", metrics=measured), Row(method="lora", adapter_params=9, metrics=measured)]
        write_results(tmp_path / run, Results(recipe="r", model="m", rows=rows))
    assert main(["report", *(str(tmp_path / run) for run in of_run), "--out", str(tmp_path / "page")]) == 0
    assert load_results(tmp_path / "page").base.metrics == known
    for said in ("lora/adapter", "Next:"):  # curves and strengths are in the runs' own folders, too
        assert said in (tmp_path / "a" / "report.md").read_text()
        assert said not in (tmp_path / "page" / "report.md").read_text()


def test_every_two_of_several_runs_must_be_alike(tmp_path, capsys):
    for run, measured in {"a": {}, "b": metrics(2.0, 0.0), "c": metrics(2.5, 0.0)}.items():
        rows = [Row(method="base", metrics=measured), Row(method="lora", metrics=metrics(1.0, 0.1))]
        write_results(tmp_path / run, Results(recipe="r", model="m", rows=rows))
    assert main(["report", *(str(tmp_path / run) for run in "abc"), "--out", str(tmp_path / "page")]) == 2
    assert "b and " in (said := capsys.readouterr().err) and "c measured sums nll differently" in said


@pytest.mark.parametrize("evaluated", ["base", "lora"])  # eval.before=false leaves no evaluation of the base
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pairs_sha256", "with other rows"),
        ("documents_sha256", "with other rows"),
        ("rules_sha256", "with other rules"),
        ("num_fewshot", "with other num_fewshot (0.1, 0.5)"),
        ("beta", "with other beta (0.1, 0.5)"),
        ("limit", ""),
    ],
)
def test_runs_whose_bases_have_the_same_number_by_definition_must_be_alike_too(
    tmp_path, capsys, key, message, evaluated
):
    measured = {"P reward margin": Metric(0.0, 0.0, 50, True, "task", "nats")}
    for run, value in (("a", 0.1), ("b", 0.5)):
        rows = [Row(method="base", metrics=measured), Row(method="lora", metrics=measured)]
        write_results(tmp_path / run, Results(recipe="r", model="m", rows=rows))
        (tmp_path / run / evaluated).mkdir()
        evaluation = Evaluation(measured, {"tasks": {"P": {key: value}}}, 1.0)
        (tmp_path / run / evaluated / "eval.json").write_text(evaluation.to_json())
    said = main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "page")])
    assert said == (2 if message else 0) and message in capsys.readouterr().err


def test_the_page_of_a_sequence_that_goes_on_is_that_of_its_last_finished_task(tmp_path, capsys):
    folder, tasks = unfinished(tmp_path / "run"), "{name: one}, {name: two}"
    text = f"{MARK}{{name: r, model: {{name_or_path: m}}, sequence: {{tasks: [{tasks}]}}, method: {{name: [lora]}}}}"
    (folder / "recipe.yaml").write_text(text)
    for number, name in enumerate(("one", "two"), 1):
        write_row(folder / "tasks" / f"{number}-{name}" / "lora", Row(method="lora", metrics=metrics(1.0, 0.1)))
    first, second = folder / "tasks" / "1-one", folder / "tasks" / "2-two"
    (first / "recipe.yaml").write_text(text.replace(tasks, ""))

    def said(page):
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr().out.strip() == str(page)
        return page.with_suffix(".md").read_text()

    assert "sums NLL 2.000 ± 0.010 before" in said(first / "unfinished.html")
    write_results(first, results())
    assert "Only the untouched base" not in said(first / "report.html")
    assert not (second / "unfinished.html").exists() and not (folder / "unfinished.html").exists()

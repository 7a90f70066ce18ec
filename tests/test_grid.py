"""Grids: every run once, equal by construction, continued after a kill, and what the report makes of them."""

import json
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from engine_worlds import world
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy import stats
from tiny import tiny_tokenizer
from tqdm import tqdm
from world import make_world, results

from lora_null.__main__ import main as command
from lora_null.eval_harness import AnswerTask, Evaluation, Metric, PreferenceTask
from lora_null.eval_harness.likelihood import TokenizedPair
from lora_null.recipes import measure, run
from lora_null.recipes.__main__ import main
from lora_null.recipes.comparisons import read_evaluations
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import GridSection
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.recipes.grid import Cell, grid_cells, mean_row, space_of_grid, starts_alike
from lora_null.recipes.job import check_asked_alike
from lora_null.recipes.processes import hold_grid_folder, work_alone
from lora_null.recipes.report import render, write_report
from lora_null.recipes.report.drawing import svg
from lora_null.recipes.report.equal_learning import equal_learning, forgetting_at
from lora_null.recipes.report.grid_figures import Frontiers
from lora_null.recipes.report.grid_page import grid_content, grid_headline
from lora_null.recipes.report.headline import headline
from lora_null.recipes.report.table import build_table
from lora_null.recipes.results import (
    Budget,
    Estimate,
    Paired,
    Row,
    load_results,
    mean,
    mean_in,
    parse_results,
    variant_of,
    write_results,
    write_row,
)
from lora_null.utils.errors import UserError
from lora_null.utils.files import remove_parts
from lora_null.utils.startup import WORKER, WORKERS

WORDS = ["--method", "lora,lora-null-v2,pissa", "--seeds", "0,1", "--sweep", "training.learning_rate=3e-3,1e-2"]
WORDS += ["training.max_steps=2", "training.save_strategy=no"]
POINTS = ("learning_rate=0.003", "learning_rate=0.01")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    assert main([str(make_world(folder)), *WORDS]) == 0
    return folder


def log(folder, point, seed, method):
    lines = (folder / "out" / "cells" / point / f"seed={seed}" / method / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_leaves_ordinary_runs_and_one_base(grid):
    out = grid / "out"
    for name in ("recipe.yaml", "results.json", "report.md", "report.html", "forgetting.png", "base/eval.json"):
        assert (out / name).stat().st_size > 0
    assert len(list(out.rglob("base"))) == 1
    for point in POINTS:
        for seed in (0, 1):
            cell = out / "cells" / point / f"seed={seed}"
            own = json.loads((cell / "results.json").read_text())
            assert [row["method"] for row in own["rows"]] == ["base", "lora", "lora-null-v2", "pissa"]
            assert own["seed"] == seed and own["settings"]["learning_rate"] == float(point.split("=")[1])
            assert (cell / "report.html").is_file() and (cell / "pissa" / "adapter").is_dir()


def test_a_dial_of_one_run_takes_the_base_of_all(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("the base was evaluated again"))
    method = grid / "out" / "cells" / POINTS[0] / "seed=0" / "lora"
    assert command(["dial", str(method), "--strengths", "0", "--out", str(tmp_path)]) == 0


def test_rows_are_means_over_the_seeds(grid):
    found = results(grid)
    assert found["seed"] is None and found["grid"]["planned"] == len(found["grid"]["cells"]) == 12
    assert found["grid"]["differing"]["learning_rate"] == [3e-3, 1e-2]
    assert not any(key.startswith("training.") for key in found["grid"]["differing"])
    row = next(r for r in found["rows"] if r["method"] == "pissa" and r["variant"] == "lr 0.01")
    values = [c["metrics"]["facts kl"]["value"] for c in found["grid"]["cells"]
              if c["method"] == "pissa" and c["point"]["training.learning_rate"] == 1e-2]  # fmt: skip
    assert row["runs"] == len(values) == 2
    assert row["metrics"]["facts kl"]["value"] == pytest.approx(np.mean(values))
    assert row["metrics"]["facts kl"]["stderr"] >= stats.sem(values)  # questions count beside the seeds
    page = (grid / "out" / "report.html").read_text()
    assert "Forgetting at equal learning" in page and "LoRA-Null-v2 (lr 0.003)" in page


def test_runs_of_a_seed_are_equal_by_construction(grid):
    for seed in (0, 1):
        first = [log(grid, point, seed, method)[0] for point in POINTS for method in ("lora", "lora-null-v2", "pissa")]
        tokens = [[line["tokens"] for line in log(grid, p, seed, m)] for p in POINTS for m in ("lora", "pissa")]
        assert all(steps == tokens[0] for steps in tokens) and len(tokens[0]) == 2
        assert all(line["loss"] == pytest.approx(first[0]["loss"], rel=1e-4) for line in first)
        assert all(line["loss"] == first[0]["loss"] for line in (first[3],))  # lora at either rate: the same bits
    assert log(grid, POINTS[0], 0, "lora")[0]["loss"] != log(grid, POINTS[0], 1, "lora")[0]["loss"]


@pytest.mark.parametrize("method", ["lora-null-v2", "pissa"])
def test_an_initialization_is_computed_once_a_seed(grid, method):
    places = [grid / "out" / "cells" / point / f"seed={seed}" / method / "init" for seed in (0, 1) for point in POINTS]
    files = [sorted(place.glob("factors.*safetensors")) for place in places]
    starts = [
        {f"{path.name} {key}": value for path in paths for key, value in load_file(path).items()} for paths in files
    ]
    assert all(starts)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(starts[a][key], starts[b][key]) for key in starts[a])


def test_every_two_methods_are_compared_at_equal_settings(grid):
    found = load_results(grid / "out")
    named = {(found.rows[e.row].method, found.rows[e.against].method, e.metric) for e in found.paired}
    assert {("pissa", "lora", "facts kl"), ("lora-null-v2", "base", "numbers nll")} <= named
    assert all(e.against == 0 or found.rows[e.row].variant == found.rows[e.against].variant for e in found.paired)
    assert all(e.seeds == 2 and e.questions in (10, 12) for e in found.paired)
    assert all(e.p <= e.p_adjusted for e in found.paired)


def test_a_killed_grid_goes_on_where_it_was(grid, tmp_path, monkeypatch, capsys):
    recipe, trained, original = make_world(tmp_path), [], run._make_trainer

    def counted(job, plan, folder):
        trained.append((job.recipe.seed, job.recipe.training["learning_rate"], plan.name))
        if len(trained) == 5 and not (tmp_path / "resumed").exists():
            raise KeyboardInterrupt
        return original(job, plan, folder)

    monkeypatch.setattr(run, "_make_trainer", counted)
    assert main([str(recipe), *WORDS]) == 130
    assert "stopped; kept in" in capsys.readouterr().err
    assert len(results(tmp_path)["grid"]["cells"]) == 4  # one of them in a cell whose other methods are not done
    assert main([str(recipe), *WORDS]) == 2 and "--resume continues it" in capsys.readouterr().err
    (tmp_path / "resumed").touch()
    assert main([str(recipe), *WORDS, "--resume"]) == 0
    assert len(trained) == 13 and len(set(trained)) == 12  # the one that was killed, twice
    ours, theirs = results(tmp_path), results(grid)
    for a, b in zip(ours["grid"]["cells"], theirs["grid"]["cells"]):
        assert a["folder"] == b["folder"] and a["metrics"] == b["metrics"]
    shown = capsys.readouterr().out
    assert "[5/12]" in shown and "[12/12]" in shown and "left" in shown and "[4/12]" not in shown
    assert main([str(recipe), *WORDS]) == 2 and "finished run" in capsys.readouterr().err


def test_two_processes_share_out_the_runs(grid, tmp_path):
    """Each takes whole runs, which are what one process alone makes of them, to the last bit."""
    ended = world(2, [str(make_world(tmp_path)), *WORDS], tmp_path / "said.txt")
    said = (tmp_path / "said.txt").read_text()
    assert ended == [0, 0], said[-2000:]
    ours, theirs = results(tmp_path), results(grid)
    assert [(row["method"], row["variant"], row["metrics"]) for row in ours["rows"][1:]] == [
        (row["method"], row["variant"], row["metrics"]) for row in theirs["rows"][1:]
    ]
    for place in sorted((grid / "out").rglob("adapter_model.safetensors")):
        assert place.read_bytes() == (tmp_path / "out" / place.relative_to(grid / "out")).read_bytes()
    assert len(re.findall(r"\[\d+/12\]", said)) == 12 and said.count("report: ") == 1
    made = [path for path in (tmp_path / "out").glob(".*") if path.name not in (".lock", ".launch.part")]
    assert not made, made


def test_a_diverged_run_is_recorded_and_the_grid_goes_on(tmp_path):
    words = ["--method", "lora,full", "--sweep", "training.learning_rate=1e30,1e-3", "training.max_steps=3"]
    assert main([str(make_world(tmp_path)), *words, "training.save_strategy=no"]) == 0
    found = results(tmp_path)
    assert len(found["grid"]["cells"]) == 4
    for cell in found["grid"]["cells"]:
        wild = cell["point"]["training.learning_rate"] == 1e30
        assert (cell["diverged"] is not None) == wild and bool(cell["metrics"]) != wild
    page = (tmp_path / "out" / "report.md").read_text()
    assert "diverged |" in page and "Diverged: LoRA in cells/learning" in page.replace("\\", "")
    assert not (tmp_path / "out" / "cells" / "learning_rate=1e+30" / "seed=0" / "lora" / "adapter").exists()


def test_a_method_may_have_values_of_its_own(tmp_path, capsys):
    raw = {
        "sweep": {"training.learning_rate": [1e-3, 1e-2]},
        "per_method": {"full": {"training.learning_rate": [1e-4, 1e-3]}},
    }
    recipe = load_recipe(str(make_world(tmp_path, grid=raw)), methods="lora,full", seeds="3")
    cells = {dict(cell.point)["training.learning_rate"]: cell.methods for cell in grid_cells(recipe)}
    assert cells == {1e-3: ("lora", "full"), 1e-2: ("lora",), 1e-4: ("full",)}
    assert main([str(make_world(tmp_path, grid=raw)), "--method", "lora,full", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "base/eval.json, cells/…/lora/init/, cells/…/lora/adapter/" in out
    assert "grid: 4 runs, each method for seeds 0; training.learning_rate = 0.001, 0.01\n" in out
    assert "\n      full: training.learning_rate = 0.0001, 0.001\n" in out
    swept = load_recipe(
        str(make_world(tmp_path, grid=raw)), methods="lora,full", sweeps=["training.learning_rate=5e-3"]
    )
    assert [cell.methods for cell in grid_cells(swept)] == [("lora", "full")]  # asked for on the command line
    assert "is not read" not in capsys.readouterr().err
    words = ["method.options={replay: {share: 0.5}, eva: {}}"]
    load_recipe(str(make_world(tmp_path, grid=raw)), words, methods="lora")
    said = capsys.readouterr().err
    assert "method.options: is not read for replay, which method.name does not have\n" in said
    assert "grid.per_method: is not read for full, which method.name does not have\n" in said


def test_the_space_of_a_grid_without_weights_is_that_of_the_runs_at_a_time(monkeypatch):
    recipe = load_recipe("quickstart", ["grid.keep_weights=false"], methods="lora,full", seeds="0,1,2")
    plans = [SimpleNamespace(name=name, written_bytes=size) for name, size in (("lora", 5), ("full", 70))]
    job = SimpleNamespace(plans=plans, reference_bytes=1)
    for workers, size in (("1", 71), ("2", 141), ("9", 226)):
        monkeypatch.setenv(WORKERS, workers)
        assert space_of_grid(recipe, grid_cells(recipe), job) == size


def test_only_what_starts_alike_shares_its_start():
    rates, lengths = {"training.learning_rate": [1e-3]}, {"training.max_length": [64]}
    assert all(starts_alike(GridSection(sweep=sweep)) for sweep in (rates, {}))
    assert not any(starts_alike(GridSection(sweep=sweep)) for sweep in (rates | lengths, {"method.rank": [4]}))


def test_a_swept_rank_starts_anew_and_is_reported(tmp_path):
    words = ["--method", "lora,pissa", "--sweep", "method.rank=2,4", "training.max_steps=1", "eval.limit=4"]
    assert main([str(make_world(tmp_path)), *words, "training.save_steps=1", "grid.keep_weights=false"]) == 0
    kept = {path.name for path in (tmp_path / "out" / "cells").rglob("*") if path.parent.name == "pissa"}
    assert "row.json" in kept and not kept & {"adapter", "checkpoint-1"}
    rows = [row for row in results(tmp_path)["rows"] if row["method"] == "pissa"]
    assert [(row["rank"], row["variant"]) for row in rows] == [(2, "rank 2"), (4, "rank 4")]
    shapes = [
        load_file(tmp_path / "out" / "cells" / f"rank={r}" / "seed=0" / "pissa" / "init" / "factors.model.layers.0.safetensors")
        ["model.layers.0.mlp.up_proj.A"].shape for r in (2, 4)
    ]  # fmt: skip
    assert shapes == [(2, 32), (4, 32)]


def test_checkpoints_whose_removal_was_killed_go_when_the_run_goes_on(tmp_path, monkeypatch):
    write_row(tmp_path / "lora", Row(method="lora"))
    (tmp_path / "lora" / "checkpoint-1").mkdir()
    job = SimpleNamespace(folder=tmp_path, plans=[SimpleNamespace(name="lora")], keep_weights=False)
    job.data, job.windows = SimpleNamespace(bad=[]), []
    job.recipe = SimpleNamespace(method=SimpleNamespace(name=["lora"]), repairs=False)
    monkeypatch.setattr(run, "evaluate_base", lambda job: Row(method="base"))
    monkeypatch.setattr(run, "_results", lambda job, rows: None)
    monkeypatch.setattr(run, "write_run_card", lambda *_: None)

    def stop(row):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run.run_job(job, stop)
    assert not (tmp_path / "lora" / "checkpoint-1").exists()


def test_a_rank_of_one_methods_own_need_not_suit_the_others(tmp_path):
    own = {"sweep": {"method.rank": [4]}, "per_method": {"full": {"method.rank": [64]}}}  # more than a layer's width
    recipe = make_world(tmp_path, grid=own)
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write('{"question": "what?", "answer": ""}\n')
    words = ["--method", "lora,full", "training.max_steps=1", "eval.limit=4", "training.save_strategy=no"]
    assert main([str(recipe), *words, "data.on_bad_row=skip"]) == 0
    assert json.loads((next((tmp_path / "out" / "cells").rglob("rows_left_out.json"))).read_text())[0]["row"] == 41
    assert sorted(row["method"] for row in results(tmp_path)["rows"]) == ["base", "full", "lora"]


def test_quick_is_laid_over_the_recipe_and_under_the_command_line(tmp_path):
    quoted = load_recipe(str(make_world(tmp_path)), sweeps=['method.target_modules="q_proj, v_proj",o_proj'])
    assert quoted.grid.sweep == {"method.target_modules": ["q_proj, v_proj", "o_proj"]}
    path = str(make_world(tmp_path, quick={"training.max_steps": 1, "grid.seeds": [7], "eval.limit": 3}))
    recipe = load_recipe(path, ["eval.limit=5"], quick=True)
    assert (recipe.training["max_steps"], recipe.grid.seeds, recipe.eval.limit, recipe.quick) == (1, [7], 5, {})
    assert load_recipe(path).training["max_steps"] == 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sweep", "method.target_modules=[q_proj,v_proj]"], "a swept value is a finite number, a text, true or"),
        (["--sweep", "eval.limit=1,2"], "'eval.limit' cannot be swept, only keys of training, method"),
        (["--sweep", "training.learning_rate"], "expected key.subkey=value,value"),
        (["--sweep", "training.learning_rate=1e-3,1e-3"], "needs values, each once"),
        (["--sweep", "training.learning_rat=1e-3,1e-2"], "no key 'learning_rat' (did you mean"),
        (["--sweep", "training.learning_rate=1e-3,-1"], "must be a number greater than 0"),
        (["--sweep", "method.rank=4,33"], "r: 33 is larger than"),
        (["--sweep", "calibration.samples=9,12", "method.init=x"], "calibration.samples changes nothing, method.init"),
        (["--sweep", "method.rank=2,4", "method.match=9K"], "method.rank changes nothing, method.match=9K sets it"),
        (["--seeds", "0,0"], "a seed is named twice"),
        (["--seeds", "0,x"], "grid.seeds"),
        (["--quick"], "has no quick form"),
        (["method.match=lroa"], "neither a count of parameters"),
        (["method.options.roselora.clmp=1"], "no option 'clmp' (did you mean 'clamp'?)"),
        (["--method", "./mine.py"], "no file ./mine.py"),
    ],
)
def test_mistakes_are_said_before_a_model_loads(tmp_path, monkeypatch, capsys, words, message):
    def load(*_):
        raise AssertionError("a model was loaded")

    recipe = make_world(tmp_path)
    monkeypatch.setattr(measure, "base_to_run", load)
    assert main([str(recipe), *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_swept_decay_is_checked_where_it_is_none(tmp_path, capsys):
    recipe = make_world(tmp_path)
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: 4\n  weight_decay: 1"))
    words = ["--method", "pissa", "method.decay_to_start=true", "--dry-run", "--sweep"]
    assert main([str(recipe), *words, "training.weight_decay=1,0"]) == 2
    assert "method.decay_to_start: there is no decay" in capsys.readouterr().err
    assert main([str(recipe), *words, "training.weight_decay=1,0.1"]) == 0


def test_a_metric_that_some_runs_lack_is_left_out_of_the_mean():
    """A judge that did not answer for one seed: the grid ends, and the mean is not that of the others."""
    known = {"a nll": Metric(1.0, 0.1, 8, False, "task", "nats")}
    rows = [
        Row(method="lora", metrics=known | {"MT-Bench": Metric(5.0, 0.1, 8, True, "task", "points")}),
        Row(method="lora", metrics=known),
    ]
    for order in (rows, rows[::-1]):
        assert mean_row(order, None).metrics.keys() == {"a nll"}


def test_what_is_asked_otherwise_than_the_base_is_refused():
    def job(*texts, beta=0.1):
        pairs = [TokenizedPair((1, 2, 3), 1)]
        tasks = [
            AnswerTask("facts", [(text, "x") for text in texts]),
            PreferenceTask("pairs", pairs, pairs, beta, "task"),
        ]
        return SimpleNamespace(tasks=tasks, recipe=SimpleNamespace(eval=SimpleNamespace(limit=None)))

    check_asked_alike(job("q"), job("q", beta=0.5), "grid.sweep")
    with pytest.raises(
        UserError, match=r"grid\.sweep, x: facts would be asked otherwise than the base was; keep data\.template"
    ):
        check_asked_alike(job("p"), job("q"), "grid.sweep, x")


def test_the_study_is_what_the_readme_says():
    study = load_recipe("study")
    cells = grid_cells(study)
    assert sum(len(cell.methods) for cell in cells) == (11 + 4) * 3 * 3 and len({cell.seed for cell in cells}) == 3
    assert cells[0].seed == cells[4].seed == 0  # a whole seed before the next
    quick = load_recipe("study", quick=True)
    assert sum(len(cell.methods) for cell in grid_cells(quick)) == 12 * 2
    for entry in (*study.eval.retention, *study.eval.task, study.calibration):
        assert Path(entry.path).is_file()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tasks = eval_tasks(EvalContext(study, tokenizer))
    sizes = {"NQ": 128, "WebQS": 128, "WikiText": 48, "Instructions": 64, "Code": 64, "GSM8K": 64}
    assert {task.name: len(task.pairs) for task in tasks} == sizes
    assert all(prompt.strip() and answer.strip() for task in tasks for prompt, answer in task.pairs)


@pytest.mark.parametrize(("visible", "index", "gpu"), [(None, 2, "2"), ("4,5,7", 2, "7"), ("4,5", 2, "4")])
def test_each_worker_begins_anew_with_a_gpu_of_its_own(monkeypatch, visible, index, gpu):
    """CUDA reads what it may use once, and that was before: at least to find out whether there is any."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": 1}
    environment = {name: str(value) for name, value in place.items()} | {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(os, "environ", {key: value for key, value in environment.items() if value is not None})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "lora_null.recipes", "study"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)
    began = []
    monkeypatch.setattr(os, "execv", lambda *words: began.append(words))
    for _ in range(2):  # as it was launched, and begun anew
        work_alone()
    assert began == [(sys.executable, [sys.executable, "-u", "-m", "lora_null.recipes", "study"])]
    assert os.environ == {WORKER: "2", WORKERS: "3", "CUDA_VISIBLE_DEVICES": gpu}
    assert sys.stdout.name == os.devnull


def test_a_worker_that_comes_when_all_is_done_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKERS, "2")
    for index in ("0", "1", "1"):
        monkeypatch.setenv(WORKER, index)
        with hold_grid_folder(tmp_path, nullcontext()):
            (mark,) = tmp_path.iterdir()  # of this launch
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)  # another launcher with the same number
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    with pytest.raises(pytest.fail.Exception, match="waits"), hold_grid_folder(tmp_path, nullcontext()):
        pass
    remove_parts(tmp_path)
    assert not mark.exists()


def test_two_processes_run_every_kind_of_method(tmp_path):
    """Random starts, factors by turns, gradients, training rows, whole weights: the same on both processes."""
    recipe = make_world(tmp_path)
    names = "full,corda,roselora,eva,lora-ga"
    words = [str(recipe), "--method", names, "training.max_steps=3", "training.save_strategy=no"]
    words += ["method.options.eva.batch_rows=20", "method.options.lora-ga.rows=8"]
    said = tmp_path / "said.txt"
    assert world(2, [*words, "--output-dir", str(tmp_path / "two")], said) == [0, 0], said.read_text()[-3000:]
    assert main([*words, "--output-dir", str(tmp_path / "one")]) == 0
    one, both = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two"))
    for a, b in zip(one, both):
        assert a["trainable_params"] == b["trainable_params"]
        for name, metric in a["metrics"].items():
            assert b["metrics"][name]["value"] == pytest.approx(metric["value"], rel=3e-2, abs=3e-3), (
                a["method"],
                name,
            )


# --- what the report computes ---


def made(points, *, base=(2.0, 0.0), diverged=(), kept="q kl", more=None, of_kept=()):
    """A grid's results by hand: points[method][seed] = [(task nll, kl), …] for rates 1, 2, …; `more` of a method's settings."""

    def metrics(task, kl):
        kind = {"stderr": 0.01, "n": 9, "higher_is_better": False, "unit": "nats"}
        return {
            kept: {"value": kl, "role": "retention", **kind, **dict(of_kept)},
            "t nll": {"value": task, "role": "task", **kind},
        }

    cells = [
        {"method": method, "folder": "f", "seed": seed,
         "point": {"training.learning_rate": float(rate)} | (more or {}).get(method, {}),
         "diverged": 3 if (method, rate) in diverged else None,
         "metrics": {} if (method, rate) in diverged else metrics(*place)}
        for method, seeds in points.items()
        for seed, path in enumerate(seeds)
        for rate, place in enumerate(path, start=1)
    ]  # fmt: skip
    rows = [{"method": "base", "metrics": metrics(*base)}]
    for cell in cells:
        cell["method"] = cell["method"].split(" ")[0]
    rows += [
        {"method": cell["method"], "variant": variant_of(cell["point"]), "metrics": cell["metrics"]} for cell in cells
    ]
    seeds = sorted({cell["seed"] for cell in cells})
    grid = {"seeds": seeds, "sweep": {}, "planned": len(cells), "cells": cells}
    return parse_results({"schema": 1, "recipe": "r", "model": "m", "rows": rows, "grid": grid})


def test_forgetting_at_by_hand():
    path = [(0, 0), (1.0, 0.2), (0.8, 0.5), (2.0, 1.2)]
    assert forgetting_at(path, 0.995).value == pytest.approx(0.199)
    assert forgetting_at(path, 1.4).value == pytest.approx(0.5 + 0.5 * 0.7)
    assert forgetting_at(path, 2.1) is None and forgetting_at(path, 0.995).influences == []
    for far_below in (0.5, 0.95):  # between the base and the first run forgetting does not rise linearly
        assert forgetting_at(path, far_below) is None


def test_each_questions_part_is_how_the_reading_follows_it():
    """Against a numerical derivative: a reading is a function of the means over questions."""
    generator = np.random.default_rng(0)
    learned = generator.normal([[1.0], [2.0]], 0.1, (2, 6))
    kept = generator.normal([[0.3], [0.7]], 0.05, (2, 9))

    def read(learned, kept):
        return forgetting_at([(0, 0), *zip(learned.mean(1), kept.mean(1))], 1.5)

    parts = [(None, None), *((x - x.mean(), y - y.mean()) for x, y in zip(learned, kept))]
    of_kept, of_learned = forgetting_at([(0, 0), *zip(learned.mean(1), kept.mean(1))], 1.5, parts).influences
    for which, part, n in ((1, of_kept, 9), (0, of_learned, 6)):
        for q in range(n):  # a question counted a little more
            moved = [learned.copy(), kept.copy()]
            more = moved[which][:, q : q + 1]
            moved[which] += 1e-6 / n * (more - moved[which].mean(1, keepdims=True))
            slope = (read(*moved).value - read(learned, kept).value) / 1e-6
            assert slope == pytest.approx(part[q] / n, rel=1e-3, abs=1e-8)


def with_answers(learned, kept):
    """A grid of methods at two rates, and the answers behind it: {method: [rates, questions]} of losses and KLs."""
    results = made({m: [list(zip(learned[m].mean(1).tolist(), kept[m].mean(1).tolist()))] for m in learned})

    def asked(losses, distances):
        samples = {"t nll": list(losses), "q kl": list(distances)}
        roles = {"t nll": "task", "q kl": "retention"}
        metrics = {n: Metric(float(np.mean(x)), 0.1, len(x), False, roles[n], "nats") for n, x in samples.items()}
        return {0: Evaluation(metrics, {}, 0.0, samples)}

    ends = [(learned[method][rate], kept[method][rate]) for method in learned for rate in range(2)]
    base = (np.full_like(ends[0][0], 2.0), np.zeros_like(ends[0][1]))
    return results, {i: asked(*end) for i, end in enumerate([base, *ends])}


def test_the_level_moves_with_its_questions():
    """Against a numerical derivative of the whole reading: LoRA's level is of the same questions as what others learned."""
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 0.3, 12)
    learned = {m: np.array(ends)[:, None] + hard + generator.normal(0, 0.02, (2, 12)) for m, ends in
               (("lora", (1.4, 1.0)), ("mine", (1.5, 0.9)))}  # fmt: skip
    kept = {m: np.array(ends)[:, None] * generator.uniform(0.5, 1.5, (2, 8)) for m, ends in
            (("lora", (0.1, 0.4)), ("mine", (0.01, 0.04)))}  # fmt: skip
    results, found = with_answers(learned, kept)
    mine = equal_learning(results, "q kl", "t nll", found)[-1].rows[1]

    def read(learned, kept):
        """mine − lora at what lora has learned at its second rate, of plain numbers."""
        (x0, x1), (y0, y1) = learned["mine"].mean(1), kept["mine"].mean(1)
        level = learned["lora"][1].mean()
        return y0 + (y1 - y0) * (level - x0) / (x1 - x0) - kept["lora"][1].mean()

    assert mine.difference.value == pytest.approx(read(learned, kept))
    variance = 0.0
    for which, n in ((learned, 12), (kept, 8)):
        parts = []
        for q in range(n):
            moved = {m: x + 1e-6 / n * (x[:, q : q + 1] - x.mean(1, keepdims=True)) for m, x in which.items()}
            both = (moved, kept) if which is learned else (learned, moved)
            parts.append((read(*both) - read(learned, kept)) / 1e-6 * n)
        variance += np.square(parts).sum() / (n * (n - 1))
    assert mine.difference.stderr == pytest.approx(variance**0.5, rel=1e-3)
    assert mine.p < 0.001 and "mine forgot less than LoRA" in grid_headline(results, found)


def test_an_error_that_half_of_the_questions_tell_is_none():
    """Forgetting as word_perplexity has no value for each question: what the task's questions tell is not its error."""
    learned = {"lora": np.full((2, 9), 1.4), "mine": np.full((2, 9), 1.5)}
    for method, end in (("lora", 1.0), ("mine", 0.9)):
        learned[method][1] = end + np.linspace(-0.1, 0.1, 9)
    kept = {"lora": np.outer([0.1, 0.4], np.ones(8)), "mine": np.outer([0.01, 0.04], np.ones(8))}
    results, found = with_answers(learned, kept)
    assert equal_learning(results, "q kl", "t nll", found)[-1].rows[1].p is not None
    for evaluations in found.values():
        del evaluations[0].samples["q kl"]
    lora, mine = equal_learning(results, "q kl", "t nll", found)[-1].rows
    assert (lora.value.stderr, mine.value.stderr, mine.p) == (None, None, None)
    said = grid_headline(results, found)
    assert "no other method could be compared with it" in said and "distinguishable" not in said
    assert "Not compared with LoRA (too few questions or seeds in common): mine." in said


def test_one_of_several_seeds_is_no_test():
    lora, never = [[(1.0, 0.40)], [(1.0, 0.44)], [(1.0, 0.42)]], [(1.5, 0.01), (1.2, 0.03)]
    found = made({"lora": lora, "mine": [[(1.6, 0.01), (1.0, 0.04)], never, never]})
    (target,) = equal_learning(found, "q kl", "t nll")
    assert target.rows[1].reached == 1 and target.rows[1].difference.value == pytest.approx(-0.36)
    said = grid_headline(found, {})
    assert target.rows[1].p is None and "forgot less" not in said
    assert "Not compared with LoRA (too few seeds in common): mine." in said


def test_a_mean_over_seeds_tells_how_many_are_the_base_again():
    """A budget left nothing of some seeds' training: their KL of 0 is no merit of the method."""
    held = {
        "measure": "q kl",
        "at_most": 0.1,
        "then": "scale",
        "step": 9,
        "steps": 9,
        "value": 0.0,
        "n": 9,
        "kept": True,
    }
    left, kept = (Budget(strength=strength, **held) for strength in (0, 0.5))
    one = made({"lora": [[(1.0, 0.3)]], "mine": [[(1.1, 0.1)]], "wild": [[(0.5, 0.0)]]})
    for gone in (3, 2):
        budgets = {"lora": [None] * 3, "mine": [kept] * 3, "wild": [left] * gone + [kept] * (3 - gone)}
        rows = [
            mean_row([row.model_copy(update={"budget": budget}) for budget in budgets[row.method]], None)
            for row in one.rows[1:]
        ]
        found = one.model_copy(update={"rows": [one.base, *rows]})
        found.paired = [
            Paired(
                row=i, against=j, metric=name, mean=mean, stderr=0.01, p=1e-9, p_adjusted=1e-8, questions=9, seeds=3
            )
            for i, j in ((2, 1), (3, 1), (3, 2))
            for name in ("q kl", "t nll")
            if (mean := rows[i - 1].metrics[name].value - rows[j - 1].metrics[name].value)
        ]
        said, table = headline(found), build_table(found)
        assert "mine forgot least" in said and "wild forgot" not in said
        assert ("wild learned most" in said) == (gone == 2)  # with the seed that learned
        some = "" if gone == 3 else " with 2 of 3 seeds"
        assert f"wild is the base again{some}: the budget left nothing of its training." in said
        assert [cell.mark for cell in next(c for c in table.columns if c.title == "q KL").cells][2:] == ["best", None]
        learned = [cell.mark for cell in next(c for c in table.columns if c.title == "t NLL").cells][1:]
        assert learned == (["second", None, "best"] if gone == 2 else ["best", None, None])


def test_nothing_is_read_between_a_run_that_is_the_base_again_and_the_first_of_which_something_is_left():
    found = made({"lora": [[(1.5, 0.1), (1.0, 0.4)]], "mine": [[(2.0, 0.0), (1.4, 0.1)]]})
    left = Budget(measure="q kl", at_most=0.1, then="scale", strength=0, step=9, steps=9, value=0.0, n=9, kept=True)
    found.grid.cells[2].budget = left
    mine = equal_learning(found, "q kl", "t nll")[0].rows[-1]
    assert mine.value is None and mine.beyond_first_run


def test_a_seed_that_lora_alone_lacks_is_no_test_either():
    learned = {m: np.array(ends)[:, None] + np.linspace(-0.1, 0.1, 9) for m, ends in
               (("lora", (1.4, 1.0)), ("mine", (1.5, 0.9)))}  # fmt: skip
    kept = {m: np.outer(ends, np.linspace(0.9, 1.1, 8)) for m, ends in (("lora", (0.1, 0.4)), ("mine", (0.01, 0.04)))}
    results, found = with_answers(learned, kept)
    assert equal_learning(results, "q kl", "t nll", found)[-1].rows[1].p < 0.001
    results.grid.cells += [run.model_copy(update={"seed": 1}) for run in results.grid.cells if run.method == "mine"]
    assert equal_learning(results, "q kl", "t nll", found)[-1].rows[1].p is None


def test_the_error_of_a_mean_over_seeds_has_that_of_the_questions():
    rows = [
        Row(method="lora", metrics={"MT-Bench": Metric(value, 0.25, 8, True, "task", "points")})
        for value in (6.1, 6.2)
    ]
    assert mean_row(rows, None).metrics["MT-Bench"].stderr == pytest.approx((0.05**2 + 0.25**2) ** 0.5)
    assert mean([Estimate(1.0, 0.3), Estimate(2.0, 0.4)]) == Estimate(1.5, 0.25)
    assert mean([Estimate(1.0, 0.3), Estimate(2.0, 0.4)], same_seeds=True) == Estimate(1.5, 0.35)
    both = {
        name: Metric(value, error, 8, True, "retention", "points")
        for name, value, error in (("a", 1.0, 0.3), ("b", 2.0, 0.4))
    }
    assert mean_in(Row(method="lora", metrics=both), ["a", "b"]) == Estimate(1.5, 0.25)
    assert mean_in(Row(method="lora", metrics=both, runs=2), ["a", "b"]) == Estimate(1.5, 0.35)


def test_forgetting_at_equal_learning_is_read_off_seed_by_seed():
    lora = [[(1.5, 0.10), (1.0, 0.40)], [(1.6, 0.12), (1.0, 0.64)], [(1.4, 0.11), (1.0, 0.42)]]
    other = [[(1.6, 0.01), (1.0, 0.04)], [(1.6, 0.02), (0.8, 0.06)], [(1.5, 0.01), (1.2, 0.03)]]
    found = made({"lora": lora, "mine": other, "weak": [[(1.9, 0.3), (1.8, 0.4)]] * 3})
    low, high = equal_learning(found, "q kl", "t nll")
    assert (low.learned, high.learned) == (pytest.approx(0.5), pytest.approx(1.0))
    for target, own in ((low, [0.10, 0.12, 0.11]), (high, [0.40, 0.64, 0.42])):  # what LoRA itself forgot there
        assert target.rows[0].value.value == pytest.approx(np.mean(own)) and target.rows[0].reached == 3
    read = [0.01 + 0.03 / 6, 0.02, 0.01 + 0.02 / 3]  # where LoRA of the same seed has learned 0.5, 0.4, 0.6
    assert low.rows[1].value.value == pytest.approx(np.mean(read)) and low.rows[1].reached == 3
    mine = next(row for row in high.rows if row.name == "mine")
    by_hand = [0.04, 0.02 + (0.6 / 0.8) * 0.04]  # learned 1.0 where 0.4 … 1.0 and 0.4 … 1.2; the third ends at 0.8
    assert mine.reached == 2 and mine.value.value == pytest.approx(np.mean(by_hand))
    assert mine.value.stderr == pytest.approx(stats.sem(by_hand))
    gaps = [by_hand[0] - 0.40, by_hand[1] - 0.64]
    assert mine.difference.value == pytest.approx(np.mean(gaps))
    alone = stats.ttest_1samp(gaps, 0).pvalue
    assert alone <= mine.p <= 2 * alone  # adjusted for the other level
    assert next(row for row in high.rows if row.name == "weak").value is None
    said = grid_headline(found, {})
    assert "Not distinguishable from LoRA: mine." in said  # two seeds, without answers
    assert "p-values: over seeds alone, as the answers are not in this folder." in said
    assert "weak does not reach that level (by the estimates alone)." in said and "learning_rate 2" in said


def test_lora_is_quoted_over_the_seeds_that_the_method_reaches():
    """In a seed that a method does not reach LoRA mostly learned and forgot more, which is no merit of the method."""
    lora = [[(1.5, 0.04), (1.0, 0.05)], [(1.5, 0.04), (1.0, 0.06)], [(1.5, 0.04), (0.2, 0.60)]]
    few = [[(1.6, 0.01), (0.9, 0.040)], [(1.6, 0.01), (0.9, 0.050)], [(1.6, 0.01), (0.9, 0.045)]]
    found = made({"lora": lora, "few": few})
    row = equal_learning(found, "q kl", "t nll")[1].rows[1]
    assert (row.reached, row.seeds, row.lora) == (2, 3, Estimate(pytest.approx(0.055), pytest.approx(0.005)))
    assert row.value.value - row.lora.value == pytest.approx(row.difference.value)
    said = "q KL 0.040 ± 0.004 against 0.055 ± 0.005, 1.4 × less (2 of 3 seeds, adjusted p ="
    assert said in grid_headline(found, {}) and "0.237" not in grid_headline(found, {})
    cells = dict(grid_content(found, {})["tables"][1]["rows"])
    assert cells["few"].startswith("0.040 ± 0.004 (2 of 3 seeds, LoRA 0.055 ± 0.005 there), adjusted p =")
    assert cells["LoRA"] == "0.237 ± 0.182"


def test_a_method_of_fewer_seeds_is_not_called_the_best_for_that():
    """Of a seed in which LoRA forgot much a method's mean is higher, however much less it forgot than LoRA."""
    lora = [[(1.0, 0.100)], [(1.0, 0.101)], [(1.0, 0.102)]]
    whole = [[(1.0, 0.050)], [(1.0, 0.0511)], [(1.0, 0.0519)]]
    few = [[(1.0, 0.040)], [(1.0, 0.0412)], [(1.5, 0.02)]]
    said = grid_headline(made({"lora": lora, "few": few, "whole": whole}), {})
    assert "whole forgot less than LoRA: q KL 0.051 ± 0.001 against 0.101 ± 0.001" in said
    assert "less (adjusted p" in said and "So did few." in said


def test_forgetting_of_an_accuracy_is_in_points():
    accuracy = {"unit": "fraction", "higher_is_better": True}
    paths = {"lora": [[(1.0, 0.30)], [(1.0, 0.31)]], "mine": [[(1.0, 0.48)], [(1.0, 0.485)]]}
    found = made(paths, base=(2.0, 0.5), kept="q acc", of_kept=accuracy)
    assert "q acc 1.75 ± 0.25 points against 19.50 ± 0.50 points, 11 × less" in grid_headline(found, {})
    (table, _) = grid_content(found, {})["tables"]
    assert table["rows"][1][1].startswith("1.75 ± 0.25 points, adjusted p")


def test_methods_of_other_seeds_are_not_tested_together():
    lora, never = [[(1.0, 0.40)], [(1.0, 0.44)], [(1.0, 0.42)]], [(1.5, 0.01), (1.2, 0.03)]
    mine = [[(1.6, 0.01), (1.0, 0.04)], [(1.6, 0.02), (1.0, 0.06)], never]
    other = [never, [(1.6, 0.02), (1.0, 0.06)], [(1.6, 0.01), (1.0, 0.05)]]
    (target,) = equal_learning(made({"lora": lora, "mine": mine, "other": other}), "q kl", "t nll")
    alone = [stats.ttest_1samp(gaps, 0).pvalue for gaps in ([-0.36, -0.38], [-0.38, -0.37])]
    assert [row.reached for row in target.rows] == [3, 2, 2]
    assert min(row.p for row in target.rows[1:]) == pytest.approx(2 * min(alone))


def test_each_setting_has_a_frontier_along_the_rates():
    more = {"lora": {"training.weight_decay": 0}, "lora decayed": {"training.weight_decay": 3.0}}
    found = made({"lora": [[(1.5, 0.1), (1.0, 0.4)]], "lora decayed": [[(1.6, 0.05), (1.0, 0.2)]]}, more=more)
    low, high = equal_learning(found, "q kl", "t nll")
    assert [row.label for row in high.rows] == ["LoRA", "LoRA (weight_decay 3)"]
    assert [row.value.value for row in high.rows] == [pytest.approx(0.4), pytest.approx(0.2)]
    assert low.rows[1].value.value == pytest.approx(0.05 + 0.15 / 6)
    assert high.rows[0].difference is None and high.rows[1].difference.value == pytest.approx(-0.2)


def test_a_setting_that_all_methods_have_is_not_said_of_one_that_has_no_other():
    decays = {"lora": 0, "lora decayed": 3.0, "mine": 0}
    points = {method: [[(1.5, 0.1), (1.0, 0.4)]] for method in decays}
    more = {method: {"training.weight_decay": decay} for method, decay in decays.items()}
    labels = made(points, more=more).labels()
    assert labels[1] == "LoRA (lr 1, weight_decay 0)" and labels[3] == "LoRA (lr 1, weight_decay 3)"
    assert labels[5:] == ["mine (lr 1)", "mine (lr 2)"]


def test_nothing_is_read_where_all_runs_learned_more():
    found = made({"lora": [[(1.8, 0.1), (1.0, 0.4)]], "fast": [[(1.0, 0.3), (0.8, 0.5)]]})
    low, high = equal_learning(found, "q kl", "t nll")
    assert (
        low.rows[-1].value is None
        and low.rows[-1].beyond_first_run
        and high.rows[-1].value.value == pytest.approx(0.3)
    )
    first, second = grid_content(found, {})["tables"][:2]
    assert [label for label, *_ in first["rows"]] == ["LoRA"] and first[
        "note"
    ] == "fast learned more than that already in its first run."
    assert dict(row[:2] for row in second["rows"])["fast"].startswith("0.300") and second["note"] == ""


def test_what_is_swept_is_said_to_differ(tmp_path):
    words = [
        "--method",
        "lora",
        "--sweep",
        "training.warmup_steps=0,1",
        "training.max_steps=2",
        "training.save_strategy=no",
    ]
    assert main([str(make_world(tmp_path)), *words]) == 0
    assert results(tmp_path)["grid"]["differing"] == {"training.warmup_steps": [0, 1]}


def test_a_grid_of_seeds_alone_is_compared_as_it_is():
    """There is one setting: forgetting at equal learning cannot be read of anybody but LoRA."""
    found = made({"lora": [[(1.0, 0.4)], [(1.1, 0.41)]], "mine": [[(0.9, 0.1)], [(0.95, 0.11)]]})
    assert "distinguishably" not in render._headline(found, {}) and "LoRA" in render._headline(found, {})
    assert grid_content(found, {})["tables"][0]["title"].count("(LoRA, learning_rate 1)") == 1
    said = grid_headline(made({"lora": [[(1.0, 0.4), (0.9, 0.5)]], "mine": [[(0.1, 0.1), (0.05, 0.2)]]}), {})
    assert "no other method can be read there. mine learned more than that already in its first run." in said


def test_rates_are_safe_where_nothing_kept_is_worse_by_more_than_two_percent():
    points = {"lora": [[(1.5, 1.01), (1.0, 1.03)]], "mine": [[(1.4, 0.99), (0.9, 1.019)]], "bad": [[(1.9, 1.2)]]}
    found = made(points, base=(2.0, 1.0), kept="q nll")
    table = grid_content(found, {})["tables"][-1]
    assert table["title"] == "Safe learning rates" and "is more than 2% worse than the base's" in table["note"]
    assert [(label, rates) for label, rates, _ in table["rows"]] == [
        ("LoRA", "1 (1 of 2)"), ("mine", "1, 2 (2 of 2)"), ("bad", "none (0 of 1)"),
    ]  # fmt: skip
    assert [learned[:4] for *_, learned in table["rows"]] == ["1.50", "0.90", "–"]
    for kept in ("q kl", "q forgetting"):  # KL does not tell better from worse, and of a base's 0 there is no share
        titles = [table["title"] for table in grid_content(made(points, kept=kept), {})["tables"]]
        assert titles and "Safe learning rates" not in titles


def test_lora_that_learned_nothing_is_not_said_to_be_missing():
    said = grid_headline(made({"lora": [[(2.1, 0.1), (2.0, 0.4)]], "mine": [[(1.5, 0.1)]]}), {})
    assert "LoRA did not learn more than the base knew (t NLL), so there is no equal learning" in said
    seeds = [[(1.5, 0.1)], [(2.1, 0.1)]]
    assert "LoRA did not with every seed learn more" in grid_headline(made({"lora": seeds}), {})
    assert "needs LoRA among the runs" in grid_headline(made({"mine": seeds}), {})


def test_a_diverged_run_leaves_its_frontier_shorter():
    found = made({"lora": [[(1.5, 0.1), (1.0, 0.4)]], "wild": [[(1.5, 0.1), (0, 0)]]}, diverged={("wild", 2)})
    high = equal_learning(found, "q kl", "t nll")[-1]
    assert next(row for row in high.rows if row.name == "wild").value is None


def test_a_seed_that_diverged_at_every_rate_is_told():
    points = {
        "lora": [[(1.0, 0.05)], [(1.0, 0.06)], [(1.0, 0.07)]],
        "mine": [[(1.0, 0.040)], [(1.0, 0.050)], [(0, 0)]],
    }
    found = made(points)
    found.grid.cells[-1] = found.grid.cells[-1].model_copy(update={"diverged": 3, "metrics": {}})
    lora, mine = grid_content(found, {})["tables"][0]["rows"]
    assert "seeds" not in lora[1] and "2 of 3 seeds" in mine[1]


def test_a_row_that_lacks_a_metric_is_left_out_of_the_pictures(tmp_path):
    """A judge that gave no grade for one seed of one method: the row has no mean of it, and the report is written."""
    found = made({"lora": [[(1.5, 0.1), (1.0, 0.2)]], "pissa": [[(1.4, 0.1), (0.9, 0.2)]]})
    for kept in ("q kl", "q nll"):
        rows = [row.model_copy(deep=True) for row in found.rows]
        for row in rows:
            row.metrics[kept] = row.metrics["q kl"]
        results = found.model_copy(update={"rows": rows}, deep=True)
        for gone in ([-1], [-1, -2], range(1, 5)):
            for i in gone:
                results.rows[i].metrics.pop(kept, None)
                results.rows[i].metrics.pop("t nll", None)
            write_results(tmp_path, results)
            write_report(tmp_path)
            assert (tmp_path / "report.html").is_file()
            (tmp_path / "report.html").unlink()


def test_the_limits_of_panels_hold_every_point():
    """Also where every value is below zero."""
    found = Frontiers.of(made({"lora": [[(1.5, -3.0), (1.0, -2.0)]]}))
    figure = Figure()
    axes = figure.subplots()
    found.set_limits(axes)
    low, high = axes.get_ylim()
    assert low < -3 and high > 0


def test_a_backslash_in_a_drawings_words_stands_for_itself():
    assert r'aria-label="\1 {} \g"' in svg(Figure(), r"\1 {} \g")


def test_questions_and_seeds_both_enter_the_error_at_equal_learning(grid):
    """More than over the seeds alone, and known of a single seed too."""
    results = load_results(grid / "out")
    found = read_evaluations(grid / "out", results)
    both = equal_learning(results, "facts kl", "numbers nll", found)[0]
    seeds = equal_learning(results, "facts kl", "numbers nll")[0]
    read = [(row, alone) for row, alone in zip(both.rows, seeds.rows) if row.value is not None]
    assert any(row.reached == 2 for row, _ in read)
    for row, alone in read:
        assert row.value.value == alone.value.value
        if row.reached == 2:
            assert row.value.stderr > alone.value.stderr


def test_folders_of_long_values_have_names_that_file_systems_take():
    paths = [f"{'a long folder/' * 20}{name}.jsonl" for name in "ab"]
    folders = [Cell(0, (("data.path", path),), ("lora",)).folder for path in paths]
    assert len(set(folders)) == 2 and all(len(part) < 100 for folder in folders for part in folder.split("/"))

"""One adapter at many strengths: in a run, by `lora-null dial`, and exported at one of them; also adapters made elsewhere."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import PROBE, losses_over, random_batches, save_tiny
from transformers import AutoModelForCausalLM
from world import base, make_world, write_rows

from lora_null.__main__ import main
from lora_null.eval_harness import Evaluation, Metric
from lora_null.recipes import measure
from lora_null.recipes.__main__ import main as recipes
from lora_null.recipes.card import results_table
from lora_null.recipes.commands import dial
from lora_null.recipes.config.run_folder import MARK
from lora_null.recipes.models import bases
from lora_null.recipes.report.dial import dial_summary, read_dial, table_rows, write_dial
from lora_null.recipes.results import EVAL_FILE
from lora_null.recipes.trained import find_trained
from lora_null.utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dial")
    words = ["training.save_strategy=no", "eval.strengths=[0.5,1]", "--method", "lora-null-v1"]
    words.append("eval.probe={every: 2, retention: 10, task: 4}")
    evaluation = "eval.retention=[{answers: facts, path: %s, limit: 24}]" % (folder / "facts.jsonl")
    assert recipes([str(make_world(folder)), evaluation, *words]) == 0
    elsewhere = get_peft_model(
        base(folder),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 2}),
    )
    losses_over(elsewhere, random_batches(), steps=5)
    elsewhere.save_pretrained(folder / "elsewhere")
    return folder


def points(folder):
    return {p["strength"]: p["metrics"] for p in json.loads((folder / "dial" / "dial.json").read_text())["points"]}


def logits(model):
    with torch.no_grad():
        return model.eval()(**PROBE).logits


def at_strength(folder, adapter, value):
    """W0 + s·ΔW in float64, by merging what was saved."""
    merged = PeftModel.from_pretrained(base(folder).double(), adapter).merge_and_unload()
    plain = base(folder).double()
    with torch.no_grad():
        for weight, changed in zip(plain.parameters(), merged.parameters(), strict=True):
            weight += value * (changed - weight)
    return plain


def test_a_run_measures_the_strengths_of_its_recipe(world):
    found = points(world / "out" / "lora-null-v1")
    rows = json.loads((world / "out" / "results.json").read_text())["rows"]
    assert list(found) == [0.0, 0.5, 1.0]
    assert found[0.0] == rows[0]["metrics"] and found[1.0] == rows[1]["metrics"]
    assert 0 < found[0.5]["facts kl"]["value"] < found[1.0]["facts kl"]["value"]


def test_the_command_measures_the_same_without_the_base_once_more(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("the base was evaluated again"))
    monkeypatch.setenv("COLUMNS", "40")
    method = world / "out" / "lora-null-v1"
    assert (
        main(["dial", str(method), "--strengths", "1,0.5,1.25", "--out", str(tmp_path), "--max-forgetting", "5"]) == 0
    )
    told, found, before = capsys.readouterr().out, points(tmp_path), points(method)
    assert (
        sum(line.startswith("Strength ") for line in told.splitlines()) > 1 and "…" not in told
    )  # in as many tables as fit
    assert list(found) == [0.0, 0.5, 1.0, 1.25] and "strength 1.25 keeps" in told
    half = before[0.5]["facts kl"]
    words = ["--strengths", "1,0.5", "--out", str(tmp_path / "b"), "--max-forgetting", "9", "--max-forgetting"]
    assert main(["dial", str(method), *words, f"facts nll=9,facts kl={half['value'] + half['stderr'] * 1.01}"]) == 0
    said = capsys.readouterr()
    assert "strength 0.5 keeps loss of facts NLL within 9 and KL to base on facts within" in said.out.replace(
        "\n", " "
    )
    assert "--max-forgetting: is given twice, the last counts" in said.err
    for strength, metrics in before.items():
        for name, metric in metrics.items():
            assert found[strength][name]["value"] == pytest.approx(metric["value"], rel=1e-4, abs=1e-7)
    assert (tmp_path / "dial" / "dial.png").stat().st_size > 5000
    assert "| 0.5 |" in (tmp_path / "dial" / "dial.md").read_text()


@pytest.mark.parametrize("adapter", ["out/lora-null-v1", "elsewhere"])
def test_exported_at_a_strength_in_every_form(world, tmp_path, adapter, capsys):
    weights = world / adapter / "adapter" if adapter.startswith("out") else world / adapter
    expected = logits(at_strength(world, weights, 0.7))
    assert main(["export", str(world / adapter), "--out", str(tmp_path / "a"), "--strength", "0.7"]) == 0
    assert "Strength 0.7" in capsys.readouterr().out
    assert (logits(PeftModel.from_pretrained(base(world), tmp_path / "a")) - expected).abs().max() < 1e-4
    assert "Strength 0.7" in (tmp_path / "a" / "README.md").read_text()
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["strength"] == "0.7"
    words = ["--strength", "0.7", "--form", "merged"]
    assert main(["export", str(world / adapter), "--out", str(tmp_path / "m"), *words]) == 0
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")) - expected).abs().max() < 1e-4


def test_another_dial_measures_the_base_on_its_own_questions(world, tmp_path):
    """The base of an earlier one, on other questions or on fewer, is not taken for it; what lies beside it stays."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("years of work")
    for name, limit in (("facts", "8"), ("facts", "16"), ("numbers", "16")):
        words = ["--keep", str(world / f"{name}.jsonl"), "--limit", limit, "--strengths", "1", "--out", str(tmp_path)]
        assert main(["dial", str(world / "elsewhere"), *words]) == 0
        found = points(tmp_path)
        assert found[0.0].keys() == found[1.0].keys() == {f"{name} nll", f"{name} kl"}
        assert {metric["n"] for metrics in found.values() for metric in metrics.values()} == {int(limit)}
    assert (tmp_path / "base" / "mine.txt").read_text() == "years of work"


def test_a_run_that_vllm_evaluated_is_measured_on_the_live_model(world, tmp_path):
    shutil.copytree(world / "out", tmp_path / "out")
    path = tmp_path / "out" / "recipe.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["eval"] |= {"backend": "vllm", "vllm": {"tensor_parallel": 2}}
    path.write_text(MARK + yaml.safe_dump(raw))
    method = tmp_path / "out" / "lora-null-v1"
    assert main(["dial", str(method), "--strengths", "1", "--limit", "4", "--out", str(tmp_path / "found")]) == 0


def test_questions_are_found_under_the_names_they_have(world, tmp_path):
    """As an entry of a recipe finds them; conversations too."""
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "they"}]
    for name, row in (("asked", {"prompt": "who?", "response": "they"}), ("talks", {"messages": talk})):
        path = write_rows(tmp_path / f"{name}.jsonl", [row] * 3)
        words = ["--keep", str(path), "--strengths", "1", "--out", str(tmp_path / name)]
        assert main(["dial", str(world / "elsewhere"), *words]) == 0
        assert points(tmp_path / name)[1.0][f"{name} nll"]["n"] == 3
    found = [points(tmp_path / name)[1.0] for name in ("asked", "talks")]
    assert found[0]["asked nll"]["value"] == found[1]["talks nll"]["value"]


def test_every_point_is_paired_with_the_base(world):
    """An accuracy that falls by no question has an error of 0, where two estimates apart have one each."""
    found = read_dial(world / "out" / "lora-null-v1")
    assert {(pair.row, pair.against, pair.questions) for pair in found.paired if "facts" in pair.metric} == {
        (1, 0, 24),
        (2, 0, 24),
    }


def test_a_files_name_is_no_markup(world, tmp_path, capsys):
    shutil.copy(world / "facts.jsonl", tmp_path / "facts [old].jsonl")
    words = ["--keep", str(tmp_path / "facts [old].jsonl"), "--strengths", "1", "--limit", "2"]
    assert main(["dial", str(world / "elsewhere"), *words, "--out", str(tmp_path / "out")]) == 0
    assert "[old]" in capsys.readouterr().out
    assert r"facts \[old\] NLL" in (tmp_path / "out" / "dial" / "dial.md").read_text()


def test_a_folder_that_is_no_dials_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "dial" / "base").mkdir(parents=True)
    (tmp_path / "dial" / "base" / "mine.txt").write_text("years of work")
    words = ["--keep", str(world / "facts.jsonl"), "--limit", "8", "--out", str(tmp_path)]
    assert main(["dial", str(world / "elsewhere"), *words]) == 2
    assert "dial/base holds other files; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "dial" / "base" / "mine.txt").is_file()


def test_a_dial_that_was_broken_off_goes_on_in_its_folder(world, tmp_path, monkeypatch):
    def break_off(*_, output_dir, **__):
        (output_dir / "half.jsonl").touch()
        raise UserError("broken off")

    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))  # without the base's evaluation
    words = ["--keep", str(world / "facts.jsonl"), "--limit", "8", "--strengths", "1", "--out", str(tmp_path)]
    half = tmp_path / "dial" / "base" / "half.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(measure, "evaluate", break_off)
        assert main(["dial", str(world / "elsewhere"), *words]) == 2
    assert half.is_file()
    assert main(["dial", str(world / "elsewhere"), *words]) == 0
    assert not half.exists() and points(tmp_path)[0.0]


def test_a_card_compares_answers_to_the_same_questions(world, tmp_path, capsys):
    shutil.copytree(world / "out", tmp_path / "out")
    method = tmp_path / "out" / "lora-null-v1"
    words, before = ["dial", str(method), "--limit", "4", "--strengths", "0.5"], read_dial(method)
    assert main(words) == 2 and "holds the dial of the run's own questions; --out" in capsys.readouterr().err
    assert read_dial(method) == before
    shutil.rmtree(method / "dial")
    assert main(words) == main(words) == 0  # one of the same questions gives way
    head, base, _ = table_rows(read_dial(method))
    shown = {column.heading: str(column.cells[0]) for column in results_table(find_trained(method), 0.5).columns}
    assert all(shown[name] == value for name, value in zip(head[1:], base[1:]))


def test_exported_within_a_budget_of_the_rows_that_the_run_probed(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("the base was evaluated again"))
    words = ["--out", str(tmp_path / "a"), "--max-forgetting", "5"]
    assert main(["export", str(world / "out" / "lora-null-v1"), *words]) == 0
    assert "on 14 rows that no probe used" in capsys.readouterr().out.replace("\n", " ")


def test_a_base_measured_under_other_settings_is_measured_anew(world, tmp_path, caplog, capsys):
    shutil.copytree(world / "out", tmp_path / "out")
    saved = tmp_path / "out" / "base" / "eval.json"
    found = json.loads(saved.read_text())
    found["settings"] |= {"device": "cuda", "ranks": 4}
    found["metrics"]["numbers nll"]["value"] += 1
    saved.write_text(json.dumps(found))
    before = points(world / "out" / "lora-null-v1")
    method = str(tmp_path / "out" / "lora-null-v1")
    assert main(["dial", method, "--strengths", "1", "--out", str(tmp_path / "dial")]) == 0
    said = caplog.text + capsys.readouterr().err
    assert "the run's base was measured under other settings (device cuda, now cpu): it is measured anew" in said
    after = points(tmp_path)[0.0]
    assert after["numbers nll"]["value"] == pytest.approx(before[0.0]["numbers nll"]["value"])
    assert main(["export", method, "--out", str(tmp_path / "a"), "--max-forgetting", "5"]) == 0
    assert "it is measured anew" in caplog.text + capsys.readouterr().err


def test_an_adapter_that_forgot_is_repaired(world, tmp_path, capsys):
    """Made elsewhere: measured on a file of questions, written at the largest strength that forgets no more."""
    files = ["--keep", str(world / "facts.jsonl"), "--learn", str(world / "numbers.jsonl")]
    assert (
        main(["dial", str(world / "elsewhere"), *files, "--out", str(tmp_path), "--strengths", "1", "--limit", "24"])
        == 0
    )
    forgot = points(tmp_path)[1.0]["facts kl"]["value"]
    at_most = forgot / 4
    words = ["--out", str(tmp_path / "a"), "--max-forgetting", f"facts kl={at_most},facts nll=9", *files]
    assert main(["export", str(world / "elsewhere"), *words]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "rows that no probe used" in said and re.search("rise of facts NLL .* at most 9 allowed", said)
    given_up = r"given up: \S+ ± \S+ nats per token of numbers NLL \(\S+ at this strength, \S+ at strength 1\)"
    assert re.search(given_up, said) and "training ended" not in said
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert 0.2 < float(file.metadata()["strength"]) < 0.8
    assert (
        main(
            [
                "dial",
                str(tmp_path / "a"),
                *files,
                "--out",
                str(tmp_path / "again"),
                "--strengths",
                "1",
                "--limit",
                "24",
            ]
        )
        == 0
    )
    assert points(tmp_path / "again")[1.0]["facts kl"]["value"] < 1.5 * at_most


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{world}/elsewhere"], "nothing says what to measure; --keep"),
        (["{world}/elsewhere", "--keep", "{world}/none.jsonl"], "--keep: no file or folder"),
        (["{world}/out/lora-null-v1", "--strengths", "0.5,half"], "--strengths: 'half' is not a number"),
        (["{world}/out/lora-null-v1", "--strengths", "-1"], "a strength is a number from 0 (the base) to 2"),
        (["{world}/out/lora-null-v1", "--strengths", "nan"], "a strength is a number from 0 (the base) to 2"),
        (["{world}/out/lora-null-v1", "--base", "{other}"], "trained on another base than"),
        (["{world}/elsewhere", "--base", "{wide}", "--keep", "{world}/facts.jsonl"], "made for another base than"),
        (["{world}/out"], "a run; give one of its methods"),
        (["{world}/out/lora-null-v1", "--prompt", "q"], "--prompt: says how the rows of --keep and --learn are read"),
        (["{world}/nowhere"], "no such folder"),
        (["{world}/out/lora-null-v1", "--out", "{world}/facts.jsonl"], "--out: cannot write to"),
        (
            ["{world}/out/lora-null-v1", "--max-forgetting", "nan"],
            "--max-forgetting: must be a number above 0, not nan",
        ),
    ],
)
def test_mistakes_are_told_before_a_model_loads(world, tmp_path, monkeypatch, capsys, words, message):
    for place in ((measure, "base_to_run"), (bases, "load_base")):
        monkeypatch.setattr(*place, lambda *_: pytest.fail("a model was loaded"))
    places = {
        "world": world,
        "other": save_tiny(tmp_path / "other", seed=1),
        "wide": save_tiny(tmp_path / "wide", hidden_size=64),
    }
    capsys.readouterr()
    assert main(["dial", *(word.format(**places) for word in words)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and len(told) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "0.5", "--max-forgetting", "0.1"], "give one of the two"),
        (["--strength", "0"], "at 0 there is nothing to export"),
        (["--strength", "3"], "a strength is a number from 0"),
        (["--max-forgetting", "0"], "must be a number above 0"),
        (
            ["--max-forgetting", "facts kl=0.1", "--measure", "facts kl"],
            "error: --max-forgetting: names the metrics already, as --measure does",
        ),
        (["--max-forgetting", "facts kl=0.1,facts nll=0"], "must be a number above 0"),
        (["--max-forgetting", "little"], "--max-forgetting: 'little' is no number, such as 0.01"),
        (
            ["--max-forgetting", "facts kl=1e-6,facts nll=9"],
            "1e-06 leaves nothing of the adapter; at the smallest strength facts kl",
        ),
        (
            ["--max-forgetting", "facts nll=9,facts kl=1e-6"],
            "1e-06 leaves nothing of the adapter; at the smallest strength facts kl",
        ),
        (["--max-forgetting", "0.1", "--measure", "facts acc"], "the run has no 'facts acc'"),
        (["--max-forgetting", "1e-6"], "leaves nothing of the adapter"),
        (["--measure", "facts kl"], "--measure: is for what --max-forgetting measures; give that too"),
        (["--strength", "0.5", "--keep", "x.jsonl"], "--keep: is for what --max-forgetting measures"),
        (["--limit", "3"], "--limit: is for what --max-forgetting measures"),
    ],
)
def test_mistakes_of_an_export(world, tmp_path, capsys, words, message):
    assert main(["export", str(world / "out" / "lora-null-v1"), "--out", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_processes_wait_for_each_other_as_long_as_in_the_run(tmp_path, monkeypatch):
    waits, method = [], tmp_path / "run" / "lora"
    monkeypatch.setattr(dial, "join_processes", waits.append)
    (method / "adapter").mkdir(parents=True)
    (method.parent / "recipe.yaml").write_text(f"{MARK}training: {{ddp_timeout: 7200}}\n")
    for folder in (method, method / "adapter", tmp_path):
        assert main(["dial", str(folder)]) == 2
    assert waits == [7200, 7200, None]


def test_two_files_of_one_name(world, tmp_path):
    for name in ("facts", "numbers"):
        (tmp_path / name).mkdir()
        shutil.copy(world / f"{name}.jsonl", tmp_path / name / "test.jsonl")
    files = ["--keep", str(tmp_path / "facts" / "test.jsonl"), "--learn", str(tmp_path / "numbers" / "test.jsonl")]
    words = ["--strengths", "1", "--limit", "4", "--out", str(tmp_path)]
    assert main(["dial", str(world / "elsewhere"), *files, *words]) == 0
    assert {"kept test kl", "learned test nll"} <= points(tmp_path)[1.0].keys()


def test_a_strength_at_which_nothing_is_finite_is_left_out(tmp_path, caplog, monkeypatch):
    def dial_of(strengths, *measured):
        evaluations = (Evaluation(metrics, {}, 1.0, {}) for metrics in measured)
        (tmp_path / "base" / EVAL_FILE).write_text(next(evaluations).to_json())
        monkeypatch.setattr(measure, "evaluate", lambda *_, **__: next(evaluations))
        return measure.measure_strengths(job, "lora", None, tmp_path / "dial", strengths)

    def metrics(value):
        return {
            "a": Metric(value, 0.1, 8, False, "retention", "nats"),
            "b": Metric(1.0, 0.1, 4, False, "task", "nats"),
        }

    (tmp_path / "base").mkdir()
    recipe = SimpleNamespace(eval=SimpleNamespace(limit=None), model=SimpleNamespace(name_or_path="m"))
    job = SimpleNamespace(recipe=recipe, base=tmp_path / "base", eval_options={}, tokenizer=None, tasks=[])
    monkeypatch.setattr(measure, "Strength", lambda _: SimpleNamespace(at=nullcontext))
    shown = dial_of([0.5, 2], metrics(0.0), metrics(0.5), metrics(float("nan")))
    assert [point.strength for point in shown.points] == [0.0, 0.5]
    assert "strength 2 is left out: a is not a finite number there" in caplog.text
    for points in (shown.points, shown.points[:1]):
        write_dial(tmp_path / "dial", shown.model_copy(update={"points": points}))
        assert dial_summary(read_dial(tmp_path))
    for point in shown.points:
        del point.metrics["b"]  # what is learned was not measured
    assert "only one side was measured" in dial_summary(shown)
    assert "strength 0.5 keeps loss of a within 1 on the rows that it was chosen by: 0.500" in dial_summary(
        shown, {"a": 1.0}
    )
    few = shown.model_copy(deep=True)
    for point in few.points:
        point.metrics["a"] = replace(point.metrics["a"], n=7)
    assert dial_summary(few, {"a": 1.0}) == "loss of a was measured on 7 rows; a limit needs at least 8"
    few.points[0].metrics["a"] = replace(few.points[0].metrics["a"], higher_is_better=None)
    assert "a has no known direction" in dial_summary(few, {"a": 1.0})
    shares = {
        "a": Metric(0.5, 0.1, 8, True, "retention", "fraction"),
        "b": Metric(1.0, 0.1, 4, False, "task", "nats"),
    }
    lower = {"a": Metric(0.48, 0.1, 8, True, "retention", "fraction"), "b": shares["b"]}
    said = dial_summary(dial_of([0.5], shares, lower), {"a": 0.5})
    assert "keeps loss of a within 50 points on the rows that it was chosen by: 2.0" in said and "points" in said
    (tmp_path / "dial" / "dial.json").write_text("{}")
    with pytest.raises(UserError, match=r"dial\.json: method: Field required \(and 2 more\)"):
        read_dial(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_dora": True}, "not linear in a strength"),
        (
            {"alora_invocation_tokens": [5, 6]},
            "has alora_invocation_tokens, by which A and B are not all of its change",
        ),
        ({"bias": "lora_only"}, "has bias, by which"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "has layer_replication, by which"),
        ({"target_parameters": ["experts.weight"]}, "has target_parameters, by which"),
    ],
)
def test_an_adapter_with_more_than_a_and_b_is_refused(world, tmp_path, monkeypatch, capsys, option, message):
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("a model was loaded"))
    shutil.copytree(world / "elsewhere", tmp_path / "dora")
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config | option))
    keep, out = ["--keep", str(world / "facts.jsonl")], ["--out", str(tmp_path / "out")]
    for words in (["dial", *keep], ["repair", *keep, *out], ["export", *out], ["export", "--form", "merged", *out]):
        assert main([words[0], str(tmp_path / "dora"), *words[1:]]) == 2
        assert message in capsys.readouterr().err

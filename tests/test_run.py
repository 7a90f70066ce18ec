"""Whole runs on a tiny model, through the real command."""

import json
import os
import signal
import weakref

import pytest
import torch
import yaml
from engine_worlds import world
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import TrainerCallback
from world import base, make_world, results

from lora_null.eval_harness import AnswerTask, evaluate
from lora_null.recipes import run
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import shipped

METHODS = ("lora", "lora-null-v1", "lora-null-v2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(make_world(folder))]) == 0
    return folder


def test_leaves_what_the_contract_says(finished):
    out = finished / "out"
    for name in ("recipe.yaml", "base/eval.json", "results.json", "report.md", "report.html", "forgetting.png"):
        assert (out / name).stat().st_size > 0
    for method in METHODS:
        adapter = {path.name for path in (out / method / "adapter").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= adapter
        assert (out / method / "checkpoint-4").is_dir()
        report = json.loads((out / method / "init" / "layers.json").read_text())
        assert bool(report["layers"]) == (method != "lora")  # nothing is solved for its start
        log = [json.loads(line) for line in (out / method / "train_log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        assert set(log[0]) == {"step", "loss", "learning_rate", "drift_mean", "drift_max", "tokens", "seconds"}
    assert not list(out.rglob("*.part"))


def test_results_follow_the_schema(finished):
    found = results(finished)
    assert found["schema"] == 1 and found["recipe"] == "tiny" and found["seed"] == 0
    assert [row["method"] for row in found["rows"]] == ["base", *METHODS]
    for row in found["rows"]:
        assert set(row["metrics"]) == {"facts nll", "facts kl", "numbers nll", "numbers kl"}
        assert all({"value", "stderr", "n", "higher_is_better", "role"} <= set(m) for m in row["metrics"].values())
    base, lora, v1, v2 = found["rows"]
    assert base["metrics"]["facts kl"]["value"] == 0 < lora["metrics"]["facts kl"]["value"]
    assert lora["metrics"]["numbers nll"]["value"] < base["metrics"]["numbers nll"]["value"]
    assert v1["trainable_params"] == lora["trainable_params"] == lora["adapter_params"] == v1["adapter_params"] // 2
    assert v2["trainable_params"] < v2["adapter_params"] == lora["adapter_params"]
    for row in (lora, v1, v2):
        assert (
            row["seconds"]["init"] > 0 and row["seconds"]["train"] > 0 and row["drift"]["max"] >= row["drift"]["mean"]
        )
        assert row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 2**20


def score_again(folder, method):
    """Return what the saved adapter scores on a fresh base, and what the run says it scored."""
    model = PeftModel.from_pretrained(base(folder), folder / "out" / method / "adapter")
    rows = [json.loads(line) for line in (folder / "numbers.jsonl").read_text().splitlines()][:10]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    again = evaluate(model, tiny_tokenizer(), [AnswerTask("numbers", pairs)], batch_size=4).metrics["numbers nll"]
    row = next(row for row in results(folder)["rows"] if row["method"] == method)
    return again["value"], row["metrics"]["numbers nll"]["value"]


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_adapter_scores_what_the_live_model_scored(finished, method):
    again, said = score_again(finished, method)
    assert again == pytest.approx(said, rel=1e-5)


def test_training_under_autocast_does_not_look_like_forgetting(tmp_path):
    """The base is measured without it, so what was trained is too: a step too small to matter gives no KL."""
    words = ["--method", "full,lora,lora-null-v1", "training.bf16=true", "training.save_strategy=no"]
    assert main([str(make_world(tmp_path)), *words, "training.learning_rate=1e-7"]) == 0
    for row in results(tmp_path)["rows"][1:]:
        assert row["metrics"]["facts kl"]["value"] < 1e-7, row["method"]
    again, said = score_again(tmp_path, "lora-null-v1")
    assert again == pytest.approx(said, rel=1e-6)


def test_a_methods_model_is_gone_before_the_next_one_loads(tmp_path, monkeypatch):
    original, models = run._make_trainer, weakref.WeakSet()

    def watched(job, plan, folder):
        assert not models
        trainer = original(job, plan, folder)
        models.add(trainer.model)
        return trainer

    monkeypatch.setattr(run, "_make_trainer", watched)
    words = ["--method", "lora,full,lora-null-v2", "training.max_steps=1", "training.save_strategy=no"]
    assert main([str(make_world(tmp_path)), *words, "eval.retention=[]", "eval.task=[]"]) == 0


def test_all_methods_see_the_same_data(finished):
    first = []
    for method in METHODS:
        line = (finished / "out" / method / "train_log.jsonl").read_text().splitlines()[0]
        first.append(json.loads(line))
    assert len({line["tokens"] for line in first}) == 1
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-4) == pytest.approx(first[2]["loss"], rel=1e-4)


def test_a_finished_run_is_kept_and_overwrite_replaces_it(finished, tmp_path):
    recipe = make_world(tmp_path)
    options = [str(recipe), "--method", "lora-null-v2", "training.max_steps=2", "training.save_strategy=no"]
    assert main(options) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main(options) == 2
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert main([*options, "--overwrite", "seed=5"]) == 0
    assert results(tmp_path)["seed"] == 5


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and "lora-null-v1" in args.output_dir:
            os.kill(os.getpid(), signal.SIGKILL)


def with_own_cache(words):
    """Run the command with another cache than the tests', the first word."""
    os.environ["LORA_NULL_CACHE"] = words[0]
    return main(words[1:])


def with_kill(words):
    original = run._make_trainer

    def make_trainer(job, plan, folder):
        trainer = original(job, plan, folder)
        trainer.add_callback(Kill())
        return trainer

    run._make_trainer = make_trainer
    return with_own_cache(words)


def test_a_killed_run_resumes_to_the_same_result(finished, tmp_path):
    recipe = make_world(tmp_path)
    assert world(1, [str(tmp_path / "cache"), str(recipe)], tmp_path / "said.txt", run=with_kill) == [-9]
    assert not (tmp_path / "out" / "results.json").exists()
    assert main([str(recipe), "--resume"]) == 0
    for method in METHODS:
        for name in ("adapter/adapter_model.safetensors", "eval.json"):
            ours, theirs = (folder / "out" / method / name for folder in (tmp_path, finished))
            if name.endswith(".json"):
                assert json.loads(ours.read_text())["metrics"] == json.loads(theirs.read_text())["metrics"]
            else:
                a, b = load_file(ours), load_file(theirs)
                assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in b)


def test_two_processes_start_alike_and_write_once(finished, tmp_path):
    recipe, said = make_world(tmp_path), tmp_path / "said.txt"
    ended = world(2, [str(tmp_path / "cache"), str(recipe)], said, run=with_own_cache)
    assert ended == [0, 0], said.read_text()[-2000:]
    assert said.read_text().count("report:") == 1
    for method in METHODS[1:]:
        one, two = (
            load_file(folder / "out" / method / "init" / "factors.model.layers.0.safetensors")
            for folder in (finished, tmp_path)
        )
        for key in one:  # two processes add the inputs up in another order
            assert (one[key] - two[key]).abs().max() <= 1e-4 * one[key].abs().max(), key
    ours, theirs = results(tmp_path), results(finished)
    assert ours["environment"]["processes"] == 2
    for mine, other in zip(ours["rows"], theirs["rows"]):
        for name, metric in other["metrics"].items():
            assert mine["metrics"][name]["n"] == metric["n"]
            assert mine["metrics"][name]["value"] == pytest.approx(metric["value"], rel=2e-2, abs=2e-3)
        log = tmp_path / "out" / mine["method"] / "train_log.jsonl"
        assert mine["method"] == "base" or len(log.read_text().splitlines()) == 4


def test_a_run_starts_from_an_earlier_initialization(finished, tmp_path, capsys):
    recipe = make_world(tmp_path)
    source = finished / "out" / "lora-null-v1"  # A0 and B0 serve v2 as well
    words = [
        str(recipe),
        "--method",
        "lora-null-v2",
        f"model.name_or_path={finished / 'model'}",
        "calibration.cache=false",
    ]
    assert main([*words, f"method.init={source}"]) == 0
    part = "init/factors.model.layers.0.safetensors"
    assert (tmp_path / "out" / "lora-null-v2" / part).read_bytes() == (source / part).read_bytes()
    assert main([*words, f"method.init={tmp_path}", f"output_dir={tmp_path / 'b'}"]) == 2
    assert "holds no complete initialization" in capsys.readouterr().err
    assert main([*words, f"method.init={source}", "method.rank=3", f"output_dir={tmp_path / 'c'}"]) == 2
    line = (
        "lora-null-v2: model.layers.0.self_attn.q_proj was written for rank 4 and scaling 1, this run asks for rank 3"
    )
    assert line in capsys.readouterr().err
    assert main([*words, f"method.init={source}", "method.alpha=8", "--dry-run", f"output_dir={tmp_path / 'c'}"]) == 2
    assert "for rank 4 and scaling 1, this run asks for rank 4 and scaling 2 (alpha / rank)" in capsys.readouterr().err


def test_print_config_and_overrides(capsys, tmp_path):
    recipe = make_world(tmp_path)
    words = ["training.learning_rate=3e-4", "eval.retention=", "eval.task=[gsm8k]", "method.target_modules=[q_proj]"]
    assert main([str(recipe), *words, "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["learning_rate"] == 3e-4 and shown["eval"]["retention"] == []
    assert shown["eval"]["task"][0]["task"] == "gsm8k" and shown["method"]["target_modules"] == ["q_proj"]
    assert shown["calibration"]["mode"] == "packed"


def test_list_and_report(capsys, finished):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(shipped())
    html = (finished / "out" / "report.html").read_bytes()
    (finished / "out" / "report.html").unlink()
    assert main(["report", str(finished / "out")]) == 0
    assert (finished / "out" / "report.html").read_bytes() == html
    assert main(["report", str(finished / "nowhere")]) == 2

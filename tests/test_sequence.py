"""Tasks in sequence: starts that leave the earlier tasks alone, one adapter at the end, transfers, interruptions."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny import random_batches, tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from world import base, make_world, write_rows

from lora_null.__main__ import main
from lora_null.calibration import InputStats
from lora_null.earlier_tasks import Earlier, WithEarlier, keep_grams, sketch_of
from lora_null.eval_harness import AnswerTask, Evaluation, Metric, evaluate
from lora_null.layer import adapted_layers, factors_of
from lora_null.nullspace import bottom_eigenspace
from lora_null.recipes import measure, run, sequence
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import parse_recipe
from lora_null.recipes.config.stages import join_recipes, stage_recipes
from lora_null.recipes.data.examples import tokenize
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.recipes.job import check_run
from lora_null.recipes.results import Row, Seconds, load_results, write_results
from lora_null.recipes.sequence import check_stages, collect, space_of_sequence, training_ids, transfer, with_earlier
from lora_null.solver import NullSpace
from lora_null.utils.errors import UserError

METHODS = "lora,lora-null-v1,lora-null-v2"
WORDS = ["training.max_steps=3", "training.save_steps=1", "--method", METHODS]


def recipes_in(folder):
    """Write a.yaml and b.yaml: two tasks on one base."""
    raw = yaml.safe_load(make_world(folder).read_text())
    write_rows(
        folder / "letters.jsonl", [{"question": f"spell {i}", "answer": "abc"[i % 3] * (i % 4 + 1)} for i in range(40)]
    )
    letters = {"answers": "letters", "path": str(folder / "letters.jsonl"), "limit": 8}
    evaluation = raw["eval"] | {"task": [letters]}
    data = raw["data"] | {"path": str(folder / "letters.jsonl")}
    (folder / "a.yaml").write_text(yaml.safe_dump(raw | {"name": "numbers"}))
    (folder / "b.yaml").write_text(yaml.safe_dump(raw | {"name": "letters", "data": data, "eval": evaluation}))
    return [str(folder / "a.yaml"), str(folder / "b.yaml")]


def in_sequence(folder, out):
    """The command that learns both recipes of a folder into another."""
    return ["train", str(folder / "a.yaml"), str(folder / "b.yaml"), "--sequence", "--output-dir", str(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    assert main(["train", *recipes_in(folder), "--sequence", "--output-dir", str(folder / "out"), *WORDS]) == 0
    return folder


def test_the_adapters_add_up_to_one_for_the_original_base(finished):
    out = finished / "out"
    for method, ranks in (("lora", (4, 8)), ("lora-null-v1", (8, 16)), ("lora-null-v2", (4, 8))):
        parts = [out / "tasks" / task / method / "adapter" for task in ("1-numbers", "2-letters")]
        assert tuple(json.loads((part / "adapter_config.json").read_text())["r"] for part in parts) == ranks
        first, both = (load_file(part / "adapter_model.safetensors") for part in parts)
        assert all(
            torch.equal(both[k][: ranks[0]] if "lora_A" in k else both[k][:, : ranks[0]], first[k]) for k in first
        )
        assert (out / method / "adapter" / "adapter_model.safetensors").read_bytes() == (
            parts[1] / "adapter_model.safetensors"
        ).read_bytes()
        model = PeftModel.from_pretrained(base(finished), out / method / "adapter")
        facts = [json.loads(line) for line in (finished / "facts.jsonl").read_text().splitlines()][:12]
        pairs = [(f"Question: {fact['question']}\nAnswer:", f" {fact['answer'][0]}") for fact in facts]
        task = AnswerTask("facts", pairs, kl=True, role="retention")
        again = evaluate(model, tiny_tokenizer(), [task], reference_dir=out / "base", batch_size=4)
        row = next(r for r in json.loads((out / "results.json").read_text())["rows"] if r["method"] == method)
        assert again.metrics["facts kl"].value == pytest.approx(row["metrics"]["facts kl"]["value"], rel=1e-3)


def test_a_start_leaves_the_knowledge_and_the_earlier_task_alone(finished, tmp_path):
    """Its A0 spans the bottom eigenspace of the weighted sum, in float64, of what the model after task 1 reads."""
    recipe = join_recipes([load_recipe(path, methods="lora-null-v2") for path in recipes_in(finished)])
    recipe.sequence.knowledge, recipe.sequence.earlier = 0.3, 2.0
    jobs = [check_run(stage) for stage in stage_recipes(recipe)]
    jobs[0].folder = finished / "out" / "tasks" / "1-numbers"
    job = with_earlier(recipe, jobs[1], jobs[:1])
    trainer = run._make_trainer(job, job.plans[0], tmp_path)
    trainer._prepare(resuming=False)
    after = PeftModel.from_pretrained(base(finished), jobs[0].folder / "lora-null-v2" / "adapter").merge_and_unload()
    layers, grams = adapted_layers(trainer.model), []
    for rows in (job.windows.ids, training_ids(jobs[0])):
        batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in rows]
        inputs = oracle.capture_inputs(after, layers, batches)
        grams.append({name: X @ X.T / X.shape[1] for name, X in inputs.items()})
    for name, layer in layers.items():
        C = 0.3 * grams[0][name] + 2.0 * grams[1][name]
        U = np.linalg.qr(factors_of(layer)[0].detach().double().numpy().T)[0]
        assert np.trace(U.T @ C @ U) == pytest.approx(np.linalg.eigvalsh(C)[:4].sum(), rel=1e-3)


def test_grams_are_added_with_their_weights(tmp_path):
    """Against float64 products of the inputs themselves."""
    model, batches = tiny_model(), random_batches(count=2)
    name = "model.layers.0.mlp.gate_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    keep_grams(tmp_path / "whole", model, [name], batches, progress=False)
    keep_grams(tmp_path / "sketch", model, [name], batches, sketch=20, progress=False)
    seen.clear()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    X = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches)]).double()
    C, N = X.T @ X, len(X)
    found = Earlier(tmp_path / "whole").mean([name], torch.device("cpu"))
    assert torch.allclose(found, C / N, rtol=1e-5, atol=1e-7 * C.norm() / N)
    found, F = Earlier(tmp_path / "sketch").mean([name], torch.device("cpu")), sketch_of(C, 20)
    assert torch.dist(found, F @ F.T / N) < 1e-5 * found.norm() < 1e-2 * torch.dist(found, C / N)
    gram = torch.diag(torch.linspace(0, 5, 32, dtype=torch.float64))
    rule = WithEarlier(NullSpace("eigh"), [Earlier(tmp_path / "whole", 3.0)], knowledge=0.5)
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    A = rule.of_input(InputStats([name], gram, torch.zeros(32, 1), tokens=7))(weight, 4, 1.0).A
    _, vectors = torch.linalg.eigh(0.5 * gram + 3 * 7 * C / N)
    overlap = torch.linalg.svdvals(torch.linalg.qr(A.double().T)[0].T @ vectors[:, :4])
    assert overlap.min() > 1 - 1e-5
    assert rule.label != WithEarlier(NullSpace("eigh"), [Earlier(tmp_path / "whole", 2.0)], 0.5).label
    with pytest.raises(UserError, match="holds no Gram of elsewhere"):
        Earlier(tmp_path / "whole").mean(["elsewhere"], torch.device("cpu"))
    with pytest.raises(UserError, match="no complete Grams"):
        Earlier(tmp_path).key  # noqa: B018


def test_an_exact_null_space_of_an_earlier_task_is_kept_as_exact(tmp_path):
    """Its small directions are squared in C, below what 32 bits can tell from zero."""
    name, batches = (
        "model.layers.0.self_attn.q_proj",
        random_batches(vocab_size=20),
    )  # 16 distinct tokens, 32 dimensions
    keep_grams(tmp_path, tiny_model(), [name], batches, progress=False)
    X = oracle.capture_inputs(tiny_model(), [name], batches)[name]
    C, path, task = X @ X.T / X.shape[1], tmp_path / f"{name}.safetensors", Earlier(tmp_path)
    found = task.mean([name], torch.device("cpu"))
    np.testing.assert_allclose(found, C, rtol=1e-12, atol=1e-14 * np.trace(C))
    space = bottom_eigenspace(found, 8)
    assert space.exact and space.rank == 16 and oracle.leak(space.vectors.numpy().T, X) < 1e-14
    assert path.stat().st_size < 4 * 32 * 33 + 200


def test_grams_kept_over_those_of_another_model_are_the_new_ones_alone(tmp_path, monkeypatch):
    q, k = ("model.layers.0.self_attn." + name for name in ("q_proj", "k_proj"))
    batches = random_batches(count=2)
    keep_grams(tmp_path / "over", tiny_model(seed=5), [q, k], batches, progress=False)
    for folder in ("over", "alone"):
        keep_grams(tmp_path / folder, tiny_model(), [k], batches, progress=False)
    over, alone = (Earlier(tmp_path / folder) for folder in ("over", "alone"))
    assert over.key == alone.key
    assert torch.equal(*(task.mean([q, k], torch.device("cpu")) for task in (over, alone)))
    monkeypatch.setattr(
        "lora_null.earlier_tasks.write_safetensors", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        keep_grams(tmp_path / "over", tiny_model(seed=6), [k], batches, progress=False)
    with pytest.raises(UserError, match="no complete Grams"):
        over.key  # noqa: B018


def test_a_sketch_is_exact_at_the_rank_and_never_more_than_the_gram():
    X = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = X @ X.T
    F = sketch_of(C, 16)
    assert torch.allclose(F @ F.T, C, atol=1e-6 * C.norm())
    few = sketch_of(C, 6)
    assert few.shape == (40, 6) and torch.linalg.eigvalsh(C - few @ few.T).min() > -1e-6 * C.norm()


def test_transfer_is_as_lopez_paz_and_ranzato_define_it():
    values = {"base": (0.1, 0.2, 0.3), "one": (0.8, 0.3, 0.3), "two": (0.6, 0.9, 0.5), "three": (0.5, 0.7, 0.9)}

    def evaluation(name):
        metrics = {f"t{j}": Metric(v, 0.1, 4, True, "task", "fraction") for j, v in enumerate(values[name])}
        return Evaluation(metrics, {}, 0.0, {key: [m.value - 0.1, m.value + 0.1] * 2 for key, m in metrics.items()})

    found = transfer("m", evaluation("base"), [evaluation(n) for n in ("one", "two", "three")], ["t0", "t1", "t2"])
    assert found.backward.value == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert found.forward.value == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)
    assert found.average == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert [e.value for e in found.lost] == pytest.approx([0.3, 0.2])


def test_the_matrix_is_what_was_measured_after_every_task(finished):
    found = json.loads((finished / "out" / "results.json").read_text())["sequence"]
    assert found["tasks"] == ["numbers", "letters"] and found["metrics"] == ["numbers nll", "letters nll"]
    for entry in found["transfers"]:
        folders = [finished / "out" / "tasks" / task / entry["method"] for task in ("1-numbers", "2-letters")]
        measured = [json.loads((folder / "eval.json").read_text())["metrics"] for folder in folders]
        for name, row in zip(found["metrics"], entry["matrix"]):
            assert [cell["value"] for cell in row] == [metrics[name]["value"] for metrics in measured]
        one, two = (metrics["numbers nll"]["value"] for metrics in measured)
        assert entry["lost"][0][0] == pytest.approx(two - one, abs=1e-6)
    page = (finished / "out" / "report.html").read_text()
    assert "Task after task" in page and "Backward transfer" in page


def test_the_dial_at_the_end_measures_every_task(finished, tmp_path, capsys):
    assert main(["dial", str(finished / "out" / "lora"), "--strengths", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "dial" / "dial.json").read_text())["points"][1]["metrics"]
    assert {"facts nll", "numbers nll", "letters nll"} <= found.keys()
    assert "only one side" not in capsys.readouterr().out


def test_a_method_that_diverged_in_an_earlier_task_stays_in_the_results(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    jobs = [check_run(stage, base=tmp_path / "out" / "base") for stage in stage_recipes(recipe)]
    first, last = (load_results(job.folder) for job in jobs)
    wild = Row(method="lora", diverged=2, seconds=Seconds(train=1.0))
    write_results(jobs[0].folder, first.model_copy(update={"rows": [first.rows[0], wild, *first.rows[2:]]}))
    write_results(jobs[1].folder, last.model_copy(update={"rows": [r for r in last.rows if r.method != "lora"]}))
    found = collect(recipe, jobs)
    assert [row.method for row in found.rows] == ["base", "lora-null-v1", "lora-null-v2", "lora"]
    assert found.labels()[-1] == "LoRA (in numbers)" and found.rows[-1].diverged == 2


def test_a_method_whose_last_evaluation_overflowed_stays_in_the_results(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    jobs = [check_run(stage, base=tmp_path / "out" / "base") for stage in stage_recipes(recipe)]
    last = load_results(jobs[1].folder)
    wild = Row(method="lora", diverged=3, seconds=Seconds(train=1.0))
    write_results(jobs[1].folder, last.model_copy(update={"rows": [last.rows[0], wild, *last.rows[2:]]}))
    evaluation = jobs[1].folder / "lora" / "eval.json"
    found = Evaluation.read(evaluation)
    found.samples["numbers nll"] = [math.nan] * len(found.samples["numbers nll"])
    evaluation.write_text(found.to_json())
    found = collect(recipe, jobs)
    assert [row.method for row in found.rows] == ["base", "lora", "lora-null-v1", "lora-null-v2"]
    assert found.rows[1].diverged == 3 and [t.method for t in found.sequence.transfers] == [
        "lora-null-v1",
        "lora-null-v2",
    ]


def test_the_change_is_that_of_all_tasks_against_the_base(finished):
    """By the weights of the whole, in float64."""
    out = finished / "out"
    for method in METHODS.split(","):
        row = next(row for row in load_results(out).rows if row.method == method)
        model = PeftModel.from_pretrained(base(finished).double(), out / method / "adapter")
        merged, W = model.merge_and_unload().state_dict(), base(finished).double().state_dict()
        for name, ratio in row.magnitude.layers.items():
            start = W[f"{name}.weight"]
            moved = torch.dist(merged[f"{name}.weight"], start) / torch.linalg.vector_norm(start)
            assert ratio == pytest.approx(float(moved), rel=1e-4)


def test_what_is_of_one_task_is_not_said_of_all(finished):
    out = finished / "out"
    stages = [load_results(folder) for folder in sorted((out / "tasks").iterdir())]
    for row in load_results(out).rows[1:]:
        own = [next(other for other in stage.rows if other.method == row.method) for stage in stages]
        assert row.drift is None and all(other.drift for other in own)
        assert row.peak_memory_bytes == max(other.peak_memory_bytes for other in own)


@pytest.mark.parametrize("nothing", ["the second", "both", "after a warmup"])
def test_a_later_task_of_which_nothing_is_left_is_not_the_base_again(tmp_path, nothing):
    """A rate at which the first step breaks the budget: what is saved is the model before the task."""
    recipes_in(tmp_path)
    probe = {"probe": {"every": 1, "retention": 12, "task": 6}}
    for name in "ab":  # after a warmup's first step, whose state keeps the budget, and has moved nothing
        raw = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        if name == "b" and nothing == "after a warmup":
            raw["training"] |= {"warmup_steps": 1}
        raw["eval"] = {**raw["eval"], **probe, "retention": [{**raw["eval"]["retention"][0], "limit": 40}]}
        raw["training"]["learning_rate"] = 1.0 if name == "b" or nothing == "both" else 1e-3
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    words = ["--method", "lora", "training.max_steps=2", "budget={at_most: 0.2, then: rewind}"]
    assert main([*in_sequence(tmp_path, tmp_path / "out"), *words]) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "tasks" / "2-letters"):
        lora, said = load_results(folder).rows[1], (folder / "report.md").read_text()
        assert lora.budget.step == 0 and lora.is_base_again == (nothing == "both")
        assert ("LoRA is the base again" in said) == (nothing == "both")
        assert ("LoRA kept nothing of letters: the budget left nothing of that training." in said) == (
            nothing != "both"
        )
        assert ("LoRA: KL to base on facts" in said) == (nothing != "both")


def test_the_whole_names_the_data_of_all_tasks(finished, tmp_path):
    out = finished / "out"
    results = load_results(out)
    stages = [load_results(folder) for folder in sorted((out / "tasks").iterdir())]
    data = [stage.settings["training_data"] for stage in stages]
    assert len(set(data)) == 2 and results.settings["training_data"] == "; ".join(data)
    for row in results.rows[1:]:
        for card in (out / row.method / "README.md", out / row.method / "adapter" / "README.md"):
            text = card.read_text()
            assert f"Trained on {Path(data[0]).name}, then on {Path(data[1]).name}." in text
            assert (
                "Learning was measured by numbers" in text and "letters" in text.partition("Learning was measured")[2]
            )


@pytest.mark.parametrize(
    "training, part",
    [
        ({}, slice(1024)),
        ({"max_length": None}, slice(None)),
        ({"max_length": 32}, slice(32)),
        ({"max_length": 32, "truncation_mode": "keep_end"}, slice(-32, None)),
        (
            {"max_length": 32, "truncation_mode": "keep_end", "packing": True},
            slice(32),
        ),  # each row cut as it is packed
    ],
)
def test_grams_of_a_task_are_of_the_tokens_that_training_reads(finished, training, part):
    recipe = load_recipe(str(finished / "a.yaml"))
    job = check_run(recipe)
    job.recipe.training |= training
    whole = [tokens.ids.tolist() for tokens in tokenize(job.data.examples, recipe.data.template, job.tokenizer)]
    assert (
        training_ids(job) == [ids[part] for ids in whole[: recipe.calibration.samples]] and max(map(len, whole)) > 32
    )


def test_a_recipe_whose_path_holds_an_equals_sign(finished, tmp_path, capsys):
    (tmp_path / "lr=1").mkdir()
    for name in "ab":
        shutil.copy(finished / f"{name}.yaml", tmp_path / "lr=1")
    words = ["train", *(str(tmp_path / "lr=1" / f"{name}.yaml") for name in "ab"), "--sequence", "--print-config"]
    assert main([*words, "method.rank=3"]) == 0 and "rank: 3" in capsys.readouterr().out


def test_a_sequence_goes_where_all_of_its_recipes_go(finished):
    recipes = [load_recipe(path, ["output_dir=~/here"]) for path in (str(finished / f"{name}.yaml") for name in "ab")]
    assert join_recipes(recipes).output_dir == str(Path.home() / "here")
    recipes[1].output_dir = "elsewhere"
    assert join_recipes(recipes).output_dir == "runs/numbers-letters"


def test_a_dry_run_looks_at_the_folder_of_the_whole(finished, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    words = in_sequence(finished, tmp_path)
    assert main([*words, "--dry-run"]) == 2
    assert "holds other files (thesis.tex)" in capsys.readouterr().err
    assert main([*words[:-1], str(finished / "out"), *WORDS, "--dry-run"]) == 2
    assert f"{finished / 'out'} holds a finished run" in capsys.readouterr().err


def test_a_dry_run_of_tasks_tells_their_space_and_their_rounding(finished, tmp_path, monkeypatch, capsys):
    words = in_sequence(finished, tmp_path / "x")
    said = "in bfloat16 the weights that a later task goes on from round small changes"
    assert main([*words, "--dry-run"]) == 0 and said not in capsys.readouterr().err
    monkeypatch.setattr("lora_null.recipes.sequence.space_of_sequence", lambda *_: 10**16)
    assert main([*words, "--dry-run", "model.dtype=bfloat16"]) == 2
    told = capsys.readouterr().err
    assert said in told and "GB free, this run needs about 10000000.0 GB" in told


class Blow(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and "2-letters" in args.output_dir and "v1" in args.output_dir:
            raise KeyboardInterrupt


def test_a_sequence_that_is_broken_off_ends_in_the_same_bits(finished, tmp_path, monkeypatch):
    words = in_sequence(finished, tmp_path / "out")
    made = run._make_trainer
    with monkeypatch.context() as patch:
        patch.setattr(run, "_make_trainer", lambda *a: (trainer := made(*a), trainer.add_callback(Blow()))[0])
        assert main([*words, *WORDS]) == 130
    assert not (tmp_path / "out" / "results.json").exists()
    assert main([*words, *WORDS, "--resume"]) == 0
    for method in METHODS.split(","):
        name = f"{method}/adapter/adapter_model.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()
    one, other = (json.loads((f / "out" / "results.json").read_text()) for f in (tmp_path, finished))
    assert one["sequence"] == other["sequence"]
    assert main([*words, *WORDS]) == 2  # finished


def test_what_is_lost_of_a_sequence_is_done_again_and_leaves_no_method_behind(finished, tmp_path, capsys):
    """Of a finished one, and of one that was stopped after its first task."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    for lost in ("tasks/1-numbers/lora-null-v2/adapter", "tasks/2-letters/lora-null-v2", "lora-null-v1/adapter"):
        shutil.rmtree(out / lost)
    for lost in ("lora/eval.json", "results.json"):
        (out / "tasks" / "1-numbers" / lost).unlink()
    (out / "tasks" / "2-letters" / "report.html").unlink()
    assert main(["train", str(out / "recipe.yaml"), "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"{out}/tasks/1-numbers/lora: was finished and its eval.json is gone" in said
    assert "lora-null-v2: was finished and its adapter or model is gone; the method goes on from its last" in said
    for method in METHODS.split(","):
        name = f"{method}/adapter/adapter_model.safetensors"
        assert (out / name).read_bytes() == (finished / "out" / name).read_bytes()
    one, other = (json.loads((f / "out" / "results.json").read_text()) for f in (tmp_path, finished))
    assert one["sequence"] == other["sequence"] and [row["method"] for row in one["rows"]] == [
        row["method"] for row in other["rows"]
    ]


def test_a_row_of_an_earlier_task_names_it(finished, tmp_path):
    """As an earlier version left them, which took a method without weights for one that had diverged."""
    shutil.copytree(finished / "out", tmp_path / "out")
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    jobs = [check_run(stage, base=tmp_path / "out" / "base") for stage in stage_recipes(recipe)]
    last = load_results(jobs[1].folder)
    write_results(jobs[1].folder, last.model_copy(update={"rows": last.rows[:-1]}))
    assert collect(recipe, jobs).labels()[1:] == ["LoRA", "LoRA-Null-v1", "LoRA-Null-v2 (after numbers)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: b | {"name": a["name"]}, "two tasks are called 'numbers'"),
        (lambda a, b: b | {"model": b["model"] | {"dtype": "bfloat16"}}, "letters changes model"),
        (lambda a, b: b | {"method": b["method"] | {"rank": 2}}, "letters changes method"),
        (lambda a, b: b | {"eval": b["eval"] | {"task": []}}, "letters has no eval.task"),
        (lambda a, b: b | {"eval": b["eval"] | {"task": a["eval"]["task"]}}, "'numbers' is listed twice"),
        (
            lambda a, b: (
                b
                | {
                    "eval": b["eval"]
                    | {"task": [{"mt_bench": "MT", "path": a["data"]["path"].replace("numbers", "talk")}]}
                }
            ),
            "letters is measured by MT-Bench alone, which nobody grades",
        ),
        (
            lambda a, b: b | {"training": b["training"] | {"lr_scheduler_type": "cosine_with_min_lr"}},
            "min_lr or min_lr_rate should",
        ),
    ],
)
def test_a_mistake_between_tasks(finished, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("a model was loaded"))
    write_rows(finished / "talk.jsonl", [{"question_id": 1, "category": "math", "turns": ["a", "b"]}])
    one, other = (yaml.safe_load((finished / name).read_text()) for name in ("a.yaml", "b.yaml"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(change(one, other)))
    words = [str(finished / "a.yaml"), str(tmp_path / "c.yaml"), "--sequence", "--output-dir", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert main(["train", *words, *more]) == 2
        told = capsys.readouterr().err.strip()
        assert message in told.splitlines()[-1] and "Traceback" not in told


def test_each_task_keeps_its_own_training_and_trainer():
    """A key that only the first recipe sets is not the second's."""
    first = {"training.max_steps": 60, "training.neftune_noise_alpha": 5.0}
    one = load_recipe("quickstart", [f"{key}={value}" for key, value in first.items()] + ["name=one"])
    words = [
        "trainer=dpo",
        "name=two",
        "eval.task=[{preferences: pairs, path: pairs.jsonl}]",
        "training.num_train_epochs=3",
    ]
    other = load_recipe("quickstart", words)
    stages = stage_recipes(join_recipes([one, other]))
    assert [stage.trainer for stage in stages] == ["sft", "dpo"]
    assert [stage.training for stage in stages] == [one.training, other.training]


def test_rewards_are_multiplied_by_their_own_tasks_beta():
    common = ["trainer=dpo", "training.num_train_epochs=3"]
    asked = [{"beta": 0.3}, {"beta": 0.5}, {}]
    recipes = [
        load_recipe(
            "quickstart",
            [*common, f"name=t{number}", f"training={beta}", f"eval.task=[{{preferences: p{number}, path: p.jsonl}}]"],
        )
        for number, beta in enumerate(asked)
    ]
    for stage in stage_recipes(join_recipes(recipes)):
        assert [entry.beta for entry in stage.eval.task] == [0.3, 0.5, 0.1]
    own = recipes[0].model_dump(mode="json")
    own["eval"]["task"][0]["beta"] = 2.0
    assert stage_recipes(join_recipes([parse_recipe(own, "own"), recipes[1]]))[1].eval.task[0].beta == 2.0


def test_bad_rows_of_an_evaluation_are_as_its_own_task_says(tmp_path):
    """After the other task too, whose recipe says the other thing."""
    paths = recipes_in(tmp_path)
    rows = [*({"question": f"q{i}", "answer": "a"} for i in range(8)), {"question": "q", "answer": ""}]
    of_first = f"eval.task=[{write_rows(tmp_path / 'bad.jsonl', rows)}]"

    def measured(own, other):
        words = [[f"data.on_bad_row={own}", of_first], [f"data.on_bad_row={other}"]]
        stages = stage_recipes(join_recipes([load_recipe(path, said) for path, said in zip(paths, words)]))
        for stage in reversed(stages):
            yield [len(task.pairs) for task in eval_tasks(EvalContext(stage, tiny_tokenizer())) if task.role == "task"]

    assert list(measured("skip", "error")) == [[8, 8]] * 2
    with pytest.raises(UserError, match="1 of 9 rows cannot be used: 1 empty 'answer'"):
        next(measured("error", "skip"))


def test_words_hold_for_tasks_that_say_otherwise(tmp_path):
    tasks = [{"name": "x", "training": {"num_train_epochs": 3}, "data": {"limit": 9, "text": "t"}}, {"name": "y"}]
    tasks[0]["eval"] = tasks[1]["eval"] = {"task": [{"answers": "a", "path": "a.jsonl"}]}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"include": "quickstart", "sequence": {"tasks": tasks}}))
    words = ["training.max_steps=10", "data={limit: 5}", "data.prompt=p", "trainer=dpo", "data.response=r"]
    one, two = stage_recipes(load_recipe(str(tmp_path / "tasks.yaml"), words))
    assert one.training["max_steps"] == two.training["max_steps"] == 10 and one.training["num_train_epochs"] == 3
    assert [(r.data.limit, r.data.prompt, r.data.text, r.trainer) for r in (one, two)] == [(5, "p", None, "dpo")] * 2


def test_a_weight_of_zero_leaves_out_the_texts_too(finished, tmp_path, caplog):
    recipe = join_recipes([load_recipe(path, methods="replay,keeplora,lora") for path in recipes_in(finished)])
    jobs = [check_run(stage) for stage in stage_recipes(recipe)]
    for weight in (0.0, 1.0):
        recipe.sequence.earlier = weight
        check_stages(recipe, jobs)
    assert "changes nothing" not in caplog.text  # these read the texts again, and keep no Gram
    recipe.sequence.sketch = 4
    check_stages(recipe, jobs)
    assert "sequence.sketch: changes nothing for replay, keeplora, lora" in caplog.text
    recipe.sequence.earlier = 0.5
    with pytest.raises(
        UserError, match="replay reads texts, the knowledge's and those of earlier tasks with a weight of"
    ):
        check_stages(recipe, jobs)
    shutil.copytree(finished / "out" / "tasks" / "1-numbers" / "lora", tmp_path / "lora")
    before = dataclasses.replace(jobs[0], folder=tmp_path)
    for name in ("replay", "keeplora"):
        shutil.copytree(tmp_path / "lora", tmp_path / name)
    recipe.sequence.earlier = 0.0
    assert with_earlier(recipe, jobs[1], [before]).earlier_rows == []
    recipe.sequence.earlier = 1.0
    assert len(with_earlier(recipe, jobs[1], [before]).earlier_rows) == len(training_ids(before)) > 0


def test_each_earlier_task_has_its_own_weight(finished, tmp_path):
    recipe = join_recipes([load_recipe(path, methods="lora-null-v2") for path in recipes_in(finished)])
    first, second = (check_run(stage) for stage in stage_recipes(recipe))
    first.folder, second.folder = tmp_path / "1", tmp_path / "2"
    shutil.copytree(finished / "out" / "tasks" / "1-numbers" / "lora-null-v2", tmp_path / "2" / "lora-null-v2")
    recipe.sequence.knowledge, recipe.sequence.earlier = 0.3, [0.5, 2.0]
    job = with_earlier(recipe, second, [first, second])
    found = [(task.folder, task.weight) for task in job.earlier["lora-null-v2"]]
    assert found == [(tmp_path / i / "lora-null-v2" / "grams", weight) for i, weight in (("1", 0.5), ("2", 2.0))]
    assert job.knowledge == 0.3


def test_a_sequence_keeps_sketches_where_it_is_asked_to(finished, tmp_path):
    recipe = join_recipes([load_recipe(path, methods="lora-null-v2") for path in recipes_in(finished)])
    job = check_run(stage_recipes(recipe)[0])
    job.folder, kept = tmp_path, Path("lora-null-v2", "grams", "model.layers.1.mlp.down_proj.safetensors")
    shutil.copytree(finished / "out" / "tasks" / "1-numbers", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / kept.parent)
    recipe.sequence.sketch = 4
    sequence._keep_grams(recipe, job, job.plans[0])
    F, lower = (
        load_file(tmp_path / kept)["sketch"],
        load_file(finished / "out" / "tasks" / "1-numbers" / kept)["lower"],
    )
    gram = torch.zeros(48, 48, dtype=torch.float64)
    gram[np.tril_indices(48)] = lower
    wanted = sketch_of(gram + gram.tril(-1).T, 4).float()
    assert F.shape == (48, 4) and torch.dist(F @ F.T, wanted @ wanted.T) < 1e-4 * (wanted @ wanted.T).norm()


def test_the_space_of_a_sequence_counts_what_every_task_writes(finished):
    recipe = join_recipes([load_recipe(path, methods="lora,lora-null-v2") for path in recipes_in(finished)])
    jobs = [check_run(stage) for stage in stage_recipes(recipe)]
    null = jobs[0].plans[1]
    runs = sum(4 * plan.saved * 3 + 2 * 3 * plan.extra_bytes for plan in jobs[0].plans)
    assert null.input_widths and space_of_sequence(recipe, jobs) == (
        jobs[0].reference_bytes + runs + 8 * sum(width * (width + 1) // 2 for width in null.input_widths)
    )
    recipe.sequence.sketch = 4
    assert space_of_sequence(recipe, jobs) == jobs[0].reference_bytes + runs + 16 * sum(null.input_widths)


@pytest.mark.parametrize("word", ["budget.at_most=0.1", "eval.limit=3", "grid.seeds=[0,1]"])
def test_what_only_the_first_recipe_says_is_not_dropped_from_a_later_one(word):
    one, other = load_recipe("quickstart"), load_recipe("quickstart", [word])
    with pytest.raises(
        UserError, match=f"sets {word.partition('=')[0].removesuffix('.at_most').removesuffix('.seeds')}, which holds"
    ):
        join_recipes([one, other])
    join_recipes([other, one])


def test_what_only_a_later_recipe_keeps_is_not_dropped():
    recipes = [load_recipe("quickstart"), load_recipe("quickstart", ["eval.retention=[webqs]"])]
    with pytest.raises(UserError, match=r"sets eval\.retention, which holds for all tasks"):
        join_recipes(recipes)


def test_paths_of_tasks_lie_beside_the_recipe(finished, tmp_path, monkeypatch):
    data, tasks = (
        finished / "numbers.jsonl",
        [{"name": "x", "data": {"path": "numbers.jsonl"}, "eval": {"task": ["numbers.jsonl"]}}, {"name": "y"}],
    )
    (finished / "tasks.yaml").write_text(yaml.safe_dump({"include": "quickstart", "sequence": {"tasks": tasks}}))
    monkeypatch.chdir(tmp_path)
    task = load_recipe(str(finished / "tasks.yaml")).sequence.tasks[0]
    assert task["data"]["path"] == task["eval"]["task"][0] == str(data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}", "--sequence"], "takes two recipes or more"),
        (["{a}", "{b}", "--sequence", "--seeds", "0,1"], "takes no grid"),
        (["{a}", "{b}", "--sequence", "eval.strengths=[0.5]"], "strength 0 of a later task is not the base"),
        (["{a}", "{b}", "--sequence", "eval.before=false"], "counted from the base; leave it at true"),
        (["{a}", "{b}", "--sequence", "--method", "lora,oft", "method.options.oft.block_size=16"], "oft leaves no plain LoRA, upon which a later task"),
        (["{a}", "sequence", "--sequence"], "sequence is a sequence itself"),
        (["{a}", "sequence={{tasks: [{{name: x}}]}}"], "at least 2 items"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{nam: y}}]}}"], "each task needs a name"),
        (["{a}", f"sequence={{{{tasks: [{{{{name: x}}}}, {{{{name: {'y' * 201}}}}}]}}}}"], "of 200 bytes at most"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y}}], earlier: [1, 1]}}"], "have 1 before the last, not 2"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y, model: {{}}}}]}}"], "y sets 'model', it changes what all tasks share"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y, eval: {{limit: 3}}}}]}}"], "y sets eval.limit"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y, eval: 3}}]}}"], "y: eval is a mapping, and its task a list"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y, eval: {{task: gsm8k}}}}]}}"], "y: eval is a mapping, and"),
        (["{a}", "sequence={{tasks: [{{name: x}}, {{name: y, eval: null}}]}}"], "y: eval is a mapping, and its task a list"),
    ],
)  # fmt: skip
def test_mistakes_of_the_section(finished, tmp_path, capsys, words, message):
    places = {"a": finished / "a.yaml", "b": finished / "b.yaml"}
    assert main(["train", *(word.format(**places) for word in words), "--output-dir", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err

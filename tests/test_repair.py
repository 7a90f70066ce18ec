"""A trained adapter that is changed so that it leaves texts alone: the equation, layers of a model, and the command."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import losses_over, random_batches, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel
from world import base, make_world, write_rows

from lora_null.__main__ import main
from lora_null.adapters.repair import RIDGE, change, repair, repaired
from lora_null.adapters.saved import read_adapter
from lora_null.recipes import adapter_job, caches
from lora_null.recipes.__main__ import main as recipes
from lora_null.recipes.config.schema import CalibrationSection
from lora_null.recipes.models import bases
from lora_null.recipes.repairs import what_is_left_alone
from lora_null.utils.errors import UserError

R, D_IN, D_OUT, WEIGHT = 2, 7, 5, 0.7


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def least_squares(A, B, X_k, X_t, weight):
    """Return the minimizer of ‖B (Z − A) X_t‖² + weight · ‖B Z X_k‖², each entry of Z an unknown of one linear system."""
    rows = np.concatenate([np.kron(B, X_t.T), weight**0.5 * np.kron(B, X_k.T)])
    wanted = np.concatenate([(B @ A @ X_t).ravel(), np.zeros(len(B) * X_k.shape[1])])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].reshape(A.shape)


@pytest.mark.parametrize("task", [True, False])
def test_the_factor_is_the_minimizer(task):
    A, B, X_k = draw(R, D_IN, seed=0), draw(D_OUT, R, seed=1), draw(D_IN, 30, seed=2)
    X_t = draw(D_IN, 4, seed=3) if task else np.eye(D_IN)  # fewer tokens than the layer is wide
    C_k, C_t = X_k @ X_k.T / 30, X_t @ X_t.T / (4 if task else 1)
    c_k, c_t = (C.diagonal().mean() for C in (C_k, C_t))
    ridge = (RIDGE * c_t) ** 0.5 * np.eye(D_IN)
    X_t = np.concatenate([X_t / (2.0 if task else 1.0), ridge], axis=1)
    expected = least_squares(A, B, X_k / 30**0.5, X_t, WEIGHT * c_t / c_k)
    grams = [torch.tensor(C) for C in (C_k, C_t)]
    found = repaired(torch.tensor(A), grams[0], grams[1] if task else None, WEIGHT)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)
    of_unit = repaired(torch.tensor(A), 1000 * grams[0], grams[1] * 9 if task else None, WEIGHT)
    torch.testing.assert_close(of_unit, found)  # the weight has no unit
    pair = torch.tensor(A), torch.tensor(B)
    assert change(pair, grams[0]) == pytest.approx(np.linalg.norm(B @ A @ X_k) ** 2 / 30)


def test_weights_between_nothing_and_everything():
    A, used = torch.tensor(draw(R, D_IN, seed=0)), torch.tensor(draw(D_IN, 3, seed=1))
    gram = used @ used.T
    torch.testing.assert_close(repaired(A, gram, None, 0.0), A)
    unused = torch.linalg.qr(used, mode="complete").Q[:, 3:]
    most = repaired(A, gram, None, 1e6)
    torch.testing.assert_close(most @ unused, A @ unused, rtol=0, atol=1e-8)  # what the texts do not use stays
    assert (most @ used).abs().max() < 1e-4
    assert repaired(A.bfloat16(), gram, gram, 1.0).dtype == torch.bfloat16


def left_by(model, folder, **config):
    """Leave an adapter that was trained for a few steps."""
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=True, **config))
    losses_over(adapted, random_batches(seed=5), steps=4)
    adapted.save_pretrained(folder)
    return read_adapter(folder)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_a_model_is_repaired_layer_by_layer(make, tmp_path):
    """Also where a scaling is a layer's own, and where a weight lies the other way round, as GPT-2's do."""
    targets = {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 2}}
    adapter = left_by(make(), tmp_path, **(targets if make is tiny_model else {"target_modules": ["c_attn"]}))
    keep, task = random_batches(count=2, seed=1), random_batches(count=2, seed=2)
    (nothing, found) = repair(make().eval(), adapter, keep, task, weights=[0.0, WEIGHT])
    assert (nothing.kept, nothing.learned) == pytest.approx((1, 1)) and found.weight == WEIGHT
    for name, (A, _) in nothing.pairs.items():
        torch.testing.assert_close(A, adapter.pairs()[name][0])
    pairs, sums = adapter.pairs(), np.zeros((2, 2))
    X_k, X_t = (oracle.capture_inputs(make().eval(), pairs, batches) for batches in (keep, task))
    for name, (A, B) in pairs.items():
        X = [X[name] / X[name].shape[1] ** 0.5 for X in (X_k, X_t)]
        c_k, c_t = ((x**2).sum() / len(x) for x in X)
        A, B = (adapter.scaling(name) * A).double().numpy(), B.double().numpy()
        ridge = np.concatenate([X[1], (RIDGE * c_t) ** 0.5 * np.eye(len(X[1]))], axis=1)
        expected = least_squares(A, B, X[0], ridge, WEIGHT * c_t / c_k)
        np.testing.assert_allclose(
            adapter.scaling(name) * found.pairs[name][0].numpy(), expected, rtol=2e-3, atol=2e-5
        )
        assert torch.equal(found.pairs[name][1], adapter.pairs()[name][1])
        sums += [[np.linalg.norm(B @ Z @ x) ** 2 for x in X] for Z in (expected, A)]
    assert (found.kept, found.learned) == pytest.approx(sums[0] / sums[1], rel=1e-3)
    assert found.kept < found.learned
    (alone,) = repair(make().eval(), adapter, keep, weights=[WEIGHT])
    assert alone.learned is None and alone.kept < found.kept


@pytest.mark.parametrize(
    ("silent", "reason"),
    [
        ("q_proj", r"no token reaches model\.layers\.0\.self_attn\.q_proj \(1 modules\)"),
        ("gate_proj", r"model\.layers\.0\.mlp\.gate_proj reads 1 rows of a batch, not its tokens"),
    ],
)
def test_a_trained_linear_whose_inputs_cannot_be_measured_is_told_as_one(tmp_path, silent, reason):
    """Such as the layers of a head that the decoder does not call, or experts: there is nothing to leave out any more."""
    model = tiny_model().eval()
    adapter = left_by(tiny_model(), tmp_path, target_modules=[silent])
    for layer in model.model.layers:
        if silent == "q_proj":
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        else:
            layer.mlp.forward = lambda x, own=layer.mlp: own.gate_proj(x[:1, :1]).sum() + x
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot be repaired, {reason}; it can be scaled \(export --"):
        repair(model, adapter, random_batches(count=1, seed=1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    words = ["training.save_strategy=no", "--method", "lora", "method.use_rslora=true"]
    evaluation = "eval.retention=[{answers: facts, path: %s, limit: 24}]" % (folder / "facts.jsonl")
    assert recipes([str(make_world(folder)), evaluation, *words]) == 0
    return folder


def test_the_command_repairs_what_a_run_trained(world, capsys, monkeypatch):
    method = world / "out" / "lora"
    assert main(["repair", str(method)]) == 0
    told, out = capsys.readouterr().out, world / "out" / "lora-repaired"
    assert "keep: " in told and "task: 40 training rows\n" in told and f"lora-null dial {out} --strengths 1" in told
    read = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (method, out)]
    assert read[0] == read[1] and (out / "adapter" / "tokenizer.json").is_file()
    old, new = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (method, out))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old if "lora_B" in k)
    assert main(["dial", str(out), "--strengths", "1"]) == 0 and main(["check", str(out)]) == 0
    assert main(["export", str(out), "--out", str(world / "exported")]) == 0
    note = "Repaired without training from the adapter lora, at weight 1, to leave facts.jsonl alone and do what it does on its"
    assert note in (world / "exported" / "README.md").read_text()
    points = json.loads((out / "dial" / "dial.json").read_text())["points"]
    row = json.loads((world / "out" / "results.json").read_text())["rows"][1]
    assert points[1]["metrics"]["facts kl"]["value"] < 0.5 * row["metrics"]["facts kl"]["value"]
    assert main(["repair", str(method)]) == 2
    assert f"{out / 'adapter'}: exists already" in capsys.readouterr().err
    monkeypatch.chdir(world)
    assert main(["repair", "out/lora", "--weight", "0.1", "--out", "out/lora-repaired-0.1"]) == 0
    assert "lora-null dial out/lora-repaired-0.1 --strengths 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("training", "words", "rows"),
    [
        # Packs that take long rows to pieces, a machine that could not train so, rows of which no answer was left.
        ({"packing": True, "packing_strategy": "bfd_split", "max_length": 16}, [], "40 training rows"),
        ({"fp16": True}, ["--max-forgetting", "1"], "40 training rows"),
        ({"max_length": 29}, [], "10 training rows, evenly spread over 40"),
    ],
)
def test_a_run_is_repaired_however_it_was_trained(world, tmp_path, training, words, rows, capsys):
    run = shutil.copytree(world / "out", tmp_path / "out", ignore=shutil.ignore_patterns("lora-*"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["training"] |= training
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["repair", str(run / "lora"), *words]) == 0
    assert f"task: {rows}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-forgetting", "1", "--weight", "2"], "--weight: --max-forgetting chooses the weight itself"),
        (["--max-forgetting", "0"], "must be a number above 0"),
        (["--max-forgetting", "0.1", "--measure", "facts acc"], "error: --measure: the run has no 'facts acc'"),
        (
            ["--max-forgetting", "1e-6"],
            "--max-forgetting: no weight keeps 1e-06; at the largest, 100, facts kl is 0.0",
        ),
        (["--measure", "facts kl"], "--measure: is for what --max-forgetting measures; give that too"),
        (["--allow-code-execution"], "--allow-code-execution: is for what --max-forgetting measures; give that too"),
    ],
)
def test_a_budget_that_cannot_be_kept_leaves_nothing(world, tmp_path, words, message, capsys):
    assert main(["repair", str(world / "out" / "lora"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_smallest_weight_that_keeps_a_budget(world, tmp_path, capsys):
    """Measured on what is written, and on the weight below, by the run's own questions."""
    method, row = str(world / "out" / "lora"), json.loads((world / "out" / "results.json").read_text())["rows"][1]
    forgot = row["metrics"]["facts kl"]["value"]
    assert main(["repair", method, "--out", str(tmp_path / "same"), "--max-forgetting", str(2 * forgot)]) == 0
    told = capsys.readouterr().out
    assert (
        "(nothing had to be given up)" in told and "nothing is repaired: the adapter keeps the budget as it is" in told
    )
    assert "repair" not in safe_open(tmp_path / "same" / "adapter" / "adapter_model.safetensors", "pt").metadata()
    same, old = (
        load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "same", world / "out" / "lora")
    )
    assert all(torch.allclose(same[name], old[name]) for name in old)
    out, bound = world / "out" / "lora-within", forgot / 4
    assert main(["repair", method, "--out", str(out), "--max-forgetting", str(bound)]) == 0
    told = capsys.readouterr().out
    weight = float(re.search(r"repaired at weight ([0-9.e-]+):", told)[1])
    assert f"at most {bound:g} allowed (repaired at weight {weight:g})" in told and "given up: " in told
    assert main(["repair", method, "--out", str(world / "out" / "below"), "--weight", str(weight / 10**0.5)]) == 0
    values = {}
    for folder in (out, world / "out" / "below"):
        assert main(["dial", str(folder), "--strengths", "1"]) == 0
        point = json.loads((folder / "dial" / "dial.json").read_text())["points"][1]
        values[folder.name] = point["metrics"]["facts kl"]["value"]
    assert values["lora-within"] < bound and values["below"] > 0.8 * bound


def test_the_command_repairs_any_adapter(world, tmp_path, capsys):
    adapter = get_peft_model(base(world), LoraConfig(r=4, target_modules=["q_proj"]))
    losses_over(adapter, random_batches(), steps=3)
    adapter.save_pretrained(tmp_path / "a")
    write_rows(tmp_path / "notes.jsonl", [{"text": f"the {i}th note of all {i * i} notes"} for i in range(40)])
    words = ["repair", str(tmp_path / "a"), "--base", str(world / "model"), "--out", str(tmp_path / "b")]
    assert main(words) == 2 and "--keep names the texts to keep" in capsys.readouterr().err
    assert main(words[:-2]) == 2 and "--out: is needed" in capsys.readouterr().err
    assert main([*words, "--keep", "x", "--max-forgetting", "1"]) == 2
    assert "--max-forgetting: is measured by a run's questions" in capsys.readouterr().err
    notes = str(tmp_path / "notes.jsonl")
    assert main([*words, "--keep", notes, "--weight", "0"]) == 2
    assert "--weight: must be a number above 0" in capsys.readouterr().err
    assert main([*words, "--keep", notes, "--weight", "1e308"]) == 2
    assert "--weight: must be at most 1e+06, not 1e+308" in capsys.readouterr().err
    for option in ("--keep", "--data"):
        assert main([*words, "--keep", notes, option, str(tmp_path / "none.jsonl")]) == 2
        assert f"error: {option}: no file or folder {tmp_path / 'none.jsonl'}" in capsys.readouterr().err
    assert main([*words, "--keep", notes, "--weight", "3"]) == 0
    assert "all directions count alike; --data names" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "c"), "--keep", notes, "--data", str(world / "numbers.jsonl")]) == 0
    assert f"task: {world / 'numbers.jsonl'}: 40 " in capsys.readouterr().out
    for name in "bc":
        assert PeftModel.from_pretrained(base(world), tmp_path / name / "adapter").peft_config["default"].r == 4


def test_a_sequence_is_repaired_on_the_rows_of_all_its_tasks(tmp_path, capsys):
    raw = yaml.safe_load(make_world(tmp_path).read_text())
    letters = write_rows(tmp_path / "letters.jsonl", [{"question": f"n {i}", "answer": "b" * i} for i in range(1, 13)])
    tasks = [{"name": "one"}, {"name": "two", "data": raw["data"] | {"path": str(letters)}}]
    tasks[1]["eval"] = {"task": [{"answers": "letters", "path": str(letters)}]}
    path = make_world(tmp_path, sequence={"tasks": tasks}, method={"name": "lora", "rank": 4})
    assert recipes([str(path), "training.save_strategy=no", "training.max_steps=2"]) == 0
    assert main(["repair", str(tmp_path / "out" / "lora")]) == 0
    assert "task: 52 training rows" in capsys.readouterr().out
    for task, rows in (("1-one", 40), ("2-two", 52)):  # the adapter of a later task holds the earlier ones' change too
        assert main(["repair", str(tmp_path / "out" / "tasks" / task / "lora")]) == 0
        assert f"task: {rows} training rows" in capsys.readouterr().out


def test_an_adapter_of_the_output_layer_is_refused_before_weights_load(world, tmp_path, capsys, monkeypatch):
    get_peft_model(base(world), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "a")
    monkeypatch.setattr(bases, "load_base", None)
    words = ["--base", str(world / "model"), "--keep", str(world / "facts.jsonl"), "--out", str(tmp_path / "b")]
    assert main(["repair", str(tmp_path / "a"), *words]) == 2
    assert "changes lm_head, whose inputs are not measured" in capsys.readouterr().err


def test_texts_that_the_model_wrote_after_the_rows_are_those_of_the_run(tmp_path, capsys, monkeypatch):
    rows = [{"question": f"what is {i} " + "and more " * 99 * (i == 7), "answer": f"it is {i}"} for i in range(301)]
    calibration = {"self": "data", "max_length": 96, "samples": 6}
    recipe = make_world(tmp_path, calibration=calibration, method={"name": "lora-null-v2", "rank": 4})
    words = ["training.save_strategy=no", "training.max_steps=1", "eval={retention: [], task: [], before: false}"]
    words += ["training.max_length=64", "data.on_bad_row=skip"]  # the row of which only a question would be left
    words.append(f"data.path={write_rows(tmp_path / 'many.jsonl', rows)}")
    assert recipes([str(recipe), *words]) == 0
    monkeypatch.setattr(caches, "base_to_run", None)  # nothing is written anew
    capsys.readouterr()
    assert main(["repair", str(tmp_path / "out" / "lora-null-v2")]) == 0
    assert "task: 256 training rows, evenly spread over 300" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "measure"),
    [
        ({}, "a kl"),
        ({"measure": ["b kl"]}, "b kl"),
        ({"measure": ["b kl", "c kl"]}, ["b kl", "c kl"]),
        ({"keep": "q"}, None),
    ],
)
def test_a_runs_own_measure_is_taken(given, measure, monkeypatch):
    """By `export --max-forgetting` too."""
    monkeypatch.setattr(adapter_job, "job_for", lambda source, arguments, scratch, budget: budget)
    source = SimpleNamespace(recipe={"budget": {"measure": "a kl", "at_most": 0.3}})
    arguments = SimpleNamespace(**{"max_forgetting": 0.1, "measure": None, "keep": None, "learn": None} | given)
    found = adapter_job.budget_job(source, arguments, None)
    assert (found["measure"], found["at_most"]) == (measure, 0.1)


def test_all_sources_are_named_and_no_folder_of_this_machine(tmp_path, monkeypatch):
    """Nor a relative one, which is a whole path where the run goes on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "b.jsonl").touch()
    section = CalibrationSection.model_validate({"sources": ["general", "/home/me/a.jsonl", "t/b.jsonl", "org/set"]})
    assert what_is_left_alone(section) == "to leave the general mix, a.jsonl, b.jsonl, org/set alone"


def test_several_processes_are_refused(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["repair", "out/lora"]) == 2
    assert "repair works in one process; start it without torchrun" in capsys.readouterr().err

"""What would be added to PEFT's comparison runner: experiments, the two calls of `runner.patch`, nb-lora's step."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import random_batches, tiny_model, tiny_tokenizer
from world import write_rows

from lora_null.config import VARIANTS, LoraNullConfig
from lora_null.layer import adapted_layers
from lora_null.recipes.config.load import load_recipe

FOLDER = Path(__file__).parent / "benchmarks" / "peft_comparison"
EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("experiments/*/*/lora_null.json"))


def variant(folder):
    return json.loads((folder / "lora_null.json").read_text())["config"]["variant"]


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import lora_null_experiments

    yield lora_null_experiments
    sys.modules.pop("lora_null_experiments")


def test_there_is_an_experiment_of_each_variant():
    assert {variant(folder) for folder in EXPERIMENTS} == set(VARIANTS) | {"nb"}
    for folder in EXPERIMENTS:
        config = PeftConfig.from_pretrained(str(folder))
        assert (config.r, config.lora_alpha, config.target_modules) == (
            32,
            64,
            {"q_proj", "v_proj"},
        )  # as lora's there


@pytest.mark.parametrize(
    "folder",
    [folder for folder in EXPERIMENTS if variant(folder) in VARIANTS],
    ids=lambda folder: f"{folder.parent.name}-{folder.name}",
)
def test_an_experiment_starts_the_runners_model_where_the_base_is(tmp_path, runner, folder):
    options = json.loads((folder / "lora_null.json").read_text())
    rows = [{"question": f"who was king {i} of the land", "answer": [f"King {i}", "k"]} for i in range(40)]
    options["calibration"]["path"] = str(write_rows(tmp_path / "facts.jsonl", rows))
    (tmp_path / "lora_null.json").write_text(json.dumps(options))
    config = runner.with_lora_null(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), str(tmp_path))
    assert isinstance(config, LoraNullConfig) and config.variant == variant(folder) and config.lora_alpha == 8
    base, batch = tiny_model().eval(), random_batches(count=1)[0]
    model = get_peft_model(tiny_model(), config)  # as the runner does between the two calls
    runner.prepare(model, tiny_tokenizer(), str(tmp_path))
    assert all("default" in layer.started for layer in adapted_layers(model).values())
    torch.testing.assert_close(model.eval()(**batch).logits, base(**batch).logits, rtol=0, atol=1e-4)


def test_other_experiments_are_left_as_they_are(tmp_path, runner):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    assert (
        runner.with_lora_null(config, str(tmp_path)) is config and runner.with_lora_null(None, str(tmp_path)) is None
    )
    model = get_peft_model(tiny_model(), config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    runner.prepare(model, tiny_tokenizer(), str(tmp_path))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_patch_adds_only_our_lines():
    lines = (FOLDER / "runner.patch").read_text().splitlines()
    added = [line[1:].strip() for line in lines[2:] if not line.startswith("@@")]
    assert len(added) == 3 and all(line.startswith("+") for line in lines[2:] if not line.startswith("@@"))
    assert {
        "peft_config = with_lora_null(peft_config, path_experiment)",
        "prepare(model, tokenizer, path_experiment)",
    } < {*added}


def test_the_small_comparison_is_a_recipe():
    text = (FOLDER / "smollm2.yaml").read_text()
    known = [name for name in ("lora", "lora-null-v1", "lora-null-v2", "nb-lora") if name in text]
    assert len(known) == 4
    recipe = load_recipe(str(FOLDER / "smollm2.yaml"), methods="lora")
    assert recipe.training["weight_decay"] == 0.1 and recipe.method.alpha == 64
    assert [next(iter(entry.model_dump())) for entry in recipe.eval.retention] == ["forgetting", "answers"]

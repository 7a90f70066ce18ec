"""The base is measured once: a second run with the same settings takes its results, any other measures."""

import json

import pytest
from world import make_world

from lora_null.recipes import base_cache, run
from lora_null.recipes.__main__ import main
from lora_null.recipes.load import load_recipe

OPTIONS = ["--method", "lora", "training.max_steps=1", "training.save_strategy=no", "eval.cache=true"]


@pytest.fixture
def measured(monkeypatch):
    """The folders of the base evaluations that were really made."""
    found = []
    original = run._evaluate

    def spy(job, model, folder, *, base):
        found.extend([folder.parent.name] * base)
        return original(job, model, folder, base=base)

    monkeypatch.setattr(run, "_evaluate", spy)
    return found


def results(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_a_second_run_takes_the_base_of_the_first(tmp_path, measured, capsys):
    recipe = make_world(tmp_path)
    for name in ("one", "two"):
        assert main([str(recipe), *OPTIONS, "--output-dir", str(tmp_path / name)]) == 0
    assert measured == ["one"] and "base: results of an earlier run" in capsys.readouterr().out
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one[0]["metrics"] == two[0]["metrics"]
    assert two[1]["metrics"]["facts kl"]["value"] == pytest.approx(one[1]["metrics"]["facts kl"]["value"], abs=1e-6)
    assert main([str(recipe), *OPTIONS, "--output-dir", str(tmp_path / "three"), "eval.cache=false"]) == 0
    assert measured == ["one", "three"]


@pytest.mark.parametrize("change", ["eval.batch_size=2", "eval.limit=5", "model.dtype=bfloat16", "eval.retention=[]"])
def test_other_settings_are_measured(tmp_path, measured, change):
    recipe = make_world(tmp_path)
    assert main([str(recipe), *OPTIONS, "--output-dir", str(tmp_path / "one")]) == 0
    assert main([str(recipe), *OPTIONS, "--output-dir", str(tmp_path / "two"), change]) == 0
    assert measured == ["one", "two"]


def test_other_documents_and_other_weights_are_measured(tmp_path, measured):
    recipe = make_world(tmp_path)
    run_to = lambda name: main([str(recipe), *OPTIONS, "--output-dir", str(tmp_path / name)])  # noqa: E731
    assert run_to("one") == 0
    rows = (tmp_path / "numbers.jsonl").read_text()
    (tmp_path / "numbers.jsonl").write_text(rows.replace("it is 4", "it was 4"))
    assert run_to("two") == 0
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # written anew
    assert run_to("three") == 0
    assert measured == ["one", "two", "three"]


def test_the_training_does_not_matter(tmp_path):
    recipe = load_recipe(str(make_world(tmp_path)))
    key = base_cache.key_of(recipe, recipe.model.name_or_path, None, [])
    recipe.training["learning_rate"], recipe.method.rank, recipe.seed = 1.0, 2, 7
    assert base_cache.key_of(recipe, recipe.model.name_or_path, None, []) == key


def test_only_the_newest_are_kept(monkeypatch):
    import os

    monkeypatch.setattr(base_cache, "KEPT", 2)
    for age, name in enumerate("abc"):
        (base_cache.folder() / name).mkdir()
        os.utime(base_cache.folder() / name, (age, age))
    base_cache._prune()
    assert {path.name for path in base_cache.folder().iterdir()} == {"b", "c"}

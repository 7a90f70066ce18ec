"""The base is measured once: a second run with the same settings takes its results, any other measures."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer
from world import make_world

from lora_null.recipes import caches, measure, output
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.recipes.models.bases import Base
from lora_null.utils.errors import UserError
from lora_null.utils.files import cache_root, keep_newest

OPTIONS = ["--method", "lora", "training.max_steps=1", "training.save_strategy=no", "eval.cache=true"]


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    own = tmp_path_factory.mktemp("base_evaluations")
    monkeypatch.setattr(caches, "bases_folder", lambda: own)


@pytest.fixture
def measured(monkeypatch):
    """The folders of the base evaluations that were really made."""
    found = []
    original = measure.evaluate_live

    def spy(job, model, folder, *, base):
        found.extend([folder.parent.name] * base)
        return original(job, model, folder, base=base)

    monkeypatch.setattr(measure, "evaluate_live", spy)
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


def key(recipe, *changes):
    recipe = load_recipe(str(recipe), changes)
    tasks = eval_tasks(EvalContext(recipe, tiny_tokenizer()))
    return caches.base_key(recipe, Base(recipe.model), tasks, recipe.eval.limit)


@pytest.mark.parametrize(
    "change", ["eval.batch_size=2", "eval.limit=5", "training.tf32=true", "model.dtype=bfloat16", "model.trust_remote_code=true", "eval.retention=[]", "eval.bf16=true",
     "eval.vllm={max_model_len: 64}"],
)  # fmt: skip
def test_other_settings_are_others(tmp_path, change):
    recipe = make_world(tmp_path)
    engine = ["eval.backend=vllm"] if "vllm" in change else []
    assert key(recipe, *engine) == key(recipe, *engine) != key(recipe, *engine, change)


def test_probes_of_rows_beyond_the_limit_are_not_taken_for_the_whole(tmp_path):
    """A probe's own rows are measured all, whatever `eval.limit` says, and it finds nothing of fewer rows in the cache."""
    own = f"[{{answers: facts, path: {tmp_path / 'facts.jsonl'}}}]"
    words = ["eval.limit=10", "eval.task=[]", f"eval.probe={{every: 1, task: 0, retention: {own}}}"]
    assert main([str(make_world(tmp_path)), *OPTIONS, *words]) == 0
    whole, probed = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("base/eval.json", "base/probe/eval.json")
    )
    assert [found["metrics"]["facts kl"]["n"] for found in (whole, probed)] == [10, 60]


@pytest.mark.parametrize("change", ["training.learning_rate=1", "method.rank=2", "seed=7", "calibration.samples=9"])
def test_the_training_does_not_matter(tmp_path, change):
    recipe = make_world(tmp_path)
    assert key(recipe) == key(recipe, change)


def test_other_documents_and_other_weights_are_others(tmp_path):
    recipe = make_world(tmp_path)
    keys = [key(recipe)]
    rows = (tmp_path / "numbers.jsonl").read_text()
    (tmp_path / "numbers.jsonl").write_text(rows.replace("it is 4", "it was 4"))
    keys.append(key(recipe))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # written anew
    keys.append(key(recipe))
    assert len(set(keys)) == 3


def test_only_the_newest_are_kept(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).mkdir() if name < "c" else (tmp_path / name).write_text(name)
        (tmp_path / name / "file").write_text(name) if name < "c" else None
        os.utime(tmp_path / name, (age, age))
    keep_newest(tmp_path.iterdir(), 3)
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c", "d"}
    keep_newest(tmp_path.iterdir(), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"d"}


def test_the_newest_evaluations_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "MAX_BASES", 2)
    for age, name in enumerate("abc"):
        (caches.bases_folder() / name).mkdir(parents=True)
        os.utime(caches.bases_folder() / name, (age, age))
    (tmp_path / "eval.json").write_text("{}")
    caches.keep_base("d", tmp_path, SimpleNamespace(settings={"tasks": {}}))
    assert {path.name for path in caches.bases_folder().iterdir()} == {"c", "d"}


def closed(path, *_, **__):
    raise PermissionError(13, "Permission denied", str(path))


def test_another_users_evaluation_that_is_closed_is_measured_again(tmp_path, monkeypatch, capsys):
    """A link would be as closed; of a folder that is closed not even the names are known."""
    (caches.bases_folder() / "theirs").mkdir(parents=True)
    (caches.bases_folder() / "theirs" / "eval.json").write_text("{}")
    for name in ("open", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, closed)
            assert not caches.fetch_base("theirs", tmp_path / "base", [])
        assert "theirs/eval.json of the cache cannot be read (Permission denied)" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_another_users_texts_are_taken_though_they_cannot_be_touched(tmp_path, monkeypatch):
    (tmp_path / "texts.json").write_text('["one"]')
    monkeypatch.setattr(os, "utime", closed)
    assert caches._read_texts(tmp_path / "texts.json") == ["one"]


@pytest.mark.parametrize("variable", ["LORA_NULL_CACHE", "XDG_CACHE_HOME", None])
def test_a_cache_needs_a_home_where_no_variable_names_it(tmp_path, monkeypatch, variable):
    for name in ("HOME", "LORA_NULL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    if variable is None:
        with pytest.raises(
            UserError, match="LORA_NULL_CACHE: is not set, and there is no home folder; set it, or HOME"
        ):
            cache_root()
    else:
        monkeypatch.setenv(variable, str(tmp_path))
        assert cache_root() == (tmp_path if variable == "LORA_NULL_CACHE" else tmp_path / "lora_null")


def test_a_cache_is_asked_for_where_it_is_used_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "file" / "cache"))
    output.check_space(tmp_path / "out", 1)
    recipe = load_recipe(str(make_world(tmp_path)), ["calibration.cache=false"])
    output.check_cache(recipe)
    recipe.calibration.cache = True
    with pytest.raises(
        UserError, match=r"LORA_NULL_CACHE: cannot .*; calibration.cache=false eval.cache=false do without"
    ):
        output.check_cache(recipe)


def test_another_users_evaluation_is_taken_though_it_cannot_be_touched(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    (caches.bases_folder() / "theirs").mkdir(parents=True)
    (caches.bases_folder() / "theirs" / "eval.json").write_text("{}")
    monkeypatch.setattr(os, "utime", refuse)
    assert caches.fetch_base("theirs", tmp_path, []) and (tmp_path / "eval.json").is_file()


def test_the_lock_of_a_folder_is_not_kept_with_what_is_in_it(tmp_path):
    """Of a grid over several processes; one that an earlier version kept is left where it is."""
    for name in ("eval.json", ".lock"):
        (tmp_path / name).write_text("{}")
    caches.keep_base("key", tmp_path, SimpleNamespace(settings={"tasks": {}}))
    kept = caches.bases_folder() / "key"
    assert [path.name for path in kept.iterdir()] == ["eval.json"]
    (kept / ".lock").write_text("another")
    held = (tmp_path / ".lock").stat().st_ino
    assert caches.fetch_base("key", tmp_path, []) and (tmp_path / ".lock").stat().st_ino == held

"""What a run leaves behind and how one goes on with it: cards, Ctrl-C, --resume, keys that are meant, every TRL field."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from engine_worlds import begin
from tiny import save_tiny
from trl import DPOConfig, SFTConfig
from world import make_world

from lora_null.__main__ import main as command
from lora_null.recipes import caches, callbacks, environment, grid, output, run, training
from lora_null.recipes.__main__ import main
from lora_null.recipes.commands.train import _stopped
from lora_null.recipes.config.load import dump, load_recipe, read_yaml
from lora_null.recipes.config.run_folder import MARK, resume_command
from lora_null.recipes.config.schema import REFUSED, parse_recipe, training_keys
from lora_null.recipes.job import inputs_of
from lora_null.recipes.models.bases import resolve_name
from lora_null.trainer.checkpoints import is_whole
from lora_null.trainer.methods import METHODS, load_method_file
from lora_null.utils.errors import UserError

ALREADY = {"bf16": False, "report_to": "none", "use_cpu": True, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(make_world(folder)), "--method", "lora"]) == 0
    return folder


def line_of(capsys, *words):
    assert main(list(words)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def interrupted(recipe, words, method, number):
    """Send a run a signal as soon as it trains; return its exit status and what it has said."""
    said, log = recipe.with_name("said.txt"), method / "train_log.jsonl"
    (process,) = begin(1, [str(recipe), *words], said)
    while process.is_alive() and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode, said.read_text()


def test_every_folder_holds_our_card(finished):
    method = finished / "out" / "lora"
    cards = sorted(str(path.relative_to(method)) for path in method.rglob("README.md"))
    assert cards == ["README.md", "adapter/README.md", "checkpoint-2/README.md", "checkpoint-4/README.md"]
    for card in cards:
        text = (method / card).read_text()
        assert text.startswith("---\n") and "fine-tuned with LoRA by lora-null" in text and "numbers.jsonl" in text
        assert "| None" not in text and "[More Information Needed]" not in text
        assert ("What it learned and what it kept" in text) == (not card.startswith("checkpoint"))
    assert "--resume` goes on" in (method / "checkpoint-2" / "README.md").read_text()
    assert is_whole(method / "checkpoint-4")


def test_ctrl_c_ends_in_two_lines_and_the_second_one_goes_on(tmp_path):
    recipe = make_world(tmp_path, method={"name": "lora", "rank": 4})
    words = ["training.max_steps=5000", "training.save_steps=100000", "training.learning_rate=1e-4"]
    words.append("training.logging_steps=50")
    status, stderr = interrupted(recipe, words, tmp_path / "out" / "lora", signal.SIGINT)
    last = (tmp_path / "out" / "lora" / "train_log.jsonl").read_text().splitlines()[-1]
    assert f"lora to step {json.loads(last)['step']}" in stderr  # what came after the last full line is logged too
    assert status == 130 and "Traceback" not in stderr
    kept, goes_on = (line for line in stderr.splitlines() if line.startswith(("stopped; kept", "go on with: ")))
    assert "lora to step" in kept and "the base's evaluation" in kept
    assert goes_on == f"go on with: lora-null train {tmp_path / 'out' / 'recipe.yaml'} --resume"
    assert main([*goes_on.split()[5:], "--dry-run"]) == 0


def test_the_recipe_that_a_run_left_goes_on_wherever_the_folder_is(finished, tmp_path, capsys):
    shutil.copytree(finished / "out", tmp_path / "elsewhere" / "out")
    moved = tmp_path / "elsewhere" / "out"
    for path in (moved / "report.html", moved / "lora" / "row.json"):
        path.unlink()
    before = (moved / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main([str(moved / "recipe.yaml"), "--resume"]) == 0
    assert (moved / "report.html").is_file()
    assert (moved / "lora" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_recipe_is_a_runs_by_what_it_holds(tmp_path):
    """Not by its name and its folder's: a user's own keeps its output_dir, a run's stands for its folder, renamed or not."""
    theirs, renamed = (tmp_path / name / "recipe.yaml" for name in ("out", "renamed"))
    for path in (theirs, renamed):
        path.parent.mkdir()
    theirs.write_text("include: quickstart\noutput_dir: elsewhere/out\n")
    recipe = load_recipe(str(theirs))
    assert recipe.output_dir == "elsewhere/out"
    renamed.write_text(MARK + dump(recipe))
    assert load_recipe(str(renamed)).output_dir == str(renamed.parent)
    assert load_recipe(str(renamed), ["output_dir=elsewhere"]).output_dir == "elsewhere"


def test_a_run_means_the_same_from_every_folder(tmp_path, monkeypatch):
    recipe, out = make_world(tmp_path / "here"), str(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "mine.py").touch()
    words = ["data.path=numbers.jsonl", "eval.task=[numbers.jsonl]", "calibration.path=~/facts.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    begun = load_recipe(str(recipe), words, output_dir=out)
    output.claim(begun, resume=False, overwrite=False)
    assert begun.data.path == "numbers.jsonl"  # as it was given
    base = resolve_name(begun.model.model_copy(update={"name_or_path": "model"}))
    assert base == str(tmp_path / "here" / "model")  # which the adapter names
    monkeypatch.chdir(tmp_path)
    output.check_output_folder(load_recipe(str(recipe), words, output_dir=out), resume=True, overwrite=False)
    left = load_recipe(f"{out}/recipe.yaml")
    assert {left.data.path, left.eval.task[0].path} == {str(tmp_path / "here" / "numbers.jsonl")}
    assert left.calibration.path == str(tmp_path / "here" / "facts.jsonl")


def test_a_method_of_ones_own_is_among_what_a_resumed_run_checks(tmp_path, monkeypatch):
    """With what its file imports, as far as that lies in no library."""
    mine, beside = tmp_path / "mine.py", tmp_path / "beside_mine.py"
    head = "from lora_null.trainer.methods import Method, method\ndef late():\n    import beside_mine\n"
    beside.write_text("gain = 1")
    mine.write_text(head + "@method\nclass Mine(Method):\n    name = 'resumed-own'\n")
    load_method_file(str(mine))
    monkeypatch.setattr("lora_null.recipes.job.METHODS", {**METHODS, "resumed-own": METHODS.pop("resumed-own")})
    method = SimpleNamespace(name=["lora", "resumed-own"], init=None, files=[str(mine)])
    model = SimpleNamespace(revision=None, name="x")
    recipe = SimpleNamespace(method=method, model=model, training={}, eval=SimpleNamespace(limit=None, judge=None))
    job = SimpleNamespace(data=None, recipe=recipe, sources=[], tasks=[], probe=None, model=model, swept_inputs={})
    found = []
    for file, text in ((mine, ""), (mine, "# changed\n"), (beside, "gain = 5")):
        file.write_text(file.read_text() + text)
        found.append({name: key for name, key in inputs_of(job).items() if name.startswith("method.")})
    assert [*map(list, found)] == 3 * [["method.files (resumed-own)"]]  # by that name it may be mended
    assert len({key for named in found for key in named.values()}) == 3


@pytest.mark.parametrize(
    "word, value", [('bf16="no"', False), ('gradient_checkpointing="True"', True), ("bf16=auto", "auto")]
)
def test_truth_values_in_quotes(word, value):
    assert load_recipe("quickstart", [f"training.{word}"]).training[word.partition("=")[0]] == value


@pytest.mark.parametrize("names", ["./", "[., /, '', .., ../.., ../kept, {tmp}/kept, 1, base/../..]", "lora"])
def test_overwrite_removes_what_a_run_left_and_nothing_else(tmp_path, monkeypatch, names):
    out, removed = tmp_path / "out", []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path))
    for name in ("out/base", "out/cells", "out/mine", "kept"):
        (tmp_path / name).mkdir(parents=True)
    recipe, text = load_recipe("quickstart", output_dir=str(out)), f"method: {{name: {names.format(tmp=tmp_path)}}}\n"
    (out / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="holds other files"):
        output.claim(recipe, resume=False, overwrite=True)
    assert not removed and (out / "recipe.yaml").read_text() == text
    for edited in (text, "method: lora\n"):
        removed.clear()
        (out / "recipe.yaml").write_text(MARK + edited)
        output.claim(recipe, resume=False, overwrite=True)
        assert removed == [out / "base", out / "cells"] and (out / "mine").is_dir()


@pytest.mark.parametrize(
    "key, named", [("method.init", "lora"), ("model.name_or_path", "lora/merged"), ("data.path", "base/rows.jsonl")]
)
def test_overwrite_removes_nothing_that_the_run_reads(tmp_path, key, named):
    needed = tmp_path / named
    needed.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(f"{MARK}method: {{name: [lora]}}\n")
    recipe = load_recipe("quickstart", [f"{key}={needed}"], output_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"--overwrite: would remove {needed}, which this run reads"):
        output.check_output_folder(recipe, resume=False, overwrite=True)
    assert needed.is_dir()


@pytest.mark.parametrize("edited", ["model: 3", "method:", "data: [x]", "eval: text", "sequence: 3"])
def test_a_run_whose_recipe_was_edited_into_none_is_told_in_one_line(tmp_path, capsys, edited):
    run, name = tmp_path / "out", edited.partition(":")[0]
    (run / "lora" / "adapter").mkdir(parents=True)
    (run / "lora" / "adapter" / "adapter_config.json").write_text("{}")
    (run / "recipe.yaml").write_text(f"{MARK}{edited}\n")
    for words in (["report", run], ["dial", run / "lora"], ["export", run / "lora", "--out", tmp_path / "there"]):
        assert command(list(map(str, words))) == 2
        assert f"recipe.yaml: {name} is a mapping of keys, found " in capsys.readouterr().err


@pytest.mark.parametrize(
    "edited, told",
    {
        "eval: {probe: 5}": "eval.probe: holds keys, such as eval.probe.every, not 5",
        "eval: {retention: 3}": r"eval.retention: is a list, such as \[3\]",
        "calibration: 3": "calibration: holds keys, such as calibration.path, not 3",
        "calibration: {sources: 3}": r"calibration.sources: is a list, such as \[3\]",
    }.items(),
)
def test_and_what_is_no_section_or_list_below(tmp_path, edited, told):
    (tmp_path / "recipe.yaml").write_text(f"{MARK}{edited}\n")
    with pytest.raises(UserError, match=f"recipe.yaml: {told}"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(
        f"{MARK}eval: {{probe: {{of_old: 1}}, retention: [of_old]}}\ncalibration: {{of_old: 1}}\n"
    )
    assert read_yaml(tmp_path / "recipe.yaml")["calibration"] == {"of_old": 1}  # keys of another version


@pytest.mark.parametrize("part", ["tasks/2-code", "cells/learning_rate=0.001/seed=0"])
def test_a_part_of_a_run_goes_on_with_the_whole_alone(tmp_path, part, capsys):
    whole = tmp_path / "my runs"
    recipe = load_recipe("quickstart", output_dir=str(whole))
    output.claim(recipe, resume=False, overwrite=False)
    inner = recipe.model_copy(update={"output_dir": str(whole / part)})
    output.claim(inner, resume=True, overwrite=False)  # as the whole does
    command = f"lora-null train '{whole / 'recipe.yaml'}' --resume"
    assert resume_command(whole / part) == command
    for words in ([], ["--dry-run"]):
        line = line_of(capsys, str(whole / part / "recipe.yaml"), "--resume", *words)
        assert "is a part of the run in" in line and f"`{command}`" in line


CHANGES = {  # what is changed → what is named
    "numbers.jsonl": (lambda path: path.write_text(path.read_text().replace("it is", "is it")), "data.path, eval.task (numbers)"),
    "facts.jsonl": (lambda path: path.write_text(path.read_text().replace("King", "Queen").replace("who", "what")), "calibration, eval.retention (facts)"),
    "probed.jsonl": (lambda path: path.write_text(path.read_text().replace("who", "what")), "eval.probe (probed)"),
    "accelerator.json": (lambda path: path.write_text('{"even_batches": false}'), "training.accelerator_config"),
    "model/generation_config.json": (lambda path: path.write_text('{"eos_token_id": 3}'), "model.name_or_path"),
    "model/model.safetensors": (lambda path: save_tiny(path.parent, seed=1), "model.name_or_path"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_resume_names_what_has_changed_behind_the_paths(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(run, "run_job", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    recipe, (change, named) = make_world(tmp_path, method={"name": "lora", "rank": 4}), CHANGES[name]
    shutil.copy(tmp_path / "facts.jsonl", tmp_path / "probed.jsonl")
    (tmp_path / "accelerator.json").write_text("{}")
    words = [
        str(recipe),
        f"training.accelerator_config={tmp_path / 'accelerator.json'}",
        f"eval.probe={{retention: [{{answers: probed, path: {tmp_path / 'probed.jsonl'}}}], task: 0}}",
    ]
    assert main(words) == main([*words, "--resume"]) == 130
    change(tmp_path / name)
    assert f"the content has changed of {named}; put it back" in line_of(capsys, *words, "--resume")
    assert main([*words, "--overwrite"]) == 130


def test_a_run_whose_model_and_data_were_moved_with_it_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "run_job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(grid, "evaluate_base", lambda job: None)
    monkeypatch.setattr("lora_null.recipes.job.rehearse", lambda *_: None)
    before, now, swept = tmp_path / "before", tmp_path / "now", ["--sweep", "training.learning_rate=1e-3,1e-2"]
    recipe, again = (
        make_world(before, method={"name": "lora", "rank": 4}),
        [str(now / "tiny.yaml"), *swept, "--resume"],
    )
    assert main([str(recipe), *swept]) == 130
    before.rename(now)
    text, rows, own = (now / "tiny.yaml").read_text(), (now / "numbers.jsonl").read_text(), now / "out" / "recipe.yaml"
    (now / "tiny.yaml").write_text(text.replace(str(before), str(now)))
    (now / "numbers.jsonl").write_text(rows.replace("it is", "is it"))
    assert "changed of data.path, eval.task" in line_of(capsys, *again) and str(before) in own.read_text()
    (now / "numbers.jsonl").write_text(rows)
    assert main(again) == 130
    recipes = [path.read_text() for path in now.rglob("recipe.yaml")]
    assert len(recipes) == 2 and not any(str(before) in recipe for recipe in recipes)
    shutil.copytree(now, before)  # whose paths are there again
    (before / "tiny.yaml").write_text(text)
    assert "another recipe: model.name_or_path was" in line_of(capsys, str(before / "tiny.yaml"), *swept, "--resume")


def test_resume_names_what_has_changed_on_the_hub_of_a_start_and_behind_swept_paths(tmp_path, capsys, monkeypatch):
    for module in (run, grid):
        monkeypatch.setattr(module, "run_job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(grid, "evaluate_base", lambda job: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe, kept = make_world(tmp_path), tmp_path / "hub" / "models--me--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("c0")
    shutil.copytree(tmp_path / "model", kept / "snapshots" / "c0")
    shutil.copy(tmp_path / "numbers.jsonl", tmp_path / "more.jsonl")
    init = ["init", "--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "facts.jsonl"), "--rank", "4"]
    for samples in ("40", "50"):
        assert command([*init, "--samples", samples, "--out", str(tmp_path / samples), "--max-length", "32"]) == 0
    words = [str(recipe), "model.name_or_path=me/tiny", "--method", "lora-null-v2", f"method.init={tmp_path / '40'}"]
    words += ["--sweep", f"data.path={tmp_path / 'numbers.jsonl'},{tmp_path / 'more.jsonl'}"]
    assert main(words) == main([*words, "--resume"]) == 130
    (tmp_path / "more.jsonl").write_text((tmp_path / "more.jsonl").read_text().replace("it is", "is it"))
    shutil.copytree(tmp_path / "50", tmp_path / "40", dirs_exist_ok=True)
    save_tiny(kept / "snapshots" / "c0", seed=1)
    named = f"method.init, model.name_or_path, data.path (path {tmp_path / 'more.jsonl'})"
    assert f"the content has changed of {named}; put it back" in line_of(capsys, *words, "--resume")


def test_the_texts_are_those_of_a_start_from_elsewhere(tmp_path, monkeypatch):
    """None are read, and the base writes none."""
    recipe, start = make_world(tmp_path), tmp_path / "start"
    init = ["init", "--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "facts.jsonl"), "--rank", "4"]
    assert command([*init, "--dtype", "float32", "--out", str(start)]) == 0
    monkeypatch.setattr(caches, "written_windows", lambda *_: pytest.fail("texts were written"))
    assert main([str(recipe), "--method", "lora-null-v2", f"method.init={start}", "calibration.self=bos"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    told = [found["settings"][f"calibration_{key}"] for key in ("data", "windows", "tokens", "mode")]
    assert told == [f"that of {start}", None, None, None] and found["rows"][1]["drift"]["mean"] > 0


def test_what_was_not_known_when_a_run_began_has_not_changed(tmp_path):
    for known in ({"a": "1"}, {"a": "1", "b": "2"}, {"b": "2"}):
        output._check_inputs(tmp_path, known)
    with pytest.raises(UserError, match="changed of b;"):
        output._check_inputs(tmp_path, {"b": "3"})
    (tmp_path / "inputs.json").write_text("[]")
    with pytest.raises(UserError, match=r"inputs\.json: the whole file: Input should be a valid dictionary"):
        output._check_inputs(tmp_path, {})


@pytest.mark.parametrize("left", ["mine/row.json", "cells/seed=0/mine/checkpoint-2"])
def test_a_method_of_ones_own_may_be_mended_until_it_has_left_something(tmp_path, left):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "row.json").touch()
    for known in ("1", "2"):
        output._check_inputs(tmp_path, {"method.files (mine)": known, "method.files (other)": "1"})
    (tmp_path / left).mkdir(parents=True)
    output._check_inputs(tmp_path, {"method.files (mine)": "2"})
    for name in ("mine", "other"):
        with pytest.raises(
            UserError, match=rf"changed of method\.files \({name}\); put it back, .* in a folder of its own"
        ):
            output._check_inputs(tmp_path, {f"method.files ({name})": "3"})


@pytest.mark.parametrize("name", ["method.files (mine)", "two: method.files (mine)", "method.files (mine) (rank 8)"])
def test_a_method_is_found_by_its_name_in_sequences_and_grids_and_behind_links(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    for known in ("1", "2"):
        output._check_inputs(run, {name: known})
    assert json.loads((run / "inputs.json").read_text()) == {name: "2"}
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "row.json").touch()
    (run / "mine").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="the content has changed of "):
        output._check_inputs(run, {name: "3"})


@pytest.mark.parametrize("consent, said", [("unsafe", " --allow-code-execution=unsafe"), ("jailed", " --allow-code-execution"), (False, "")])  # fmt: skip
def test_the_command_that_goes_on_has_the_consent_that_was_given(tmp_path, consent, said):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "recipe.yaml").touch()
    kept, goes_on = _stopped(tmp_path / "a b", SimpleNamespace(allow_code_execution=consent))
    assert kept == f"stopped; nothing was finished in {tmp_path}/a b yet"
    assert goes_on == f"go on with: lora-null train '{tmp_path}/a b/recipe.yaml' --resume{said}"


@pytest.mark.parametrize("place, launcher", [
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "go on with: torchrun --nproc_per_node 2 -m lora_null.recipes"),
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "go on with the same launcher and: -m lora_null.recipes"),
    ({"ACCELERATE_USE_FSDP": "true"}, "go on with the same launcher and: -m lora_null.recipes"),
])  # fmt: skip
def test_the_command_that_goes_on_starts_as_many_processes_of_the_same_engine(tmp_path, monkeypatch, place, launcher):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").touch()
    _, goes_on = _stopped(tmp_path, SimpleNamespace(allow_code_execution=False))
    assert goes_on == f"{launcher} {tmp_path}/recipe.yaml --resume"


def test_seconds_before_a_checkpoint_count(tmp_path, monkeypatch):
    job, plan = SimpleNamespace(shared_init={}), SimpleNamespace(name="lora")
    assert run._init_before(job, plan, tmp_path) == 0
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "layers.json").write_text('{"key": "k", "seconds": {"all": 7.0}}')
    assert run._init_before(job, plan, tmp_path) == 7
    job.shared_init["lora"] = tmp_path  # copied, not computed
    assert run._init_before(job, plan, tmp_path) == 0
    path, clock = tmp_path / "train_log.jsonl", [100.0]
    lines = [{"step": 1, "seconds": 10, "probe/seconds": 4}, {"step": 2, "seconds": 20}, {"step": 3, "seconds": 30}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    log, state = callbacks.WriteLog(path, ()), SimpleNamespace(global_step=2, is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    clock[0] += 5  # a step
    state.global_step = 3
    log.on_log(None, state, None, {"loss": 1.0})
    clock[0] += 100  # a save
    log.on_save(None, state, None)
    clock[0] += 3
    log.on_log(None, state, None, {"probe/x": 1.0, "probe/seconds": 3.0})
    log.on_train_end(None, state, None)
    assert log.seconds == 20 - 4 + 5
    assert [json.loads(line)["seconds"] for line in path.read_text().splitlines()] == [10, 20, 25, 28]
    state.global_step = 0
    log.on_train_begin(None, state, None)  # in the same process, with a smaller batch (auto_find_batch_size)
    clock[0] += 7
    log.on_train_end(None, state, None)
    assert log.seconds == 7


def test_resume_names_what_differs(finished, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    kept = (finished / "out" / "recipe.yaml").read_text()
    assert " on_bad_row: null" in kept.split("retention:")[1]
    (out / "recipe.yaml").write_text(re.sub(" *on_bad_row: null\n", "", kept))  # as by a version without the key
    words = ["--method", "lora", "--output-dir", str(out), "--resume"]
    line = line_of(capsys, str(finished / "tiny.yaml"), *words, "training.learning_rate=1", "seed=3", "eval.limit=2")
    assert (
        "recipe: training.learning_rate was 0.01 and is 1; eval.limit was null and is 2; seed was 0 and is 3;" in line
    )
    assert f"`lora-null train {out / 'recipe.yaml'} --resume`" in line


MEANT = {
    "lr=1": "training.learning_rate",
    "training.lr=1": "training.learning_rate",
    "training.epochs=2": "training.num_train_epochs",
    "batch_size=4": "training.total_batch_size",
    "training.max_seq_length=8": "training.max_length",
    "lora_alpha=3": "method.alpha",
    "method.r=3": "method.rank",
    "learning_rate=1": "training.learning_rate",
    "model.quantizatoin=nf4": "quantization",
    "data.limt=3": "limit",
}


@pytest.mark.parametrize("word", MEANT)
def test_keys_of_other_tools_are_understood(word, capsys):
    assert f"(did you mean {MEANT[word]!r}?)" in line_of(capsys, "quickstart", word)


@pytest.mark.parametrize("word", ["training.xyzzy=1", "xyzzy=1", "method.xyzzy=1"])
def test_no_line_lists_every_key(word, capsys):
    line = line_of(capsys, "quickstart", word)
    assert len(line) < 250
    for named in re.findall(r"\((.+) names every key\)", line):
        assert Path(named).is_absolute() and Path(named).is_file()  # wherever the package is installed
    assert "'lr' cannot be swept (did you mean 'training.learning_rate'?)" in line_of(
        capsys, "quickstart", "--sweep", "lr=1,2"
    )


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig])
def test_every_field_of_trl_is_taken_or_refused_with_a_reason(kind, tmp_path):
    """Each field at its own default reaches the trainer's configuration; what is refused stands in the README."""
    trainer = {SFTConfig: "sft", DPOConfig: "dpo"}[kind]
    default = kind(output_dir=str(tmp_path), **ALREADY)
    fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(kind) if f.init}
    readme = (Path(environment.__file__).parent / "README.md").read_text()
    recipe = load_recipe("quickstart", [f"trainer={trainer}"])
    assert fields.keys() - REFUSED.keys() <= training_keys(trainer)
    assert all(f"`{name}`" in readme for name in REFUSED)
    for name, value in fields.items():
        given = recipe.model_dump() | {"training": {**ALREADY, name: value}}
        if name in REFUSED:
            given["training"][name] = "anything"
            with pytest.raises(UserError, match=f"training.{name} (is|has)"):
                parse_recipe(given, "x")
            continue
        parsed = parse_recipe(given, "x")
        if name in ("eos_token", "pad_token"):
            assert getattr(parsed.model, name) == value
            continue
        made = getattr(run.training_arguments(parsed, tmp_path), name)
        assert made == value or name in ("accelerator_config", "local_rank", "report_to")


@pytest.mark.parametrize(
    "words, steps",
    [
        ([], 1),
        (["training.gradient_accumulation_steps=3"], 3),
        (["training.total_batch_size=8"], 2),
        (["training.gradient_accumulation_steps=2", "training.total_batch_size=8"], 2),
    ],
)
def test_a_batch_is_given_in_either_way(words, steps, tmp_path):
    assert run.training_arguments(load_recipe("quickstart", words), tmp_path).gradient_accumulation_steps == steps


@pytest.mark.parametrize(
    "words, processes, batch",  # sequences of a pass in one process, passes of a step
    [
        ([], 2, (2, 1)),
        ([], 4, (1, 1)),
        (["training.total_batch_size=24"], 2, (4, 3)),
        (["training.total_batch_size=24"], 4, (3, 2)),
        (["training.per_device_train_batch_size=", "training.total_batch_size=12"], 1, (6, 2)),
        (["training.per_device_train_batch_size=", "training.total_batch_size=6"], 2, (3, 1)),
        (["training.per_device_train_batch_size=", "training.total_batch_size=64"], 2, (8, 4)),
        ([], 3, None),
        ([], 8, None),
        (["training.total_batch_size=24", "training.gradient_accumulation_steps=6"], 4, None),
    ],
)
def test_processes_share_out_the_total_batch(words, processes, batch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "num_processes", lambda: processes)
    recipe = load_recipe("quickstart", words)
    if batch is None:
        with pytest.raises(UserError, match="is not a multiple of per_device_train_batch_size × processes"):
            training.training_arguments(recipe, tmp_path)
        return
    found = training.training_arguments(recipe, tmp_path)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == batch
    given = recipe.training.get("per_device_train_batch_size")
    assert (f"sequences a pass, not {given}" in capsys.readouterr().out) is (given is not None and batch[0] != given)


def test_one_process_takes_one_of_several_gpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 1 if vars(self).get("_n_gpu") == 1 else 3))
    assert training.training_arguments(load_recipe("quickstart"), tmp_path).n_gpu == 1
    assert "one of 3 GPUs; accelerate launch" in capsys.readouterr().out


def test_the_batch_of_a_file_gives_way_to_the_other_one_laid_over_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("include: quickstart\ntraining: {gradient_accumulation_steps: 5}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert "total_batch_size" not in recipe.training
    assert run.training_arguments(recipe, tmp_path).gradient_accumulation_steps == 5
    again = load_recipe(str(tmp_path / "mine.yaml"), ["training.total_batch_size=4"])
    assert run.training_arguments(again, tmp_path).gradient_accumulation_steps == 1


def test_the_models_tokens_may_be_given_as_trl_calls_them():
    recipe = load_recipe("quickstart", ["training.eos_token=<|im_end|>", "training.pad_token=<pad>"])
    assert (recipe.model.eos_token, recipe.model.pad_token) == ("<|im_end|>", "<pad>")
    assert not {"eos_token", "pad_token"} & recipe.training.keys()
    with pytest.raises(UserError, match=r"'a' is not model\.eos_token"):
        load_recipe("quickstart", ["training.eos_token=a", "model.eos_token=b"])


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_what_the_processor_computes(native, monkeypatch, capsys, tmp_path):
    # As PyTorch built for CUDA on a machine without a GPU.
    built = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built)
    found = {"avx2": True, "avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    recipe = load_recipe("quickstart", ["model.dtype=auto", "eval.bf16=auto"])
    assert recipe.training["bf16"] == "auto" and run.training_arguments(recipe, tmp_path).bf16 is native
    environment.choose_precision(recipe)
    assert recipe.training["bf16"] is recipe.eval.bf16 is native
    assert recipe.model.dtype == ("bfloat16" if native else "float32")
    line = capsys.readouterr().out
    assert line.startswith("precision   bf16: this processor has bf16" if native else "precision   float32: this pro")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    recipe = load_recipe("quickstart")
    environment.choose_precision(recipe)
    assert recipe.training["bf16"] is False and "precision   float32: " in capsys.readouterr().out


@pytest.mark.parametrize("own, launchers, taken", [
    (False, "bf16", "no"), (False, "fp8", "no"), (True, "fp8", "bf16"), (True, "no", "bf16"), (True, "bf16", "bf16"),
])  # fmt: skip
def test_the_recipes_precision_stands_over_the_launchers(own, launchers, taken, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
    made = run.training_arguments(load_recipe("quickstart", [f"training.bf16={own}"]), tmp_path)
    assert made.mixed_precision == taken  # with which the trainer makes its accelerator
    assert (f"(ACCELERATE_MIXED_PRECISION={launchers})" in capsys.readouterr().out) is (launchers not in ("no", taken))


@pytest.mark.parametrize("own, launchers, told", [
    ({}, "INDUCTOR", True), ({}, "NO", False), ({"torch_compile_backend": "eager"}, "inductor", False),
])  # fmt: skip
def test_what_is_compiled_is_the_recipes_to_say(own, launchers, told, monkeypatch, capsys, tmp_path):
    for key, value in (("BACKEND", launchers), ("USE_FULLGRAPH", "true"), ("MODE", "default")):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{key}", value)
    recipe = load_recipe("quickstart", [f"training.{key}={value}" for key, value in own.items()])
    made = run.training_arguments(recipe, tmp_path)
    assert (f"(ACCELERATE_DYNAMO_BACKEND={launchers})" in capsys.readouterr().out) is told
    taken = TorchDynamoPlugin(backend=made.torch_compile_backend)  # as the trainer makes it where it compiles
    assert (taken.backend.value.lower(), taken.fullgraph) == (("eager", True) if own else ("no", False))
    assert made.torch_compile is bool(own)


def test_auto_asks_a_gpu_itself(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert environment.computes_bf16() is native


def test_a_mac_computes_on_its_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as accelerate's launcher sets it there
    for _ in range(2):
        environment.choose_device()
    assert capsys.readouterr().out == "device      the CPU: mps has no float64, in which forgetting is measured\n"
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and environment.accelerator() is None
    assert run.training_arguments(load_recipe("quickstart"), tmp_path).use_cpu
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    environment.choose_device()
    assert os.environ["ACCELERATE_USE_CPU"] == "False" and environment.accelerator() == torch.device("cuda")

"""The shipped recipes: what they inherit, each model by its preset, and a dry run of each at full size."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import tiny_model
from transformers import AutoModelForCausalLM, BloomConfig
from world import make_world

from lora_null.recipes import output
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import dump, load_recipe, merge, presets, read_yaml, shipped
from lora_null.recipes.config.parsed_sources import method_options
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.data.calibration import Windows
from lora_null.recipes.grid import Cell, grid_cells
from lora_null.recipes.models.bases import Base, attention, load_base
from lora_null.recipes.run import _settings
from lora_null.recipes.training import optimizer_steps, training_arguments
from lora_null.trainer.methods import METHODS
from lora_null.utils.errors import UserError

PAPER = ("math", "code", "instruct", "ultrafeedback", "roselora", "code-feedback")
MODELS = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "6,738M"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "8,030M"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "8,030M"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "3,213M"),
    "gemma-3-1b": ("google/gemma-3-1b-pt", "1,000M"),
}


def test_every_paper_recipe_is_shipped_and_every_model_has_a_preset():
    assert set(PAPER) | {"quickstart", "study", "sequence"} == set(shipped()) and set(presets()) == set(MODELS)


@pytest.mark.parametrize("name", [*PAPER, "quickstart", "study"])
def test_recipes_inherit_one_default_and_copy_nothing(name):
    own, default = read_yaml(shipped()[name]), load_recipe(name)
    assert own["include"] in ("default", "ultrafeedback", "code")
    assert default.training["warmup_steps"] == 0.03
    if name in PAPER:
        assert [entry.task for entry in default.eval.retention] == ["triviaqa", "nq_open", "webqs"]
        assert default.calibration.samples == 256
    inherited = read_yaml(shipped()[name].parent / "presets" / "default.yaml")
    for key, value in own.items():
        if isinstance(value, dict) and own["include"] == "default":
            assert not [inner for inner in value if value[inner] == inherited.get(key, {}).get(inner)]


def test_the_papers_settings():
    math, code, instruct = (load_recipe(name) for name in PAPER[:3])
    assert (math.data.path, math.data.prompt, math.data.response) == ("meta-math/MetaMathQA", "query", "response")
    assert (code.data.prompt, code.data.response, instruct.data.messages) == (
        "instruction",
        "response",
        "conversations",
    )
    assert {recipe.data.limit for recipe in (math, code, instruct)} == {100000}
    assert math.training["learning_rate"] == 2e-5 and math.training["total_batch_size"] == 128
    aaai = load_recipe("code-feedback")
    assert aaai.method.name == ["lora-null-v1"] and (aaai.data.prompt, aaai.data.response) == ("query", "answer")
    assert aaai.eval == code.eval and aaai.training == code.training
    roselora, dpo = load_recipe("roselora"), load_recipe("roselora", ["trainer=dpo"])
    assert roselora.method.name == ["lora", "roselora", "lora-null-v1", "lora-null-v2"] and roselora.method.rank == 32
    assert roselora.trainer == "sft" and dpo.trainer == "dpo" and dpo.data == roselora.data
    assert roselora.data.response == "chosen" and load_recipe("ultrafeedback").trainer == "dpo"


# Every recipe and every preset, not each with each: a plan at full size takes a second or two.
@pytest.mark.parametrize(("name", "preset"), [*zip(PAPER, itertools.cycle(MODELS)), ("ultrafeedback", "llama-2-7b")])
def test_dry_run_at_full_size(capsys, monkeypatch, name, preset):
    enough = SimpleNamespace(free=10**12)  # for the 18 GB that such a run would write
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: enough)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # the hub is asked six times, where nobody answers
    assert main([name, "--dry-run", "--model-preset", preset]) == 0
    out = capsys.readouterr().out
    assert f"{MODELS[preset][0]}, {MODELS[preset][1]} parameters" in out
    assert "measure  " not in out and "not checked, the hub does not answer" in out
    if name == "math" and preset == "llama-2-7b":
        assert "782 optimizer steps of 128 sequences" in out and "174M" in out
    if name == "ultrafeedback" and preset == "llama-2-7b":
        assert "44M" in out


def test_paths_of_an_included_recipe_mean_what_lies_beside_it(tmp_path):
    """Also where files of the same name lie beside the recipe that includes it."""
    for folder in (tmp_path, tmp_path / "inner"):
        folder.mkdir(exist_ok=True)
        for name in ("rows.jsonl", "kept.jsonl", "mine.py"):
            (folder / name).write_text("")
    beside = {
        "data": {"path": "rows.jsonl"},
        "calibration": {"sources": ["kept.jsonl"]},
        "eval": {"retention": [{"answers": "kept", "path": "kept.jsonl"}]},
        "grid": {"sweep": {"data.path": ["rows.jsonl"]}},
    }
    (tmp_path / "inner" / "base.yaml").write_text(yaml.safe_dump({"include": "quickstart", **beside}))
    (tmp_path / "main.yaml").write_text("include: inner/base.yaml\n")
    found = load_recipe(str(tmp_path / "main.yaml"))
    assert [found.data.path, *found.grid.sweep["data.path"]] == [str(tmp_path / "inner" / "rows.jsonl")] * 2
    kept = [found.calibration.sources[0].path, found.eval.retention[0].path]
    assert kept == [str(tmp_path / "inner" / "kept.jsonl")] * 2


def test_includes(tmp_path):
    make_world(tmp_path)
    (tmp_path / "mine.yaml").write_text("include: tiny.yaml\nmethod: {rank: 2}\n")
    (tmp_path / "two.yaml").write_text("include: [mine.yaml, llama-3.2-3b]\n")
    mine, two = load_recipe(str(tmp_path / "mine.yaml")), load_recipe(str(tmp_path / "two.yaml"))
    assert (
        mine.method.rank == 2 and mine.method.name == ["lora", "lora-null-v1", "lora-null-v2"] and mine.name == "mine"
    )
    assert two.model.name_or_path == "meta-llama/Llama-3.2-3B" and two.method.rank == 2
    over = load_recipe(str(tmp_path / "mine.yaml"), ["model.dtype=float32"], preset="llama-3-8b")
    assert over.model.name_or_path == "meta-llama/Meta-Llama-3-8B" and over.model.dtype == "float32"
    assert merge({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 1},
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("include: defalt", r"include: no file 'defalt' \(did you mean 'default'\?\)"),
        ("include: me.yaml", "'me.yaml' includes itself"),
        ("include: default\ntrainer: dpoo", "trainer: input should be 'sft' or 'dpo'"),
        ("include: default\ntrainer: dpo\ntraining: {packing: true}", "training has no key 'packing'"),
        ("include: ultrafeedback\ndata: {messages: m}", "not data.messages"),
        ("include: math\neval: {task: [{tsk: gsm8k}]}", "needs one of the keys task, answers, preferences, mt_bench"),
        ("include: math\neval: {judge: {}}", "eval.judge.model is missing"),
        ("include: math\neval: {backend: vlm}", "eval.backend: input should be 'hf' or 'vllm'"),
        ("include: math\nmethod: {rank: 1}\nmethod: {rank: 2}", "line 3: the key 'method' is given twice"),
        ("include: math\ntraining: {on: 1}", "line 2: the key 'on' is no text to YAML; put it in quotes"),
        ("include: math\neval: {task: [{no: 1}]}", "the key 'no' is no text"),
        ("include: math\ntrainer: dop\ntraining: {beta: 1}", "trainer: input should be 'sft' or 'dpo'$"),
        ("include: math\ntraining: {max_steps: 2.5}", r"training\.max_steps: must be a whole number, not 2\.5"),
        (
            "include: default\ndata: {path: x, messages: m, prompt: p}",
            "data: takes messages instead of prompt, not both",
        ),
        ("include: default\ndata: {path: x, text: t, response: a}", "data: takes text instead of response, not both"),
        (
            "include: math\neval: {task: [{answers: a, path: p, messages: m, response: r}]}",
            "0: takes messages instead",
        ),
        ("include: math\nseed: yes", "me: seed: must be a number, not true"),
        ("include: math\nseed: 4294967296", "me: seed: input should be less than 4294967296"),
        ("include: math\ngrid: {seeds: [0, 4294967296]}", "grid.seeds.1: input should be less than 4294967296"),
        (
            "include: math\ngrid: {sweep: {training.eos_token: [a]}}",
            r"'eos_token' \(did you mean 'model.eos_token'\?\)",
        ),
        (
            "include: math\neval: {task: [{answers: a, path: p, system: ''}]}",
            "0.system: string should have at least 1",
        ),
        (
            "include: math\neval: {task: [{answers: a, path: p, prompt: ''}]}",
            "0.prompt: string should have at least 1",
        ),
        ("include: math\neval: {strengths: [on]}", "eval.strengths: must be a number, not true"),
        ("include: math\nmethod: {rank_pattern: {q_proj: no}}", "rank_pattern: must be a number, not false"),
        ("include: math\nmethod: {rank_pattern: {q_proj: 0}}", "rank_pattern.q_proj: input should be greater than or"),
        ("include: math\nmethod: {alpha: .inf}", "method.alpha: input should be a finite number"),
        ("include: math\ncalibration: [{path: x, weight: .nan}]", "weight: input should be"),
        ("include: math\ntraining: {max_steps: -5}", "training.max_steps: trains nothing with -5"),
        ("include: math\ntraining: {max_steps: '0'}", "training.max_steps: trains nothing with 0"),
        ("include: math\ntraining: {run_name: [a]}", r"training.run_name: takes one value, not \['a'\]"),
        ("include: math\ntraining: {learning_rate: 1:30}", "learning_rate: must be a number, not '1:30'"),
        (
            "include: math\neval: {task: [[gsm8k]]}",
            r"eval.task.0: an entry is a name, a path, or a mapping, not \['gsm",
        ),
        ("include: math\ngrid: {sweep: {method.rank: [4, 4.0]}}", "'method.rank' needs values, each once"),
        ("include: math\ngrid: {sweep: {data.path: [a/b, a_b]}}", "'data.path' needs values, each once"),
        (
            "include: math\ngrid: {sweep: {data.path: [a, null]}}",
            "data.path.1: a swept value is a finite number, a text",
        ),
        ("include: math\ntraining: {max_length: long}", r"training\.max_length: must be a number, not 'long'"),
    ],
)
def test_mistakes(tmp_path, text, message):
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "me.yaml"))


def test_numbers_and_texts_as_they_are_meant(tmp_path):
    """Quoted digits and 1e3 where TRL takes a number, digits that stay text where a text is meant, nothing for null."""
    words = ["training.max_steps=1e3", 'training.max_length="512"', "training.total_batch_size=64.0"]
    words += ["training.per_device_train_batch_size=", "training.run_name=7", "training.weight_decay='0.1'"]
    words += ["data.subset='2023'", "model.revision='1234567'", "eval.task=[{answers: '2024', path: x.jsonl}]"]
    recipe = load_recipe("quickstart", words)
    expected = {"max_steps": 1000, "max_length": 512, "total_batch_size": 64, "run_name": "7", "weight_decay": 0.1}
    found = {key: recipe.training[key] for key in expected}
    assert found == expected and [type(v) for v in found.values()] == [type(v) for v in expected.values()]
    assert (recipe.data.subset, recipe.model.revision, recipe.eval.task[0].answers) == ("2023", "1234567", "2024")
    assert training_arguments(recipe, tmp_path).per_device_train_batch_size == 8


def test_numbers_and_texts_of_yaml(tmp_path):
    """What YAML 1.1 takes for text, octal numbers, numbers to the base of 60 and dates; and each again as a run left it."""
    training = "learning_rate: 1e-4, max_steps: 010, weight_decay: 1_000, run_name: 2024-01-01, max_grad_norm: .inf"
    (tmp_path / "me.yaml").write_text(
        f"include: math\nname: 12:30\ndata: {{split: 08, subset: '1e5'}}\ntraining: {{{training}}}"
    )
    first = load_recipe(str(tmp_path / "me.yaml"), ["data.limit=1e2"])
    (tmp_path / "again.yaml").write_text(dump(first))
    for recipe in (first, load_recipe(str(tmp_path / "again.yaml"))):
        found = [recipe.training[key] for key in ("learning_rate", "max_steps", "weight_decay", "run_name")]
        assert found == [1e-4, 10, 1000, "2024-01-01"] and recipe.training["max_grad_norm"] == float("inf")
        assert (recipe.name, recipe.data.split, recipe.data.subset, recipe.data.limit) == ("12:30", "08", "1e5", 100)


def test_texts_of_which_yaml_makes_nothing():
    texts = ["|", "#", "####", "!", "-", ":", "?", " ", "\t", "Q #{prompt}", "a\nb"]
    found = [load_recipe("quickstart", [f"data.subset={text}"]).data.subset for text in texts]
    assert found == texts
    texts = ["", "~", "null", "'~'", "'|'", "!!str 5", "|\n a\n b"]
    found = [load_recipe("quickstart", [f"data.subset={text}"]).data.subset for text in texts]
    assert found == [None, None, None, "~", "|", "5", "a\nb"]


@pytest.mark.parametrize("word", ["lora, lora-null-v2", "[lora, lora-null-v2]", "[lora,lora-null-v2]"])
def test_several_methods_in_one_word(word):
    assert load_recipe("quickstart", [f"method.name={word}"]).method.name == ["lora", "lora-null-v2"]


def test_a_template_is_no_mapping():
    templates = ["Q: {prompt}", "{prompt}", "[INST] {prompt} [/INST]", "{prompt}: {prompt}"]
    assert [load_recipe("quickstart", [f"data.template={text}"]).data.template for text in templates] == templates
    assert load_recipe("quickstart", ["model.pad_token=[PAD]"]).model.pad_token == "[PAD]"
    assert load_recipe("quickstart", ["data.template='Q: {prompt}'"]).data.template == "Q: {prompt}"


def test_options_over_what_a_file_has(caplog):
    assert load_recipe("quickstart", ["budget="], max_forgetting="1e-2").budget.at_most == 0.01
    with pytest.raises(UserError, match="--max-forgetting: 'budget' holds a value, not keys"):
        load_recipe("quickstart", ["budget=0.01"], max_forgetting="0.02")
    with pytest.raises(UserError, match="--output-dir: is empty"):
        load_recipe("quickstart", output_dir="")
    grid = load_recipe("study", sweeps=["training.learning_rate=1e-4,1e-3"]).grid
    assert (grid.sweep, grid.per_method) == ({"training.learning_rate": [1e-4, 1e-3]}, {})
    assert "--sweep: holds for every method; the recipe's grid.per_method (" in caplog.text


RATES = "--sweep training.learning_rate=…"


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (
            ["training.learning_rate=1e-4"],
            {},
            f"training.learning_rate: the grid has values of its own for it; {RATES}",
        ),
        (["training={learning_rate: 1e-4}"], {}, "argument training.learning_rate: the grid has"),
        (
            ["seed=5"],
            {},
            "argument seed: the grid has values of its own for it; --seeds … replaces them, grid={} runs",
        ),
        (
            ["training.max_steps=3"],
            {"sweeps": ["training.num_train_epochs=1,2"]},
            "own for training.num_train_epochs; --s",
        ),
        (["calibration=a.jsonl"], {"sweeps": ["calibration.path=b.jsonl"]}, "argument calibration.path: the grid"),
        (
            ["training.max_steps=3", "training={max_steps: 50}"],
            {},
            "argument training.max_steps: is given twice, alone and",
        ),
        (["method.name=full"], {"methods": "lora"}, "--method: method.name is given too; give one of the two"),
        (["budget={at_most: 0.5}"], {"max_forgetting": "0.1"}, "--max-forgetting: budget.at_most is given too"),
        (["grid.seeds=[7]"], {"seeds": "0,1"}, "--seeds: grid.seeds is given too"),
        (["grid={sweep: {}}"], {"sweeps": ["method.rank=4,8"]}, "--sweep: grid.sweep is given too"),
        *(
            ([words], {"sweeps": ["method.rank=4,8"]}, "--sweep: holds for every method, and grid.per_method is given")
            for words in ("grid.per_method=[1]", "grid.per_method.lora={method.rank: [2]}", "grid={per_method: {}}")
        ),
        (["output_dir=b"], {"output_dir": "a"}, "--output-dir: output_dir is given too"),
    ],
)
def test_what_another_would_take_the_place_of_is_refused(words, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_recipe("study", words, **options)


def test_words_that_replace_a_grid_leave_its_keys_free():
    words = ["training.learning_rate=1e-4", "seed=5"]
    for grid in (["grid={}"], ["grid.sweep={method.rank: [4]}", "grid.per_method={}", "grid.seeds=[]"]):
        recipe = load_recipe("study", [*words, *grid])
        assert (recipe.training["learning_rate"], recipe.seed) == (1e-4, 5)


@pytest.mark.parametrize("word", ["eval.task=[gsm8k]", "eval={task: [gsm8k]}"])
def test_the_evaluations_of_a_sequences_tasks_are_their_own(word):
    with pytest.raises(UserError, match=r"argument eval\.task: the tasks of a sequence set their own"):
        load_recipe("sequence", [word])


@pytest.mark.parametrize(
    ("name", "words", "found"),
    [
        ("math", ["data.messages=m"], {"messages": "m", "prompt": "prompt", "response": "response"}),
        ("math", ["data.text=t"], {"text": "t", "prompt": "prompt"}),
        ("instruct", ["data.prompt=q", "data.response=a"], {"messages": None, "prompt": "q", "response": "a"}),
        ("instruct", ["data.prompt="], {"messages": "conversations", "prompt": None}),
    ],
)
def test_what_rows_hold_is_said_by_what_is_laid_over(name, words, found):
    data = load_recipe(name, words).data
    assert {key: getattr(data, key) for key in found} == found


def test_a_whole_section_is_laid_over_the_files(tmp_path):
    (tmp_path / "me.yaml").write_text("include: quickstart\nquick: {training: {max_steps: 2}}\ncalibration:\n")
    path = str(tmp_path / "me.yaml")
    for recipe in (load_recipe(path, quick=True), load_recipe(path, ["training={max_steps: 2}"])):
        assert (recipe.training["max_steps"], recipe.training["learning_rate"]) == (2, 3e-4)
    assert (load_recipe(path).calibration.path, load_recipe(path).calibration.source) == (None, "general")
    assert load_recipe("quickstart", ["calibration="]).calibration.source == "general"
    assert load_recipe("study", ["grid={seeds: [5]}"]).grid.per_method
    assert not load_recipe("study", ["grid={}"]).grid


def test_no_is_a_strategy_and_off_is_not_false(tmp_path):
    """As YAML reads them: also in a sequence's tasks and a grid's runs."""
    tasks = "[{name: x, training: {save_strategy: no}, eval: {task: [gsm8k]}}, {name: y, eval: {task: [webqs]}}]"
    (tmp_path / "me.yaml").write_text(
        f"include: math\npreflight: off\nsequence: {{tasks: {tasks}}}\neval: {{retention: }}\n"
    )
    stage = stage_recipes(load_recipe(str(tmp_path / "me.yaml")))[0]
    assert (stage.training["save_strategy"], stage.preflight, stage.eval.retention) == ("no", "off", [])
    grid = load_recipe("math", ["grid.sweep={training.save_strategy: [no]}"])
    assert grid_cells(grid)[0].recipe(grid, tmp_path).training["save_strategy"] == "no"


def test_epochs_laid_over_a_number_of_steps(tmp_path):
    (tmp_path / "me.yaml").write_text("include: math\ntraining: {max_steps: 60}\nquick: {training.max_steps: 2}")
    for options, steps in (({}, 60), ({"quick": True}, 2)):
        assert load_recipe(str(tmp_path / "me.yaml"), **options).training["max_steps"] == steps
        training = load_recipe(str(tmp_path / "me.yaml"), ["training.num_train_epochs=3"], **options).training
        assert training["num_train_epochs"] == 3 and "max_steps" not in training


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", None)  # nobody is asked
    recipe = make_world(tmp_path)
    (tmp_path / "model" / "own.py").write_text(OWN_MODEL)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": code}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main([str(recipe), "--dry-run", "model.trust_remote_code=true"]) == 0
    assert main([str(recipe), "--dry-run"]) == 2
    assert "read that, model.trust_remote_code=true runs it" in capsys.readouterr().err


def test_packed_rows_take_fewer_steps_than_there_are_rows_for():
    training = training_arguments(load_recipe("math"), Path("out"))
    assert optimizer_steps(training, 1000) == 8
    training.dataloader_drop_last = True
    training.per_device_train_batch_size, training.gradient_accumulation_steps = 8, 16
    assert [optimizer_steps(training, rows) for rows in (1000, 1023, 1024, 1031)] == [8, 8, 8, 8]
    training.per_device_train_batch_size, training.gradient_accumulation_steps = 128, 1
    assert optimizer_steps(training, 1000) == 7
    training.packing = True
    assert optimizer_steps(training, 1000) is None
    training.max_steps = 3
    assert optimizer_steps(training, 1000) == 3


def test_a_method_that_trains_on_more_rows_has_steps_of_its_own_among_the_settings():
    words = ["training.num_train_epochs=1", "training.total_batch_size=8", "method.options={replay: {share: 0.5}}"]
    words.append("calibration=self")
    data = SimpleNamespace(rows=[{}] * 80, bad=[], cut=0)
    for limit, own in (([], 20), (["training.max_steps=7"], None)):
        recipe = load_recipe("math", [*words, *limit], methods="lora,replay")
        job = SimpleNamespace(recipe=recipe, folder=Path("out"), data=data, tasks=[], budget=None)
        job.model, job.windows, job.calibrates = SimpleNamespace(config=None), Windows([[1, 2]], ["x"]), True
        found = _settings(job)
        assert (
            found["calibration_mode"] == "separate" != recipe.calibration.mode
        )  # what the model writes is not packed
        assert (found["optimizer_steps"], found.get("optimizer_steps_of_replay")) == (7 if limit else 10, own)


def test_paths_mean_what_lies_beside_the_recipe(tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("prompts.jsonl", "start"):
        (tmp_path / name).touch()
    (tmp_path / "me.yaml").write_text(
        "include: tiny.yaml\nmodel: {name_or_path: model}\nmethod: {init: start}\noutput_dir: ~/out\n"
        "eval: {judge: {model: j, prompts: prompts.jsonl}}\n"
        "grid: {sweep: {data.path: [numbers.jsonl, facts.jsonl]}, per_method: {lora: {data.path: [facts.jsonl]}}}\n"
    )
    recipe = load_recipe(str(tmp_path / "me.yaml"))
    found = [recipe.model.name_or_path, recipe.method.init, recipe.eval.judge.prompts, *recipe.grid.sweep["data.path"]]
    found += recipe.grid.per_method["lora"]["data.path"]
    names = ("model", "start", "prompts.jsonl", "numbers.jsonl", "facts.jsonl", "facts.jsonl")
    assert found == [str(tmp_path / name) for name in names] and recipe.output_dir == "/home/me/out"
    (tmp_path / "in_$usd.jsonl").touch()  # a path that is there, beside the recipe, is one
    assert load_recipe(str(tmp_path / "me.yaml"), ["method.init=in_$usd.jsonl"]).method.init.endswith("in_$usd.jsonl")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    recipe = load_recipe(str(tmp_path / "me.yaml"), ["output_dir=$SCRATCH/out", "method.init=${SCRATCH}/start"])
    assert (recipe.output_dir, recipe.method.init) == (str(tmp_path / "out"), str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"\$SCRATCHES/out: the environment has no variable SCRATCHES"):
        load_recipe(str(tmp_path / "me.yaml"), ["output_dir=$SCRATCHES/out"])
    with pytest.raises(UserError, match=r"~nobody_of_this_name/x: there is no user ~nobody_of_this_name"):
        load_recipe(str(tmp_path / "me.yaml"), ["output_dir=~nobody_of_this_name/x"])
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        recipe = load_recipe("me.yaml", ["output_dir=out"])
        output.claim(recipe, resume=False, overwrite=False)
        folders, again = ([cell.folder for cell in grid_cells(r)] for r in (recipe, load_recipe("out/recipe.yaml")))
        assert again == folders  # a grid goes on in the folders that it began
    (tmp_path / "own.yaml").touch()
    task = "{name: a, data: {path: numbers.jsonl}, eval: {task: [facts.jsonl, {task: own.yaml, fewshot_path: start}]}}"
    (tmp_path / "two.yaml").write_text(
        f"include: tiny.yaml\ntraining: {{fsdp_config: own.yaml}}\nsequence: {{tasks: [{task}, {{name: b}}]}}\n"
        "eval: {include_path: start, probe: {task: [{task: own.yaml, path: start}]}}"
    )
    recipe = load_recipe(str(tmp_path / "two.yaml"))
    first, probed = recipe.sequence.tasks[0], recipe.eval.probe.task[0]
    found = [first["data"]["path"], first["eval"]["task"][0], *first["eval"]["task"][1].values()]
    found += [probed.task, probed.path, recipe.eval.include_path, recipe.training["fsdp_config"]]
    names = ("numbers.jsonl", "facts.jsonl", "own.yaml", "start", "own.yaml", "start", "start", "own.yaml")
    assert found == [str(tmp_path / name) for name in names]


def test_texts_to_calibrate_on_have_none_of_the_fields_of_the_rows_before(tmp_path):
    (tmp_path / "notes.md").write_text("a note")
    for path, template in (
        (tmp_path, None),
        (tmp_path / "notes.md", None),
        ("rows.jsonl", "Q: {question}?\nA: {answer}"),
    ):
        recipe = load_recipe("quickstart", [f"calibration.path={path}"])
        assert recipe.calibration.template == template and recipe.calibration.samples == 128


def test_texts_beside_the_recipe_are_texts_from_any_folder(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("a note")
    (tmp_path / "mine.yaml").write_text("include: quickstart\ncalibration: notes\n")
    (tmp_path / "other.yaml").write_text("include: quickstart\n")
    for name, words in (
        ("mine.yaml", []),
        ("other.yaml", ["calibration.path=notes"]),
        ("other.yaml", ["calibration=notes"]),
    ):
        found = load_recipe(str(tmp_path / name), words).calibration
        assert (found.path, found.template) == (str(tmp_path / "notes"), None)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_words_means_nothing(tmp_path, order):
    (tmp_path / "notes.md").write_text("a note")
    words = [f"calibration.path={tmp_path}", "calibration.limit=5"][::order]
    recipe = load_recipe("quickstart", words)
    assert (recipe.calibration.path, recipe.calibration.limit) == (str(tmp_path), 5)
    swept = dict(word.split("=") for word in words)
    cell = Cell(0, tuple((key, int(value) if value.isdigit() else value) for key, value in swept.items()), ("lora",))
    assert cell.recipe(load_recipe("quickstart"), tmp_path).calibration == recipe.calibration


METHOD = "from lora_null.trainer.methods import Method, method\n@method\nclass Mine(Method):\n    name = 'mine-own'\n"


def test_the_file_of_a_method_is_kept_with_its_name(tmp_path):
    """So that the recipe that a run leaves goes on in another process, which has not read the file."""
    make_world(tmp_path)
    (tmp_path / "mine.py").write_text(METHOD)
    recipe = load_recipe(str(tmp_path / "tiny.yaml"), methods="lora,mine.py")
    (tmp_path / "dumped.yaml").write_text(dump(recipe))
    del method_options()["mine-own"], METHODS["mine-own"]
    again = load_recipe(str(tmp_path / "dumped.yaml"))
    assert again.method.name == ["lora", "mine-own"] and again.method.files == [str(tmp_path / "mine.py")]
    del method_options()["mine-own"], METHODS["mine-own"]


@pytest.mark.parametrize(
    "body, words, told",
    [
        ("    gain: float = 1.0", ["method.options.mine-own.gain=big"], "mine-own.gain: must be a number, not big"),
        (
            "    def rule_for(self, options): return self",
            [],
            "rule_for of mine-own returns has no label and no of_input, see",
        ),
    ],
)
def test_what_a_method_of_ones_own_lacks_is_told_before_a_run(tmp_path, capsys, body, words, told):
    make_world(tmp_path)
    (tmp_path / "mine.py").write_text(METHOD + body)
    try:
        assert main([str(tmp_path / "tiny.yaml"), "--method", str(tmp_path / "mine.py"), *words, "--dry-run"]) == 2
    finally:
        del method_options()["mine-own"], METHODS["mine-own"]
    assert told in capsys.readouterr().err


def test_an_unknown_preset(capsys):
    assert main(["math", "--model-preset", "llama-3.2-8b", "--dry-run"]) == 2
    assert "--model-preset: no preset 'llama-3.2-8b' (did you mean 'llama-3.2-3b'?)" in capsys.readouterr().err


def test_a_reference_ahead_needs_one_process(monkeypatch, tmp_path):
    """TRL keeps it beside a file of rows; the rows of a recipe lie in each process's memory."""
    recipe = load_recipe("ultrafeedback", ["training.precompute_ref_log_probs=true", "training.total_batch_size=null"])
    assert training_arguments(recipe, tmp_path).precompute_ref_log_probs
    monkeypatch.setattr("lora_null.recipes.training.num_processes", lambda: 2)
    with pytest.raises(UserError, match=r"training.precompute_ref_log_probs: .* or start one process"):
        training_arguments(recipe, tmp_path)


@pytest.mark.parametrize("kind, chosen", [("llama", "sdpa"), ("bloom", "eager")])
def test_attention_is_what_the_model_has(tmp_path, kind, chosen):
    shape = {"llama": tiny_model().config, "bloom": BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)}
    AutoModelForCausalLM.from_config(shape[kind]).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    assert attention(section, shape[kind]) == chosen
    assert load_base(Base(section)).config._attn_implementation == chosen


def test_of_a_word_that_is_given_twice_the_last_counts_and_is_told(caplog, monkeypatch):
    """As where a script's own words and the user's stand in one line."""
    recipe = load_recipe("math", ["training.max_steps=3", "seed=1", "training.max_steps=50"])
    assert recipe.training["max_steps"] == 50
    assert caplog.text.count("argument training.max_steps: is given twice, the last counts") == 1
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    load_recipe("math", ["seed=1", "seed=2"])  # told by the first of several processes
    assert caplog.text.count("is given twice") == 1

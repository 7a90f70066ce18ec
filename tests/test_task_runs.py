"""Whole tiny runs of what the paper's recipes add: preferences, conversations, generated answers, code."""

import json
import shutil
from types import SimpleNamespace

import pytest
import trl
from tiny import tiny_model, tiny_tokenizer
from world import make_world, results, write_rows

from lora_null.eval_harness.code.jails import find_jail
from lora_null.eval_harness.tasks import TASK_FILES
from lora_null.recipes import caches
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.data.examples import training_data
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.recipes.job import check_run, check_same_everywhere
from lora_null.recipes.results import Row, Seconds, write_row
from lora_null.recipes.sequence import _keep_grams, with_earlier
from lora_null.utils.errors import UserError

CODE = {
    "task_id": "t/0",
    "prompt": "def one():\n    ''' Return 1. '''\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
}
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}<assistant>"


def world(folder, **changes):
    recipe = make_world(folder, **changes)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    tokenizer.save_pretrained(folder / "model")
    return recipe


GSM8K = TASK_FILES / "math" / "metamath_gsm8k.yaml"
METHODS = ["lora", "lora-null-v1", "lora-null-v2"]
TRAINING = {"learning_rate": 1e-2, "max_steps": 3, "total_batch_size": 4, "per_device_train_batch_size": 2}
TRAINING |= {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no"}


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo(tmp_path, precompute):
    pairs = [{"q": f"what is {i}", "yes": f"it is {i}", "no": "who knows"} for i in range(30)]
    path = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    names = {"prompt": "q", "response": "yes", "rejected": "no"}
    retention = [{"answers": "facts", "path": str(tmp_path / "facts.jsonl"), "limit": 8}]
    recipe = world(
        tmp_path,
        trainer="dpo",
        method={"name": METHODS[1:] if precompute else METHODS, "rank": 4},
        data={"path": path, "template": "qa", **names},
        training={**TRAINING, "beta": 0.3, "precompute_ref_log_probs": precompute},
        eval={"retention": retention, "task": [{"preferences": "pairs", "path": path, "limit": 10, **names}]},
    )
    assert main([str(recipe)]) == 0
    base, *rows = results(tmp_path)["rows"]
    assert (
        base["metrics"]["pairs reward accuracy"]["value"] == 0.5
        and base["metrics"]["pairs reward margin"]["value"] == 0
    )
    assert [row["method"] for row in rows] == METHODS[precompute:]
    for row in rows:
        assert row["metrics"]["pairs reward accuracy"]["value"] > 0.5 and row["metrics"]["facts kl"]["value"] > 0
        assert row["drift"]["mean"] > 0
        log = (tmp_path / "out" / row["method"] / "train_log.jsonl").read_text().splitlines()
        first, *_, last = map(json.loads, log)
        assert abs(first["reward_margin"]) < 1e-4 and last["reward_margin"] > 0 and 0 <= last["reward_accuracy"] <= 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "pairs reward accuracy" in report and "trainer: dpo" in report


def test_dpo_of_every_weight_compares_with_the_base_of_the_recipe(tmp_path, monkeypatch):
    """TRL would load the reference by the model's path alone: of another revision, and none whose code is its own."""
    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", None)
    pairs = [{"prompt": f"what is {i}", "chosen": f"it is {i}", "rejected": "who knows"} for i in range(30)]
    path = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    recipe = world(
        tmp_path,
        trainer="dpo",
        method={"name": "full"},
        data={"path": path, "template": "qa", "response": "chosen"},
        training=TRAINING,
        eval={"retention": [], "task": [{"preferences": "pairs", "path": path, "limit": 10, "beta": 0.5}]},
    )
    assert main([str(recipe)]) == 0
    _, row = results(tmp_path)["rows"]
    assert row["metrics"]["pairs reward accuracy"]["value"] > 0.5
    log = (tmp_path / "out" / "full" / "train_log.jsonl").read_text().splitlines()
    assert abs(json.loads(log[0])["reward_margin"]) < 1e-4 < json.loads(log[-1])["reward_margin"]


def test_held_out_preferences_are_written_as_those_of_training(tmp_path):
    row = {"sys": "be terse", "prompt": "say it", "chosen": "<think>hm</think>yes", "rejected": "no"}
    path, tokenizer = str(write_rows(tmp_path / "pairs.jsonl", [row] * 12)), tiny_tokenizer()
    data = {"path": path, "response": "chosen", "template": "qa", "system": "sys", "thinking": "drop"}
    task = {"preferences": "pairs", "path": path}
    recipe = load_recipe(str(make_world(tmp_path, trainer="dpo", data=data, eval={"retention": [], "task": [task]})))
    (held_out,) = eval_tasks(EvalContext(recipe, tokenizer))
    trained = training_data(recipe.data, tokenizer, preferences=True, max_length=None).rows[0]
    assert tokenizer.decode(held_out.chosen[0].ids) == trained["prompt"] + trained["chosen"]
    long = [row | {"prompt": "say it " * 20}] * 6
    write_rows(tmp_path / "pairs.jsonl", [row] * 6 + long)
    with pytest.raises(UserError, match=r"6 of 12 rows cannot be used: 6 prompt longer than max_length \(64 tokens\)"):
        held_out_of(recipe, tokenizer, max_length=64)
    whole = held_out_of(recipe, tokenizer, max_length=None)
    for length, start in ((64, 64 - (len(whole.ids) - whole.start)), (3, 1)):
        pair = held_out_of(recipe, tokenizer, max_length=length, truncation_mode="keep_end")
        assert (pair.ids, pair.start) == (whole.ids[-length:], start)


def held_out_of(recipe, tokenizer, **training):
    """The last chosen response of the one evaluation of a recipe that is trained so."""
    recipe = recipe.model_copy(update={"training": recipe.training | training})
    (task,) = eval_tasks(EvalContext(recipe, tokenizer))
    return task.chosen[-1]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_conversations_with_generated_answers(tmp_path, template):
    said = [{"from": who, "value": f"{who} says {turn}"} for turn in (1, 2) for who in ("human", "gpt")]
    questions = [{"question_id": i, "category": "writing", "turns": ["tell", "more"]} for i in range(3)]
    gsm = [{"question": f"what is {i}+{i}", "answer": f"#### {2 * i}"} for i in range(3)]
    recipe = world(
        tmp_path,
        method={"name": "lora-null-v2", "rank": 4},
        data={
            "path": str(write_rows(tmp_path / "talk.jsonl", [{"talk": said}] * 12)),
            "messages": "talk",
            "template": template,
        },
        training={**TRAINING, "max_length": 400},
        eval={
            "retention": [
                {"answers": "facts", "path": str(tmp_path / "facts.jsonl"), "limit": 4, "template": template},
            ],
            "task": [
                {
                    "mt_bench": "MT-Bench",
                    "path": str(write_rows(tmp_path / "q.jsonl", questions)),
                    "max_new_tokens": 5,
                },
                {
                    "task": "metamath_gsm8k",
                    "name": "gsm8k",
                    "path": str(write_rows(tmp_path / "g.jsonl", gsm)),
                    "limit": 2,
                },
            ],
        },
    )
    (tmp_path / "model" / "config.json").write_text(
        (tmp_path / "model" / "config.json")
        .read_text()
        .replace('"max_position_embeddings": 512', '"max_position_embeddings": 2048')
    )
    assert main([str(recipe), "eval.strengths=[0.5]"]) == 0
    for folder in ("base", "lora-null-v2", "lora-null-v2/dial/strength=0.5"):
        answers = (tmp_path / "out" / folder / "mt_bench" / "answers.jsonl").read_text().splitlines()
        assert [len(json.loads(line)["choices"][0]["turns"]) for line in answers] == [2, 2, 2]
    assert results(tmp_path)["rows"][1]["metrics"]["gsm8k/exact_match"]["n"] == 2
    assert results(tmp_path)["rows"][1]["metrics"]["facts kl"]["n"] == 4
    assert results(tmp_path)["settings"]["template"] == f"{template}, in training and in MT-Bench, gsm8k"


def test_code_runs_only_when_allowed(tmp_path, capsys, caplog, monkeypatch):
    path = str(write_rows(tmp_path / "code.jsonl", [CODE] * 3))
    options = {"method": {"name": "lora", "rank": 4}, "training": TRAINING}
    data = {"path": str(tmp_path / "numbers.jsonl"), "prompt": "question", "response": "answer"}
    task = {"task": "sandbox_humaneval_completion", "name": "humaneval", "path": path}
    recipe = world(tmp_path, **options, data=data, eval={"task": [task], "batch_size": 4})
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    assert main([str(recipe)]) == 2
    assert "runs code that the model writes; consent with --allow-code-execution" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    from lora_null.eval_harness.lm_eval import model as lm

    answers = [CODE["canonical_solution"], "    return 2", "    return 1"]
    monkeypatch.setattr(lm.ShardedLM, "generate_until", lambda *_, **__: answers)
    assert main(["--allow-code-execution=unsafe", str(recipe)]) == 0
    assert "without a jail" in capsys.readouterr().err + caplog.text
    assert results(tmp_path)["rows"][1]["metrics"]["humaneval"]["value"] == pytest.approx(2 / 3)
    assert results(tmp_path)["settings"]["generated_code"] == "no jail, limits on time, memory and files alone"
    assert "no jail, limits" in (tmp_path / "out" / "report.html").read_text()
    probed = f"eval.probe={{task: [{{task: sandbox_humaneval_completion, name: probed, path: {path}}}], retention: 0}}"
    words = [str(recipe), probed, "--dry-run", "--output-dir", str(tmp_path / "other")]
    assert main([*words, "--allow-code-execution=unsafe"]) == 0 and main(words) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    find_jail.cache_clear()
    capsys.readouterr()
    assert main(["--allow-code-execution", str(recipe), "--overwrite"]) == 2
    assert "code execution: bwrap is not installed" in capsys.readouterr().err
    assert main(["--allow-code-execution", str(recipe), "--overwrite", "eval.code={jail: podman, image: mine}"]) == 2
    assert "code execution: podman is not installed" in capsys.readouterr().err
    assert main([str(recipe), "--allow-code-execution=save"]) == 2
    assert "invalid choice: 'save'" in capsys.readouterr().err
    find_jail.cache_clear()


@pytest.mark.parametrize(
    ("task", "templates"),
    [("metamath_gsm8k", "alpaca or chat"), (str(GSM8K), "alpaca or chat"), ("metamath_gsm8k_chat", "chat")],
)
def test_own_tasks_are_asked_as_trained_or_not_at_all(tmp_path, capsys, task, templates):
    recipe = str(world(tmp_path))  # its template is qa
    assert main([recipe, f"eval.task=[{task}]"]) == 2
    assert f"{task} is asked in {templates}, and data.template is 'qa'" in capsys.readouterr().err
    (made,) = tasks_of(recipe, f"eval.task=[{task}]", "data.template=chat")
    assert (made.task, made.chat, made.in_training_template) == ("metamath_gsm8k_chat", True, True)


def test_a_file_of_ones_own_is_not_taken_for_the_packages_task(tmp_path):
    shutil.copytree(GSM8K.parent, tmp_path / "mine")
    words = [str(world(tmp_path)), f"eval.task=[{tmp_path}/mine/{GSM8K.name}]"]
    (made,) = tasks_of(*words, "data.template=alpaca")
    assert (made.task, made.chat, made.include_path) == ("metamath_gsm8k", False, f"{tmp_path}/mine")
    with pytest.raises(UserError, match=r"is asked in alpaca, and data\.template is 'chat'"):
        tasks_of(*words, "data.template=chat")


def tasks_of(recipe, *words):
    return eval_tasks(EvalContext(load_recipe(recipe, [*words, "eval.retention="]), tiny_tokenizer()))


@pytest.mark.parametrize("kept", [False, True])
def test_a_reference_that_was_removed_is_measured_again(tmp_path, capsys, kept):
    """In the run's folder, and among the kept bases."""
    recipe, out = str(make_world(tmp_path, method={"name": "lora", "rank": 4})), tmp_path / "out"
    words = [recipe, f"eval.cache={kept}"]
    assert main(words) == 0
    for file in caches.bases_folder().glob("*/facts.safetensors") if kept else ():
        file.unlink()
    before = json.loads((out / "results.json").read_text())["rows"]
    for file in ("base/facts.safetensors", "report.html", "lora/row.json"):
        (out / file).unlink()
    assert main([*words, "--resume"]) == 0
    assert f"base: facts.safetensors is no longer in {out}/base, it is measured again" in capsys.readouterr().out
    assert [r["metrics"] for r in json.loads((out / "results.json").read_text())["rows"]] == [
        r["metrics"] for r in before
    ]


def test_processes_that_read_other_rows_are_refused(tmp_path, monkeypatch):
    job = check_run(load_recipe(str(make_world(tmp_path, method={"name": "lora", "rank": 4}))))
    check_same_everywhere(job)
    monkeypatch.setattr("lora_null.recipes.job.num_processes", lambda: 2)
    own = []
    for folder in ("here", "there"):  # equal files that lie elsewhere are no difference
        recipe = load_recipe(str(make_world(tmp_path / folder, method={"name": "lora", "rank": 4})))
        monkeypatch.setattr("lora_null.recipes.job.all_gather", lambda mine: own.append(mine) or [mine])
        check_same_everywhere(check_run(recipe))
    assert own[0] == own[1]
    job.model = SimpleNamespace(name="me/tiny")
    for commit in ("c0", "c1"):
        monkeypatch.setattr("lora_null.recipes.job.hub_commit", lambda *_, commit=commit: commit)
        check_same_everywhere(job)
    assert own[2]["model.name_or_path"] != own[3]["model.name_or_path"]
    for name in ("data.path", "the recipe", "model.name_or_path"):
        monkeypatch.setattr("lora_null.recipes.job.all_gather", lambda own, name=name: [own, {**own, name: "another"}])
        with pytest.raises(UserError, match=f"{name} differs between the processes"):
            check_same_everywhere(job)


def test_a_base_measured_under_other_settings_is_said(tmp_path, caplog, capsys):
    recipe, saved = (
        str(make_world(tmp_path, method={"name": "lora", "rank": 4})),
        tmp_path / "out" / "base" / "eval.json",
    )
    assert main([recipe]) == 0
    assert "other settings" not in caplog.text + capsys.readouterr().err
    found = json.loads(saved.read_text())
    before = {"torch": "1.0", "peft": "0.1", "lora-null": "0.0.9 (evaluation code 12345678)"}
    found["settings"] |= {"ranks": 4, "versions": found["settings"]["versions"] | before}
    saved.write_text(json.dumps(found))
    for file in ("report.html", "lora/row.json"):
        (tmp_path / "out" / file).unlink()
    assert main([recipe, "--resume"]) == 0
    said = caplog.text + capsys.readouterr().err
    assert "lora: the base was measured under other settings (torch 1.0, now " in said
    assert "; processes 4, now 1)" in said
    assert "lora-null 0.0.9 (evaluation code 12345678), now 0." in said


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_model_may_end_its_answers_otherwise_than_its_tokenizer(tmp_path, capsys, file):
    words = [str(world(tmp_path)), "--dry-run", "data.template=chat"]
    turns = CHATML.replace("<assistant>", "").replace("eos_token", "'!'")
    (tmp_path / "model" / "chat_template.jinja").write_text(turns)
    assert main(words) == 2 and "would never learn to stop" in capsys.readouterr().err
    (tmp_path / "model" / "generation_config.json").unlink()
    path = tmp_path / "model" / file
    held = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(held | {"eos_token_id": [2, tiny_tokenizer().convert_tokens_to_ids("!")]}))
    assert main(words) == 0


def test_a_judge_without_a_key(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    questions = [{"question_id": 1, "category": "math", "turns": ["a", "b"]}]
    recipe = world(
        tmp_path, eval={"task": [{"mt_bench": "MT", "path": str(write_rows(tmp_path / "q.jsonl", questions))}]}
    )
    assert main([str(recipe), "eval.judge.model=gpt-4"]) == 2
    assert "needs a key in the environment variable OPENAI_API_KEY" in capsys.readouterr().err


def test_a_judge_with_nothing_to_grade_is_said(tmp_path, capsys):
    command = [str(world(tmp_path)), "--dry-run", "eval.judge.model=gpt-4", f"eval.include_path={tmp_path}"]
    assert main([*command, "calibration={self: bos, mode: packed}"]) == 0
    out, said = capsys.readouterr()
    assert "eval.judge: has nothing to grade, since no evaluation is MT-Bench" in said
    assert "eval.include_path: changes nothing, since no evaluation is a task of lm-eval" in said
    assert "tokens, each alone" in out  # what the model writes is not packed


def test_what_is_counted_from_a_base_that_is_not_measured(tmp_path, capsys):
    path = str(write_rows(tmp_path / "pairs.jsonl", [{"prompt": "say", "chosen": "yes", "rejected": "no"}] * 12))
    command = [str(world(tmp_path)), "--dry-run", "eval.before=false"]
    assert main(command) == 0
    assert "eval.before=false: no KL and no forgetting, which are counted from the base" in capsys.readouterr().err
    task = f"eval.task=[{{preferences: pairs, path: {path}}}]"
    assert main([*command, task]) == 2
    assert "eval.before: pairs is measured against the base; leave it at true" in capsys.readouterr().err
    assert main([*command, "eval.retention=[]", "eval.task=[]"]) == 0 and "no KL" not in capsys.readouterr().err


def test_no_task_goes_on_from_a_method_whose_evaluation_overflowed(tmp_path):
    """Its weights were finite and are saved; its row says that it diverged."""
    (tmp_path / "lora-null-v2" / "adapter").mkdir(parents=True)
    write_row(tmp_path / "lora-null-v2", Row(method="lora-null-v2", diverged=3, seconds=Seconds()))
    recipe, plan = load_recipe("sequence"), SimpleNamespace(name="lora-null-v2")
    job = SimpleNamespace(folder=tmp_path, plans=[plan], recipe=SimpleNamespace(name="math"))
    with pytest.raises(UserError, match="no method is left after math, all have diverged"):
        with_earlier(recipe, job, [job])
    _keep_grams(recipe, job, plan)  # loads no model
    assert not (tmp_path / "lora-null-v2" / "grams").exists()

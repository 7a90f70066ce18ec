"""Evaluations of one's own: task files, groups, Python classes, and a bare file of questions."""

import json
import random
import shutil

import pytest
from chats import TOOLS, assistant, chat_tokenizer, user
from tiny import tiny_model, tiny_tokenizer
from world import make_world, write_rows

from lora_null.eval_harness import LmEvalTask, evaluate, validate_tasks
from lora_null.eval_harness.lm_eval.loading import name_in
from lora_null.recipes.__main__ import main
from lora_null.recipes.checks import tell_of_shared_rows
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks
from lora_null.recipes.job import check_run
from lora_null.utils.errors import UserError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
output_type: {kind}
metric_list: [{{metric: {metric}}}]
"""
CODE = """
import json
import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task


class Configured(ConfigurableTask):
    VERSION = 1
    DATASET_PATH = "none"

    def __init__(self, config=None):
        super().__init__(config={"metadata": {"version": 1}})

    def download(self, *_, **__):
        rows = [{"question": f"q{i}", "answer": "x"} for i in range(3)]
        self.dataset = {"test": datasets.Dataset.from_list(rows)}

    def has_training_docs(self): return False
    def has_validation_docs(self): return False
    def has_test_docs(self): return True
    def test_docs(self): return self.dataset["test"]
    def doc_to_text(self, doc): return doc["question"]
    def doc_to_target(self, doc): return " " + doc["answer"]
    def construct_requests(self, doc, ctx, **kwargs):
        kwargs.pop("apply_chat_template", None), kwargs.pop("chat_template", None)
        return [Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, self.doc_to_target(doc)), idx=0, **kwargs)]
    def process_results(self, doc, results): return {"ll": results[0][0]}
    def aggregation(self): return {"ll": mean}
    def higher_is_better(self): return {"ll": True}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    make_world(folder)
    data = write_rows(folder / "mine.jsonl", [{"question": f"q{i}", "answer": "x"} for i in range(6)])
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, kind, metric in (("mine_lls", "loglikelihood", "acc"), ("mine_gen", "generate_until", "exact_match")):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, metric=metric))
    (tasks / "group.yaml").write_text("group: mine_all\ntask: [mine_lls, mine_gen]\n")
    (tasks / "code.py").write_text(CODE)
    (tasks / "class.yaml").write_text("task: mine_class\nclass: !function code.Configured\n")
    (tasks / "empty.yaml").write_text("nothing: here\n")
    return folder


@pytest.mark.parametrize("name", ["mine_lls", "mine_all", "mine_class"])
def test_tasks_of_a_folder_run(own, name):
    found = evaluate(tiny_model(), tiny_tokenizer(), [LmEvalTask(name, include_path=str(own / "tasks"))], limit=3)
    names = {"mine_lls": {"mine_lls"}, "mine_all": {"mine_lls", "mine_gen"}, "mine_class": {"mine_class"}}
    assert found.metrics.keys() == names[name]
    assert all(metric.n == 3 for metric in found.metrics.values())
    assert {metric.unit for metric in found.metrics.values()} == {"ll" if name == "mine_class" else "fraction"}


@pytest.mark.parametrize("metric, unit", [("points", "points"), ("acc_of_points", "fraction")])
@pytest.mark.parametrize("points", [1.0, 5.0])
def test_the_unit_is_that_of_the_metric_whatever_is_found(own, tmp_path, metric, unit, points):
    (tmp_path / "code.py").write_text(f"def score(doc, results): return {{'{metric}': {points}}}")
    text = TASK.format(name="mine", data=own / "mine.jsonl", kind="generate_until", metric=metric)
    text = text.replace("}]", ", aggregation: mean, higher_is_better: true}]")
    (tmp_path / "mine.yaml").write_text(f"{text}process_results: !function code.score\n")
    found = evaluate(tiny_model(), tiny_tokenizer(), [LmEvalTask("mine", include_path=str(tmp_path))], limit=1)
    assert found.metrics["mine"].unit == unit and found.metrics["mine"].value == points


@pytest.mark.parametrize("name", ["mine_lls", "mine_all", "mine_class"])
def test_what_decides_them_is_described(own, tmp_path, name):
    """Rules, code beside them, and local documents: a kept evaluation of the base is of just these."""
    folder = tmp_path / "tasks"
    shutil.copytree(own / "tasks", folder)
    for path in folder.glob("mine_*.yaml"):
        path.write_text(path.read_text().replace(str(own / "mine.jsonl"), str(tmp_path / "mine.jsonl")))
    shutil.copyfile(own / "mine.jsonl", tmp_path / "mine.jsonl")

    def described():
        return LmEvalTask(name, include_path=str(folder)).describe(3)

    first = described()
    assert described() == first
    changed = [
        folder / "code.py",
        folder / "prompts.json",
        *([] if name == "mine_class" else [folder / "mine_lls.yaml", tmp_path / "mine.jsonl"]),
    ]
    for path in changed:
        path.write_text((path.read_text() if path.is_file() else "") + "\n")
        assert described() != first
        first = described()


def test_what_merely_lies_beside_a_task_does_not_decide_it(own, tmp_path):
    """A recipe, a log, an environment of Python: a run that began before they changed goes on."""
    shutil.copy(own / "tasks" / "mine_lls.yaml", tmp_path)
    (tmp_path / "recipe.yaml").write_text("include: default\noutput_dir: out\n")

    def described():
        return LmEvalTask("mine_lls", include_path=str(tmp_path)).describe(3)

    first = described()
    (tmp_path / "recipe.yaml").write_text("include: default\noutput_dir: mine\n")
    (tmp_path / "log.txt").write_text("step 1\n")
    assert described() == first
    (tmp_path / "code.py").write_text("NAMES = open('names.yaml')\n")
    with_code = described()
    assert with_code != first
    (tmp_path / "recipe.yaml").write_text("include: default\noutput_dir: out\n")
    assert described() == with_code
    (tmp_path / "names.yaml").write_text("a: 1\n")
    assert described() != with_code


def test_what_a_task_includes_and_imports_decides_it_too(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "shared"))
    text = TASK.format(name="mine", data=own / "mine.jsonl", kind="loglikelihood", metric="acc")
    files = {
        tmp_path / "common" / "base.yaml": text.replace("task: mine\n", ""),
        tmp_path
        / "tasks"
        / "mine.yaml": "task: mine\ninclude: ../common/base.yaml\nprocess_docs: !function help.docs.keep\n",
        tmp_path / "tasks" / "help" / "docs.py": "import kept_rows\ndef keep(rows):\n    return rows\n",
        tmp_path / "shared" / "kept_rows.py": "",
    }
    for path, written in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(written)
    first = LmEvalTask("mine", include_path=str(tmp_path / "tasks")).describe(3)
    for path in files:
        path.write_text(path.read_text() + "# changed\n")
        now = LmEvalTask("mine", include_path=str(tmp_path / "tasks")).describe(3)
        assert now != first, path
        first = now


def test_groups_of_groups_have_a_direction_and_count_who_has_the_metric(own, tmp_path):
    """As leaderboard and mmlu: lm-eval knows no direction of theirs, and not every member has every metric."""
    for name in ("mine_lls", "mine_gen"):
        shutil.copy(own / "tasks" / f"{name}.yaml", tmp_path)
    inner = "{group: inner, task: [mine_lls], aggregate_metric_list: [{metric: acc}]}"
    means = "[{metric: acc}, {metric: exact_match, filter_list: none}]"
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [{inner}, mine_gen]\naggregate_metric_list: {means}\n")
    found = evaluate(tiny_model(), tiny_tokenizer(), [LmEvalTask("outer", include_path=str(tmp_path))], limit=3)
    assert found.metrics.keys() == {"outer/acc", "outer/exact_match"}
    for name, metric in found.metrics.items():
        assert (metric.higher_is_better, metric.n, metric.unit) == (True, 3, "fraction")
        assert len(found.group_samples[name]) == 3


SHUFFLES = """
import random

def docs(rows):
    return rows.map(lambda row: {"order": random.sample(range(8), 8)})

def score(doc, results):
    import numpy as np
    return {"acc": np.bool_(doc["question"] != "q0")}
"""


def test_what_rules_draw_is_drawn_once_whatever_the_seed(own, tmp_path):
    """GPQA shuffles its choices: the right answer is that of the question that was asked."""
    text = TASK.format(name="drawn", data=own / "mine.jsonl", kind="generate_until", metric="acc")
    text += "process_docs: !function draws.docs\nprocess_results: !function draws.score\n"
    (tmp_path / "drawn.yaml").write_text(text)
    (tmp_path / "draws.py").write_text(SHUFFLES)
    orders = []
    for seed in (1, 2):
        random.seed(seed)
        task = LmEvalTask("drawn", include_path=str(tmp_path), path=str(own / "mine.jsonl"))
        (member,) = task.loaded["tasks"].values()
        orders += [[doc["order"] for doc in member.eval_docs] for _ in range(2)]
        assert random.random() == random.Random(seed).random()  # the run's own draws are left alone
    assert orders[0] == orders[1] == orders[2] == orders[3] and orders[0][0] != orders[0][1]
    assert evaluate(tiny_model(), tiny_tokenizer(), [task], limit=3).samples["drawn"] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["Paris", ["NYC", "New York"]], "answers that are texts and others that are lists; write all as lists"),
        ([["Paris"], "NYC"], "answers that are texts and others that are lists"),
    ],
)
def test_every_row_of_a_local_file_is_tried(tmp_path, answers, message):
    path = write_rows(tmp_path / "f.jsonl", [{"question": "q?", "answer": answer} for answer in answers])
    with pytest.raises(UserError, match=message):
        validate_tasks([LmEvalTask("nq_open", path=str(path))])


def test_a_bad_row_is_named_before_a_model_loads(tmp_path):
    rows = [{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": answer} for answer in ("1", "2", "")]
    with pytest.raises(UserError, match=r"'winogrande' cannot use row 3 of .*f.jsonl \(KeyError"):
        validate_tasks([LmEvalTask("winogrande", path=str(write_rows(tmp_path / "f.jsonl", rows)))])
    (tmp_path / "mine.yml").write_text("task: mine\n")
    with pytest.raises(UserError, match=r"mine.yml: lm-eval reads task files that end in .yaml; rename it"):
        name_in(tmp_path / "mine.yml")


UNSAFE_CODE = """
def score(doc, results):
    open({path!r}, "w").close()
    return {{"acc": 1}}
"""


def test_code_that_a_task_runs_itself_is_not_said_to_be_in_a_jail(own, tmp_path, caplog):
    text = TASK.format(name="runs", data=own / "mine.jsonl", kind="generate_until", metric="acc")
    (tmp_path / "runs.yaml").write_text(f"{text}unsafe_code: true\nprocess_results: !function code_rules.score\n")
    (tmp_path / "code_rules.py").write_text(UNSAFE_CODE.format(path=str(tmp_path / "made")))
    task = LmEvalTask("runs", include_path=str(tmp_path), confirm_run_unsafe_code=True)
    assert validate_tasks([task]) and (tmp_path / "made").exists()
    assert "without a jail" in caplog.text and task.report_notes() == {
        "generated_code": "by the rules of runs, without a jail"
    }


@pytest.mark.parametrize(
    "code, data, told",
    [
        (
            "from rules_beside import score",
            "mine.jsonl",
            "its code imports rules_beside, which lies beside it, where lm-eval",
        ),
        ("import nowhere_at_all", "mine.jsonl", "needs another package"),
        (
            "score = None",
            "not_there.jsonl",
            r"a file of its data is not there \(.*looks for data_files in the current folder",
        ),
    ],
)
def test_what_lies_beside_a_task_where_nobody_looks_is_said_to_be_there(own, tmp_path, monkeypatch, code, data, told):
    monkeypatch.chdir(own)
    text = TASK.format(name="mine", data=data, kind="generate_until", metric="acc")
    (tmp_path / "mine.yaml").write_text(f"{text}process_results: !function code.score\n")
    (tmp_path / "code.py").write_text(code)
    (tmp_path / "rules_beside.py").write_text("def score(doc, results):\n    return {'acc': 1}\n")
    (tmp_path / "not_there.jsonl").touch()
    with pytest.raises(UserError, match=told):
        validate_tasks([LmEvalTask("mine", include_path=str(tmp_path))])


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "cruxeval_input"])
def test_lm_evals_own_code_tasks_need_the_consent_to_no_jail(name):
    with pytest.raises(UserError, match=r"without a jail; take sandbox_humaneval .*--allow-code-execution=unsafe"):
        validate_tasks([LmEvalTask(name, confirm_run_unsafe_code=True)])


def test_the_lesser_of_two_limits_counts():
    assert [LmEvalTask("x", limit=own).effective_limit(of_all) for own in (None, 100) for of_all in (None, 10)] == [
        None,
        10,
        100,
        10,
    ]


def test_a_recipe_names_them_by_folder_or_by_file(own):
    words = [f"eval.include_path={own}/tasks", f"eval.task=[mine_all, {own}/tasks/class.yaml]", "eval.retention="]
    recipe = load_recipe(str(own / "tiny.yaml"), words)
    tasks = eval_tasks(EvalContext(recipe, tiny_tokenizer()))
    assert [(task.key, task.task) for task in tasks] == [("mine_all", "mine_all"), ("mine_class", "mine_class")]
    assert validate_tasks(tasks)


def test_paths_beside_the_recipe(own):
    (own / "beside.yaml").write_text(
        "include: tiny.yaml\neval: {include_path: tasks, task: [tasks/mine_lls.yaml], retention: [mine.jsonl]}\n"
    )
    recipe = load_recipe(str(own / "beside.yaml"))
    assert recipe.eval.include_path == str(own / "tasks") and recipe.eval.task[0].task == f"{own}/tasks/mine_lls.yaml"
    without = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"task": []})})
    (task,) = eval_tasks(EvalContext(without, tiny_tokenizer()))
    assert task.key == "mine" and task.kl and len(task.pairs) == 6


@pytest.mark.parametrize(
    "fields", [("prompt", "completion"), ("instruction", "output"), ("query", "response"), ("q", "a")]
)
def test_a_bare_file_of_questions_is_an_entry(own, fields):
    path = write_rows(own / f"{fields[0]}.jsonl", [dict(zip(fields, (f"ask {i}", f"say {i}"))) for i in range(3)])
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{path}]", "eval.task="])
    (task,) = eval_tasks(EvalContext(recipe, tiny_tokenizer()))
    assert task.key == fields[0] and task.pairs[1] == ("Question: ask 1\nAnswer:", " say 1")


def test_a_question_has_the_input_of_its_instruction(own):
    path = write_rows(
        own / "alpaca.jsonl", [{"instruction": "add", "input": f"{i}+1", "output": str(i + 1)} for i in range(3)]
    )
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{path}]", "eval.task="])
    assert eval_tasks(EvalContext(recipe, tiny_tokenizer()))[0].pairs[1] == ("Question: add\n\n1+1\nAnswer:", " 2")


def test_a_file_of_conversations_in_one_line(own):
    path = write_rows(own / "chats.jsonl", [{"messages": [user(f"{i}?"), assistant(f"{i}!")]} for i in range(3)])
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{path}]", "eval.task="])
    assert eval_tasks(EvalContext(recipe, tiny_tokenizer()))[0].pairs[1] == ("Question: 1?\nAnswer:", " 1!")
    (chats,) = eval_tasks(EvalContext(recipe, chat_tokenizer(TOOLS)))  # as calibration writes them
    assert chats.pairs[1] == ("<user>1?\n<assistant>", "1!") and not chats.special_tokens


def test_the_system_text_of_a_row_is_asked_with(own):
    rows = [{"system": f"Be {i}.", "messages": [user(f"{i}?"), assistant(f"{i}!")]} for i in range(3)]
    path = write_rows(own / "chats.jsonl", rows)
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{path}]", "eval.task="])
    (chats,) = eval_tasks(EvalContext(recipe, chat_tokenizer(TOOLS)))
    assert "Be 1." in chats.pairs[1][0] and chats.pairs[1][0].endswith("<user>1?\n<assistant>")


def test_notes_are_an_entry(own):
    (own / "notes.md").write_text("The harbor is closed in winter.\n\nAsk for the key at the office next door.\n")
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{own}/notes.md]", "eval.task="])
    (task,) = eval_tasks(EvalContext(recipe, tiny_tokenizer()))
    assert "".join(task.pairs[0]).startswith("The harbor is closed") and "Question" not in task.pairs[0][0]


def test_rows_that_are_left_out_are_said(own, capsys):
    rows = [{"messages": [user(f"{i}?"), *[assistant(f"{i}!")] * (i > 2)]} for i in range(4)]
    path = write_rows(own / "chats.jsonl", rows)
    recipe = load_recipe(str(own / "tiny.yaml"), [f"eval.retention=[{path}]", "eval.task=", "data.on_bad_row=skip"])
    assert len(eval_tasks(EvalContext(recipe, tiny_tokenizer()))[0].pairs) == 1
    assert "left out 3 of 4 rows of eval.retention: 3 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval.task=[{answers: a, path: rows.jsonl}]"], ["eval.task", "trained on"]),
        (["eval.task=[{answers: a, path: rows.jsonl, offset: 4}]", "data.limit=4"], []),
        (["eval.task=[{answers: a, path: rows.jsonl, offset: 3}]", "data.limit=4"], ["eval.task", "trained on"]),
        (["eval.retention=[{answers: a, path: kept.jsonl}]", "calibration={path: kept.jsonl}"], ["eval.retention", "calibrated on"]),
        (["eval.retention=[{answers: a, path: kept.jsonl, offset: 4}]", "calibration={path: kept.jsonl, limit: 4}"], []),
    ],
)  # fmt: skip
def test_measuring_what_was_read_is_told(own, caplog, monkeypatch, words, told):
    monkeypatch.chdir(own)
    for name in ("rows", "kept"):
        write_rows(own / f"{name}.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(8)])
    data = "data={path: rows.jsonl, prompt: question, response: answer}"
    nothing = [f"{key}=" for key in ("eval.retention", "eval.task") if not words[0].startswith(key)]
    tell_of_shared_rows(load_recipe(str(own / "tiny.yaml"), [*nothing, data, *words]), [], [])
    assert all(word in caplog.text for word in told) and bool(caplog.text) == bool(told)


def test_questions_of_a_copy_that_are_trained_on_are_told(own, caplog):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(8)]
    write_rows(own / "rows.jsonl", rows)
    write_rows(own / "copy.jsonl", [*rows[5:], {"question": "9?", "answer": "9"}])
    words = [f"data={{path: {own}/rows.jsonl, prompt: question, response: answer}}", "eval.retention="]
    check_run(load_recipe(str(own / "tiny.yaml"), [*words, f"eval.task=[{own}/copy.jsonl]"]))
    assert "eval.task: 3 of 4 questions of copy are trained on too" in caplog.text


@pytest.mark.parametrize(
    "words, message",
    [
        (["eval.task=[mine_lsl]", "eval.include_path={0}/tasks"], "unknown lm-eval task 'mine_lsl' (did you mean 'mine_lls'"),
        (["eval.task=[{0}/tasks/nothing.yaml]"], "no task file"),
        (["eval.task=[{0}/tasks/empty.yaml]"], "empty.yaml holds no task of lm-eval"),
        (["eval.task=[{0}/torn/torn.yaml]"], "torn.yaml cannot be read as a task file (while parsing"),
        (["eval.task=[torn]", "eval.include_path={0}/torn"], "torn.yaml cannot be read as a task file (while parsing"),
        (["eval.include_path={0}/nowhere", "eval.task=[mine_lls]"], "eval.include_path: no folder"),
        (["eval.retention=[{0}/strange.jsonl]"], "has no question and answer under a usual name (its fields: foo)"),
        (["eval.task=[{0}/broken/broken.yaml]"], "broken': a file of its data is not there (Unable to find '/nowhere.jsonl'); lm-eval looks"),
    ],
)  # fmt: skip
def test_mistakes_in_them(own, capsys, words, message):
    write_rows(own / "strange.jsonl", [{"foo": "bar"}])
    for name in ("broken", "torn"):
        (own / name).mkdir(exist_ok=True)
    (own / "torn" / "torn.yaml").write_text("task: [torn\n")
    text = TASK.format(name="broken", data="/nowhere.jsonl", kind="loglikelihood", metric="acc")
    (own / "broken" / "broken.yaml").write_text(text)
    assert main([str(own / "tiny.yaml"), "--dry-run", *(word.format(own) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_task_file_with_a_wrong_field_is_refused_with_its_name(own):
    text = TASK.format(name="wrong", data=own / "mine.jsonl", kind="loglikelihood", metric="acc")
    (own / "wrong").mkdir(exist_ok=True)
    (own / "wrong" / "w.yaml").write_text(text.replace("{{answer}}", "{{answer.nothing.more}}"))
    with pytest.raises(UserError, match="wrong"):
        validate_tasks([LmEvalTask("wrong", include_path=str(own / "wrong"))])
    assert json.loads((own / "mine.jsonl").read_text().splitlines()[0])["answer"] == "x"


@pytest.mark.parametrize("eos", ["</s>", None])
def test_what_ends_an_answer_is_not_asked_for(tmp_path, eos):
    """Of a chat neither the end token nor that of a turn, which are two in Gemma's; and there may be no end token."""
    write_rows(tmp_path / "talk.jsonl", [{"q": "1+1?", "a": "2 </s> or 2"}, {"q": "2+2?", "a": "4"}])
    entry = {"answers": "talk", "path": str(tmp_path / "talk.jsonl"), "prompt": "q", "response": "a"}
    tokenizer = chat_tokenizer(TOOLS.replace("{{ eos_token }}", "<turn|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn|>"]})
    tokenizer.eos_token = eos
    for template, first in (("chat", "2 </s> or 2"), ("qa", " 2 </s> or 2")):
        recipe = make_world(tmp_path, eval={"retention": [{**entry, "template": template}]})
        (task,) = eval_tasks(EvalContext(load_recipe(str(recipe), []), tokenizer))
        assert [answer for _, answer in task.pairs] == [first, first.replace("2 </s> or 2", "4")]

"""Every kind of evaluation is the same few methods, and every result the same few fields."""

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest

from lora_null.eval_harness import (
    AnswerTask,
    Evaluation,
    LmEvalTask,
    Metric,
    MTBenchTask,
    PreferenceTask,
    Task,
    TaskResult,
    evaluate,
    validate_tasks,
)
from lora_null.eval_harness.likelihood import TokenizedPair
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit

LONG = [TokenizedPair(tuple(range(2, 60)), 3)]
QUESTION = {"question_id": 1, "category": "math", "turns": ["a", "b"], "reference": []}
TABLE = PositionLimit(16, "n_positions", True, "GPT2LMHeadModel")


def one_of_each():
    return [
        LmEvalTask("nq_open", path="unused.jsonl", num_fewshot=0),
        AnswerTask("answers", [("Q: who wrote it, and when was it\nA:", " nobody")]),
        PreferenceTask("preferences", LONG, LONG),
        MTBenchTask("talk", [QUESTION], lambda before, asked: asked, max_new_tokens=20),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_a_role_that_does_not_exist_is_refused_by_every_kind(kind):
    task = replace(one_of_each()[kind], role="retain")
    with pytest.raises(UserError, match=rf"evaluation task '{task.label}': unknown role 'retain'"):
        validate_tasks([task])


@pytest.mark.parametrize("kind", range(4))
def test_every_kind_compares_its_own_lengths_with_the_positions(kind, tokenizer, nq_file):
    task = one_of_each()[kind]
    task = replace(task, path=nq_file) if kind == 0 else task
    with pytest.raises(UserError, match="16"):
        task.check_positions(tokenizer, TABLE)
    task.check_positions(tokenizer, replace(TABLE, tokens=512))


def test_descriptions_are_json_and_tell_settings_apart(nq_file, sciq_file):
    tasks = [replace(one_of_each()[0], path=nq_file), *one_of_each()[1:]]
    changed = [
        replace(tasks[0], path=sciq_file),
        replace(tasks[1], pairs=[("Q:", " a")]),
        replace(tasks[2], beta=0.2),
        replace(tasks[3], max_new_tokens=21),
    ]
    for task, other in zip(tasks, changed):
        assert json.loads(json.dumps(task.describe(3))) == task.describe(3) != other.describe(3)
        assert task.describe(3) != task.describe(4)


@dataclass(frozen=True)
class LengthTask(Task):
    """Another kind: the mean number of characters of some texts."""

    name: str
    texts: list[str] = field(repr=False)
    role: str = "task"
    limit: int | None = None

    def check(self):
        super().check()
        if not self.texts:
            raise UserError(f"{self} has no texts")

    def describe(self, limit):
        return {"texts": len(self.texts[:limit])}

    def run(self, model, tokenizer, options):
        assert not model.training
        lengths = [float(len(text)) for text in self.texts[: options.limit]]
        metric = Metric(sum(lengths) / len(lengths), None, len(lengths), None, self.role, "characters")
        return TaskResult({self.name: metric}, {self.name: lengths}, {"seed": options.seed})


def test_another_kind_runs_beside_the_others(model, tokenizer, pairs):
    tasks = [AnswerTask("answers", pairs), LengthTask("length", ["a", "bcd", "efghi"], limit=2)]
    found = evaluate(model, tokenizer, tasks, limit=4, seed=3)
    assert found.metrics["length"] == Metric(2.0, None, 2, None, "task", "characters")
    assert found.samples["length"] == [1.0, 3.0] and found.metrics["answers nll"].n == 4
    assert found.settings["tasks"]["length"] == {"texts": 2, "seed": 3}
    assert evaluate(model, tokenizer, tasks, limit=1).metrics["length"].n == 1


def test_all_tasks_are_checked_before_any_runs(model, tokenizer, pairs):
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append("forward"))
    with pytest.raises(UserError, match="'length' has no texts"):
        evaluate(model, tokenizer, [AnswerTask("answers", pairs), LengthTask("length", [])])
    assert not steps


def test_a_task_that_ran_before_gives_the_same_again(model, tokenizer, write):
    """Its documents are read once; few-shot examples are drawn by the seed alone."""
    rows = [{"question": f"{i} + {i}", "answer": f"#### {2 * i}"} for i in range(9)]
    task = LmEvalTask("gsm8k", path=write("t.jsonl", rows[:3]), fewshot_path=write("s.jsonl", rows), num_fewshot=2)
    asked = []
    model.register_forward_pre_hook(lambda _, args, kw: asked.append(kw["input_ids"].tolist()), with_kwargs=True)
    for seed in (1, 1, 2):
        found = evaluate(model, tokenizer, [task], seed=seed)
        asked.append(found.samples)
    ends = [i for i, entry in enumerate(asked) if isinstance(entry, dict)]
    first, second, third = asked[: ends[0]], asked[ends[0] + 1 : ends[1]], asked[ends[1] + 1 : ends[2]]
    assert first == second != third


def test_an_evaluation_is_written_and_read_back_unchanged(tmp_path, model, tokenizer, pairs):
    found = evaluate(model, tokenizer, [AnswerTask("answers", pairs, role="retention")])
    (tmp_path / "eval.json").write_text(found.to_json())
    assert Evaluation.read(tmp_path / "eval.json") == found
    written = json.loads(found.to_json())
    assert list(written) == ["metrics", "settings", "seconds", "samples", "weights", "noise", "group_samples"]
    assert list(written["metrics"]["answers nll"]) == ["value", "stderr", "n", "higher_is_better", "role", "unit"]


def test_metrics_of_older_and_later_versions_are_read():
    entry = {"value": 1.0, "stderr": None, "n": 3, "higher_is_better": True, "role": "task"}
    assert Metric.from_dict(entry) == Metric(1.0, None, 3, True, "task", "fraction")
    assert Metric.from_dict(entry | {"unit": "nats", "weight": 2}) == Metric(1.0, None, 3, True, "task", "nats")
    with pytest.raises(KeyError):
        Metric.from_dict({"value": 1.0})
    assert Metric.from_dict(entry)["value"] == 1.0
    with pytest.raises(KeyError):
        Metric.from_dict(entry)["to_dict"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metrics": {"a": {}}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval\.json: damaged"):
        Evaluation.read(tmp_path / "eval.json")


def test_importing_the_package_loads_nothing_heavy():
    code = """
import sys
import lora_null.eval_harness as harness
print(sorted({"torch", "lm_eval", "transformers", "datasets", "openai"} & set(sys.modules)))
import lora_null.eval_harness.mt_bench.judge, lora_null.eval_harness.results
print(sorted({"torch", "lm_eval", "transformers", "datasets", "openai"} & set(sys.modules)))
import lora_null.eval_harness.evaluation
from lora_null.eval_harness import evaluate
print(callable(evaluate), all(hasattr(harness, name) for name in harness.__all__), hasattr(harness, "OwnTask"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[]", "[]", "True True False"]

"""lm-eval tasks from local files, and every mistake with its line."""

import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance

from lora_null.eval_harness import AnswerTask, LmEvalTask, Metric, evaluate, validate_tasks
from lora_null.eval_harness.lm_eval import loading
from lora_null.eval_harness.lm_eval.model import ShardedLM
from lora_null.recipes.budget import plan_budget
from lora_null.utils.errors import UserError


def documents(task):
    """The prompts and targets that lm-eval makes of a task's documents."""
    (leaf,) = task.loaded["tasks"].values()
    shots = leaf.config.num_fewshot
    return [(leaf.fewshot_context(doc, shots), leaf.doc_to_target(doc)) for doc in leaf.eval_docs]


def test_a_local_file_stands_in_for_the_hub(nq_file):
    prompt, target = documents(LmEvalTask("nq_open", path=nq_file))[2]
    assert prompt == "Answer these questions:\n\nQ: who is number 2?\nA:"
    assert target == ["n2", "m2"]


def test_fields_are_renamed(write):
    path = write("wq.jsonl", [{"id": "1", "query": "who", "answer": ["b", "a"]}] * 2)
    task = LmEvalTask("webqs", path=path, fields={"answers": "answer", "question": "query"})
    (leaf,) = task.loaded["tasks"].values()
    assert leaf.doc_to_text(leaf.eval_docs[0]) == "Question: who\nAnswer:"
    assert leaf.doc_to_choice(leaf.eval_docs[0]) == ["a", "b"]


def test_triviaqa_keeps_its_layout(write):
    path = write("tqa.jsonl", [{"question": "who", "answer": {"aliases": ["A", "B"], "value": "A"}}])
    assert documents(LmEvalTask("triviaqa", path=path)) == [("Question: who?\nAnswer:", ["A", "B"])]


@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
def test_other_kinds_of_files(tmp_path, suffix):
    path = str(tmp_path / f"gsm.{suffix}")
    rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": f"so #### {i}"} for i in range(3)])
    getattr(rows, f"to_{suffix}")(path)
    assert documents(LmEvalTask("gsm8k", path=path, num_fewshot=0))[1] == ("Question: q1\nAnswer:", "so #### 1")


def gsm_rows(letter):
    return [{"question": f"{letter}{i}", "answer": f"#### {i}"} for i in range(6)]


def test_few_shot_examples_come_from_their_own_file(write):
    path, shots = write("test.jsonl", gsm_rows("t")), write("train.jsonl", gsm_rows("s"))
    prompt, _ = documents(LmEvalTask("gsm8k", path=path, fewshot_path=shots))[0]
    assert prompt.count("Question: s") == 5 and prompt.count("Question: t") == 1
    prompt, _ = documents(LmEvalTask("gsm8k_cot", path=path))[0]  # has its own examples
    assert prompt.startswith("Q: There are 15 trees")


def test_a_group_of_subsets_runs_as_one_task(write):
    rows = [{"problem": f"p{i}", "solution": rf"\boxed{{{i}}}", "level": "1", "type": "x"} for i in range(3)]
    assert documents(LmEvalTask("hendrycks_math", path=write("math.jsonl", rows)))[2] == ("Problem: p2\nAnswer:", "2")


def test_names_of_results(model, tokenizer, write, nq_file):
    gsm = write("gsm.jsonl", gsm_rows("t"))
    wanted = [
        LmEvalTask("nq_open", path=nq_file, limit=2, role="retention"),
        LmEvalTask("nq_open", path=nq_file, limit=1, name="nq again"),
        LmEvalTask("gsm8k", path=gsm, num_fewshot=0, limit=2),
        LmEvalTask("gsm8k", path=gsm, num_fewshot=0, limit=2, name="picked", metric="strict-match"),
    ]
    found = evaluate(model, tokenizer, wanted)
    assert set(found.metrics) == {
        "nq_open",
        "nq again",
        "gsm8k/strict-match",
        "gsm8k/flexible-extract",
        "picked/strict-match",
    }
    assert found.metrics["nq_open"] == Metric(0.0, 0.0, 2, True, "retention", "fraction")
    assert json.loads(found.to_json())["metrics"]["nq_open"] == {
        "value": 0.0,
        "stderr": 0.0,
        "n": 2,
        "higher_is_better": True,
        "role": "retention",
        "unit": "fraction",
    }
    assert found.metrics["nq again"].n == 1 and found.metrics["nq again"].stderr is None
    assert found.samples["nq_open"] == [0.0, 0.0]
    assert found.settings["tasks"]["gsm8k"]["versions"] == {"gsm8k": 3.0}
    assert type(found).from_json(found.to_json()) == found


@pytest.fixture
def fake_hub(monkeypatch):
    """Let every hub data set be these few rows."""

    def serve(rows):
        splits = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: splits)

    return serve


def test_a_group_from_the_hub_reports_its_own_aggregate(model, tokenizer, fake_hub):
    fake_hub([{"problem": f"p{i}", "solution": rf"\boxed{{{i}}}"} for i in range(3)])
    task = LmEvalTask("hendrycks_math", metric="exact_match", limit=3, role="retention")
    recipe = SimpleNamespace(budget=SimpleNamespace(measure=None, at_most=0.1))
    with pytest.raises(UserError, match="'hendrycks_math' is a group's mean, without a value for each question"):
        plan_budget(recipe, [task], SimpleNamespace(tasks=[]))
    found = evaluate(model, tokenizer, [task], limit=2)
    assert set(found.metrics) == {"hendrycks_math"} and not found.samples  # by which a budget counts rows
    assert found.group_samples == {"hendrycks_math": [0.0] * 14} and type(found).from_json(found.to_json()) == found
    assert found.metrics["hendrycks_math"].n == 7 * 2 and found.metrics["hendrycks_math"].unit == "fraction"


def test_documents_of_the_hub_are_described_by_what_they_hold(fake_hub):
    described = []
    for answer in ("a", "a", "b"):
        fake_hub([{"question": "q", "answer": [answer]}])
        described.append(LmEvalTask("nq_open").describe(1))
    assert described[0] == described[1] != described[2]


def test_a_tag_reports_each_of_its_tasks(model, tokenizer, fake_hub):
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    fake_hub([{"id": str(i), "question": f"q{i}", "choices": choices, "answerKey": "A"} for i in range(3)])
    named = LmEvalTask("ai2_arc", metric="acc", limit=1, name="arc")
    apart = evaluate(model, tokenizer, [named]).metrics  # other questions: not two rules for the same
    assert set(apart) == {"arc: arc_challenge/acc", "arc: arc_easy/acc"} and all(map(named.measures, apart))
    found = evaluate(
        model, tokenizer, [LmEvalTask("ai2_arc", metric="acc", limit=1), LmEvalTask("arc_easy", name="easy")], limit=2
    )
    assert {name: metric.n for name, metric in found.metrics.items()} == {
        "arc_challenge/acc": 1,
        "arc_easy/acc": 1,
        "easy/acc": 2,
        "easy/acc_norm": 2,
    }
    with pytest.raises(UserError, match="'arc_easy/acc' is measured by 'ai2_arc' too; give one of them another name"):
        evaluate(model, tokenizer, [LmEvalTask("ai2_arc", metric="acc"), "arc_easy"])


def test_several_metrics_are_told_apart(write):
    rows = [{"text": f"one two three {i}", "domain": None} for i in range(2)]
    task = LmEvalTask("lambada_openai", path=write("l.jsonl", rows))
    results = {"results": {"lambada_openai": {"perplexity,none": 1.0, "perplexity_stderr,none": 0.1, "acc,none": 0.5}}}
    assert set(task.result_names(task.loaded, results)) == {"lambada_openai/perplexity", "lambada_openai/acc"}


def test_rolling_likelihood_equals_a_plain_computation(model, tokenizer, write):
    text = "a page about nothing at all"
    found = evaluate(model, tokenizer, [LmEvalTask("wikitext", path=write("w.jsonl", [{"page": text}] * 2))])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    nats = -log_probs.gather(-1, ids[0, 1:, None]).sum().item()
    word_perplexity = found.metrics["wikitext/word_perplexity"]
    assert word_perplexity.value == pytest.approx(math.exp(nats / 6), rel=1e-4)
    assert word_perplexity.unit == "word_perplexity" and not word_perplexity.higher_is_better
    assert word_perplexity.stderr is None


@pytest.mark.parametrize("answer", ["", "x" * 40])
def test_an_answer_that_the_model_cannot_take_is_one_line(make_model, tokenizer, answer):
    lm = ShardedLM(make_model(max_position_embeddings=32), tokenizer, 2)
    request = Instance("loglikelihood", {}, ("one two", answer), 0, ("t", 0, 1))
    message = rf"an answer of {len(answer)} tokens \('{answer}'\), the model takes from 1 to 32"
    with pytest.raises(UserError, match=message):
        lm.loglikelihood([request], disable_tqdm=True)


MISTAKES = {
    "unknown lm-eval task 'nq_opne' (did you mean 'nq_open'": LmEvalTask("nq_opne"),
    "'humaneval' runs code that the model writes; consent with": LmEvalTask("humaneval"),
    "'zzzz' (list them with": LmEvalTask("zzzz"),
    "'nq_open': there is no file nowhere.jsonl": LmEvalTask("nq_open", path="nowhere.jsonl"),
    "unknown role 'retension' (did you mean 'retention'?)": LmEvalTask("nq_open", role="retension"),
    "limit must be a whole number of at least 1, not 0": LmEvalTask("nq_open", limit=0),
    "num_fewshot must be a whole number of at least 0, not -1": LmEvalTask("nq_open", num_fewshot=-1),
    "fields needs path": LmEvalTask("nq_open", fields={"a": "b"}),
    "fewshot_path needs path": LmEvalTask("gsm8k", fewshot_path="x.jsonl"),
    "'e' has no pairs of prompt and answer": AnswerTask("e", []),
    "'e': pair 1 must be a prompt and an answer": AnswerTask("e", [("a", "b"), ("a", "")]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(UserError) as raised:
        validate_tasks([MISTAKES[message]])
    assert message in str(raised.value) and "\n" not in str(raised.value)


FILE_MISTAKES = {
    "'answers'; its fields: question, answer; map one with fields: {answers: FIELD}": {"task": "webqs"},
    "has no field 'replies'; its fields: question, answer": {"task": "webqs", "fields": {"answers": "replies"}},
    "'list object' has no attribute 'aliases'": {"task": "triviaqa"},
    "5 few-shot examples from the evaluated file": {"task": "gsm8k"},
    "3 few-shot examples from the evaluated file": {"task": "nq_open", "num_fewshot": 3},
    "'passage'; its fields": {"task": "boolq"},
    "'mmlu' is a group of different tasks": {"task": "mmlu"},
    "metric 'loose' names 0 of its results": {"task": "gsm8k", "num_fewshot": 0, "metric": "loose"},
    "metric 'exact_match' names 2 of its results": {"task": "gsm8k", "num_fewshot": 0, "metric": "exact_match"},
}


@pytest.mark.parametrize("message", FILE_MISTAKES)
def test_mistakes_about_a_file(message, nq_file):
    with pytest.raises(UserError) as raised:
        validate_tasks([LmEvalTask(path=nq_file, **FILE_MISTAKES[message])])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_rows_without_a_field_that_the_rules_name(tmp_path):
    rows = [{"question": f"who {i}", "answer": ["he"]} for i in range(9)]
    rows[3] = {"question": "who 3", "note": "lacks its answer"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"has no 'answer' in rows 4$"):
        validate_tasks([LmEvalTask("nq_open", path=str(path))])


def test_few_shot_examples_from_the_evaluated_file_by_name(nq_file):
    with pytest.raises(UserError, match="fewshot_path is the evaluated file itself"):
        validate_tasks([LmEvalTask("gsm8k", path=nq_file, fewshot_path=nq_file)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xls", "x", r"cannot read .*a\.xls \(choose from: \.csv"),
        ("a.jsonl", "{broken", r"cannot read .*a\.jsonl as json"),
        ("a.csv", "question,answer\n", r"cannot read .*a\.csv as csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        validate_tasks([LmEvalTask("nq_open", path=str(tmp_path / name))])


def test_two_tasks_of_one_name(nq_file):
    with pytest.raises(UserError, match="'nq_open' is listed twice"):
        validate_tasks([LmEvalTask("nq_open", path=nq_file), "nq_open"])


def test_two_tasks_with_a_metric_of_one_name(nq_file):
    with pytest.raises(
        UserError, match="'nq_open nll' is measured by 'nq_open nll' too; give one of them another name"
    ):
        validate_tasks(
            [LmEvalTask("nq_open", path=nq_file, name="nq_open nll"), AnswerTask("nq_open", [("Q:", " a")])]
        )


def test_an_unreachable_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as raised:
        validate_tasks(["nq_open"])
    assert str(raised.value) == (
        "evaluation task 'nq_open': its hub data set cannot be read (Couldn't reach the Hub); "
        "give a local copy with path: FILE"
    )


def test_lm_evals_tasks_are_parsed_once(nq_file, monkeypatch):
    task = LmEvalTask("nq_open", path=nq_file)
    validate_tasks([task])

    def parse(*args, **kwargs):
        raise AssertionError("parsed again")

    monkeypatch.setattr(loading, "TaskManager", parse)
    validate_tasks([LmEvalTask("nq_open", path=nq_file)])

"""The math task files, in our harness and through the lm_eval command."""

import pytest

from lora_null.eval_harness import TASK_FILES, LmEvalTask, evaluate
from lora_null.eval_harness.lm_eval import model as lm
from lora_null.eval_harness.lm_eval.loading import folder_manager

GSM = [
    {"question": f"What is {i}+{i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(4)
]
MATH = [{"problem": f"Halve {i}.", "solution": rf"It is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in (1, 3, 5)]
GSM_ANSWERS = ["The answer is: 0", "so\nThe answer is: $2.00.", "#### 4", "I think 6"]
MATH_ANSWERS = ["The answer is: \\frac12", "The answer is: 1.5", "I do not know"]


@pytest.fixture
def says(monkeypatch):
    def replace(answers):
        given = iter(answers)
        monkeypatch.setattr(
            lm.ShardedLM, "generate_until", lambda self, requests, **_: [next(given) for _ in requests]
        )

    return replace


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=2048)


def test_gsm8k(model, tokenizer, write, says):
    says(GSM_ANSWERS)
    found = evaluate(model, tokenizer, [LmEvalTask("metamath_gsm8k", path=write("g.jsonl", GSM), name="gsm8k")])
    assert found.samples["gsm8k/exact_match"] == [1.0, 1.0, 1.0, 0.0]
    assert found.samples["gsm8k/metamath_rule"] == [1.0, 1.0, 0.0, 0.0]  # it reads nothing after ####
    assert found.metrics["gsm8k/exact_match"].unit == "fraction"
    assert found.settings["tasks"]["gsm8k"]["versions"] == {"metamath_gsm8k": 3.0}


def test_math_by_mathematics_and_by_string(model, tokenizer, write, says):
    says(MATH_ANSWERS)
    found = evaluate(model, tokenizer, [LmEvalTask("metamath_math", path=write("m.jsonl", MATH))])
    assert found.samples["metamath_math/math_verify"] == [1.0, 1.0, 0.0]
    assert found.samples["metamath_math/string_match"] == [1.0, 0.0, 0.0]


def test_asked_as_in_training(write):
    from lora_null.recipes.data.templates import render

    (leaf,) = LmEvalTask("metamath_gsm8k", path=write("g.jsonl", GSM)).loaded["tasks"].values()
    assert leaf.doc_to_text(leaf.eval_docs[1]) == render("alpaca", GSM[1]["question"], "")[0]


@pytest.mark.parametrize("name", ["metamath_gsm8k", "metamath_math", "sandbox_humaneval", "sandbox_mbpp"])
def test_the_chat_twin_asks_the_same_without_the_frame(name):
    manager = folder_manager(TASK_FILES)
    bare, framed = (manager.task_index[n].cfg["doc_to_text"] for n in (f"{name}_chat", name))
    opening, _, rest = framed.partition("### Instruction:\n")
    assert opening.startswith("Below is an instruction") and rest == f"{bare}\n\n### Response:"


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_a_chat_template_alone_writes_the_start_token(model, tokenizer, write, monkeypatch, start):
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    tokenizer.chat_template = start + "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    seen, generate = [], lm.ShardedLM._model_generate
    monkeypatch.setattr(lm.ShardedLM, "_model_generate", lambda self, context, **options: seen.append(context[0]) or generate(self, context, **options))  # fmt: skip
    task = LmEvalTask("metamath_gsm8k_chat", path=write("g.jsonl", GSM[:1]), chat=True)
    evaluate(model, tokenizer, [task])
    expected = tokenizer.apply_chat_template([{"role": "user", "content": GSM[0]["question"]}], return_dict=False)
    assert seen[0].tolist() == expected and seen[0].tolist().count(tokenizer.bos_token_id) == (start != "")


def test_the_folder_has_only_tasks_of_its_own():
    assert TASK_FILES.is_dir() and {"metamath_gsm8k", "sandbox_mbpp"} <= set(folder_manager(TASK_FILES).task_index)

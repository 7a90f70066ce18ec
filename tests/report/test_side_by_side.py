"""A real run on a tiny model: what it compares, the noise floor of its base, and the questions it answers."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM
from world import make_world

from lora_null.eval_harness import AnswerTask, evaluate
from lora_null.recipes.__main__ import main
from lora_null.recipes.results import load_results
from lora_null.recipes.side_by_side import choose


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    words = ["eval.examples=3", "--method", "lora,full", "training.max_steps=2", "training.save_strategy=no"]
    assert main([str(make_world(folder)), *words]) == 0
    return folder


def test_the_saved_adapters_answer_the_questions_that_moved_most(finished):
    results = load_results(finished / "out")
    answers = results.answers
    assert answers.task == "facts" and answers.labels == ["base", "LoRA", "Full fine-tuning"]
    samples = [
        json.loads((finished / "out" / m / "eval.json").read_text())["samples"]["facts kl"] for m in ("lora", "full")
    ]
    change = np.mean(samples, axis=0)
    assert [q.why for q in answers.questions] == ["largest change", "largest change", "median change"]
    assert [q.change for q in answers.questions[:2]] == pytest.approx(sorted(change, reverse=True)[:2])
    assert answers.questions[2].change == pytest.approx(sorted(change)[len(change) // 2], rel=0.5)
    first = answers.questions[0]
    prompt = tiny_tokenizer()(first.question, return_tensors="pt")["input_ids"]
    for label in ("base", "LoRA"):
        who = AutoModelForCausalLM.from_pretrained(finished / "model")
        if label == "LoRA":
            who = PeftModel.from_pretrained(who, finished / "out" / "lora" / "adapter")
        who.eval()
        new = who.generate(input_ids=prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :]
        lines = tiny_tokenizer().decode(new, skip_special_tokens=True).splitlines()
        assert first.answers[answers.labels.index(label)] == next((x.strip() for x in lines if x.strip()), "")
    html = (finished / "out" / "report.html").read_text()
    assert "What forgetting looks like" in html and "max_steps: 2" in html  # and the recipe, to copy


def test_every_pair_of_rows_is_compared_on_every_metric(finished):
    results = load_results(finished / "out")
    pairs = {(p.row, p.against, p.metric) for p in results.paired}
    both = {(1, 0), (2, 0), (2, 1)}
    expected = {(*pair, name) for pair in both for name in ("facts nll", "numbers nll")} | {(2, 1, "facts kl")}
    assert pairs == expected  # the base's KL is zero by definition and is not tested
    values = [row.metrics["numbers nll"].value for row in results.rows]
    gap = results.difference(2, 1, "numbers nll")
    assert (
        gap.mean == pytest.approx(values[2] - values[1]) and results.difference(1, 2, "numbers nll").mean == -gap.mean
    )


def test_every_value_is_the_weighted_mean_of_its_samples(finished):
    found = json.loads((finished / "out" / "lora" / "eval.json").read_text())
    for name, metric in found["metrics"].items():
        assert np.average(found["samples"][name], weights=found["weights"][name]) == pytest.approx(metric["value"])


def test_the_noise_floor_is_what_other_batches_change(finished, tmp_path):
    """Under bfloat16 autocast the base is not equal to itself in batches of another size, and that is measured."""
    results = load_results(finished / "out")
    assert set(results.noise) == {"facts nll", "facts kl", "numbers nll", "numbers kl"}
    model, task = (
        AutoModelForCausalLM.from_pretrained(finished / "model"),
        AnswerTask("q", PAIRS, kl=True, role="retention"),
    )
    options = {"batch_size": 6, "reference_dir": tmp_path}
    half = evaluate(model, tiny_tokenizer(), [task], record_reference=True, autocast_dtype=torch.bfloat16, **options)
    other = evaluate(
        model, tiny_tokenizer(), [task], autocast_dtype=torch.bfloat16, batch_size=3, reference_dir=tmp_path
    )
    assert half.noise["q kl"] == pytest.approx(other.metrics["q kl"].value) and half.metrics["q kl"].value == 0
    assert half.noise["q nll"] == pytest.approx(abs(other.metrics["q nll"].value - half.metrics["q nll"].value))
    assert other.noise == {}


PAIRS = [("who was king " + "old " * i, f"k{i}") for i in range(6)]


def test_nothing_is_chosen_without_samples(finished):
    results = load_results(finished / "out")
    assert choose(results, {}, "facts", 5) is None

"""Reward accuracy and margin of held-out pairs, against the base model's own likelihoods."""

import numpy as np
import pytest
import torch

from lora_null.eval_harness import PreferenceTask, evaluate
from lora_null.eval_harness.likelihood import tokenize_pairs
from lora_null.utils.errors import UserError


@pytest.fixture
def task(tokenizer):
    prompts = [f"Q: {'why ' * (i % 3)}{i}?\nA:" for i in range(9)]
    chosen = tokenize_pairs(tokenizer, [(prompt, f" because {i}") for i, prompt in enumerate(prompts)], "p", None)
    rejected = tokenize_pairs(tokenizer, [(prompt, " no") for prompt in prompts], "p", None)
    return PreferenceTask("pairs", chosen, rejected, beta=0.5)


def log_prob(model, pair):
    ids = torch.tensor([pair.ids])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return log_probs[pair.start - 1 :].sum().item()


def test_rewards_are_counted_from_the_base(model, peft_model, tokenizer, task, tmp_path):
    base = evaluate(model, tokenizer, [task], batch_size=4, reference_dir=tmp_path, record_reference=True)
    assert base.metrics["pairs reward accuracy"].value == 0.5 and base.metrics["pairs reward margin"].value == 0
    assert set(base.noise) == {"pairs reward margin"}  # the signs of rounding would be an accuracy
    found = evaluate(peft_model, tokenizer, [task], batch_size=4, reference_dir=tmp_path)
    with torch.no_grad():
        rewards = np.array(
            [
                [0.5 * (log_prob(peft_model.eval(), pair) - log_prob(model, pair)) for pair in pairs]
                for pairs in (task.chosen, task.rejected)
            ]
        )
    margins = rewards[0] - rewards[1]
    assert found.samples["pairs reward margin"] == pytest.approx(margins.tolist(), abs=1e-4)
    assert found.metrics["pairs reward accuracy"].value == pytest.approx((margins > 0).mean())
    assert found.metrics["pairs reward accuracy"].unit == "fraction"
    assert found.metrics["pairs reward margin"].stderr == pytest.approx(margins.std(ddof=1) / 3, abs=1e-4)


def test_without_a_reference_nothing_is_said(peft_model, tokenizer, task, tmp_path):
    assert evaluate(peft_model, tokenizer, [task], reference_dir=tmp_path).metrics == {}


def test_a_reference_of_other_pairs_is_refused(model, tokenizer, task, tmp_path):
    evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)
    with pytest.raises(UserError, match="recorded for other texts"):
        evaluate(model, tokenizer, [task], limit=3, reference_dir=tmp_path)


def test_what_is_no_number_is_not_counted_as_a_wrong_answer(model, peft_model, tokenizer, task, tmp_path):
    evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)
    for broken in (peft_model, model):
        torch.nn.init.constant_(broken.get_output_embeddings().weight, float("nan"))
    found = evaluate(peft_model, tokenizer, [task], reference_dir=tmp_path).metrics
    assert np.isnan(found["pairs reward accuracy"].value) and np.isnan(found["pairs reward margin"].value)
    with pytest.raises(UserError, match=r"pairs preferences.json: the base gives no finite loss on row 0, but nan"):
        evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)

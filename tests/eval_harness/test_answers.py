"""Answer likelihoods against plain float64 computations."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lora_null.drift import token_kl
from lora_null.eval_harness import AnswerTask, evaluate, likelihood
from lora_null.eval_harness.likelihood import (
    Reference,
    TokenizedPair,
    answer_log_probs,
    kept_tokens,
    save_reference,
    score_answers,
    tokenize_pairs,
)
from lora_null.utils.errors import UserError


def plain_log_probs(model, pair):
    """The log-probabilities at one pair's answer tokens, alone, from all logits, in float64."""
    model = model.double()
    logits = model(input_ids=torch.tensor([pair.ids])).logits[0]
    model.float()
    return logits[pair.start - 1 : -1].log_softmax(-1).detach()


def test_tokenized_as_trl_does(tokenizer):
    (pair,) = tokenize_pairs(tokenizer, [("Q:", " yes")], "t", None)
    tokens = tokenizer.convert_ids_to_tokens(pair.ids)
    assert tokens == ["Q", ":Ġ", "y", "e", "s"]
    assert pair.start == 1  # the prompt alone ends in ":", which the answer's space has joined


def test_a_chat_text_gets_no_second_start_token(tokenizer):
    tokenizer.bos_token, tokenizer.add_bos_token = "Q", True
    tokenizer.update_post_processor()
    counts = [
        len(tokenize_pairs(tokenizer, [("ab", " yes")], "t", None, special_tokens=special)[0].ids)
        for special in (True, False)
    ]
    assert counts[0] == counts[1] + 1


def test_nll_and_kl_equal_a_plain_float64_computation(model, peft_model, tokenizer, pairs, tmp_path):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    peft_model.eval()
    score_answers(model, tokenized, reference=tmp_path / "r.safetensors", record=True)
    scores = score_answers(peft_model, tokenized, reference=tmp_path / "r.safetensors")
    for i, pair in enumerate(tokenized):
        base, other = plain_log_probs(model, pair), plain_log_probs(peft_model, pair)
        targets = torch.tensor(pair.ids[pair.start :])
        assert scores.nll[i] == pytest.approx(-other[range(len(targets)), targets].sum().item(), rel=1e-5)
        assert scores.kl[i] == pytest.approx((base.exp() * (base - other)).sum().item(), rel=1e-4)
        assert scores.tokens[i] == len(targets)


def test_a_reference_too_large_for_the_whole_vocabulary(model, peft_model, tokenizer, pairs, tmp_path, monkeypatch):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    peft_model.eval()
    whole = score_answers(peft_model, tokenized, reference=recorded(model, tokenized, tmp_path / "whole"))
    positions = int(whole.tokens.sum())
    monkeypatch.setattr(likelihood, "REFERENCE_BYTES", 7 * 8 * positions + 5)  # room for 7 tokens of each position
    path = recorded(model, tokenized, tmp_path / "few")
    scores = score_answers(peft_model, tokenized, reference=path)
    assert (whole.kept, scores.kept) == (None, 7)
    assert path.stat().st_size < 7 * 8 * positions + 4 * positions + 4000 < 101 * 4 * positions
    for i, pair in enumerate(tokenized):
        base, other = plain_log_probs(model, pair).numpy(), plain_log_probs(peft_model, pair).numpy()
        sums = 0.0
        for p, q in zip(np.exp(base), np.exp(other)):
            first = np.argsort(-p)[:7]
            p, q = (np.append(x[first], 1 - x[first].sum()) for x in (p, q))
            sums += (p * np.log(p / q)).sum()
        assert scores.kl[i] == pytest.approx(sums, rel=1e-4)
        assert scores.kl[i] < whole.kl[i]  # less is seen, never more
    assert score_answers(model, tokenized, reference=path).kl == pytest.approx(np.zeros(len(pairs)), abs=1e-5)


def test_a_reference_never_grows_beyond_its_limit():
    answers = [TokenizedPair((0,) * 131, 1)] * 1000  # 1,000 answers of 130 tokens, a vocabulary of 128k
    kept = kept_tokens(answers, 128_256)
    assert 130_000 * 8 * kept <= likelihood.REFERENCE_BYTES < 130_000 * 8 * (kept + 1)
    assert kept_tokens(answers[:1], 128_256) is None and kept_tokens(answers * 2000, 128_256) == 1


def recorded(model, tokenized, path):
    score_answers(model, tokenized, reference=path, record=True)
    return path


def test_a_name_may_be_longer_than_a_files(model, tokenizer, pairs, tmp_path):
    tasks = [AnswerTask("知识" * 40 + end, pairs, kl=True) for end in "ab"]
    for record in (True, False):
        found = evaluate(model, tokenizer, tasks, reference_dir=tmp_path, record_reference=record).metrics
    assert len(found) == 4 and len(list(tmp_path.iterdir())) == 2


def test_kl_on_the_new_task_is_neither_better_nor_worse(model, peft_model, tokenizer, pairs, tmp_path):
    task = AnswerTask("new", pairs, kl=True, role="task")
    evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)
    found = evaluate(peft_model, tokenizer, [task], reference_dir=tmp_path).metrics
    assert found["new kl"].value > 0 and found["new kl"].higher_is_better is None
    assert found["new nll"].higher_is_better is False and found["new kl"].role == "task"


def test_only_needed_logits_equal_all_logits(model, tokenizer, pairs, monkeypatch):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    few = answer_log_probs(model, tokenized)
    monkeypatch.setattr("lora_null.eval_harness.likelihood._keeps_logits", lambda model: False)
    for kept, full in zip(few, answer_log_probs(model, tokenized), strict=True):
        torch.testing.assert_close(kept, full, rtol=0, atol=1e-5)


def test_kl_of_the_base_with_itself_is_zero(model, tokenizer, pairs, tmp_path):
    task = AnswerTask("nq", pairs, kl=True, role="retention")
    recorded = evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)
    again = evaluate(model, tokenizer, [task], reference_dir=tmp_path)
    assert recorded.metrics["nq kl"].value == recorded.metrics["nq kl"].stderr == 0.0
    assert again.metrics["nq kl"].value == pytest.approx(0.0, abs=1e-9)
    assert again.metrics["nq nll"] == recorded.metrics["nq nll"]
    assert again.metrics["nq kl"].role == "retention" and not again.metrics["nq kl"].higher_is_better


def test_tokens_that_the_base_rules_out_add_nothing_to_the_kl():
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    model = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    found = [token_kl(base, row[None]) for row in model]
    assert [kl.item() for kl in found] == [pytest.approx(0.5 * np.log(2)), 0, float("inf")]
    sum(found[:2]).backward()
    assert model.grad[:2].tolist() == [[-0.5, -0.5, 0.0]] * 2


def test_kl_is_missing_without_a_reference(model, tokenizer, pairs, tmp_path):
    task = AnswerTask("nq", pairs, kl=True)
    assert set(evaluate(model, tokenizer, [task], reference_dir=tmp_path).metrics) == {"nq nll"}
    assert set(evaluate(model, tokenizer, [AnswerTask("nq", pairs, kl=False)]).metrics) == {"nq nll"}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_padding_do_not_matter(model, tokenizer, pairs, batch_size):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    expected = [score_answers(model, [pair]).nll[0] for pair in tokenized]
    np.testing.assert_allclose(score_answers(model, tokenized, batch_size=batch_size).nll, expected, rtol=1e-5)


def test_autocast_is_close_and_different(model, tokenizer, pairs):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    full = score_answers(model, tokenized).nll
    half = score_answers(model, tokenized, autocast_dtype=torch.bfloat16).nll
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, rtol=0.1)


def test_reference_holds_the_full_distribution_in_float32(model, tokenizer, pairs, tmp_path):
    tokenized = tokenize_pairs(tokenizer, pairs, "t", 512)
    path = tmp_path / "new folder" / "r.safetensors"
    score_answers(model, tokenized, reference=path, record=True)
    assert [p.name for p in path.parent.iterdir()] == ["r.safetensors"]  # no temporary file is left
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == {str(i) for i in range(len(pairs))}
        tensor = reference.get_tensor("3")
    assert tensor.dtype == torch.float32 and tensor.shape == (len(tokenized[3].ids) - tokenized[3].start, 101)
    torch.testing.assert_close(tensor.exp().sum(-1), torch.ones(len(tensor)))


def test_an_interrupted_write_keeps_the_old_reference(tmp_path, monkeypatch):
    path, pairs = tmp_path / "r.safetensors", [TokenizedPair((1, 2), 1)]
    save_reference(path, {"0": torch.zeros(1, 4)}, pairs, 4)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_reference(path, {"0": torch.ones(1, 4)}, pairs, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]
    assert Reference(path, pairs).file.get_tensor("0").sum() == 0


def test_a_reference_for_other_tokens_or_vocabulary_is_refused(model, make_model, tokenizer, pairs, tmp_path):
    task = AnswerTask("nq", pairs, kl=True)
    evaluate(model, tokenizer, [task], reference_dir=tmp_path, record_reference=True)
    with pytest.raises(UserError, match=r"nq\.safetensors was recorded for other prompts"):
        evaluate(model, tokenizer, [task], reference_dir=tmp_path, limit=3)
    with pytest.raises(UserError, match="vocabulary of 101 tokens, the model 120"):
        evaluate(make_model(vocab_size=120), tokenizer, [task], reference_dir=tmp_path)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "'t' has no pairs"),
        ([("Q:", "")], "the answer of pair 0 has no tokens"),
        ([("", "yes")], "the prompt of pair 0 has no tokens"),
        ([("Q:", "x" * 600)], "pair 0 has 602 tokens, the model takes 512"),
    ],
)
def test_pairs_that_cannot_be_scored(tokenizer, pairs, message):
    with pytest.raises(UserError, match=message):
        tokenize_pairs(tokenizer, pairs, "t", 512)

"""Rows that leave the batch early say what transformers' own generation says."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lora_null.eval_harness.generate import StopWords, can_generate_rows, generate_rows, generate_texts
from lora_null.eval_harness.lm_eval.model import ShardedLM
from lora_null.utils.tokens import end_ids

PROMPTS = [f"Q: {'why ' * i}?\nA:" for i in range(9)]


def requests(until, length=24):
    options = {"until": until, "do_sample": False, "max_gen_toks": length}
    return [Instance("generate_until", {}, (prompt, options), 0, ("t", i, 1)) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("until", [[], ["e"], ["a", "b", "zz", "\n"]], ids=["none", "one", "several"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_same_texts_as_lm_eval(peft_model, tokenizer, until, batch_size):
    ours = ShardedLM(peft_model.eval(), tokenizer, batch_size)
    assert can_generate_rows(ours.model)
    theirs = HFLM(pretrained=peft_model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    expected = theirs.generate_until(requests(until), disable_tqdm=True)
    assert ours.generate_until(requests(until), disable_tqdm=True) == expected
    assert len(set(expected)) > 1


def test_a_row_that_ended_is_computed_no_more(model, tokenizer):
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = iter([3, 1, 6, 2, 5, 4, 9, 8, 7])
    limits = {}
    found = generate_rows(
        model,
        ids,
        mask,
        max_new_tokens=12,
        ends=(),
        stopped=lambda tokens: len(tokens) >= limits.setdefault(id(tokens), next(lengths, 0)),
    )
    hook.remove()
    assert [len(row) for row in found] == [3, 1, 6, 2, 5, 4, 9, 8, 7]
    assert sizes == [9, 8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("rules", [{}, {"top_k": 3}, {"top_p": 0.4, "top_k": 0}])
def test_draws_are_from_what_transformers_draws_from(model, tokenizer, rules):
    """Of many draws of one token: never one that its own generation would leave out, and in its proportions."""
    model.generation_config.update(**rules)
    batch = tokenizer(PROMPTS[1:2], return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            **batch,
            do_sample=True,
            temperature=0.5,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    wanted = made.scores[0][0].softmax(-1)
    ids, mask = (batch[key].expand(4000, -1) for key in ("input_ids", "attention_mask"))
    options = {"max_new_tokens": 1, "ends": (), "stopped": lambda tokens: True, "temperature": 0.5}
    rows = generate_rows(model, ids, mask, generator=torch.Generator().manual_seed(0), **options)
    found = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(wanted)) / len(rows)
    assert not found[wanted == 0].any() and (found - wanted).abs().max() < 0.03
    assert (wanted > 0).sum() <= {"top_k": 3}.get(next(iter(rules), ""), 50)


def test_sampling_follows_its_generator(model, tokenizer):
    batch = tokenizer(PROMPTS[:2], padding=True, padding_side="left", return_tensors="pt")

    def draw(seed):
        options = {"max_new_tokens": 8, "ends": (), "stopped": StopWords(tokenizer, [])}
        generator = torch.Generator().manual_seed(seed)
        return generate_rows(
            model, batch["input_ids"], batch["attention_mask"], temperature=1.0, generator=generator, **options
        )

    assert draw(0) == draw(0) != draw(1)


def test_a_model_that_overflows_answers_with_nonsense(model):
    model.get_output_embeddings().weight.data[:] = float("nan")
    options = {"max_new_tokens": 3, "ends": (), "stopped": lambda tokens: False, "temperature": 0.7}
    ids = torch.tensor([[5, 6, 7]])
    (row,) = generate_rows(model, ids, torch.ones_like(ids), generator=torch.Generator().manual_seed(0), **options)
    assert len(row) == 3


def test_models_with_rules_of_their_own_are_left_to_transformers(model):
    model.generation_config.repetition_penalty = 1.2
    assert not can_generate_rows(model)


def test_transformers_ends_answers_where_we_do(model, tokenizer):
    """A penalty that changes no choice, so that both ways give the same; the tokenizer's end is not the model's own."""
    options = {"temperatures": [0.0] * len(PROMPTS), "max_new_tokens": 12}
    whole = generate_texts(model, tokenizer, PROMPTS, **options)
    tokenizer.eos_token, stop = whole[1][3], whole[5][3]
    ours = generate_texts(model, tokenizer, PROMPTS, stops=[stop], **options)
    model.generation_config.repetition_penalty = 1 + 1e-9
    assert not can_generate_rows(model)
    assert generate_texts(model, tokenizer, PROMPTS, stops=[stop], **options) == ours != whole


def test_end_ids(model, tokenizer):
    tokenizer.eos_token = None
    assert end_ids(model, tokenizer) == {2}
    model.generation_config.eos_token_id = [2, 7]
    assert end_ids(model, tokenizer) == {2, 7}

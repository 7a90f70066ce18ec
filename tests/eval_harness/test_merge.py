"""Merging for generation: chosen by measurement, never in 16 bits, undone to the last bit."""

import copy

import pytest
import torch
from tiny import random_batches, tiny_model

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.eval_harness import LmEvalTask, evaluate
from lora_null.eval_harness.lm_eval import merged as merge
from lora_null.eval_harness.lm_eval.merged import merged_if_faster


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def clock(monkeypatch):
    """Let the two measurements be these."""

    def set_times(*seconds):
        times = iter(seconds)
        monkeypatch.setattr(merge, "_seconds", lambda _: next(times))

    return set_times


@pytest.mark.parametrize("seconds, merged", [((2.0, 1.0), True), ((1.0, 2.0), False), ((1.0, 0.99), False)])
def test_the_faster_form_is_taken_and_every_bit_restored(peft_model, clock, seconds, merged):
    clock(*seconds)
    before, batch = bits(peft_model.eval()), random_batches(1)[0]
    expected = peft_model(**batch).logits
    with merged_if_faster(peft_model) as faster:
        assert faster is merged
        assert (
            torch.equal(
                peft_model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight,
                before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
            )
            is not merged
        )
        assert torch.allclose(peft_model(**batch).logits, expected, atol=1e-4)
    after = bits(peft_model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(peft_model(**batch).logits, expected)


def test_a_known_choice_is_not_measured_again(peft_model, clock):
    clock()
    with merged_if_faster(peft_model.eval(), True) as faster:
        assert faster
    with merged_if_faster(peft_model.eval(), False) as faster:
        assert not faster


def test_an_error_inside_leaves_the_weights_as_they_were(peft_model, clock):
    clock(2.0, 1.0)
    before = bits(peft_model.eval())
    with pytest.raises(KeyError), merged_if_faster(peft_model):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in peft_model.state_dict().items())


@pytest.mark.parametrize(
    "make", [lambda model: copy.deepcopy(model).to(torch.bfloat16), lambda model: model.get_base_model()]
)
def test_16_bit_and_plain_models_are_not_merged(peft_model, make):
    with merged_if_faster(make(peft_model.eval())) as faster:
        assert not faster


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_both_variants_say_the_same_merged(tokenizer, nq_file, monkeypatch, variant):
    from peft import get_peft_model

    model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant=variant))
    initialize_lora_null_weights(model, random_batches(), min_tokens=1, progress=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = []
    for times in ((2.0, 1.0), (1.0, 2.0)):
        given = iter(times)
        monkeypatch.setattr(merge, "_seconds", lambda _, given=given: next(given))
        found.append(evaluate(model, tokenizer, [LmEvalTask("nq_open", path=nq_file)]))
    assert [f.settings["merged_to_generate"] for f in found] == [True, False]
    assert found[0].samples == found[1].samples

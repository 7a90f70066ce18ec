"""A live model, its tokenizer and the random states are left as they were."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_null.eval_harness import AnswerTask, LmEvalTask, evaluate, logits_differ
from lora_null.utils.model_state import own_precision, preserve


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_evaluation_leaves_no_trace(peft_model, tokenizer, pairs, nq_file):
    peft_model.train()
    peft_model.base_model.model.model.layers[0].eval()  # a mixture, as with frozen parts
    peft_model.config.use_cache = False
    frozen = next(p for p in peft_model.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    tokenizer.padding_side, tokenizer.pad_token = "right", None  # lm-eval would choose a padding token
    before = [m.training for m in peft_model.modules()], [p.requires_grad for p in peft_model.parameters()]
    weights = {k: v.clone() for k, v in peft_model.state_dict().items()}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    evaluate(peft_model, tokenizer, [AnswerTask("a", pairs), LmEvalTask("nq_open", path=nq_file, limit=2)])
    assert draw() == expected
    assert ([m.training for m in peft_model.modules()], [p.requires_grad for p in peft_model.parameters()]) == before
    assert peft_model.config.use_cache is False and tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None
    assert torch.is_grad_enabled() and "tie_weights" not in vars(peft_model)
    assert all(torch.equal(v, weights[k]) for k, v in peft_model.state_dict().items())


def test_autocast_around_a_prepared_model_is_taken_off_and_put_back(peft_model, tokenizer, pairs):
    task = [AnswerTask("a", pairs)]
    plain = evaluate(peft_model, tokenizer, task).metrics
    AcceleratorState._reset_state()  # whatever precision a trainer of another test had
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(peft_model)
    AcceleratorState._reset_state()
    ids = torch.tensor([[5, 6, 7]])
    rounded = prepared(input_ids=ids).logits
    assert evaluate(prepared, tokenizer, task).metrics == plain
    assert torch.equal(prepared(input_ids=ids).logits, rounded)
    with own_precision(prepared):
        assert not torch.equal(prepared(input_ids=ids).logits, rounded)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_adapter_states_are_restored(peft_model, merged, enabled):
    if merged:
        peft_model.merge_adapter()
    if not enabled:
        peft_model.base_model.disable_adapter_layers()
    ids = torch.tensor([[5, 6, 7]])
    peft_model.eval()
    before = peft_model(input_ids=ids).logits
    flags = [p.requires_grad for p in peft_model.parameters()]
    with pytest.raises(KeyError), preserve(peft_model):
        if merged:
            peft_model.unmerge_adapter()
        else:
            peft_model.merge_adapter()
        peft_model.base_model.enable_adapter_layers()
        torch.set_grad_enabled(False)
        raise KeyError
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.is_grad_enabled()
    assert layer.disable_adapters is not enabled
    assert [p.requires_grad for p in peft_model.parameters()] == flags
    torch.testing.assert_close(peft_model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    if enabled:
        assert bool(layer.merged_adapters) is merged


def test_the_active_adapter_is_restored(peft_model):
    from peft import LoraConfig

    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with preserve(peft_model):
        peft_model.set_adapter("other")
    assert peft_model.active_adapter == "default"
    assert peft_model.base_model.model.model.layers[0].self_attn.q_proj.active_adapters == ["default"]


def test_a_text_longer_than_a_table_of_positions_is_looked_at_in_part(tokenizer):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    assert logits_differ(model, tokenizer, "hello " * 500)


def test_an_adapter_that_changes_nothing_is_found(peft_model, model, tokenizer):
    assert logits_differ(peft_model, tokenizer, "hello")
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert not logits_differ(peft_model, tokenizer, "hello")
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapter"):
        logits_differ(model, tokenizer, "hello")

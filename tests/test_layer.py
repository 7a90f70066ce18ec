"""The training forward pass of `LoraNullLinear`: PEFT's numbers, and nothing of A's input kept where A is frozen."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import random_batches, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.config import ResidualLoraConfig
from lora_null.layer import _say_once, adapted_layers, factors_of
from lora_null.residual import subtract_residuals

BASE = {"base_model.model.linear." + part for part in ("lora_A.default.weight", "lora_B.default.weight")}


class One(nn.Module):
    def __init__(self, d_in=24, d_out=40):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x):
        return self.linear(x)


def wrapped(config, dtype):
    torch.manual_seed(0)
    peft_model = get_peft_model(One().to(dtype), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_()
    return peft_model


def outcome(peft_model, dtype, autocast):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = peft_model(x)
    y.float().square().sum().backward()
    gradients = {n: p.grad for n, p in peft_model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, gradients


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("dtype, autocast, close", [
    (torch.float64, False, 1e-12), (torch.float32, False, 1e-5), (torch.float32, True, 0.03),
    (torch.bfloat16, False, 0.03), (torch.bfloat16, True, 0.03),
])  # fmt: skip
def test_forward_and_gradients_are_pefts(dtype, autocast, close, alpha):
    theirs = outcome(wrapped(LoraConfig(r=4, lora_alpha=alpha, target_modules=["linear"]), dtype), dtype, autocast)
    for variant, trains in (("v1", BASE), ("v2", {name for name in BASE if "lora_B" in name})):
        config = LoraNullConfig(r=4, lora_alpha=alpha, target_modules=["linear"], variant=variant)
        ours = outcome(wrapped(config, dtype), dtype, autocast)
        assert ours[0].dtype == theirs[0].dtype and set(ours[2]) == trains
        pairs = [(ours[0], theirs[0]), (ours[1], theirs[1]), *((ours[2][n], theirs[2][n]) for n in trains)]
        for one, other in pairs:
            assert (one.double() - other.double()).abs().max() <= close * other.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("linear", [nn.Linear(24, 40), Conv1D(40, 24)])
def test_a_small_change_from_the_residual_survives_16_bits(linear, dtype):
    """s·(BA − B0A0) of the factors as they are stored, rounded once; against numpy in float64."""
    model = One()
    model.linear = copy.deepcopy(linear)
    config = ResidualLoraConfig(r=4, lora_alpha=6, target_modules=["linear"])
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    layer = adapted_layers(peft_model)["linear"]
    A, B = factors_of(layer)
    nn.init.normal_(B)
    subtract_residuals(peft_model)
    B.data += 0.01 * torch.randn_like(B)
    peft_model.to(dtype)
    A, B, A0, B0 = (x.detach().to(dtype).double().numpy() for x in (*factors_of(layer), *layer.residual[:2]))
    wanted = 1.5 * (B @ A - B0 @ A0)
    got = layer.get_delta_weight("default").detach()
    assert got.dtype == dtype
    got = got.double().numpy().T if isinstance(linear, Conv1D) else got.double().numpy()
    assert np.abs(got - wanted).max() <= max(torch.finfo(dtype).eps, 1e-4) * np.abs(wanted).max()


def saved_elements(peft_model):
    sizes = []
    x = torch.randn(64, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.shape, t.numel())), t)[1], lambda t: t):
        peft_model(x)
    weights = {tuple(p.shape) for p in peft_model.parameters()} | {
        tuple(p.shape)[::-1] for p in peft_model.parameters()
    }
    return sum(size for shape, size in sizes if tuple(shape) not in weights)


def test_a_bias_of_a_factor_is_computed():
    """Of a second adapter, whose config is PEFT's own."""
    model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant="v2"))
    initialize_lora_null_weights(model, random_batches(), min_tokens=1, progress=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")
    plain = get_peft_model(tiny_model(), config, adapter_name="second")
    with torch.no_grad():
        for layer, other in zip(adapted_layers(model, "second").values(), adapted_layers(plain, "second").values()):
            layer.lora_B["second"].bias.uniform_()
            for part in ("lora_A", "lora_B"):
                getattr(other, part)["second"].load_state_dict(getattr(layer, part)["second"].state_dict())
        torch.testing.assert_close(model(**random_batches()[0]).logits, plain(**random_batches()[0]).logits)


def test_a_frozen_a_keeps_no_input():
    v1, v2 = (
        saved_elements(wrapped(LoraNullConfig(r=4, target_modules=["linear"], variant=variant), torch.float32))
        for variant in ("v1", "v2")
    )
    assert v2 == 64 * 4  # A x alone
    assert v1 == 64 * 4 + 64 * 24


def never_started(folder):
    return get_peft_model(tiny_model(), LoraNullConfig(r=4))


def started(folder):
    peft_model = never_started(folder)
    initialize_lora_null_weights(peft_model, random_batches(), min_tokens=1, progress=False)
    return peft_model


def loaded(folder):
    started(folder).save_pretrained(folder)
    config = LoraNullConfig.from_pretrained(folder, variant="v2")
    return PeftModel.from_pretrained(tiny_model(), folder, config=config, is_trainable=True)


@pytest.mark.parametrize("make", [started, loaded])
def test_a_frozen_factor_that_was_made_to_train_is_told_once(make, tmp_path, caplog):
    _say_once.cache_clear()
    peft_model, batch = make(tmp_path), random_batches()[0]
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad = "lora_" in name
    for _ in range(2):
        peft_model.train()(**batch).logits.sum().backward()
    assert caplog.text.count("adapter 'default': v2 keeps A frozen, and requires_grad was set on it") == 1


def test_what_was_never_initialized_is_told_of_by_the_pieces_that_zero_3_leaves(caplog):
    _say_once.cache_clear()
    for peft_model in (started("."), never_started(".")):
        assert "never initialized" not in caplog.text
        for layer in adapted_layers(peft_model).values():
            B = layer.lora_B["default"].weight
            B.ds_id, B.ds_tensor = 0, torch.zeros(4)
            layer.train()._warn_if_not_initialized()
    assert caplog.text.count("never initialized") == 1


@pytest.mark.parametrize("make", [never_started, started, loaded])
def test_training_what_was_never_initialized_is_told_once(make, tmp_path, caplog):
    _say_once.cache_clear()
    peft_model = make(tmp_path)
    batch = random_batches()[0]
    peft_model.eval()(**batch)
    with torch.no_grad():
        peft_model.train()(**batch)
    assert "never initialized" not in caplog.text
    for _ in range(2):
        peft_model(**batch).logits.sum().backward()
    assert caplog.text.count("adapter 'default': a LoraNullConfig that was never initialized") == (
        make is never_started
    )

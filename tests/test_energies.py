"""‖W0 X‖ and the sketch, against float64: behind large biases, in 16 bits, and of modules that are called repeatedly."""

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_batches, tiny_model
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lora_null import LoraNullConfig, UserError
from lora_null.calibration import measure_inputs
from lora_null.drift import DriftMeter
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers

BATCHES = random_batches()


def biased(kind, size, dtype):
    torch.manual_seed(0)
    if kind == "llama":
        model = tiny_model(attention_bias=True, mlp_bias=True, initializer_range=0.1)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("k_proj.bias", "c_attn.bias", "up_proj.bias")):
                parameter.normal_(std=size)
    return model.to(dtype).eval()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("kind, size", [("llama", 0), ("llama", 10), ("llama", 400), ("gpt2", 300)])
def test_outputs_are_measured_behind_any_bias(kind, size, dtype, limit, gram):
    model = biased(kind, size, dtype)
    ends = ("k_proj", "q_proj", "up_proj", "c_attn", "c_fc")
    modules = {name: module for name, module in model.named_modules() if name.endswith(ends)}
    X = oracle.capture_inputs(model, modules, BATCHES)
    calibration = measure_inputs(model, modules, BATCHES, gram=gram, progress=False)
    for name, module in modules.items():
        W = module.weight.detach().double().numpy()
        truth = np.linalg.norm((W.T if kind == "gpt2" else W) @ X[name])
        assert calibration.output_energy[name] ** 0.5 == pytest.approx(truth, rel=limit), name


@pytest.mark.parametrize("variant", ["lora", "v2"])
def test_the_drift_behind_a_large_bias(variant):
    model, name = biased("llama", 400, torch.bfloat16), "model.layers.0.self_attn.k_proj"
    X = oracle.capture_inputs(model, [name], BATCHES)[name]
    W = model.get_submodule(name).weight.detach().double().numpy()
    if variant == "lora":
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj"]))
        calibration = measure_inputs(peft_model, adapted_layers(peft_model), BATCHES, progress=False)
    else:
        peft_model = get_peft_model(model, LoraNullConfig(r=4, target_modules=["k_proj"]))
        _, calibration = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))
    layer = adapted_layers(peft_model)[name]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    with torch.no_grad():
        delta = layer.get_delta_weight("default").double().numpy()
    truth = np.linalg.norm(delta @ X) / np.linalg.norm(W @ X)
    found = DriftMeter(peft_model, calibration).measure()[name]
    assert found == pytest.approx(truth, rel=0.4 if variant == "lora" else 0.01)  # a sketch of 64 columns, or exact


class Repeating(nn.Module):
    """A model that calls its linears several times in one forward pass, once on what it has read before."""

    base_model_prefix = ""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(101, 16)
        self.inner, self.beside = nn.Linear(16, 16), nn.Linear(16, 16)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask, **_):
        x = self.embed(input_ids)
        for _ in range(4):
            x = x + torch.tanh(self.inner(x)) * self.beside(x)
        return self.inner(x * 3) + self.inner(x)


def albert():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=101, embedding_size=16, hidden_size=32, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    return AlbertForSequenceClassification(config).eval()


def repeated(kind):
    if kind == "albert":
        layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
        return albert(), [f"{layer}.attention.query", f"{layer}.attention.value", f"{layer}.ffn"]
    torch.manual_seed(0)
    return Repeating().eval(), ["inner"]


@pytest.mark.parametrize("kind", ["albert", "own"])
def test_every_call_has_a_gaussian_of_its_own(kind):
    """The mean of S Sᵀ over seeds is C, of all calls."""
    model, names = repeated(kind)
    modules = {name: model.get_submodule(name) for name in names}
    seen, mask = {name: [] for name in names}, None
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1])[mask].double().numpy())
        )
        for name, module in modules.items()
    ]
    for batch in BATCHES:
        mask = batch["attention_mask"].bool().flatten()
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    seeds = 40
    sums = dict.fromkeys(names, 0)
    for seed in range(seeds):
        calibration = measure_inputs(model, modules, BATCHES, seed=seed, gram=seed == 0, progress=False)
        for name in names:
            stats = calibration.input_of(name)
            X = np.concatenate(seen[name])
            if seed == 0:
                assert stats.tokens == len(X)
                assert np.linalg.norm(stats.gram.numpy() - X.T @ X) < 1e-6 * np.linalg.norm(X.T @ X)
            sums[name] = sums[name] + stats.sketch.numpy() @ stats.sketch.numpy().T / seeds
    for name in names:
        C = np.concatenate(seen[name]).T @ np.concatenate(seen[name])
        assert np.trace(sums[name]) == pytest.approx(np.trace(C), rel=0.05)
        assert np.linalg.norm(sums[name] - C) < 0.15 * np.linalg.norm(C)


def test_tokens_are_counted_once_however_often_they_are_read():
    peft_model = get_peft_model(
        albert(), LoraNullConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value", "ffn"])
    )
    report, _ = start_adapter(peft_model, BATCHES, InitOptions(min_tokens=1, progress=False))
    tokens = int(sum(batch["attention_mask"].sum() for batch in BATCHES))
    assert report.tokens == tokens and {line.tokens for line in report.layers} == {5 * tokens}


def test_an_input_that_is_shared_in_some_calls_only_is_named():
    model, _ = repeated("own")
    modules = {name: model.get_submodule(name) for name in ("inner", "beside")}
    forward = model.forward
    model.forward = lambda input_ids, **_: model.beside(forward(input_ids, **_))
    with pytest.raises(UserError, match="beside reads what inner reads in some calls, not in others"):
        measure_inputs(model, modules, BATCHES, progress=False)

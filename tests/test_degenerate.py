"""Weights, scalings and inputs at the edge: a right result or one line, never NaN and never a traceback."""

import json
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from tiny import random_batches, tiny_model
from torch import nn

from lora_null import LoraNullConfig, UserError
from lora_null.calibration import InputStats, measure_inputs
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.earlier_tasks import Earlier, WithEarlier, keep_grams
from lora_null.factors import LayerStats, null_factors
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.nullspace import bottom_eigenspace
from lora_null.solver import NullSpace
from lora_null.trainer.methods import make_method

BATCHES = random_batches()
QUIET = InitOptions(min_tokens=1, progress=False)


def started(model, folder=None, batches=BATCHES, **config):
    peft_model = get_peft_model(model, LoraNullConfig(**{"r": 4, **config}), autocast_adapter_dtype=False)
    return peft_model, *start_adapter(peft_model, batches, QUIET, folder=folder)


def change(name, value):
    model = tiny_model()
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight.mul_(0) if value == 0 else weight[1, 2].fill_(value)
    return model


@pytest.mark.parametrize("value, message", [(0, "is zero"), (math.nan, "NaN or inf"), (-math.inf, "NaN or inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_weight_that_holds_nothing_or_no_number_is_named(name, value, message, variant, tmp_path):
    with pytest.raises(UserError, match=f"{name}.*{message}") as told:
        started(change(name, value), tmp_path, variant=variant)
    assert "\n" not in str(told.value) and not (tmp_path / "layers.json").exists()


def test_the_message_leads_to_a_start():
    _, report, _ = started(
        change("model.layers.1.self_attn.o_proj", 0), exclude_modules=r".*layers\.1\.self_attn\.o_proj"
    )
    assert len(report.layers) == 13


def test_a_weight_without_anything_along_the_null_space_is_named():
    """Pruned inputs are zero and so are their columns: W0 U = 0, although W0 is not."""
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:6] = 0
            layer.self_attn.q_proj.weight[:, :6] = 0
    with pytest.raises(
        UserError, match=r"layers.0.self_attn.q_proj: its weight is zero, or zero along the null space"
    ):
        started(model, target_modules=["q_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", [{"variant": "v2"}, {"variant": "nb", "null_multiple": 2}])
def test_a_weight_with_only_rounding_along_the_null_space_is_told(dtype, basis, caplog):
    """It reads the span of its inputs alone: in float64 W0 U = 0, stored in 16 or 32 bits it is their rounding."""
    names, batches = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)], random_batches(vocab_size=20)
    for only_rounding in (False, True):
        model = tiny_model().to(dtype).eval()
        X = oracle.capture_inputs(model, names, batches)[names[0]]  # of 16 distinct tokens, in 32 dimensions
        U = np.linalg.svd(X)[0][:, 16:]
        weight = model.get_submodule(names[0]).weight
        if only_rounding:
            weight.data.copy_(torch.from_numpy((W := weight.detach().double().numpy()) - W @ U @ U.T))
        W = weight.detach().double().numpy()
        share = np.linalg.norm(W @ U) ** 2 / np.linalg.norm(W) ** 2
        _, report, _ = started(model, batches=batches, target_modules=["q_proj"], **basis)
        told = f"the weight of {names[0]} holds only rounding along the null space" in caplog.text
        assert told == only_rounding == (share < torch.finfo(dtype).eps ** 2)
        assert report.layers[0].energy <= share and names[1] not in caplog.text


@pytest.mark.parametrize("alpha", [0, -4, math.inf, math.nan, "8"])
def test_a_scaling_that_is_not_above_zero_is_refused(alpha):
    for wrong in (dict(lora_alpha=alpha), dict(alpha_pattern={"q_proj": alpha})):
        with pytest.raises(UserError, match="lora_alpha: the numerator of the scaling is a number above 0"):
            LoraNullConfig(r=4, **wrong)
    if isinstance(alpha, str):
        return
    peft_model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
    for layer in adapted_layers(peft_model).values():
        layer.set_scale("default", alpha / layer.scaling["default"])
    with pytest.raises(UserError, match=r"q_proj has a scaling of .*, it has to be above 0"):
        start_adapter(peft_model, BATCHES, QUIET)


@pytest.mark.parametrize("alpha", [0.5, 1e-6, 1e6])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_any_scaling_above_zero_starts_at_the_base(alpha, variant):
    before = tiny_model().double()(**BATCHES[0]).logits
    peft_model, report, _ = started(tiny_model().double().eval(), variant=variant, lora_alpha=alpha)
    assert (peft_model(**BATCHES[0]).logits - before).abs().max() < 1e-8
    assert all(0 < line.leakage < 1 for line in report.layers)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("target, r", [("q_proj", 32), ("k_proj", 16), ("down_proj", 32)])
def test_r_as_large_as_the_weight_allows(target, r, variant):
    names = [f"model.layers.{i}.{'mlp' if target == 'down_proj' else 'self_attn'}.{target}" for i in range(2)]
    X = oracle.capture_inputs(tiny_model().double(), names, BATCHES)
    W = {name: tiny_model().double().get_submodule(name).weight.detach().numpy() for name in names}
    peft_model, report, _ = started(tiny_model().double().eval(), variant=variant, target_modules=[target], r=r)
    for line in report.layers:
        T = oracle.projection(W[line.name], X[line.name], r)
        A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().numpy()
        assert line.energy == pytest.approx(np.linalg.norm(T) ** 2 / np.linalg.norm(W[line.name]) ** 2)
        assert line.leakage == pytest.approx(oracle.leak(A, X[line.name]), rel=1e-6)


def test_a_weight_of_lower_rank_than_r_has_no_condition(tmp_path):
    model = tiny_model().double()
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight[2:] = weight[:1]
    _, report, _ = started(model, tmp_path, r=8, variant="v1", target_modules=["q_proj"])
    conditions = [line["condition"] for line in json.loads((tmp_path / "layers.json").read_text())["layers"]]
    read = [LayerStats.from_json(line.to_json()).condition for line in report.layers]
    assert read == [line.condition for line in report.layers] and read[0] == float("inf")
    assert LayerStats.from_json(replace(report.layers[0], condition=None).to_json()).condition is None
    assert conditions[0] is None and conditions[1] == report.layers[1].condition < 1e6


@pytest.mark.parametrize(
    "ids",
    [[[7]], [[7] * 12] * 3, [[7, 8] * 6]],
    ids=["one token", "one token many times", "two tokens in turn"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_texts_of_hardly_any_tokens(ids, dtype, tmp_path):
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}
    model = tiny_model().to(dtype).eval()
    X = oracle.capture_inputs(model, ["model.layers.0.self_attn.q_proj"], [batch])
    peft_model, report, calibration = started(model, tmp_path, [batch])
    line, X = report.layers[0], X["model.layers.0.self_attn.q_proj"]
    A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().double().numpy()
    assert line.gram_rank == np.linalg.matrix_rank(X) <= 2
    assert line.leakage == pytest.approx(oracle.leak(A, X), rel=1e-3, abs=1e-16)
    assert all(math.isfinite(drift) for drift in DriftMeter(peft_model, calibration).measure().values())
    json.loads((tmp_path / "layers.json").read_text(), parse_constant=pytest.fail)


def test_the_drift_of_a_layer_that_gives_only_zeros_is_left_out(tmp_path):
    zero = "model.layers.1.self_attn.o_proj"
    peft_model = get_peft_model(change(zero, 0), LoraConfig(r=4, target_modules="all-linear"))
    layers = adapted_layers(peft_model)
    calibration = measure_inputs(peft_model, layers, BATCHES, progress=False)
    with torch.no_grad():
        for layer in layers.values():
            nn.init.normal_(layer.lora_B["default"].weight)
    for meter in (DriftMeter(peft_model, calibration), WeightDriftMeter(layers, calibration)):
        assert set(meter.measure()) == set(layers) - {zero}
        assert all(math.isfinite(value) for value in meter.summary().values())
    only = get_peft_model(change(zero, 0), LoraConfig(r=4, target_modules=r".*layers\.1\.self_attn\.o_proj"))
    calibration = measure_inputs(only, adapted_layers(only), BATCHES, progress=False)
    with pytest.raises(UserError, match="drift: no adapted layer"):
        DriftMeter(only, calibration)
    rotated = get_peft_model(
        change(zero, 0), OFTConfig(oft_block_size=8, target_modules=r".*layers\.1\.self_attn\.o_proj")
    )
    method = make_method("oft", {"block_size": 8})
    calibration = measure_inputs(rotated, method.layers(rotated), BATCHES, progress=False)
    with pytest.raises(UserError, match="drift: no adapted layer"):
        method.drift_meter(rotated, calibration)


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_factors_of_no_weight_are_refused(fill):
    U = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0]
    with pytest.raises(ValueError, match="its weight"):
        null_factors(torch.full((5, 9), fill), U, 1.0)


@pytest.mark.parametrize("d, r", [(1, 1), (5, 5), (600, 600), (600, 1)])
def test_the_whole_space_and_one_direction(d, r):
    X = torch.randn(d, 3 * d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bottom_eigenspace(X @ X.T, r)
    best = np.linalg.svd(X.numpy(), compute_uv=False)[-r:]
    assert torch.linalg.matrix_norm(found.vectors.T @ X).item() <= 1.01 * np.linalg.norm(best)
    assert found.rank == d


def test_few_tokens_of_the_knowledge_do_not_bound_the_rank_of_what_came_before(tmp_path):
    model, name = tiny_model(), "model.layers.0.mlp.down_proj"
    keep_grams(tmp_path, model, [name], BATCHES, progress=False)
    X = torch.randn(48, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = WithEarlier(NullSpace("eigh"), [Earlier(tmp_path)])
    found = rule.of_input(InputStats([name], X @ X.T, torch.zeros(48, 1), tokens=7))(torch.ones(32, 48), 4, 1.0)
    both = [X.numpy(), oracle.capture_inputs(model, [name], BATCHES)[name]]
    assert found.gram_rank == np.linalg.matrix_rank(np.concatenate(both, axis=1)) > 7

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_batches, tiny_model

from lora_null import LoraNullConfig
from lora_null.calibration import measure_inputs
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers, factors_of

BATCHES = random_batches(count=20)
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "v1": LoraNullConfig(r=4, variant="v1"),
    "v2": LoraNullConfig(r=4, lora_alpha=8, variant="v2"),
    "nb": LoraNullConfig(r=4, variant="nb"),
}


def moved(name, batches=BATCHES, beside=False):
    """A model, its meter, and W0 and X of every layer; the adapter has moved from its start.

    `beside` another one, which is the active one until it moves.
    """
    model = tiny_model().double().eval()
    first = "first" if beside else "default"
    peft_model = get_peft_model(model, CONFIGS["v2" if beside else name], first, autocast_adapter_dtype=False)
    if beside:
        peft_model.add_adapter("default", CONFIGS[name], autocast_adapter_dtype=False)
    layers = adapted_layers(peft_model)
    W = {key: layer.get_base_layer().weight.detach().numpy().copy() for key, layer in layers.items()}
    X = oracle.capture_inputs(tiny_model().double().eval(), W, batches)
    if name == "lora":
        calibration = measure_inputs(peft_model, layers, batches, progress=False)
    else:
        _, calibration = start_adapter(peft_model, batches, InitOptions(progress=False, min_tokens=1))
    meter = DriftMeter(peft_model, calibration)
    assert max(meter.measure().values()) == 0
    peft_model.set_adapter("default")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return peft_model, meter, W, X


def exact_drift(layer, W0, X):
    """‖ΔW X‖ / ‖W0 X‖ from the effective weight itself."""
    with torch.no_grad():
        effective = layer.get_base_weight() + layer.get_delta_weight("default")
    return np.linalg.norm((effective.numpy() - W0) @ X) / np.linalg.norm(W0 @ X)


@pytest.mark.parametrize("beside", [False, True])
def test_frozen_a_is_measured_exactly(beside):
    peft_model, meter, W, X = moved("v2", beside=beside)
    for name, value in meter.measure().items():
        # A X is nearly zero: what counts is the difference to rounding of ‖ΔW X‖ itself
        assert value == pytest.approx(
            exact_drift(adapted_layers(peft_model)[name], W[name], X[name]), rel=1e-4, abs=1e-9
        )


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["lora", "v1", "nb"])
def test_the_sketch_is_unbiased_and_close(name, beside):
    peft_model, meter, W, X = moved(name, beside=beside)
    found = meter.measure()
    ratios = [found[key] / exact_drift(adapted_layers(peft_model)[key], W[key], X[key]) for key in found]
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.15)
    assert all(0.6 < ratio < 1.5 for ratio in ratios)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sketch_is_not_rounded_to_16_bits(dtype, autocast):
    """Near the null space of 8 distinct tokens, what rounding the sketch would add is as large as the drift."""
    config = LoraNullConfig(r=4, variant="nb", null_multiple=2, target_modules=["q_proj"], layers_to_transform=[0])
    peft_model = get_peft_model(tiny_model(), config)
    (layer,) = adapted_layers(peft_model).values()
    layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    few = random_batches(count=20, vocab_size=12)
    _, calibration = start_adapter(peft_model, few, InitOptions(progress=False, min_tokens=1))
    meter = DriftMeter(peft_model, calibration)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    A, B = (factor.detach().double() for factor in factors_of(layer))
    ((name, energy),) = calibration.output_energy.items()
    expected = torch.linalg.matrix_norm(B @ (A @ calibration.input_of(name).sketch)) / energy**0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert meter.measure()[name] == pytest.approx(expected.item(), rel=1e-3)


def test_whole_weights_are_measured_in_float32_under_autocast():
    model = tiny_model()
    layers = {"q": model.model.layers[0].self_attn.q_proj}
    calibration = measure_inputs(model, layers, BATCHES, gram=False, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        meter = WeightDriftMeter(layers, calibration)
        with torch.no_grad():
            layers["q"].weight.mul_(1 + 1e-4)
        sketch = torch.linalg.matrix_norm(layers["q"].weight.double() @ calibration.input_of("q").sketch).item()
        assert meter.measure()["q"] == pytest.approx(1e-4 * sketch / calibration.output_energy["q"] ** 0.5, rel=1e-2)


def test_v2_does_not_drift_where_the_null_space_is_exact():
    few = random_batches(count=1, size=2, length=8)  # fewer tokens than input dimensions
    assert moved("v2", few)[1].summary()["max"] < 1e-6 < 1e-3 < moved("lora", few)[1].summary()["mean"]

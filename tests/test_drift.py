import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_batches, tiny_model

from lora_null import LoraNullConfig
from lora_null.calibration import measure_inputs
from lora_null.drift import DriftMeter
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers

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


def test_v2_does_not_drift_where_the_null_space_is_exact():
    few = random_batches(count=1, size=2, length=8)  # fewer tokens than input dimensions
    assert moved("v2", few)[1].summary()["max"] < 1e-6 < 1e-3 < moved("lora", few)[1].summary()["mean"]

"""What makes a CPU wait for its GPU, counted on a pretended one: a few numbers a layer, nothing a batch."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pretended import DEVICE, Accelerator, moved, waits
from tiny import random_batches, tiny_model
from torch import nn

from lora_null import LoraNullConfig
from lora_null.calibration import measure_inputs
from lora_null.checkpoint_reader import adapters_in_memory
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import walk_layers
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.models.bases import Base, open_base
from lora_null.utils.distributed import device_of

EAGER = {"attn_implementation": "eager"}


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))


def targets(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head}


def few(count):
    """Padded batches of so few tokens that the Grams stay in float64 and nothing is asked of them."""
    return random_batches(count=count, size=2, length=8)


def test_a_layer_waits_for_three_answers_whatever_the_number_of_batches():
    plain, found = tiny_model(**EAGER).eval(), {}
    expected = dict(walk_layers(plain, targets(plain), few(6), progress=False))
    for count in (2, 6):
        model = tiny_model(**EAGER).eval()
        with Accelerator(), torch.no_grad():
            found[count] = []
            for name, part in walk_layers(moved(model), targets(model), few(count), progress=False):
                found[count].append(waits.total())
                waits.clear()
                for one, other in zip(part.inputs, expected[name].inputs):
                    assert count == 2 or torch.equal(one.gram.held, other.gram)
    first, later = zip(*found.values())
    assert first[0] == first[1] and later == (3, 3)  # the first counts what the model is asked before: no batch in it


def test_layers_run_on_an_accelerator_that_does_not_hold_the_model(tmp_path):
    """From weights on the CPU, and from their files: masks, Gaussians and positions go along."""
    tiny_model().save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32", **EAGER)
    config = LoraNullConfig(r=4, exclude_modules=["lm_head"])
    batches = random_batches()
    X = oracle.capture_inputs(tiny_model().double(), targets(tiny_model()), batches)
    held = get_peft_model(tiny_model(**EAGER).eval(), config), None
    base, files = open_base(Base(section))
    with adapters_in_memory():
        in_files = get_peft_model(base, config), files
    for model, weights in (held, in_files):
        with Accelerator():
            options = InitOptions(device=DEVICE, weights=weights, min_tokens=1, progress=False)
            report, _ = start_adapter(model, batches, options)
        for line in report.layers:
            A = adapted_layers(model)[line.name].lora_A["default"].weight
            assert A.device.type == "cpu"
            assert oracle.leak(A.detach().numpy(), X[line.name]) == pytest.approx(line.leakage, rel=1e-3, abs=1e-6)


def test_a_residual_leaves_the_accelerator_with_its_model():
    model = get_peft_model(tiny_model(**EAGER).eval(), LoraNullConfig(r=4, variant="v1", exclude_modules=["lm_head"]))
    start_adapter(model, few(2), InitOptions(min_tokens=1, progress=False))
    residuals = {name: layer.residual for name, layer in adapted_layers(model).items()}
    with Accelerator(), torch.no_grad():
        for layer in adapted_layers(moved(model)).values():
            layer.residual = layer.residual.to(DEVICE)
        model.to("cpu")
    for name, layer in adapted_layers(model).items():
        assert layer.residual.A.device.type == "cpu" and torch.equal(layer.residual.A, residuals[name].A)


def test_a_model_whose_pieces_wait_on_the_cpu_computes_where_its_mesh_is():
    model = nn.Linear(2, 2)
    assert device_of(model).type == "cpu"
    model.weight.device_mesh = SimpleNamespace(device_type="meta")  # as FSDP2's DTensor has one, under CPU offload
    assert device_of(model).type == "meta"


@pytest.mark.parametrize("of", ["factors", "weights"])
def test_a_drift_waits_once(of):
    model = get_peft_model(tiny_model(**EAGER), LoraConfig(r=4, target_modules="all-linear"))
    layers = adapted_layers(model)
    calibration = measure_inputs(model, layers, few(2), progress=False)
    with Accelerator(), torch.no_grad():
        moved(model)
        meter = DriftMeter(model, calibration) if of == "factors" else WeightDriftMeter(layers, calibration)
        meter.measure()  # which moves what it keeps
        waits.clear()
        assert len(meter.measure()) == len(layers) and waits.total() == 1

"""‖ΔW‖_F and ‖W0‖_F of every kind of layer against the effective weights themselves, in float64."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, OFTConfig, OSFConfig, get_peft_model
from safetensors.torch import load_file
from tiny import random_batches, tiny_model
from world import make_world

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.layer import adapted_layers
from lora_null.magnitude import Change, weight_changes
from lora_null.recipes.__main__ import main
from lora_null.recipes.results import Magnitude, load_results

CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"),
    "dora": LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=True),
    "v1": LoraNullConfig(r=4, lora_alpha=8, variant="v1"),
    "v2": LoraNullConfig(r=4, variant="v2"),
    "oft": OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "osf": OSFConfig(target_modules=["q_proj", "down_proj"], effective_rank=8),
}


def moved(name):
    """A model whose adapter has moved, its layers, and for each W0 and the weight that it computes with now."""
    model = tiny_model().double().eval()
    before = {key: x.weight.detach().numpy().copy() for key, x in model.named_modules() if hasattr(x, "in_features")}
    peft_model = get_peft_model(model, CONFIGS[name], autocast_adapter_dtype=False)
    if name in ("v1", "v2"):
        initialize_lora_null_weights(peft_model, random_batches(count=20))
    modules = dict(peft_model.get_base_model().named_modules())
    layers = adapted_layers(peft_model) or {key: modules[key] for key in before if hasattr(modules[key], "base_layer")}
    start = weight_changes(layers)
    assert max(change.moved for change in start.values()) < 1e-12
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return peft_model, layers, before


@pytest.mark.parametrize("name", CONFIGS)
def test_each_kind_of_layer_against_what_it_computes(name):
    _, layers, before = moved(name)
    found = weight_changes(layers)
    assert set(found) == set(layers) and len(found) >= 4
    for key, layer in layers.items():
        with torch.no_grad():
            effective = layer(torch.eye(layer.in_features, dtype=torch.float64)).T.numpy()
        assert found[key].moved == pytest.approx(np.linalg.norm(effective - before[key]), rel=1e-6)
        assert found[key].start == pytest.approx(np.linalg.norm(before[key]), rel=1e-12)


def test_plain_linears_against_their_originals():
    model, start = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-2)
    layers = {"lm_head": model.lm_head}
    found = weight_changes(layers, original=lambda name: start.get_submodule(name).weight)["lm_head"]
    now, then = (x.lm_head.weight.detach().double().numpy() for x in (model, start))
    assert found == pytest.approx((np.linalg.norm(now - then), np.linalg.norm(then)), rel=1e-12)


def test_all_layers_as_one_weight():
    found = Magnitude.of({"a": Change(3.0, 30.0), "b": Change(4.0, 40.0), "zeros": Change(0.5, 0.0)})
    assert found.total == pytest.approx(math.sqrt(9 + 16 + 0.25) / 50)
    assert found.layers == {"a": 0.1, "b": 0.1} and found.max == 0.1
    assert Magnitude.of({"zeros": Change(1.0, 0.0)}) is None


def test_a_grid_reports_the_size_of_every_change(tmp_path):
    recipe, out = make_world(tmp_path), tmp_path / "out"
    assert main([str(recipe), "--method", "full,lora", "--sweep", "training.learning_rate=1e-3,1e-2"]) == 0
    results = load_results(out)
    assert results.base.magnitude is None
    assert all(
        row.magnitude.total > 0 and not row.magnitude.layers for row in (*results.rows[1:], *results.grid.cells)
    )
    cell = out / results.grid.cells[0].folder
    full, lora = load_results(cell).rows[1:]
    for row in (full, lora):
        assert 0 < row.magnitude.total <= row.magnitude.max == max(row.magnitude.layers.values()) < 10
    now, then = (load_file(folder / "model.safetensors") for folder in (cell / "full/model", tmp_path / "model"))
    for name, ratio in full.magnitude.layers.items():
        a, b = (x[f"{name}.weight"].double() for x in (now, then))
        assert ratio == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)
    assert set(full.magnitude.layers) == set(lora.magnitude.layers)  # without the head, which full trains too
    assert (out / "magnitude.png").stat().st_size > 10_000
    markdown = (out / "report.md").read_text()
    assert "(magnitude.png)" in markdown and "‖ΔW‖/‖W₀‖" in markdown
    assert "Forgetting against the size" in (out / "report.html").read_text()
    assert results.base.metrics["numbers kl"].value == 0 and "| numbers KL |" in markdown  # at equal learning too

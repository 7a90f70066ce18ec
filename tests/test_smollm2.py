"""On the real SmolLM2-135M-Instruct, where the package index gives it."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null.recipes
from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.adapters.plain import save_plain_adapter
from lora_null.batches import token_batches
from lora_null.layer import adapted_layers
from lora_null.recipes.models import smollm2
from lora_null.trainer import CalibrationArgs, calibration_windows
from lora_null.trainer.calibration_data import padded_batches

pytestmark = pytest.mark.smollm2
SAMPLES = Path(lora_null.recipes.__file__).parent / "samples"
LAYERS = ["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.up_proj", "model.layers.27.mlp.down_proj"]
TARGETS = r".*layers\.(3\.self_attn\.q|12\.mlp\.up|27\.mlp\.down)_proj"


@pytest.fixture(scope="module")
def folder():
    try:
        return smollm2.smollm2()
    except UserError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def batches(folder):
    questions = [
        json.loads(line)["question"] for line in (SAMPLES / "nq_open_calibration.jsonl").read_text().splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return padded_batches(calibration_windows(questions, tokenizer, CalibrationArgs(256, 256, "separate")), 0)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def start(folder, batches, dtype):
    """Return a model whose adapters have started, their inputs and weights in float64, and the layer report."""
    model = load(folder, dtype)
    pieces = token_batches(
        batches, torch.device("cpu"), 0
    )  # the calibration's own: bfloat16 rounds otherwise in other shapes
    X = oracle.capture_inputs(model, LAYERS, [piece.inputs for piece in pieces])
    W = {name: model.get_submodule(name).weight.detach().double().numpy().copy() for name in LAYERS}
    peft_model = get_peft_model(model, LoraNullConfig(r=32, target_modules=TARGETS))
    return peft_model, X, W, initialize_lora_null_weights(peft_model, batches, progress=False)


@pytest.fixture(scope="module")
def started(folder, batches):
    return start(folder, batches, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_activations_leak_no_more_than_the_float64_svd(folder, batches, started, dtype):
    peft_model, X, W, report = started if dtype == torch.float32 else start(folder, batches, dtype)
    for line in report.layers:
        A = adapted_layers(peft_model)[line.name].lora_A["default"].weight.detach().double().numpy()
        U = oracle.null_space(X[line.name], 32)
        ideal = oracle.leak(oracle.factors(W[line.name] @ U @ U.T, 32, 1.0)[0], X[line.name])
        print(
            f"{dtype} {line.name}: leakage {line.leakage:.3e}, float64 full SVD {ideal:.3e}, energy {line.energy:.2%}"
        )
        assert line.leakage == pytest.approx(oracle.leak(A, X[line.name]), rel=1e-4)
        assert line.leakage <= 1.01 * ideal
        rounded = torch.from_numpy(A).bfloat16().double().numpy()  # as the forward pass has it under autocast
        print(f"leakage under bf16 autocast: {oracle.leak(rounded, X[line.name]) / line.leakage:.4f} times")
        assert oracle.leak(rounded, X[line.name]) <= 1.001 * line.leakage
        best, found = (oracle.leak(Q.T, X[line.name]) for Q in (U, np.linalg.qr(A.T)[0]))
        assert found <= 1.01 * best  # the space itself, whatever weight T gives to its directions


def test_theorem_2_on_real_activations(started):
    """Whatever B becomes, W* X stays W0 X to the leakage: several times closer than the same change through a random A.

    Real inputs have no exact null space here (every Gram has full rank), so the theorem's ≈ is measured, not assumed.
    """
    peft_model, X, *_ = started
    generator = np.random.default_rng(0)
    for name, layer in adapted_layers(peft_model).items():
        A = layer.lora_A["default"].weight.detach().double().numpy()
        B = generator.standard_normal((layer.out_features, 32))
        random_A = generator.standard_normal(A.shape)
        random_A *= np.linalg.norm(A) / np.linalg.norm(random_A)
        moved, moved_at_random = (np.linalg.norm(B @ (rows @ X[name])) for rows in (A, random_A))
        print(f"{name}: ‖ΔW X‖ {moved:.3e} in the null space, {moved_at_random:.3e} through a random A")
        assert moved < 0.25 * moved_at_random


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_saved_adapter_gives_the_live_logits(folder, batches, variant, tmp_path):
    live = get_peft_model(
        load(folder),
        LoraNullConfig(
            r=8, variant=variant, target_modules=["q_proj", "up_proj", "down_proj"], layers_to_transform=[0, 12, 29]
        ),
    )
    initialize_lora_null_weights(live, batches[-1:], progress=False, min_tokens=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.003)
        inputs = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
        save_plain_adapter(live, tmp_path)
        fresh = PeftModel.from_pretrained(load(folder), tmp_path)
        ours, theirs = live.eval()(**inputs).logits, fresh.eval()(**inputs).logits
        base = load(folder)(**inputs).logits
    print(
        f"{variant}: live against saved {(ours - theirs).abs().max():.1e}, against base {(ours - base).abs().max():.1e}"
    )
    assert (ours - theirs).abs().max() < 1e-4 < 1e-1 < (ours - base).abs().max()

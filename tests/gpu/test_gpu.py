"""On whatever accelerator is here: factors against the float64 oracle, the first step, what stays in bfloat16, resuming.

pytest -n 0 -m gpu tests/gpu                              # on a GPU
LORA_NULL_GPU_DEVICE=cpu pytest -n 0 -m gpu tests/gpu     # the same on the CPU
"""

import copy
import os
import shutil

import numpy as np
import oracle
import pytest
import torch
from engine_worlds import unfinished
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import losses_over, random_batches, tiny_model
from torch import nn
from world import make_world

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.gram import Gram
from lora_null.layer import adapted_layers
from lora_null.nullspace import bottom_eigenspace
from lora_null.recipes.__main__ import main
from lora_null.trainer.methods import METHODS

DEVICE = os.environ.get("LORA_NULL_GPU_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="no GPU is here; LORA_NULL_GPU_DEVICE=cpu runs these on the CPU"),
]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
RANK = 8
BATCHES = random_batches()


def on_device(batches):
    return [{key: value.to(DEVICE) for key, value in batch.items()} for batch in batches]


def started(variant, dtype):
    """Return the base on the device, and a PEFT model that was initialized there."""
    base = tiny_model(**SHAPE).to(DEVICE, dtype)
    model = get_peft_model(copy.deepcopy(base), LoraNullConfig(r=RANK, variant=variant))
    initialize_lora_null_weights(model, on_device(BATCHES), min_tokens=1, progress=False)
    return base.eval(), model.eval()


def inputs_of(base):
    """Return {layer: X in float64}, the inputs that the base's layers read on the device, in its own dtype."""
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "layers." in name]
    return oracle.capture_inputs(base, linears, on_device(BATCHES))


def factors_of(layer):
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def exact(tensor):
    return tensor.detach().double().cpu().numpy()


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1.001), (torch.bfloat16, 1.05)])
def test_factors_against_the_float64_oracle(dtype, slack):
    """A leaks no more than the oracle's on the same inputs, and lies in the oracle's null space."""
    base, model = started("v2", dtype)
    X = inputs_of(base)
    for name, layer in adapted_layers(model).items():
        A = exact(factors_of(layer)[0])
        T = oracle.projection(exact(base.get_submodule(name).weight), X[name], RANK)
        A0, _ = oracle.factors(T, RANK, 1.0)
        assert oracle.leak(A, X[name]) <= slack * oracle.leak(A0, X[name]) + 1e-6, name
        null = oracle.null_space(X[name], RANK)
        outside = A - A @ null @ null.T
        assert (outside**2).sum() <= (slack - 1) * (A**2).sum(), name  # A lies in the oracle's null space


@pytest.fixture
def products(request):
    """How the user has float32 products computed, which Grams are not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    "dtype, products",
    [(torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    indirect=["products"],
)
def test_grams_catch_what_float64_catches(dtype):
    """Channels with a mean and of falling size, where sums that are cut off would lose the small directions."""
    d, r, generator = 512, 16, torch.Generator().manual_seed(0)
    falling = torch.arange(1, d + 1).float().pow(-0.5)
    rows = (torch.randn(16 * d, d, generator=generator) * falling + 0.1).to(DEVICE, dtype)
    gram = Gram(d, rows.device, tokens=2 * len(rows))
    for part in rows.split(1500):
        gram.add(part)
    assert not gram.exact
    if dtype == torch.bfloat16 and rows.is_cuda and torch.cuda.get_device_capability() >= (8, 0):
        assert gram.kernel is not None  # or else the float32 product would be tested in its place
    total, X = exact(gram.result()), exact(rows).T
    truth = X @ X.T
    assert abs(total - total.T).max() == 0
    scale = np.sqrt(truth.diagonal())
    assert abs((total - truth) / scale / scale[:, None]).max() <= 16 * 2**-24
    found = bottom_eigenspace(gram.result(), r).vectors
    best = oracle.leak(oracle.null_space(X, r).T, X)
    assert oracle.leak(exact(found).T, X) <= 1.01 * best


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_step_0_is_the_base(variant, dtype, tolerance):
    base, model = started(variant, dtype)
    batch = on_device(BATCHES)[0]
    with torch.no_grad():
        before, after = (m(**batch).logits.float() for m in (base, model))
    limit = 0 if variant == "v2" else tolerance * float(before.abs().max())
    assert (after - before).abs().max() <= limit


@pytest.mark.parametrize("variant", ["v2", "nb"])
def test_what_is_frozen_stays_in_the_null_space_under_bfloat16(variant):
    if variant == "nb" and "nb-lora" not in METHODS:
        pytest.skip("nb-lora is not in the table of methods")
    base, model = started(variant, torch.bfloat16)
    X = inputs_of(base)

    def leaks():
        return {
            name: oracle.leak(exact(factors_of(layer)[0]), X[name]) for name, layer in adapted_layers(model).items()
        }

    before, A = leaks(), [factors_of(layer)[0].detach().clone() for layer in adapted_layers(model).values()]
    if variant == "nb":
        from lora_null import keep_in_null_basis

        model.register_forward_pre_hook(lambda module, _: keep_in_null_basis(module))
    losses = losses_over(model, on_device(BATCHES), steps=12)
    if variant == "nb":
        keep_in_null_basis(model)
    assert losses[-1] < losses[0]
    after = leaks()
    if variant == "v2":
        assert all(torch.equal(a, factors_of(layer)[0]) for a, layer in zip(A, adapted_layers(model).values()))
        assert after == before
    else:  # A moves within a basis of four times as many directions, whose worst leaks more than the start
        X_norms = {name: oracle.leak(oracle.null_space(X[name], 4 * RANK).T, X[name]) for name in after}
        assert all(after[name] <= 3 * max(before[name], X_norms[name]) for name in after)


def test_a_run_that_was_cut_ends_in_the_same_weights(tmp_path):
    recipe = str(make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4}))
    assert main([recipe, "--output-dir", str(tmp_path / "whole")]) == 0
    unfinished(tmp_path / "whole", tmp_path / "cut")
    assert main([recipe, "--output-dir", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = (
        load_file(tmp_path / run / "lora-null-v2" / "adapter" / "adapter_model.safetensors")
        for run in ("whole", "cut")
    )
    assert all(torch.dist(whole[key], cut[key]) <= 1e-5 * whole[key].norm() for key in whole)
    shutil.rmtree(tmp_path)

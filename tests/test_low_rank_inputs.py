"""Inputs that span less than their width, however many tokens there are: rank, leakage and drift are the true ones."""

import numpy as np
import oracle
import pytest
import torch
from peft import get_peft_model
from tiny import random_batches, tiny_model
from torch import nn

from lora_null import LoraNullConfig
from lora_null.drift import DriftMeter
from lora_null.gram import CHUNK_TOKENS, Gram
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.nullspace import bottom_eigenspace

FIRST = "model.layers.0.self_attn.q_proj"  # reads one vector a distinct token
WIDE = dict(hidden_size=96, intermediate_size=128)


def few_tokens(count):
    return random_batches(count=count, size=8, length=24, vocab_size=50)


def repeated_texts(count):
    return random_batches(count=1, size=4, length=12) * (4 * count)


def dead_channels(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight[3::5] = 0


def started(model, batches, form="auto", r=12):
    peft_model = get_peft_model(model, LoraNullConfig(r=r, variant="v2"))
    options = InitOptions(min_tokens=1, progress=False, form=form)
    return peft_model, *start_adapter(peft_model, batches, options)


def measured(batches, name, dtype, form="auto", change=None):
    """True and reported rank, leakage and drift of one layer after its B has moved."""
    model = tiny_model(**WIDE).to(dtype)
    if change:
        with torch.no_grad():
            change(model)
    X = oracle.capture_inputs(model, [name], batches)[name]
    W = model.get_submodule(name).weight.detach().double().numpy().copy()
    peft_model, report, calibration = started(model, batches, form)
    line = next(line for line in report.layers if line.name == name)
    layer = adapted_layers(peft_model)[name]
    torch.manual_seed(0)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    A, B = (getattr(layer, part)["default"].weight.detach().double().numpy() for part in ("lora_A", "lora_B"))
    drift = np.linalg.norm(B @ (A @ X)) / np.linalg.norm(W @ X)
    truth = np.linalg.matrix_rank(X), oracle.leak(A, X), drift
    return truth, (line.gram_rank, line.leakage, DriftMeter(peft_model, calibration).measure()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["layers", "hooks"])
@pytest.mark.parametrize("batches, change", [
    (few_tokens(1), None), (few_tokens(3), None), (few_tokens(9), None), (repeated_texts(1), None),
    (repeated_texts(9), None), (random_batches(count=12, size=8, length=24), dead_channels),
], ids=["few tokens", "3 times as many", "9 times as many", "texts 4 times", "texts 36 times", "dead channels"])  # fmt: skip
def test_reported_is_true(batches, change, form, dtype):
    truth, reported = measured(batches, FIRST, dtype, form, change)
    assert truth[0] < 96 and truth[1] < 1e-7  # a null space wide enough: what leaks is the rounding of A
    assert reported[0] == truth[0]
    assert reported[1:] == pytest.approx(truth[1:], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_as_true(dtype):
    truth, reported = measured(random_batches(count=20, size=8, length=24), FIRST, dtype)
    assert reported[0] == truth[0] == 96
    assert reported[1:] == pytest.approx(truth[1:], rel=1e-3)


@pytest.mark.parametrize("distinct, leaks, under_autocast", [(100, 1.6e-9, 1.0e-4), (1000, None, None)])
def test_autocast_rounds_a_and_so_bounds_what_an_exact_null_space_leaks(distinct, leaks, under_autocast):
    """The figures of lora_null/README.md; its leakage and the drift are those of the float32 A."""
    model = tiny_model(vocab_size=distinct + 4, hidden_size=256).bfloat16()
    batches = random_batches(count=12, size=16, length=24, vocab_size=distinct + 4)
    X = oracle.capture_inputs(model, [FIRST], batches)[FIRST]
    peft_model, report, calibration = started(model, batches, r=16)
    layer = adapted_layers(peft_model)[FIRST]
    A = layer.lora_A["default"]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = A(torch.from_numpy(X.T).bfloat16()).double().numpy()
    A = A.weight.detach().double().numpy()
    forward = np.linalg.norm(seen) / (np.linalg.norm(A) * np.linalg.norm(X))
    assert report.layers[0].leakage == pytest.approx(oracle.leak(A, X), rel=0.02)
    if leaks is None:
        assert forward == pytest.approx(oracle.leak(A, X), rel=1e-3)
        return
    assert (oracle.leak(A, X), forward) == pytest.approx((leaks, under_autocast), rel=0.1)
    nn.init.normal_(layer.lora_B["default"].weight)
    drift, B = (
        DriftMeter(peft_model, calibration).measure()[FIRST],
        layer.lora_B["default"].weight.detach().double().numpy(),
    )
    W = layer.get_base_layer().weight.detach().double().numpy()
    assert drift < 1e-3 * np.linalg.norm(B @ seen.T) / np.linalg.norm(W @ X)


def test_the_choice_within_the_null_space_is_the_same_however_tokens_are_batched():
    whole = few_tokens(6)
    rows = [
        {key: value[i : i + 3] for key, value in b.items()} for b in whole for i in range(0, len(b["input_ids"]), 3)
    ]
    found = []
    for batches in (whole, whole[::-1], rows):
        peft_model, _, _ = started(tiny_model(**WIDE), batches)
        found.append(adapted_layers(peft_model)[FIRST].lora_A["default"].weight.detach().double())
    for other in found[1:]:
        assert torch.linalg.matrix_norm(found[0] - other) < 1e-6 * torch.linalg.matrix_norm(found[0])


@pytest.mark.parametrize("distinct", [40, 170, 300])
@pytest.mark.parametrize("d, r", [(180, 8), (560, 8)])
def test_rank_and_null_space_against_a_float64_svd(distinct, d, r):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(distinct, d, generator=generator) * torch.logspace(0, -2, d)
    rows = rows[torch.randint(0, distinct, (4 * d,), generator=generator)]
    gram = Gram(d, rows.device, tokens=len(rows))
    for part in rows.split(700):
        gram.add(part)
    found = bottom_eigenspace(gram.result(), r)
    X = rows.double().numpy().T
    rank = np.linalg.matrix_rank(X)
    if rank < d:
        assert found.rank == rank and found.exact == (d - rank >= r)
        assert oracle.leak(found.vectors.T.numpy(), X) < 1e-10
    else:
        best = oracle.leak(oracle.null_space(X, r).T, X)
        assert not found.exact and oracle.leak(found.vectors.T.numpy(), X) <= 1.01 * best


def test_float32_products_begin_once_the_matrix_is_resolved():
    rows = torch.randn(8 * CHUNK_TOKENS, 64, generator=torch.Generator().manual_seed(0))
    few = rows[torch.arange(len(rows)) % 40]
    faint = rows * torch.logspace(0, -20, 64)
    for x, exact in (
        (rows, False),
        (few, True),
        (torch.cat([few[:4096], rows]), False),
        (rows[:100], True),
        (faint, True),
    ):
        gram = Gram(64, x.device, tokens=len(x))
        gram.add(x)
        assert gram.exact == exact
        truth = x.double().T @ x.double()
        assert ((gram.result() - truth).abs() / (x.double().abs().T @ x.double().abs())).max() < 2**-21


@pytest.mark.parametrize("times", [10, 1000])
@pytest.mark.parametrize("d, decades", [(128, 0), (128, 3), (512, 3)])
def test_louder_tokens_than_those_that_resolved_the_matrix_do_not_fill_its_small_directions(d, decades, times):
    """4,096 tokens along one direction, which is no channel, after 1,024 ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
    ordinary = torch.randn(1024, d, generator=generator) * torch.logspace(0, -decades, d) @ Q
    direction = nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    rows = torch.cat([ordinary, times * torch.randn(4096, 1, generator=generator) * direction])
    gram = Gram(d, rows.device, tokens=len(rows))
    gram.add(rows)
    assert not gram.exact and gram._multipliable(ordinary).dtype == torch.float32
    U, X = bottom_eigenspace(gram.result(), 8).vectors.numpy(), rows.double().numpy().T
    assert np.linalg.norm(U.T @ X) ** 2 <= 1.001 * (np.linalg.svd(X, compute_uv=False)[-8:] ** 2).sum()


def by_the_older_switch(on):
    torch.set_float32_matmul_precision("medium" if on else "highest")


def by_backend(on):
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "tf32" if on else "none"


@pytest.mark.parametrize("switch", [by_the_older_switch, by_backend])
def test_products_are_float32_under_autocast_and_tf32(switch):
    """However TF32 was turned on: by PyTorch's older switch, or as transformers does it, of which the older one raises."""
    rows = torch.randn(8 * CHUNK_TOKENS, 64, generator=torch.Generator().manual_seed(0))
    plain, inside = (Gram(64, rows.device, tokens=len(rows)) for _ in range(2))
    plain.add(rows)
    backend = torch.backends.mkldnn.matmul
    switch(True)
    try:
        before = backend.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            inside.add(rows)
        assert backend.fp32_precision == before != "ieee"
    finally:
        switch(False)
    assert not plain.exact and torch.equal(plain.result(), inside.result())

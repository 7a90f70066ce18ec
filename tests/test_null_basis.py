"""Variant nb: A starts in the span of N and stays there, whatever trains it; N goes wherever the start goes."""

import copy

import numpy as np
import oracle
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_trainer import make
from tiny import load_initialization, logits, random_batches, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights, keep_in_null_basis
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import NullBasis, adapted_layers, factors_of
from lora_null.nullspace import outer_eigenspace
from lora_null.start import rule_of

BATCHES = random_batches()
QUIET = InitOptions(min_tokens=1, progress=False)


def wrapped(model=None, dtype=torch.float32, **config):
    config = LoraNullConfig(**{"r": 4, "variant": "nb", "null_multiple": 3, **config})
    return get_peft_model((model or tiny_model()).to(dtype), config, autocast_adapter_dtype=False)


def started(batches=BATCHES, **options):
    peft_model = wrapped(**options)
    initialize_lora_null_weights(peft_model, batches, min_tokens=1, progress=False)
    return peft_model.train()


def bases(peft_model):
    return {name: layer.bases["default"].vectors for name, layer in adapted_layers(peft_model).items()}


def outside(peft_model, N=None):
    """Return the largest share of an A outside the span of its N; N as the model keeps it, or by module name."""
    shares = []
    for name, layer in adapted_layers(peft_model).items():
        A = factors_of(layer)[0].detach().double().numpy()
        Q = np.linalg.qr((bases(peft_model) if N is None else N)[name].double().numpy())[0]
        shares.append(np.linalg.norm(A - A @ Q @ Q.T) / np.linalg.norm(A))
    return max(shares)


@pytest.mark.parametrize("start, share", [("zero", None), ("residual", None), ("zero", 0.95)])
def test_start_against_the_full_decompositions(start, share):
    model, original = tiny_model().double(), tiny_model().double()
    options = {"null_multiple": None, "null_energy": share} if share else {}
    peft_model = started(model=model, dtype=torch.float64, start=start, lora_alpha=8, **options)
    layers = adapted_layers(peft_model)
    X = oracle.capture_inputs(original, layers, BATCHES)
    for name, layer in layers.items():
        values, vectors = np.linalg.eigh(X[name] @ X[name].T)
        k = int((np.cumsum(values) <= (1 - share) * values.sum()).sum()) if share else 12
        N, found = vectors[:, :k], bases(peft_model)[name].numpy()
        np.testing.assert_allclose(found @ found.T, N @ N.T, atol=1e-7)
        W = original.get_submodule(name).weight.detach().numpy()
        A0, B0 = oracle.factors(W @ N @ N.T, 4, 2.0)
        A, B = (factor.detach().numpy() for factor in factors_of(layer))
        signs = np.sign(np.sum(A0 * A, axis=1))
        np.testing.assert_allclose(A, signs[:, None] * A0, atol=1e-7)
        np.testing.assert_allclose(B, (start == "residual") * signs * B0, atol=1e-7)
        base = layer.get_base_layer().weight.detach().numpy()
        np.testing.assert_allclose(base, W - (start == "residual") * 2 * B0 @ A0, atol=1e-7)


@pytest.mark.parametrize("start", ["zero", "residual"])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_step_0_is_the_base(start, dtype, close):
    before = logits(tiny_model().to(dtype)).float()
    found = logits(started(dtype=dtype, start=start)).float()
    assert (found - before).abs().max() <= (0 if start == "zero" else close * before.abs().max())


def adamw(parameters, gradients, moments, step, *, lr, decay):
    """Decoupled AdamW by its paper, in numpy."""
    for name, p in parameters.items():
        m, v = moments.setdefault(name, (np.zeros_like(p), np.zeros_like(p)))
        m, v = 0.9 * m + 0.1 * gradients[name], 0.999 * v + 0.001 * gradients[name] ** 2
        moments[name] = (m, v)
        p *= 1 - lr * decay
        p -= lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


@pytest.mark.parametrize("start", ["zero", "residual"])
def test_training_is_adamw_and_a_projection_under_decay_clipping_and_accumulation(start):
    peft_model = started(dtype=torch.float64, start=start)
    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    N = {name: vectors.numpy() for name, vectors in bases(peft_model).items()}
    ours = {name: p.detach().numpy().copy() for name, p in trained.items()}
    optimizer, moments = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.3), {}
    for step in range(1, 6):
        for batch in (BATCHES[step % 6], BATCHES[(step + 1) % 6]):
            peft_model(**batch, labels=batch["input_ids"]).loss.backward()  # puts A back where a step has moved it
        nn.utils.clip_grad_norm_(trained.values(), 0.1)
        gradients = {name: p.grad.numpy().copy() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        adamw(ours, gradients, moments, step, lr=1e-2, decay=0.3)
        for module, P in N.items():
            A = ours[f"base_model.model.{module}.lora_A.default.weight"]
            A[:] = A @ P @ P.T
    keep_in_null_basis(peft_model)
    for name, p in trained.items():
        np.testing.assert_allclose(p.detach().numpy(), ours[name], atol=1e-9)


@pytest.mark.parametrize("decades, exact, kept", [(4, 6.7e-5, 6.8e-5), (6, 1.9e-6, 8.8e-6), (None, 1.1e-9, 8.6e-6)])
def test_what_the_rounding_of_n_lets_through(decades, exact, kept):
    """The figures of lora_null/README.md: 128 of 576 directions; singular values over decades, or 300 tokens."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(576, 576 if decades else 300, generator=generator, dtype=torch.float64)
    if decades:
        X = torch.linalg.qr(X)[0] * torch.logspace(0, -decades, 576, dtype=torch.float64)
    X = X.numpy()
    U = torch.from_numpy(oracle.null_space(X, 128).copy())
    A = torch.randn(32, 576, generator=generator, dtype=torch.float64)
    inside, projected = (A @ U @ U.T).float().numpy().astype(float), A.float()
    NullBasis.for_factor(U, projected).project_(projected)
    projected = projected.numpy().astype(float)
    share = np.linalg.norm(projected - projected @ U.numpy() @ U.numpy().T) / np.linalg.norm(projected)
    assert share == pytest.approx(1.8e-4, rel=0.05)
    assert (oracle.leak(inside, X), oracle.leak(projected, X)) == pytest.approx((exact, kept), rel=0.05)
    in_bfloat16 = torch.from_numpy(projected).bfloat16().double().numpy()
    assert oracle.leak(in_bfloat16, X) == pytest.approx(7e-5 if decades != 4 else 9.7e-5, rel=0.05)


def test_what_was_written_past_autograd_is_put_back_too():
    peft_model = started()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    peft_model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    optimizer.step()
    for layer in adapted_layers(peft_model).values():
        factors_of(layer)[0].data += 1
    assert outside(peft_model) > 0.1
    keep_in_null_basis(peft_model)
    assert outside(peft_model) < 1e-6


@pytest.mark.parametrize("kind", [torch.Tensor.detach, torch.nn.Parameter])
@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_tensors_that_stand_in_for_the_parameters_are_left_alone(kind, trained_before, copied):
    """As in evolution strategies, which try many at once."""
    peft_model = copy.deepcopy(started()) if copied else started()
    if trained_before:
        peft_model(**BATCHES[0])
    given = {name: kind(p.detach() + 1) for name, p in peft_model.named_parameters() if p.requires_grad}
    for _ in range(3):
        before = {name: tensor.detach().clone() for name, tensor in given.items()}
        torch.func.functional_call(peft_model, given, (), dict(BATCHES[0]))
        assert all(torch.equal(given[name], before[name]) for name in given)
        with torch.no_grad():
            for tensor in given.values():
                tensor.add_(1)
    if not trained_before:
        peft_model(**BATCHES[0])
    with torch.no_grad():
        for layer in adapted_layers(peft_model).values():
            factors_of(layer)[0].add_(1)
    torch.func.functional_call(peft_model, given, (), dict(BATCHES[0]))
    assert outside(peft_model) > 0.01
    peft_model(**BATCHES[0])  # the model's own are put back as ever
    assert outside(peft_model) < 1e-6


ROUNDED = {"float32": 1e-6, "bfloat16": 0.01}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_a_stays_inside_in_a_loop_of_ones_own(dtype, autocast, how):
    peft_model = started(dtype=getattr(torch, dtype))
    assert outside(peft_model) < ROUNDED[dtype]
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2, **how)
    start = {name: factors_of(layer)[0].detach().clone() for name, layer in adapted_layers(peft_model).items()}
    for batch in BATCHES:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            peft_model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert outside(peft_model) < ROUNDED[dtype]
    with torch.no_grad():
        for layer in adapted_layers(peft_model).values():
            factors_of(layer)[0].add_(0.1)  # as no optimizer does
    assert outside(peft_model) > 0.01
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        peft_model.state_dict()
    assert outside(peft_model) < ROUNDED[dtype]
    for name, layer in adapted_layers(peft_model).items():
        assert not torch.equal(factors_of(layer)[0], start[name])


def test_a_projection_is_exact_although_its_basis_is_rounded():
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(4, 96, generator=draw)
    basis = NullBasis.for_factor(torch.linalg.qr(torch.randn(96, 24, generator=draw, dtype=torch.float64)).Q, A)
    assert basis.vectors.dtype == torch.float16
    Q = torch.linalg.qr(basis.vectors.double()).Q
    wanted = A.double() @ Q @ Q.T
    basis.project_(A)
    assert torch.dist(A.double(), wanted) < 1e-6 * wanted.norm()


def test_a_stays_inside_compiled_copied_and_under_transformers_own_trainer(tmp_path):
    copied = copy.deepcopy(started())
    compiled = torch.compile(copied, backend="eager")
    optimizer = torch.optim.AdamW([p for p in copied.parameters() if p.requires_grad], lr=1e-2)
    for batch in BATCHES:
        compiled(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = started()
    rows = [{"input_ids": ids, "labels": ids} for batch in BATCHES for ids in batch["input_ids"].tolist()]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    Trainer(plain, args, train_dataset=rows).train()
    assert outside(copied) < 1e-6 and outside(plain) < 1e-6


@pytest.mark.parametrize("start", ["zero", "residual"])
def test_the_trainer_keeps_a_inside_the_null_space_of_the_inputs(start, tmp_path):
    config = LoraNullConfig(r=4, variant="nb", null_multiple=2, start=start)
    options = dict(weight_decay=0.3, max_grad_norm=0.1, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer = make(tmp_path, config, save_strategy="steps", save_steps=3, **options)
    trainer.train()
    assert outside(trainer.model) < 1e-6
    eigh = make(tmp_path / "exact", config)  # its N by eigh, in float64
    eigh.model.double()
    eigh._init_options = InitOptions(solver="eigh", progress=False)
    eigh._prepare(resuming=False)
    assert outside(trainer.model, bases(eigh.model)) < 1e-3  # N's entries are rounded to float16
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-6")
    assert (logits(saved) - logits(trainer.model)).abs().max() < 1e-4
    assert saved.peft_config["default"].r == (8 if start == "residual" else 4)


def test_layers_that_share_an_input_share_a_basis_in_memory_and_on_disk(tmp_path):
    peft_model, again, other = wrapped(), wrapped(start="residual"), wrapped(null_multiple=2)
    start_adapter(peft_model, BATCHES, QUIET, folder=tmp_path)
    load_initialization(tmp_path, again)  # one folder serves both starts
    for model in (peft_model, again, copy.deepcopy(peft_model)):
        layers = adapted_layers(model)
        distinct = {id(layer.bases["default"]) for layer in layers.values()}
        assert len(layers) == 14 and len(distinct) == 8  # q, k, v; o; gate, up; down
    for name, N in bases(again).items():
        assert torch.equal(N, bases(peft_model)[name]) and N.dtype == torch.float16
    held = sum(N.nbytes for N in {id(N): N for N in bases(peft_model).values()}.values())
    assert held == 2 * (3 * 32 + 48) * 12 * 2
    with pytest.raises(
        UserError, match="holds an initialization by null basis of 3 r, this run needs null basis of 2 r"
    ):
        load_initialization(tmp_path, other)
    with pytest.raises(UserError, match="holds an initialization by null basis of 3 r, this run needs null-space"):
        load_initialization(tmp_path, wrapped(variant="v2", null_multiple=None))


def test_another_stage_in_the_same_process_stays_inside_too(tmp_path):
    first = make(tmp_path / "1", LoraNullConfig(r=4, variant="nb", null_multiple=2))
    first.train()
    second = make(tmp_path / "2", "none", model=first.model)
    second.train()
    assert outside(second.model) < 1e-6


def test_from_disk_it_has_no_basis_and_says_so(tmp_path):
    trainer = make(tmp_path, LoraNullConfig(r=4, variant="nb"), max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    with pytest.raises(UserError, match=r"plain LoRA without the basis.*variant='v2'"):
        LoraNullConfig.from_pretrained(tmp_path / "saved", variant="nb")
    config = LoraNullConfig(r=4, variant="nb", inference_mode=False)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", config=config, is_trainable=True)
    with pytest.raises(UserError, match="plain LoRA without the basis"):
        make(tmp_path / "2", "none", model=model)
    with pytest.raises(
        UserError, match="plain LoRA without the basis"
    ):  # and a loop without a trainer of this package
        model.train()(**BATCHES[0])
    model.eval()(**BATCHES[0])


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(null_multiple=9),
            r"9 r are 36 directions, more than model.layers.0.self_attn.q_proj reads \(d_in = 32\)",
        ),
        (
            dict(null_multiple=None, null_energy=0.9999999),
            r"down_proj: only 0 directions lie outside the top 0.9999999 of its.*fewer than r = 4",
        ),
    ],
)
def test_a_basis_that_cannot_be_is_named(config, message):
    with pytest.raises(UserError, match=message) as refusal:
        initialize_lora_null_weights(wrapped(**config), BATCHES, min_tokens=1, progress=False)
    assert "\n" not in str(refusal.value)


def test_the_width_of_a_share_of_the_energy():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    for share, width in ((0.39, 4), (0.4, 4), (0.41, 3), (0.7, 3), (0.75, 2), (0.95, 1), (0.9999, 1)):
        space = outer_eigenspace(torch.diag(values), share)
        assert space.vectors.shape == (5, width) and space.exact == (width == 1)
        assert space.vectors[width:].abs().max() < 1e-12
    with pytest.raises(ValueError, match="zero or not finite"):
        outer_eigenspace(torch.zeros(3, 3, dtype=torch.float64), 0.9)


def test_every_energy_is_a_start_of_its_own():
    """The label is all that a cache and a kept initialization know of it."""
    energies = (0.99, 0.9999999, 0.99999999)
    labels = [rule_of(LoraNullConfig(variant="nb", null_energy=energy)).label for energy in energies]
    assert len(set(labels)) == 3 and labels[0] == "null basis outside 0.99 of the energy"

"""Every method: what it starts from, what of it moves, what it saves, and its factors against a float64 oracle."""

import itertools
import json
import math
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, OFTConfig, OSFConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from tiny import logits, tiny_model, tiny_tokenizer
from torch import nn
from trainers import CUT, ROWS, TEXTS, quick
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_null import UserError
from lora_null.calibration import InputStats
from lora_null.layer import adapted_layers, factors_of
from lora_null.layerwise import measure_in_parts
from lora_null.recipes.callbacks import LOGGED
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.models.plan import plan_methods
from lora_null.recipes.output import OWN_FILES
from lora_null.trainer import LoraNullSFTTrainer
from lora_null.trainer.methods import (
    METHODS,
    Method,
    Term,
    check_adapter,
    check_base,
    check_engine,
    load_method_file,
    make_method,
)
from lora_null.trainer.methods.base import distinct_inputs
from lora_null.trainer.methods.residual import CorDA, MiLoRA, PiSSA
from lora_null.trainer.methods.roselora import _cut_moments, top_mask

PAPER = ("full", "lora", "lora-fa", "pissa", "milora", "corda", "roselora", "lora-null-v1", "lora-null-v2")
RIVALS = ("sc-lora", "kl-anchor", "replay", "clora", "oft", "oplora", "keeplora")
ALL = (*PAPER, "nb-lora", "osf", "mica", "eva", "lora-ga", *RIVALS)
TRAINS = dict.fromkeys(ALL, ("lora_A", "lora_B"))
TRAINS |= {
    "lora-fa": ("lora_B",),
    "lora-null-v2": ("lora_B",),
    "mica": ("lora_A",),
    "keeplora": ("lora_B",),
    "osf": ("osf_svd_params",),
    "oft": ("oft_R",),
    "full": ("",),
}
OPTIONS = {"eva": {"rows": 32}, "lora-ga": {"rows": 8}, "sc-lora": {"rows": 32}}
OPTIONS |= {"keeplora": {"rows": 8, "weight_energy": 0.5, "input_energy": 0.9}}
OPTIONS |= {"clora": {"k": 8}, "oplora": {"k": 8}, "oft": {"block_size": 16}, "kl-anchor": {"every": 2}}


def make(folder, name, *, options=None, adapter=None, model=None, **training):
    method = make_method(name, options or OPTIONS.get(name))
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (adapter or {})
    return LoraNullSFTTrainer(
        model=model or tiny_model(),
        args=SFTConfig(**quick(folder, **{"lr_scheduler_type": "constant", **training})),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=method.config(**adapter),
        method=method,
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )


def started(folder, name, **options):
    trainer = make(folder, name, **options)
    trainer._prepare(resuming=False)
    trainer._prepared = True
    return trainer


@pytest.mark.parametrize("name", ALL)
def test_starts_as_the_base_and_moves_exactly_what_it_should(tmp_path, name):
    trainer = started(tmp_path, name)
    assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-4
    assert trainer.drift_meter.summary()["max"] < 1e-5
    before = {key: parameter.detach().clone() for key, parameter in trainer.model.named_parameters()}
    trainer.model.train()
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert set(before) == set(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    wanted = {key for key in before if any(part in key for part in TRAINS[name])}
    assert changed == wanted == trainer.method.trainable(trainer.model)
    assert all(after[key].dtype == torch.float32 for key in wanted)
    assert trainer.drift_meter.summary()["mean"] > 1e-5


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_on_a_fresh_base_gives_the_trained_logits(tmp_path, name):
    trainer = make(tmp_path / "run", name)
    trainer.train()
    saved = trainer.method.save(trainer.model, tmp_path / "saved")
    if trainer.method.saves == "model":
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert saved == sum(p.numel() for p in fresh.parameters())
    else:
        fresh = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        if name == "oft":
            assert config["peft_type"] == "OFT" and "oft_block_size" in config and saved > 0
            return assert_trained(fresh, trainer)
        assert config["init_lora_weights"] is True and config["rank_pattern"] == {}
        assert config["r"] == trainer.method.saved_rank(4) or name == "eva"
    assert_trained(fresh, trainer)


def assert_trained(fresh, trainer):
    assert (logits(fresh) - logits(trainer.model)).abs().max() < 1e-4
    assert (logits(fresh) - logits(tiny_model())).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_resumed_run_ends_in_the_same_bits(tmp_path, name):
    whole = make(tmp_path, name, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(tmp_path, name, save_strategy="steps", save_steps=3)
    if not resumed.method.needs_texts:
        resumed._calibration_dataset = "must not be read"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), key
    one, other = ([line["loss"] for line in x.state.log_history if "loss" in line] for x in (whole, resumed))
    assert len(one) == 6 and one == other
    assert resumed.drift_meter.measure() == whole.drift_meter.measure()


@pytest.mark.parametrize("name", ALL)
def test_what_trains_is_float32_on_a_bf16_base_under_bf16_autocast(tmp_path, name):
    trainer = make(tmp_path, name, model=tiny_model().bfloat16(), bf16=True, max_steps=2)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 and p.isfinite().all() for p in trained)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad and p.dtype == torch.bfloat16]
    assert bool(frozen) == (name != "full")
    assert trainer.method.save(trainer.model, tmp_path / "saved") > 0


@pytest.mark.parametrize("name", ["full", "osf", "pissa"])
def test_drift_is_that_of_the_weights(tmp_path, name):
    trainer = make(tmp_path, name)
    trainer.train()
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
               for ids in tiny_tokenizer()(TEXTS)["input_ids"]]  # fmt: skip
    trainer.method.save(trainer.model, tmp_path / "saved")
    after = tiny_model()
    if trainer.method.saves == "model":
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    else:
        after = PeftModel.from_pretrained(after, tmp_path / "saved").merge_and_unload()
    found, base = trainer.drift_meter.measure(), tiny_model()
    X = oracle.capture_inputs(base, found, batches)
    for key, value in found.items():
        W0, W = (m.get_submodule(key).weight.detach().double().numpy() for m in (base, after))
        assert_drift(trainer, key, value, W - W0, W0, X[key])


def assert_drift(trainer, key, value, moved, W0, X):
    """By the meter's own sketch to rounding where it has whole weights, and by all inputs as far as 64 random columns tell."""
    whole = np.linalg.norm(W0 @ X)
    if sketches := getattr(trainer.drift_meter, "sketches", None):
        S = sketches[key].double().numpy()
        assert S.shape == (len(X), 64) and value == pytest.approx(np.linalg.norm(moved @ S) / whole, rel=1e-3)
    assert value == pytest.approx(np.linalg.norm(moved @ X) / whole, rel=0.5)


# --- initial factors against oracles ---


def factors(trainer, name):
    layer = adapted_layers(trainer.model)[name]
    A, B = (factor["default"].weight.detach().double().numpy() for factor in (layer.lora_A, layer.lora_B))
    return A, B, layer.scaling["default"]


@pytest.mark.parametrize("name", ["pissa", "milora"])
@pytest.mark.parametrize("shape", [{}, {"use_rslora": True}])
def test_svd_factors(tmp_path, name, shape):
    trainer = started(tmp_path, name, adapter=shape)
    for key in adapted_layers(trainer.model):
        W = tiny_model().get_submodule(key).weight.detach().double().numpy()
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        part = slice(None, 4) if name == "pissa" else slice(-4, None)
        A, B, s = factors(trainer, key)
        np.testing.assert_allclose(s * B @ A, U[:, part] * S[part] @ Vh[part], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(A, axis=1) ** 2 * s, S[part], rtol=1e-4)  # A = √S Vᵀ / √s
        np.testing.assert_allclose(np.linalg.norm(B, axis=0) ** 2 * s, S[part], rtol=1e-4)
        base = adapted_layers(trainer.model)[key].get_base_layer().weight.detach().double().numpy()
        np.testing.assert_allclose(base + s * B @ A, W, atol=1e-6)


def corda_oracle(W, C, r):
    """Knowledge-preserved CorDA from the Gram matrix C, by the equations of its paper and code."""
    damp = 0.01
    while True:
        shifted = C + damp * np.mean(np.diag(C)) * np.eye(len(C))
        inverse = np.linalg.inv(shifted)
        if np.linalg.norm(shifted @ inverse - np.eye(len(C))) < 0.05:
            break
        damp *= 2
    U, S, Vh = np.linalg.svd(W @ shifted, full_matrices=False)
    return np.sqrt(S[-r:])[:, None] * (Vh[-r:] @ inverse), U[:, -r:] * np.sqrt(S[-r:])


def test_corda_factors_from_the_inputs_without_padding(tmp_path):
    trainer = started(tmp_path, "corda")
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
               for ids in tiny_tokenizer()(TEXTS)["input_ids"]]  # fmt: skip
    layers = adapted_layers(trainer.model)
    X = oracle.capture_inputs(tiny_model(), layers, batches)
    for key in layers:
        W = tiny_model().get_submodule(key).weight.detach().double().numpy()
        A0, B0 = corda_oracle(W, X[key] @ X[key].T / X[key].shape[1], 4)
        A, B, s = factors(trainer, key)
        assert np.linalg.norm(s * B @ A - B0 @ A0) < 1e-3 * np.linalg.norm(B0 @ A0)
        scale = np.linalg.norm(B0) / np.linalg.norm(
            B
        )  # of C alone: one number a layer, at which A and B weigh the same
        np.testing.assert_allclose(scale * np.linalg.norm(B, axis=0), np.linalg.norm(B0, axis=0), rtol=1e-3)
        assert np.linalg.norm(A) == pytest.approx(np.linalg.norm(B), rel=1e-4)


def corda_factors(weight, r, inputs):
    found = CorDA().of_input(inputs)(weight, r, 1.0)
    return found.A, found.B


def test_corda_factors_are_pefts_on_the_same_gram():
    """PEFT's own code in its "kpm" mode, fed our covariance, in float32."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer

    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 16, bias=False)
    X = torch.randn(24, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    linear.covariance_matrix = (X @ X.T / 400).float()
    eigens = collect_eigens_for_layer(linear, LoraConfig(corda_config=CordaConfig(corda_method="kpm")))
    S, U, V = (x.double().detach() for x in (eigens.S_WC[-4:], eigens.U_WC[:, -4:], eigens.V_WC[:, -4:]))
    theirs = (U * S) @ V.T
    A, B = corda_factors(linear.weight.detach().double(), 4, InputStats([], X @ X.T, X[:, :1], 400))
    assert (B @ A - theirs).norm() < 1e-4 * theirs.norm()


def test_corda_raises_lambda_until_the_inverse_is_good():
    x = torch.linspace(1, 2, 30, dtype=torch.float64)[:, None]
    A, B = corda_factors(torch.eye(30, dtype=torch.float64), 3, InputStats([], x @ x.T, x, 1))  # rank one
    assert A.isfinite().all() and B.isfinite().all()


@pytest.mark.parametrize("name", ["milora", "corda"])
def test_a_start_from_which_nothing_would_ever_train_is_refused(tmp_path, name):
    """A = B = 0: of a weight of 16 rows, of which 8 are zero, the r = 4 smallest directions hold nothing."""
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.data[8:] = 0
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj: the part .* that \w+ trains is zero") as told:
        started(tmp_path, name, model=model)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("method, zero", [(MiLoRA(), True), (CorDA(), True), (PiSSA(), False)])
def test_zero_to_the_rounding_of_the_weight_is_zero(method, zero):
    """Rows that are there twice; PiSSA of a weight of rank 2 trains its r = 4 largest, of which two are zero."""
    generator = torch.Generator().manual_seed(0)
    rows, x = (torch.randn(8, 32, generator=generator), torch.randn(32, 90, generator=generator).double())
    weight = rows.repeat(2, 1) if zero else rows[[0, 1] * 8]
    start = method.of_input(InputStats([], x @ x.T, x, 90))
    if zero:
        with pytest.raises(ValueError, match="is zero"):
            start(weight, 4, 1.0)
        return
    found = start(weight, 4, 1.0)
    torch.testing.assert_close(found.B @ found.A, weight.double())


@pytest.mark.parametrize("name", ["lora", "lora-fa", "roselora"])
def test_lora_starts(tmp_path, name):
    trainer = started(tmp_path, name)
    for layer in adapted_layers(trainer.model).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not B.any() and A.abs().max() <= layer.in_features**-0.5  # Kaiming uniform with a = √5


def test_mica_factors(tmp_path):
    trainer = started(tmp_path, "mica")
    for key in adapted_layers(trainer.model):
        W = tiny_model().get_submodule(key).weight.detach().double().numpy()
        A, B, _ = factors(trainer, key)
        U = np.linalg.svd(W, full_matrices=False)[0][:, -4:]
        np.testing.assert_allclose(B @ B.T, U @ U.T, atol=1e-4)
        assert not A.any()


def test_eva_rows_lie_in_the_leading_input_directions(tmp_path):
    trainer = started(tmp_path, "eva", options={"rows": 48, "batch_rows": 48, "rho": 1.0})
    key = "model.layers.0.self_attn.q_proj"
    rows = [trainer.train_dataset[i] for i in range(48)]
    batches = [{"input_ids": torch.tensor([row["input_ids"]]), "attention_mask": torch.tensor([row["labels"]]) != -100}
               for row in rows]  # fmt: skip
    whole = [b | {"attention_mask": torch.ones_like(b["input_ids"])} for b in batches]
    X = oracle.capture_inputs(tiny_model(), [key], whole)[key]
    answers = np.concatenate([b["attention_mask"][0].numpy() for b in batches])
    X = X[:, answers]
    A, B, _ = factors(trainer, key)
    U = np.linalg.svd(X - X.mean(axis=1, keepdims=True), full_matrices=False)[0][:, : len(A)]
    assert not B.any()
    assert np.linalg.norm(U.T @ A.T) ** 2 > 0.98 * np.linalg.norm(A) ** 2


def test_lora_ga_rows_lie_in_the_gradients_leading_directions(tmp_path):
    trainer = started(tmp_path, "lora-ga")
    base = tiny_model().double()
    for i in (0, 4):
        batch = trainer.data_collator([trainer.train_dataset[j] for j in range(i, i + 4)])
        base(**batch).loss.backward()
    key = "model.layers.1.mlp.up_proj"
    gradient = base.get_submodule(key).weight.grad.numpy()
    U, _, Vh = np.linalg.svd(gradient)
    A, B, _ = factors(trainer, key)
    np.testing.assert_allclose(A.T @ A, Vh[:4].T @ Vh[:4], atol=1e-2)
    assert np.linalg.norm(U[:, 4:8].T @ B) ** 2 > 0.98 * np.linalg.norm(B) ** 2


@pytest.mark.parametrize(
    "name, key, one, other",
    [
        ("eva", "eva_config", EvaConfig(whiten=False), EvaConfig(whiten=True)),
        ("lora-ga", "lora_ga_config", LoraGAConfig(direction="ArB2r"), LoraGAConfig(direction="ArBr")),
        ("lora-ga", "lora_ga_config", LoraGAConfig(scale="stable"), LoraGAConfig(scale="gd")),
    ],
)
def test_the_adapters_own_options_of_pefts_start_are_used(tmp_path, name, key, one, other):
    """With one cache for both."""
    found = []
    for options in (one, other):
        trainer = make(tmp_path, name)
        setattr(trainer.model.peft_config["default"], key, options)
        trainer._prepare(resuming=False)
        found.append({n: p for n, p in trainer.model.state_dict().items() if "lora_" in n})
    assert any(found[0][n].shape != p.shape or not torch.equal(found[0][n], p) for n, p in found[1].items())


@pytest.mark.parametrize("rows", [dict(packing=True, max_length=64), dict(padding_free=True, max_length=None)])
@pytest.mark.parametrize("name", ["eva", "lora-ga", "keeplora", "sc-lora"])
def test_starts_that_read_the_training_rows_read_them_without_padding_too(tmp_path, name, rows):
    trainer = started(tmp_path, name, **rows)
    padded = started(tmp_path, name)
    assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-4
    if "padding_free" in rows and name != "eva":  # the same rows; EVA does not see where a batch is padded otherwise
        for key in adapted_layers(trainer.model):
            A, P = (np.linalg.qr(factors(x, key)[0].T)[0] for x in (trainer, padded))
            assert np.linalg.norm(A @ A.T - P @ P.T, 2) < 0.05, key


@pytest.mark.parametrize("name", ["eva", "lora-ga", "keeplora"])
def test_an_evaluation_before_training_changes_no_start(tmp_path, name):
    found = []
    for evaluates in (False, True):
        trainer = make(tmp_path, name, bf16=True)
        trainer._init_options = replace(trainer._init_options, cache=False)
        if evaluates:
            trainer.evaluate(trainer.train_dataset.select(range(4)))
        trainer._prepare(resuming=False)
        found.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_osf_keeps_the_leading_space_of_the_weights(tmp_path):
    trainer = make(tmp_path, "osf")
    trainer.args.weight_decay = 0.0
    trainer.train()
    trainer.method.save(trainer.model, tmp_path / "saved")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    key = "model.layers.0.self_attn.q_proj"
    W0, W = (m.get_submodule(key).weight.detach().double().numpy() for m in (tiny_model(), after))
    U, S, Vh = np.linalg.svd(W0)
    kept = U[:, :16].T @ W @ Vh[:16].T
    assert np.linalg.norm(kept - np.diag(S[:16])) < 0.05 * np.linalg.norm(W - W0)


# --- RoseLoRA ---


def test_roselora_schedule():
    method = make_method("roselora")
    kept = [method.kept_fraction(t, 100) for t in range(1, 101)]
    assert kept[:12] == [1.0] * 12 and kept[12] < 1
    assert kept[79:] == [0.05] * 21
    assert all(a >= b for a, b in itertools.pairwise(kept))
    for t in (20, 46, 70):
        assert kept[t - 1] == pytest.approx(0.05 + 0.95 * (1 - (t - 12) / 68) ** 3)
    assert make_method("roselora", {"begin": 0.0, "end": 0.0}).kept_fraction(1, 10) == 0.05


@pytest.mark.parametrize("dim", [0, 1])
def test_top_mask_is_exact_and_breaks_ties_by_position(dim):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (40, 30), generator=generator).float()  # many ties
    for fraction in (1e-9, 0.05, 0.3, 0.77, 1.0):
        mask = top_mask(scores, fraction, dim).numpy()
        n = scores.shape[dim]
        keep = max(1, round(fraction * n))
        order = np.argsort(-scores.numpy(), axis=dim, kind="stable")
        wanted = np.zeros_like(mask)
        np.put_along_axis(wanted, np.take(order, range(keep), axis=dim), True, axis=dim)
        assert (mask == wanted).all() and (mask.sum(axis=dim) == keep).all()


def test_roselora_sparsity_in_the_saved_adapter(tmp_path):
    trainer = make(tmp_path / "run", "roselora", options={"final_fraction": 0.1}, max_steps=10)
    trainer.train()
    trainer.method.save(trainer.model, tmp_path / "saved")
    for key, tensor in load_file(tmp_path / "saved" / "adapter_model.safetensors").items():
        dim = 1 if "lora_A" in key else 0
        kept = (tensor != 0).sum(dim=dim)
        assert (kept <= max(1, round(0.1 * tensor.shape[dim]))).all() and kept.sum() > 0


def test_roselora_cut_entries_do_not_come_back_through_the_moments(tmp_path):
    trainer = make(tmp_path, "roselora", options={"final_fraction": 0.2, "begin": 0.0, "end": 0.5}, max_steps=4)
    seen = []

    def step_without_gradient():
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                cut, before = parameter == 0, parameter.detach().clone()
                moments = [
                    x for x in trainer.optimizer.state[parameter].values() if getattr(x, "shape", None) == cut.shape
                ]
                assert len(moments) == 2 and not any(moment[cut].any() for moment in moments)
                parameter.grad = torch.zeros_like(parameter)
                seen.append((parameter, cut, before))
        trainer.optimizer.step()
        return all(not parameter[cut].any() for parameter, cut, _ in seen), any((p != b).any() for p, _, b in seen)

    trainer.train()
    still_cut, moved = step_without_gradient()
    assert still_cut and moved


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit", "AdEMAMix", "AdEMAMix8bit"])
def test_roselora_cuts_moments_that_are_kept_in_codes_or_stacked(kind):
    optimizers = pytest.importorskip("bitsandbytes").optim
    torch.manual_seed(0)
    parameter, cut = torch.nn.Parameter(torch.randn(8, 512)), torch.rand(8, 512) < 0.8
    options = {"min_8bit_size": 16} if kind != "AdEMAMix" else {}
    optimizer = getattr(optimizers, kind)([parameter], lr=0.1, weight_decay=0.0, **options)
    for scale in (1, 1, 0):
        parameter.grad = scale * torch.randn(8, 512)
        optimizer.step()
        if scale:
            parameter.data.masked_fill_(cut, 0)
            _cut_moments(optimizer.state[parameter], cut)
            before = parameter.detach().clone()
    assert not parameter[cut].any() and (parameter != before)[~cut].any()


def test_roselora_smooths_the_sensitivity_and_keeps_the_most_sensitive_by_hand(tmp_path):
    """Three steps by the formulas, every gradient taken from the run itself."""
    trainer = make(tmp_path, "roselora", options={"begin": 0.0, "end": 1.0}, max_steps=3)
    layer = next(iter(adapted_layers(trainer.model).values()))
    name, A = next(iter(adapted_layers(trainer.model))), layer.lora_A["default"].weight
    (prune,) = (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "_Prune")
    smooth, cuts, original, cut = [], [], type(prune).on_pre_optimizer_step, type(prune).on_optimizer_step

    def watched(self, args, state, control, **kwargs):
        now = (A * A.grad).abs().detach()
        smooth.append(now if not smooth else 0.8 * smooth[-1] + 0.2 * now)
        original(self, args, state, control, **kwargs)
        torch.testing.assert_close(self.sensitivity[f"{name}.lora_A"], smooth[-1])

    def watched_cut(self, args, state, control, **kwargs):
        cut(self, args, state, control, **kwargs)
        cuts.append(max(1, round((0.05 + 0.95 * (1 - len(smooth) / 3) ** 3) * A.shape[1])))
        order = smooth[-1].argsort(dim=1, descending=True, stable=True)
        wanted = torch.zeros_like(A, dtype=torch.bool).scatter(1, order[:, : cuts[-1]], True)
        assert torch.equal(A != 0, wanted)

    prune.on_pre_optimizer_step, prune.on_optimizer_step = watched.__get__(prune), watched_cut.__get__(prune)
    trainer.train()
    assert len(smooth) == 3 and smooth[-1].any() and cuts == [11, 3, 2]
    assert sum(x.numel() for x in prune.sensitivity.values()) == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )  # memory: one number a trained parameter, whatever the number of steps


def test_roselora_learns_nothing_from_a_step_that_overflowed(tmp_path):
    trainer = make(tmp_path, "roselora", options={"begin": 0.0, "end": 0.0}, max_steps=2)
    trainer.train()
    (prune,) = (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "_Prune")
    before = {key: value.clone() for key, value in prune.sensitivity.items()}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, torch.inf)
        p.data.fill_(1.0)  # of which most would be cut
    skipped = SimpleNamespace(step_was_skipped=True, state={})  # as float16's scaler leaves it
    prune.on_pre_optimizer_step(None, trainer.state, None, model=trainer.model)
    prune.on_optimizer_step(None, trainer.state, None, model=trainer.model, optimizer=skipped)
    assert all(torch.equal(prune.sensitivity[key], value) for key, value in before.items())
    assert all((p == 1).all() for p in trained)


def test_roselora_cuts_nothing_without_having_seen_a_gradient(tmp_path):
    trainer = make(tmp_path, "roselora", options={"begin": 0.0, "end": 0.0})
    trainer.add_callback(type("NoGradients", (TrainerCallback,), {"on_pre_optimizer_step": forget_gradients})())
    trainer.callback_handler.callbacks.insert(0, trainer.callback_handler.callbacks.pop())
    with pytest.raises(RuntimeError, match="no gradient was there to be read before a step"):
        trainer.train()


def forget_gradients(self, args, state, control, model, **_):
    model.zero_grad()  # what DeepSpeed leaves


@pytest.mark.parametrize(
    "name, sharded, said", [("roselora", False, "DeepSpeed leaves none; use DDP"), ("roselora", True, "use DDP for it"),
                            ("oplora", True, "use DDP or ZeRO-2"), ("oplora", False, None)],
)  # fmt: skip
def test_engines_under_which_a_method_cannot_train(name, sharded, said):
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_engine(METHODS[name], fsdp=None, zero=3 if sharded else 2, args=SimpleNamespace(bf16=False, fp16=False))


@pytest.mark.parametrize(
    ("adapted", "counted"), [("qkv", "q"), ("kv", "k"), ("v", "v"), ("qvo", "qo"), (["gate", "up"], ["gate"]), (["up"], ["up"])]
)  # fmt: skip
def test_an_input_counts_once_whichever_of_its_linears_are_adapted(adapted, counted):
    names = lambda leaves: [f"layers.{i}.{leaf}_proj" for i in (0, 1) for leaf in leaves]  # noqa: E731
    assert list(distinct_inputs(dict.fromkeys(names(adapted)))) == names(counted)


def test_the_plan_counts_the_gradients_that_a_start_holds():
    plan = lambda name: plan_methods(load_recipe("math", ["method.rank=4"], methods=name), tiny_model().config)[0]  # noqa: E731
    linears = sum(
        x.weight.numel() for n, x in tiny_model().named_modules() if isinstance(x, nn.Linear) and n != "lm_head"
    )
    assert plan("lora").start_bytes == 0
    assert plan("keeplora").start_bytes == plan("lora-ga").start_bytes == 2 * linears  # in the weights' bfloat16
    whole = plan("osf")
    assert whole.kept_bytes > 0 and whole.peak_bytes(0, 0) == whole.extra_bytes
    assert plan("keeplora").peak_bytes(1, 10**9) == 1 + 10**9 + max(plan("keeplora").extra_bytes, 2 * linears)


@pytest.mark.parametrize("key", ["bf16", "fp16"])
def test_deepspeed_does_not_round_what_trains(key):
    args = SimpleNamespace(**{"bf16": False, "fp16": False, "torch_compile": False, key: True})
    check_engine(METHODS["lora-null-v1"], fsdp=2, zero=None, args=args)
    args.torch_compile = True
    with pytest.raises(UserError, match="torch_compile: under FSDP2 the adapter would be saved under names"):
        check_engine(METHODS["lora-null-v1"], fsdp=2, zero=None, args=args)
    with pytest.raises(UserError, match=f"training.{key}: DeepSpeed turns what trains into {key} too"):
        check_engine(METHODS["lora-null-v1"], fsdp=None, zero=2, args=args)


def test_roselora_takes_no_earlier_checkpoint_for_its_result(tmp_path):
    trainer = make(tmp_path, "roselora")
    trainer.args.load_best_model_at_end = True
    with pytest.raises(
        UserError, match=r"load_best_model_at_end: roselora is as sparse as asked from 0\.8 of the steps"
    ):
        trainer.train()


class _Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("step, kept", [(2, "0.357"), (3, "0.132"), (5, None), (6, None)])
def test_roselora_that_ends_early_says_that_it_is_denser_than_asked(tmp_path, caplog, step, kept):
    trainer = make(tmp_path, "roselora")
    trainer.add_callback(_Stop(step))
    trainer.train()
    told = f"training ended after {step} of 6 steps, with {kept} of the entries kept, not the final_fraction of 0.05"
    assert (told in caplog.text) == bool(kept) and ("final_fraction" in caplog.text) == bool(kept)


def test_roselora_clamp(tmp_path):
    trainer = make(tmp_path, "roselora", options={"clamp": 3e-3})
    trainer.train()
    largest = max(p.abs().max() for p in trainer.model.parameters() if p.requires_grad)
    assert 0 < largest <= 3e-3 + 1e-9


@pytest.mark.parametrize(
    "wrong", [{"final_fraction": 0}, {"begin": 0.9}, {"end": 1.1}, {"decay": 1.0}, {"clamp": -1.0}, {"clmp": 1}]
)
def test_roselora_refuses_nonsense(wrong):
    with pytest.raises(UserError, match=r"method\.options\.roselora"):
        make_method("roselora", wrong)


# --- the table ---


def test_the_table_holds_every_method():
    assert set(ALL) <= set(METHODS)
    assert all(issubclass(kind, Method) and kind.name == name for name, kind in METHODS.items())


def test_unknown_method_and_option():
    with pytest.raises(UserError, match="did you mean 'pissa'"):
        make_method("pisa")
    with pytest.raises(UserError, match=r"no option 'rowz'.*did you mean 'rows'"):
        make_method("eva", {"rowz": 3})
    with pytest.raises(UserError, match="wrong type"):
        make_method("roselora", {"clamp": "small"})
    with pytest.raises(UserError, match=r"method\.options\.clora\.weight: must be a number, not True"):
        make_method("clora", {"weight": True})
    assert make_method("clora", {"weight": 2}).weight == 2


@pytest.mark.parametrize(
    "found, told",
    [
        (torch.tensor(1.0), r"extra_loss of clora has to return \{name: Term\(value, weight\)\}"),
        ({"subspace_penalty": torch.tensor(1.0)}, "extra_loss of clora has to return"),
        ({"subspace_penalty": Term(torch.ones(2), 1.0)}, "with tensors of one number"),
        (
            {"penalty": Term(torch.tensor(1.0), 1.0)},
            "extra_loss of clora returns 'penalty', which its terms do not name",
        ),
    ],
)
def test_what_is_added_to_the_loss_is_what_the_method_names(tmp_path, monkeypatch, found, told):
    trainer = make(tmp_path, "clora")
    monkeypatch.setattr(trainer.method, "extra_loss", lambda *_: found)
    with pytest.raises(UserError, match=told):
        trainer.train()


def test_what_is_computed_becomes_a_and_b_and_nothing_of_it_is_ignored():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    name, layer = next(iter(adapted_layers(model).items()))
    A, B = factors_of(layer)
    Method().apply(model, {f"{name}.lora_A": torch.ones_like(A), f"{name}.lora_B": torch.ones_like(B)})
    assert (A == 1).all() and (B == 1).all()
    for other in ("scale", f"{name}.lora_E", "elsewhere.lora_A"):
        with pytest.raises(
            UserError, match=f"compute of lora returns '{other}', which is no LAYER.lora_A or LAYER.lora_B"
        ):
            Method().apply(model, {other: torch.ones(2)})


def test_a_quantized_base_is_refused_with_the_methods_that_work():
    for name in ("pissa", "milora", "corda", "full", "osf", "mica"):
        with pytest.raises(UserError, match=f"{name} needs plain weights.*lora, lora-fa"):
            check_base(METHODS[name], quantized=True)
    for name in ("lora", "lora-fa", "roselora", "lora-null-v1", "lora-null-v2"):
        check_base(METHODS[name], quantized=True)


def test_a_method_of_ones_own_is_one_file(tmp_path, monkeypatch):
    file = tmp_path / "halved.py"
    file.write_text(
        "from lora_null.trainer.methods import Method, method\n"
        "@method\nclass Halved(Method):\n    name = 'halved-b'\n    factor: float = 0.5\n"
        "    def config(self, **adapter):\n        from peft import LoraConfig\n"
        "        return LoraConfig(**adapter | {'lora_alpha': self.factor * adapter['lora_alpha']})\n"
    )
    monkeypatch.setattr("lora_null.trainer.methods.METHODS", METHODS)
    assert load_method_file(str(file)) == ["halved-b"]
    try:
        trainer = make(tmp_path / "run", "halved-b", options={"factor": 0.25})
        assert next(iter(adapted_layers(trainer.model).values())).scaling["default"] == 0.5
        trainer.train()
    finally:
        del METHODS["halved-b"]
    file.write_text("x = 1")
    with pytest.raises(UserError, match="enters no method"):
        load_method_file(str(file))
    file.write_text("import nothing_of_the_kind")
    with pytest.raises(UserError, match="cannot be imported"):
        load_method_file(str(file))


@pytest.mark.parametrize(
    "body, said",
    [
        ("def extra_loss(self, trainer, model, micro_batch): return {}", "extra_loss does nothing without terms"),
        ("terms = ('l2',)", "terms does nothing without extra_loss"),
        ("def compute(self, trainer, batches): return {}", "compute does nothing without training_batches"),
        ("def training_batches(self, trainer): return []", "training_batches does nothing without compute"),
    ],
)
def test_a_hook_that_would_not_be_called_is_refused(tmp_path, body, said):
    file = tmp_path / "half.py"
    file.write_text(
        f"from lora_null.trainer.methods import Method, method\n@method\nclass Half(Method):\n    name = 'half'\n    {body}\n"
    )
    with pytest.raises(UserError, match=rf"half\.py cannot be imported \(Half: {said}; define both, or neither\)"):
        load_method_file(str(file))
    assert "half" not in METHODS


NO_NAMES = {*OWN_FILES, "my/method, v2", "Base", "", ".mine", "init", "dial", "mine.py", "checkpoint-1"}


@pytest.mark.parametrize(
    "body, said",
    [
        ("gain: float = 2.0", "has no name of its own and would replace 'lora-null-v2'; set name"),
        ("name = 'lora'", "'lora' is the name of a method of this package; give it another"),
        *(
            (f"name = {name!r}", rf"{re.escape(repr(name))} cannot name a folder of a run")
            for name in sorted(NO_NAMES)
        ),
        ("name, terms = 'mine', 'pen'", r"terms is a text; write terms = \('pen',\)"),
        *((f"name, terms = 'mine', ({name!r},)", f"the term {name!r} is the name of another") for name in LOGGED),
    ],
)
def test_a_method_of_ones_own_takes_no_others_place(tmp_path, body, said):
    file, before = tmp_path / "mine.py", dict(METHODS)
    head = "from lora_null.trainer.methods.lora_null import LoRANullV2, method\n@method\nclass Mine(LoRANullV2):\n    "
    file.write_text(head + body)
    with pytest.raises(UserError, match=rf"mine\.py cannot be imported \(Mine: {said}"):
        load_method_file(str(file))
    assert before == METHODS
    file.write_text(head + "name = 'mine-own'")
    try:
        assert load_method_file(str(file)) == load_method_file(str(file)) == ["mine-own"]  # again, as a notebook does
    finally:
        del METHODS["mine-own"]


OWN_START = """from __future__ import annotations
import torch
IMPORT
from lora_null.trainer.methods import method
from lora_null.trainer.methods.residual import ResidualMethod
@method
class Scaled(ResidualMethod):
    name = 'scaled-rows'
    gain: float = 1.0
    def factors(self, weight, r, prepared):
        return SCALE * self.gain * torch.eye(weight.shape[1])[:r].to(weight), weight[:, :r] / 4
"""


@pytest.mark.parametrize("edited", ["scaled.py", "scaled_by.py"])
def test_a_start_of_ones_own_is_computed_anew_when_its_file_is_edited(tmp_path, monkeypatch, capsys, edited):
    """Or one that it imports, here from another that it imports."""
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    found, file = [], tmp_path / "scaled.py"
    (tmp_path / "scaled_beside.py").write_text("from scaled_by import SCALE\n")
    try:
        for scale in (1, 1, 2):
            own = edited == "scaled.py"
            file.write_text(
                OWN_START.replace("IMPORT", f"SCALE = {scale}" if own else "from scaled_beside import SCALE")
            )
            (tmp_path / "scaled_by.py").write_text(f"SCALE = {1 if own else scale}  # {'x' * scale}\n")
            for name in ("scaled_by", "scaled_beside"):
                monkeypatch.delitem(sys.modules, name, raising=False)
            assert load_method_file(str(file)) == ["scaled-rows"]
            layer = next(iter(adapted_layers(started(tmp_path / "run", "scaled-rows").model).values()))
            found.append((layer.lora_A["default"].weight, "reused" in capsys.readouterr().err))
    finally:
        del METHODS["scaled-rows"]
    assert [reused for _, reused in found] == [False, True, False]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[2][0], 2 * found[0][0])


def test_a_cache_that_cannot_be_written_is_told_and_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))
    trainer = started(tmp_path / "run", "lora-null-v2")
    assert f"not kept, {tmp_path / 'cache'} cannot be written" in capsys.readouterr().err
    assert trainer.layer_report.layers and (tmp_path / "run" / "init" / "layers.json").is_file()


def test_a_weight_with_nan_is_named(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    method = make_method("pissa")
    adapter = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    data = {"train_dataset": ROWS, "processing_class": tiny_tokenizer(), "args": SFTConfig(**quick(tmp_path))}
    trainer = LoraNullSFTTrainer(model=model, peft_config=method.config(**adapter), method=method, **data)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: its weight has numbers that are NaN"):
        trainer.train()


def test_memory_that_runs_out_is_no_model_of_another_kind(monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model()
    monkeypatch.setattr(type(model.model), "forward", out_of_memory)
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}]
    modules = {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}
    with pytest.raises(torch.OutOfMemoryError):
        list(measure_in_parts(model, modules, batches, progress=False))


@pytest.mark.parametrize("name", ["eva", "lora-ga"])
def test_the_first_rows_of_a_stream_start_what_reads_rows(tmp_path, name, monkeypatch):
    whole = started(tmp_path / "1", name)
    monkeypatch.setitem(globals(), "ROWS", ROWS.to_iterable_dataset())
    streamed = started(tmp_path / "2", name)
    for (key, a), b in zip(whole.model.state_dict().items(), streamed.model.state_dict().values()):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["oft", "osf"])
def test_other_configs_of_peft_take_what_they_have_and_drop_nothing(name):
    method = make_method(name)
    assert method.config(r=4, lora_alpha=8).target_modules == "all-linear"
    with pytest.raises(UserError, match=rf"lora_dropout: {name} takes no such argument"):
        method.config(lora_dropout=0.1)
    if name == "oft":
        taken = {"exclude_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]}
        config = method.config(target_modules=["k_proj"], **taken)
        assert {key: getattr(config, key) for key in taken} == {**taken, "exclude_modules": {"q_proj"}}
    else:
        with pytest.raises(UserError, match="modules_to_save: osf takes no such argument"):
            method.config(modules_to_save=["lm_head"])


@pytest.mark.parametrize(
    "key, value", [("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("use_rslora", True)]
)
@pytest.mark.parametrize("name", ["oft", "osf", "full"])
def test_what_has_no_ranks_takes_no_pattern_of_them(name, key, value):
    with pytest.raises(UserError, match=f"{key}: {name} has no factors A and B"):
        make_method(name).config(r=4, lora_alpha=8, **{key: value})


@pytest.mark.parametrize("owner, call, at", [(torch.Tensor, "backward", 1), (LoraLayer, "lora_ga_init", 3)])
def test_lora_ga_starts_the_same_after_an_attempt_that_was_broken_off(tmp_path, monkeypatch, owner, call, at):
    inner, done = getattr(owner, call), []

    def broken_off(*given):
        inner(*given)
        done.append(given)
        if len(done) == at:
            raise KeyboardInterrupt

    expected, trainer = (make(tmp_path / name, "lora-ga", max_steps=1) for name in "12")
    for each in (expected, trainer):
        each._init_options = replace(each._init_options, cache=False)
    expected._prepare(resuming=None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, call, broken_off)
        trainer.train()
    assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-6
    trainer._prepare(resuming=None)
    for name, layer in adapted_layers(trainer.model).items():
        for one, other in zip(factors_of(layer), factors_of(adapted_layers(expected.model)[name])):
            assert torch.equal(one, other), name
    trainer._prepared = True
    trainer.train()


def test_full_fine_tuning_takes_nothing_that_it_would_not_read(tmp_path):
    with pytest.raises(UserError, match="exclude_modules: full trains every weight of the model itself"):
        make_method("full").config(exclude_modules=["q_proj"])
    for targets, said in (
        (["q_proj", "v_porj"], "no module matches 'v_porj' (did you mean 'v_proj'?)"),
        (".*q", "no module matches '.*q', a text is a pattern for the whole name of a module"),
    ):
        with pytest.raises(UserError, match=f"target_modules: {re.escape(said)}"):
            make(tmp_path, "full", adapter={"target_modules": targets})


@pytest.mark.parametrize(
    "name, config",
    [
        ("oft", OFTConfig(oft_block_size=8)),
        ("osf", OSFConfig(effective_rank=4)),
        ("eva", LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))),
    ],
)
def test_an_option_that_method_and_adapter_have_both_is_the_same_in_both(name, config):
    with pytest.raises(
        UserError, match=rf"peft_config: {name} cannot train another .*; give peft_config=method.config"
    ):
        check_adapter(make_method(name), "a model", config)


def test_eva_takes_no_ranks_that_it_would_not_keep():
    with pytest.raises(UserError, match="rank_pattern: eva deals out the ranks itself"):
        make_method("eva").config(r=4, rank_pattern={"q_proj": 2})


def test_pefts_own_options_of_a_start_go_through_the_method():
    assert make_method("eva").config(r=4, eva_config=EvaConfig(rho=2.0, tau=0.9)).eva_config.tau == 0.9
    how = LoraGAConfig(direction="ArB2r")
    assert make_method("lora-ga").config(r=4, lora_ga_config=how).lora_ga_config is how


@pytest.mark.parametrize("name", ["pissa", "lora-ga", "lora-null-v1"])
def test_no_dropout_on_a_residual_base_and_no_bias_of_b(name):
    with pytest.raises(UserError, match="lora_dropout: a residual base needs 0"):
        make_method(name).config(lora_dropout=0.1)
    with pytest.raises(UserError, match="lora_bias: not supported, the saved rank-2r adapter has no place"):
        make_method(name).config(lora_bias=True)
    with pytest.raises(UserError, match=r"alora_invocation_tokens: not .*, aLoRA adapts only some tokens"):
        make_method(name).config(alora_invocation_tokens=[1, 2])


@pytest.mark.parametrize("name", ["eva", "lora-ga"])
def test_a_start_of_rows_that_a_collator_of_ones_own_cannot_take_whole(tmp_path, name):
    def collate(rows):  # as those of transformers, which refuse a column of text
        assert not any(isinstance(value, str) for row in rows for value in row.values())
        return DataCollatorForLanguageModeling(pad_token_id=0)(rows)

    trainer = make(tmp_path, name, max_steps=1)
    trainer.train_dataset = trainer.train_dataset.add_column("note", ["a text"] * len(trainer.train_dataset))
    trainer.args.remove_unused_columns, trainer.data_collator = True, collate
    trainer.train()


def test_a_residual_methods_options_are_a_part_of_its_rule():
    """Another gain is another start, which the cache must not take for the first."""

    @dataclass
    class Scaled(PiSSA):
        name = "scaled"
        gain: float = 1.0

    rules = {PiSSA().label, Scaled().label, Scaled(2.0).label, Scaled(gain=2.0).label}
    assert len(rules) == 3 and PiSSA().label == "pissa"


@pytest.mark.parametrize("name", ["pissa", "milora", "corda", "lora-ga"])
def test_disabling_gives_the_original_model_back(tmp_path, name):
    trainer = make(tmp_path, name)
    trainer.train()
    with trainer.model.disable_adapter():
        assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-4


def test_shared_weights_and_large_ranks_are_refused():
    model = tiny_model(tie_word_embeddings=True)
    method = make_method("pissa")
    config = method.config(r=4, target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="lm_head shares its weight"):
        method.check(get_peft_model(model, config))
    with pytest.raises(UserError, match=r"r: 17 is larger than .* allows"):
        method.check(get_peft_model(tiny_model(), method.config(r=17, target_modules="all-linear")))

"""Weight decay on a residual base pulls to the start; an oracle of AdamW in numpy tells by how much."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.trainer_optimizer
from peft import LoraConfig, get_peft_model
from test_null_basis import adamw
from test_trainer import make
from tiny import tiny_model
from transformers import TrainerCallback

from lora_null import LoraNullConfig, UserError
from lora_null.layer import adapted_layers, factors_of, residual_of
from lora_null.trainer.decay import DecayToStart, check_decay_is_read, decays_to_start
from lora_null.trainer.methods import make_method

KINDS = {
    "v1": LoraNullConfig(r=4, variant="v1", lora_alpha=8),
    "nb": LoraNullConfig(r=4, variant="nb", start="residual", null_multiple=2),
    "pissa": make_method("pissa").config(r=4, target_modules="all-linear"),
    "v2": LoraNullConfig(r=4, variant="v2"),
    "lora": LoraConfig(r=4, target_modules="all-linear"),
}
DECAYED = dict(weight_decay=0.3, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.5, max_steps=5)
DECAYED |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, save_strategy="steps", save_steps=3)


class Record(TrainerCallback):
    """Keeps the factors before the first step, and each step's clipped gradients and rate."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model, **_):
        self.before = {n: p.detach().numpy().copy() for n, p in model.named_parameters() if p.requires_grad}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
        gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.requires_grad}
        self.steps.append((optimizer.param_groups[0]["lr"], gradients))


def trainer_of(kind, folder, *, decay_to_start=None, **options):
    method = make_method("pissa") if kind == "pissa" else None
    return make(folder, KINDS[kind], method=method, model=tiny_model().double(), decay_to_start=decay_to_start,
                **DECAYED | options)  # fmt: skip


@pytest.mark.parametrize("asked", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_adamws_with_decay_to_where_it_should_go(kind, asked, tmp_path):
    trainer, record = trainer_of(kind, tmp_path, decay_to_start=asked), Record()
    trainer.add_callback(record)
    trainer.train()
    ours, moments = {name: p.copy() for name, p in record.before.items()}, {}
    to_start = kind in ("v1", "nb", "pissa") and asked is None
    rates = set()
    for step, (lr, gradients) in enumerate(record.steps, start=1):
        rates.add(lr)
        for name in ours:
            ours[name] -= lr * 0.3 * (ours[name] - (record.before[name] if to_start else 0))
        adamw(ours, gradients, moments, step, lr=lr, decay=0)
        for module, layer in adapted_layers(trainer.model).items():
            for basis in getattr(layer, "bases", {}).values():
                A, N = ours[f"base_model.model.{module}.lora_A.default.weight"], basis.vectors.numpy()
                A[:] = A @ N @ N.T
    assert len(rates) == 5
    for name, p in trainer.model.named_parameters():
        if name in ours:
            assert p.dtype == torch.float64
            np.testing.assert_allclose(p.detach().numpy(), ours[name], atol=1e-9)


@pytest.mark.parametrize("given, added", [(DecayToStart(), None), (None, DecayToStart()), (None, DecayToStart)])
def test_ones_own_callback_beside_the_trainers_acts_once(given, added, tmp_path):
    one = trainer_of("v1", tmp_path / "1")
    two = trainer_of("v1", tmp_path / "2", callbacks=[given] if given else None)
    if added is not None:
        two.add_callback(added)
    for trainer in (one, two):
        trainer.train()
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["v1", "nb"])
def test_resumed_it_ends_in_the_same_bits(kind, tmp_path):
    whole, resumed = trainer_of(kind, tmp_path / "1"), trainer_of(kind, tmp_path / "2")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_checkpoints_decay_goes_to_the_start_where_none_is_asked_for(tmp_path):
    """The optimizer goes on with the decay that the checkpoint holds."""
    whole = make(
        tmp_path / "whole", LoraNullConfig(r=4, variant="v1"), weight_decay=5.0, save_strategy="steps", save_steps=3
    )
    whole.train()
    resumed = make(tmp_path / "resumed", LoraNullConfig(r=4, variant="v1"), weight_decay=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_no_gradient_reaches_stays_as_it_is(tmp_path):
    class Unreached(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            layer, *_ = adapted_layers(model).values()  # as an expert that no token was sent to
            for factor in factors_of(layer):
                factor.grad = None

    trainer = trainer_of("v1", tmp_path)
    trainer.add_callback(Unreached())
    trainer.train()
    layer, *_ = adapted_layers(trainer.model).values()
    for factor, start in zip(factors_of(layer), residual_of(layer)):
        assert torch.equal(factor, start)


def test_decay_alone_leads_back_to_the_original_model(tmp_path):
    trainer = trainer_of("v1", tmp_path, learning_rate=1e-2, weight_decay=50.0, lr_scheduler_type="constant")
    trainer._prepare(resuming=False)
    trainer._prepared = True
    layers = adapted_layers(trainer.model)
    moved = {}
    for name, layer in layers.items():
        for factor in factors_of(layer):
            factor.requires_grad_(True).register_hook(torch.zeros_like)
        factors_of(layer)[0].data += 1
        moved[name] = factors_of(layer)[0].detach() - residual_of(layer).A
    trainer.train()
    for name, layer in layers.items():  # five steps of a half
        A = factors_of(layer)[0].detach()
        torch.testing.assert_close(A - residual_of(layer).A, moved[name] / 32, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "kind, asked, options, message",
    [
        ("lora", True, {}, "no residual base to go back to; decay to zero is decay of the change"),
        ("v2", True, {}, "no residual base"),
        ("v1", True, {"weight_decay": 0.0}, "weight_decay is 0"),
        ("v1", None, {"optim": "adafactor"}, "is defined for AdamW, not for adafactor"),
        ("v1", None, {"optim": "schedule_free_adamw"}, "is defined for AdamW, not for schedule_free_adamw"),
        (
            "v1",
            None,
            {"optim": "galore_adamw_layerwise"},
            "galore_adamw_layerwise steps inside the backward pass, .*decay_to_start=False",
        ),
        ("v1", None, {"optimizer_class": (torch.optim.SGD, {})}, "is defined for AdamW, not for SGD"),
    ],
)
def test_what_means_nothing_is_refused(kind, asked, options, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        trainer_of(kind, tmp_path, decay_to_start=asked, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["osf", "full"])
def test_what_trains_whole_weights_is_not_told_that_it_decays_the_change(name, tmp_path):
    method = make_method(name)
    config = method.config(r=4, target_modules="all-linear") or "none"
    with pytest.raises(UserError, match=r"no residual base .* it is defined for methods that start from one"):
        make(tmp_path, config, method=method, decay_to_start=True, weight_decay=0.1)


def test_an_average_of_weights_leaves_the_basis(tmp_path):
    with pytest.raises(UserError, match=r"optim: schedule_free_adamw averages weights, and nb-lora's A would leave"):
        trainer_of("nb", tmp_path, optim="schedule_free_adamw", weight_decay=0.0)


@pytest.fixture
def galore(monkeypatch):
    """AdamW in the place of the optimizers of the package galore_torch."""

    class GaLoreAdamW(torch.optim.AdamW):
        def __init__(self, groups, lr, weight_decay=0.0):
            super().__init__(groups, lr=lr, weight_decay=weight_decay)

    names = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**dict.fromkeys(names, GaLoreAdamW)))
    monkeypatch.setattr(transformers.trainer_optimizer, "is_galore_torch_available", lambda: True)


@pytest.mark.parametrize("kind", ["v1", "nb", "v2"])
def test_layerwise_optimizers_are_made_once_and_keep_the_basis(kind, galore, tmp_path):
    options = dict(optim="galore_adamw_layerwise", optim_target_modules=["q_proj"], save_strategy="no")
    trainer = make(tmp_path, KINDS[kind], weight_decay=0.0, **options)
    trainer.train()
    hooks = [p._post_accumulate_grad_hooks for p in trainer.model.parameters() if p.requires_grad]
    assert {len(of_one) for of_one in hooks} == {1} and trainer.something_moved
    for layer in adapted_layers(trainer.model).values():
        for basis in getattr(layer, "bases", {}).values():
            A, N = factors_of(layer)[0].detach(), basis.vectors.float()
            assert (A - A @ N @ N.T).norm() < 1e-3 * A.norm()


@pytest.mark.parametrize(
    "options, line",
    [
        (dict(optimizer_class=(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3})), "0.3 of AdamW and 0.0 of"),
        (dict(optim="sgd", optim_args="weight_decay=0.3"), "0.3 of SGD and 0.0 of"),
        (dict(optim="galore_adamw_layerwise", optim_target_modules=["q_proj"], weight_decay=0.3), "0.0 of GaLoreAdamW and 0.3 of"),
        (dict(optimizer_class=(torch.optim.AdamW, {"params": []}), weight_decay=0.3), "0.01 of AdamW and 0.3 of"),
        (dict(optimizer_class=(lambda model, **_: None, {"weight_decay": 0.1}), weight_decay=0.3), "0.1 of <lambda> and 0.3 of"),
        (dict(optimizer_class=(partial(dict), {"weight_decay": 0.1}), weight_decay=0.3), ".* and 0.3 of"),
    ],
)  # fmt: skip
def test_a_decay_that_would_not_be_read_is_refused_before_the_initialization(options, line, galore, tmp_path):
    trainer = make(tmp_path, KINDS["v2"], save_strategy="no", **options)
    with pytest.raises(UserError, match=f"^weight_decay: {line}"):
        trainer.train()
    assert not trainer.init_dir.exists()


def test_a_decay_that_is_read_is_not_refused():
    args, weight = SimpleNamespace(weight_decay=0.1, optim="adamw_torch"), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    for kind, options in (
        (torch.optim.AdamW, {"lr": 1.0}),
        (torch.optim.AdamW, {"params": groups}),
        (torch.optim.AdamW, {"params": [weight], "weight_decay": 0.1}),
        (torch.optim.AdamW, {"params": iter([weight]), "weight_decay": 0.1}),
        (lambda model, decay: None, {"decay": 0.1}),
    ):
        check_decay_is_read(args, kind, options)
        assert list(options.get("params", [weight]))  # still to be read by the optimizer


def test_gradients_that_are_gone_cannot_be_read(tmp_path):
    method, options = make_method("roselora"), dict(optim="galore_adamw_layerwise", optim_target_modules=["q_proj"])
    trainer = make(tmp_path, method.config(r=4, target_modules="all-linear"), method=method, **options)
    with pytest.raises(UserError, match="roselora reads gradients, and galore_adamw_layerwise leaves none; use adamw"):
        trainer.train()


def test_deepspeed_is_refused(tmp_path):
    trainer = trainer_of("v1", tmp_path)
    with pytest.raises(UserError, match=r"DeepSpeed keeps weights of its own.*decay_to_start=False"):
        decays_to_start(None, trainer.model, trainer.args, None, deepspeed=True)
    assert not decays_to_start(False, trainer.model, trainer.args, None, deepspeed=True)


def test_an_optimizer_of_ones_own(tmp_path):
    model = get_peft_model(tiny_model(), KINDS["v1"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for optimizer, fits in ((torch.optim.AdamW(trained, weight_decay=0.1), True),
                            (torch.optim.SGD(trained, weight_decay=0.1), False)):  # fmt: skip
        options = dict(model=model, optimizers=(optimizer, None), weight_decay=0.0, save_strategy="no")
        if not fits:
            with pytest.raises(UserError, match="not for SGD"):
                make(tmp_path, "none", **options)
            continue
        trainer = make(tmp_path, "none", **options)
        assert "DecayToStart" in trainer.callback_handler.callback_list


def test_a_decay_beside_an_optimizer_of_ones_own(tmp_path):
    model = get_peft_model(tiny_model(), KINDS["v1"])
    trained = [p for p in model.parameters() if p.requires_grad]
    own = torch.optim.AdamW([{"params": trained[:2], "weight_decay": 0.0}, {"params": trained[2:]}], weight_decay=0.1)
    with pytest.raises(UserError, match=r"weight_decay: 0.0 of the optimizer given and 0.5 of the training arguments"):
        make(tmp_path, "none", model=model, optimizers=(own, None), weight_decay=0.5)
    make(tmp_path, "none", model=model, optimizers=(own, None), weight_decay=0.1)


def test_an_optimizer_of_ones_own_whose_groups_have_no_decay(tmp_path):
    class AdamW(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1e-3})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=-1e-3)

    model = get_peft_model(tiny_model(), KINDS["v1"])
    own = AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = make(tmp_path, "none", model=model, optimizers=(own, None), save_strategy="no")
    trainer.train()
    assert trainer.something_moved

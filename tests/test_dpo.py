"""DPO: the reference is the original model, and the mixin fits other trainers too."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from trainers import CUT, PAIRS, TEXTS, quick
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from lora_null import LoraNullConfig, UserError
from lora_null.layer import adapted_layers
from lora_null.trainer import LoraNullDPOTrainer, LoraNullMixin
from lora_null.trainer.methods import make_method

LNULL = [LoraNullConfig(r=4, variant="v1"), LoraNullConfig(r=4, variant="v2"), LoraNullConfig(r=4, variant="nb")]


def make(folder, config, *, pairs=PAIRS, model=None, **changes):
    return LoraNullDPOTrainer(
        model=model or tiny_model(),
        args=DPOConfig(**quick(folder, **{"max_steps": 4, **changes})),
        train_dataset=pairs,
        processing_class=tiny_tokenizer(),
        peft_config=config,
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def log_probs(model, batch):
    """Each sequence's summed log-probability of its completion, from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("config", LNULL, ids=["v1", "v2", "nb"])
def test_at_step_0_policy_and_reference_are_the_original_model(tmp_path, config):
    trainer = make(tmp_path, config)
    trainer._prepare(resuming=False)
    trainer._prepared = True
    batch = next(iter(trainer.get_train_dataloader()))
    original = log_probs(tiny_model().eval(), batch)
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.allclose(reference, original, atol=0, rtol=1e-5)
    policy = log_probs(trainer.model.eval(), batch)
    assert torch.allclose(policy, reference, atol=0, rtol=1e-5), policy - reference
    trainer.train()
    assert abs(logged(trainer, "rewards/chosen")[0]) < 1e-5 and abs(logged(trainer, "rewards/margins")[0]) < 1e-5
    assert logged(trainer, "rewards/margins")[-1] > 0.01
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-5)
    again = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert torch.allclose(again, original, atol=0, rtol=1e-5)  # training moved the policy, not the reference


@pytest.mark.parametrize("form", [dict(variant="v1"), dict(variant="nb", start="residual")], ids=["v1", "nb"])
@pytest.mark.parametrize(
    "dtype, bf16", [("bfloat16", False), ("float16", False), ("bfloat16", True), ("float32", True)]
)
def test_a_16_bit_policy_starts_at_its_reference(tmp_path, dtype, bf16, form):
    """Both compute and round what a residual base and its adapter give together alike, so that rewards start at 0."""
    config = LoraNullConfig(r=4, lora_alpha=6, **form)
    trainer = make(tmp_path, config, model=tiny_model().to(getattr(torch, dtype)), max_steps=1, bf16=bf16)
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == logged(trainer, "rewards/rejected")[0] == 0
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("config", LNULL, ids=["v1", "v2", "nb"])
def test_precomputed_references_give_the_same_run(tmp_path, config):
    live, ahead = make(tmp_path / "a", config), make(tmp_path / "b", config, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in ahead.train_dataset.column_names
    live.train()
    ahead.train()
    for key in ("loss", "rewards/chosen", "rewards/margins"):
        assert logged(ahead, key) == pytest.approx(logged(live, key), abs=2e-5)


def test_a_v1_reference_is_not_the_residual_base(tmp_path, monkeypatch):
    """Without the compensation the reference would be W0 − s·B0A0: this is what the first test would catch."""
    monkeypatch.setattr("lora_null.layer.LoraNullLinear._missing_scale", lambda self: 0)
    trainer = make(tmp_path, LNULL[0])
    trainer.train()
    assert abs(logged(trainer, "rewards/chosen")[0]) > 1e-3


def test_v2_drifts_less_than_lora(tmp_path):
    lora, v2 = make(tmp_path / "a", LoraConfig(r=4, target_modules="all-linear")), make(tmp_path / "b", LNULL[1])
    for trainer in (lora, v2):
        trainer.train()
        assert len(logged(trainer, "drift_mean")) == 4
    assert v2.drift_meter.summary()["mean"] < lora.drift_meter.summary()["mean"]


@pytest.mark.parametrize("config", LNULL, ids=["v1", "v2", "nb"])
def test_resumed_run_ends_in_the_same_bits(tmp_path, config):
    whole = make(tmp_path, config, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(tmp_path, config, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_equal_completions_are_a_users_mistake(tmp_path):
    same = PAIRS.remove_columns("rejected").add_column("rejected", PAIRS["chosen"])
    with pytest.raises(UserError, match="chosen and rejected are equal"):
        make(tmp_path, LNULL[1], pairs=same).train()


def test_it_is_trls_trainer(tmp_path):
    assert isinstance(make(tmp_path, LNULL[1]), DPOTrainer)


class LoraNullGRPOTrainer(LoraNullMixin, GRPOTrainer):
    """The three lines that put the initialization on another TRL trainer."""


def test_a_model_of_no_path_needs_its_reference_where_every_weight_trains(tmp_path):
    given = {"train_dataset": PAIRS, "processing_class": tiny_tokenizer(), "method": make_method("full")}
    given |= {"calibration_dataset": TEXTS, "calibration_args": CUT}
    with pytest.raises(UserError, match=r"^ref_model: every weight trains, and .* give ref_model=copy.deepcopy"):
        LoraNullDPOTrainer(model=tiny_model(), args=DPOConfig(**quick(tmp_path, max_steps=4)), **given)
    rewarded = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} | given
    with pytest.raises(
        UserError, match=r"^model: every weight trains, and .* save it, and load it with from_pretrained"
    ):
        LoraNullGRPOTrainer(
            model=tiny_model(), args=GRPOConfig(**quick(tmp_path, beta=0.1, num_generations=2)), **rewarded
        )
    arguments = DPOConfig(**quick(tmp_path, max_steps=1))
    LoraNullDPOTrainer(model=tiny_model(), ref_model=tiny_model(), args=arguments, **given).train()


def test_a_reference_is_of_the_precision_that_the_method_gives_the_model(tmp_path):
    given = {"train_dataset": PAIRS, "processing_class": tiny_tokenizer(), "method": make_method("full")}
    half = lambda: tiny_model().to(torch.bfloat16)  # noqa: E731
    trainer = LoraNullDPOTrainer(
        model=half(), ref_model=half(), args=DPOConfig(**quick(tmp_path, max_steps=1)), **given
    )
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0 and logged(trainer, "rewards/chosen")[0] == 0
    ahead = DPOConfig(**quick(tmp_path, max_steps=1, precompute_ref_log_probs=True))
    with pytest.raises(UserError, match=r"precompute_ref_log_probs: full trains in torch.float32, and the references"):
        LoraNullDPOTrainer(model=half(), args=ahead, **given)


def test_a_second_round_says_what_becomes_of_the_first_ones_reference(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    first = make(tmp_path / "1", None, model=model)
    with pytest.raises(UserError, match=r"model: holds the reference of an earlier trainer; after .*delete_adapter"):
        make(tmp_path / "2", None, model=first.model)
    first.model.delete_adapter("ref")
    make(tmp_path / "2", None, model=first.model)


@pytest.mark.parametrize("ready", [True, False])
def test_a_start_of_pefts_that_changes_the_base_is_no_reference(tmp_path, ready):
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, given = (get_peft_model(tiny_model(), config), None) if ready else (tiny_model(), config)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"^init_lora_weights: 'pissa' takes its factors out of the base.*make_method"):
        make(tmp_path, given, model=model)
    assert all(map(torch.equal, before, model.parameters()))
    kept = {"args": DPOConfig(**quick(tmp_path, max_steps=1)), "train_dataset": PAIRS}
    LoraNullDPOTrainer(
        model=model, ref_model=tiny_model(), peft_config=given, processing_class=tiny_tokenizer(), **kept
    ).train()


def test_the_reference_is_of_the_adapter_that_trains(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(UserError, match="model: TRL takes the adapter 'default' for the reference, and 'mine' trains"):
        make(tmp_path, None, model=model)


@pytest.mark.parametrize(
    ("biased", "given", "refused"),
    [(True, {}, True), (True, {"precompute_ref_log_probs": True}, False), (False, {}, False)],
)
def test_a_reference_whose_biases_would_train_is_refused(tmp_path, biased, given, refused):
    config = LoraConfig(r=4, bias="lora_only", target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"^bias: biases of the base would train") if refused else nullcontext():
        make(tmp_path, config, model=tiny_model(attention_bias=biased), **given)


def test_the_mixin_on_one_more_trainer(tmp_path):
    trainer = LoraNullGRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(**quick(tmp_path, max_steps=2, num_generations=2, max_completion_length=8)),
        train_dataset=PAIRS.select_columns("prompt"),
        processing_class=tiny_tokenizer(),
        peft_config=LoraNullConfig(r=4, variant="v2"),
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )
    trainer._prepare(resuming=False)
    trainer._prepared = True
    layers = adapted_layers(trainer.model)
    start = {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}
    assert len(trainer.layer_report.layers) == len(layers) == 14
    trainer.train()
    assert all(torch.equal(layer.lora_A["default"].weight, start[name]) for name, layer in layers.items())
    assert trainer.drift_meter.summary()["mean"] > 0

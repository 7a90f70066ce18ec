"""A trained adapter goes on from where it is; what is saved, restored and loaded as best is whatever trains."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import losses, make
from tiny import logits, random_batches, tiny_model, tiny_tokenizer
from trainers import CUT, ROWS, TEXTS, quick
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.layer import adapted_layers, residual_of
from lora_null.store import cached_folder, read_report
from lora_null.trainer import LoraNullDPOTrainer, LoraNullMixin
from lora_null.trainer.checkpoints import mark_complete
from lora_null.trainer.methods import make_method

BATCHES = random_batches()
PAIRS = Dataset.from_list([{"prompt": f"Q: {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(16)])
CONFIGS = {
    "v1": lambda **more: LoraNullConfig(r=4, variant="v1", **more),
    "v2": lambda **more: LoraNullConfig(r=4, variant="v2", **more),
    "nb": lambda **more: LoraNullConfig(r=4, variant="nb", null_multiple=2, **more),
    "lora": lambda **more: LoraConfig(r=4, target_modules="all-linear", **more),
}


def far(a, b):
    return (logits(a) - logits(b)).abs().max().item()


def second_stage(model, folder, **options):
    """A trainer over a model that is a PeftModel already; its rate changes nothing in float32 unless another is given."""
    return make(folder, "none", model=model, **{"max_steps": 1, "learning_rate": 1e-12, **options})


def dpo(model, folder, **options):
    arguments = dict(per_device_train_batch_size=2, max_steps=2, learning_rate=1e-12)
    return LoraNullDPOTrainer(
        model=model,
        args=DPOConfig(**quick(folder, **{**arguments, **options})),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )


class TestGoingOn:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_a_second_trainer_goes_on(self, kind, tmp_path):
        first = make(tmp_path / "1", CONFIGS[kind]())
        first.train()
        one = logits(first.model).clone()
        second = second_stage(first.model, tmp_path / "2")
        second.train()
        assert (logits(second.model) - one).abs().max() < 1e-5 < far(second.model, tiny_model())
        assert second.layer_report is None and second.drift_meter.summary()["mean"] > 0  # of both stages together

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_two_stages_train_exactly_what_one_trained(self, kind, tmp_path):
        model = make(tmp_path / "1", CONFIGS[kind]())
        model.train()
        A = {name: layer.lora_A["default"].weight.clone() for name, layer in adapted_layers(model.model).items()}
        second = second_stage(model.model, tmp_path / "2", learning_rate=1e-2, max_steps=3)
        second.train()
        second.save_model(tmp_path / "saved")
        for name, layer in adapted_layers(second.model).items():
            assert torch.equal(layer.lora_A["default"].weight, A[name]) == (kind == "v2")
        reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
        assert far(reloaded, second.model) < 1e-4

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_sft_then_dpo(self, kind, tmp_path):
        first = make(tmp_path / "1", CONFIGS[kind]())
        first.train()
        one = logits(first.model).clone()
        second = dpo(first.model, tmp_path / "2")
        second.train()
        assert (logits(second.model) - one).abs().max() < 1e-5
        line = second.state.log_history[0]
        assert abs(line["rewards/chosen"]) < 1e-4 and line["loss"] == pytest.approx(0.6931, abs=1e-3)
        second.model.set_adapter("ref")  # TRL's reference is the policy that it began with, not the original model
        assert (logits(second.model) - one).abs().max() < 1e-5

    @pytest.mark.parametrize("given", ["fresh", "v2 from disk", "v1 from disk"])
    def test_an_adapter_from_disk(self, given, tmp_path):
        if given == "fresh":
            model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
            trainer = second_stage(model, tmp_path)
            trainer.train()
            assert trainer.layer_report is not None
            return
        variant = given[:2]
        first = make(tmp_path / "1", LoraNullConfig(r=4, variant=variant))
        first.train()
        first.save_model(tmp_path / "saved")
        config = LoraNullConfig.from_pretrained(tmp_path / "saved", variant="v2")
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", config=config, is_trainable=True)
        assert far(model, first.model) < 1e-4
        before = {name: layer.lora_A["default"].weight.clone() for name, layer in adapted_layers(model).items()}
        second = second_stage(model, tmp_path / "2", learning_rate=1e-2)
        second.train()
        for name, layer in adapted_layers(second.model).items():  # the guarantee: A stays in the null space
            assert torch.equal(layer.lora_A["default"].weight, before[name])
        assert far(second.model, first.model) > 1e-3

    def test_one_loaded_as_v1_has_no_residual_for_decay_to_go_back_to(self, tmp_path):
        first = make(tmp_path / "1", LoraNullConfig(r=4))
        first.train()
        first.save_model(tmp_path / "saved")
        config = LoraNullConfig.from_pretrained(tmp_path / "saved", variant="v1")
        load = lambda: PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", config=config, is_trainable=True)  # noqa: E731
        second = make(tmp_path / "2", "none", model=load(), weight_decay=0.1, optim="adafactor", max_steps=1)
        assert "DecayToStart" not in second.callback_handler.callback_list
        second.train()
        with pytest.raises(UserError, match="decay_to_start: there is no residual base to go back to"):
            make(tmp_path / "3", "none", model=load(), weight_decay=0.1, decay_to_start=True)

    def test_a_config_that_is_read_back_without_its_variant_says_so(self, tmp_path, caplog):
        LoraNullConfig(r=4, variant="v1").save_pretrained(tmp_path / "alone")
        get_peft_model(tiny_model(), LoraNullConfig(r=4, variant="v1")).save_pretrained(tmp_path / "adapter")
        for folder, given, told in (("alone", {}, True), ("alone", {"variant": "v1"}, False), ("adapter", {}, False)):
            caplog.clear()
            config = LoraNullConfig.from_pretrained(tmp_path / folder, **given)
            assert config.variant == given.get("variant", "v2")
            assert ("variant: a saved config holds none, v2 is taken" in caplog.text) == told

    def test_one_that_has_taken_no_step_goes_on_from_its_start_too(self, tmp_path):
        first = make(tmp_path / "1", CONFIGS["v2"]())
        first._prepare(resuming=False)
        first.save_model(tmp_path / "saved")
        config = LoraNullConfig.from_pretrained(tmp_path / "saved", variant="v2")
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", config=config, is_trainable=True)
        second = second_stage(model, tmp_path / "2", calibration=None, learning_rate=1e-2)
        second.train()
        for name, layer in adapted_layers(second.model).items():
            assert torch.equal(
                layer.lora_A["default"].weight, adapted_layers(first.model)[name].lora_A["default"].weight
            )

    @pytest.mark.parametrize("how", ["initialized v1", "initialized v2", "trained", "loaded", "by PEFT"])
    def test_initializing_what_is_started_is_refused(self, how, tmp_path):
        variant = "v1" if "v1" in how else "v2"
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant=variant))
        if how.startswith("initialized"):
            initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False)
        elif how == "trained":
            torch.nn.init.normal_(next(iter(adapted_layers(model).values())).lora_B["default"].weight)
        elif how == "loaded":
            trained = make(tmp_path / "1")
            trained.train()
            trained.save_model(tmp_path / "saved")
            config = LoraNullConfig.from_pretrained(tmp_path / "saved")
            model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", config=config, is_trainable=True)
        else:
            model = get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]))
            before = logits(model)
            trainer = make(tmp_path, "none", model=model, max_steps=1, learning_rate=1e-12)
            trainer.train()  # goes on instead
            assert (logits(trainer.model) - before).abs().max() < 1e-4
            return
        before = logits(model)
        with pytest.raises(UserError, match="is started already"):
            initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False)
        assert torch.equal(logits(model), before)

    def test_what_would_not_be_read_is_refused(self, tmp_path):
        first = make(tmp_path / "1")
        first.train()
        with pytest.raises(UserError, match="init_folder: would not be read, the adapter is started"):
            make(tmp_path / "2", "none", model=first.model, init_folder=tmp_path / "1")
        with pytest.raises(UserError, match="init_folder: would not be read, lora computes no initialization"):
            make(tmp_path / "2", CONFIGS["lora"](), init_folder=tmp_path / "1")
        with pytest.raises(UserError, match="calibration_dataset: corda needs texts"):
            make(tmp_path / "2", make_method("corda").config(r=4), method=make_method("corda"), calibration=None)

    @pytest.mark.parametrize(
        "name, config, said",
        [
            ("lora", None, "lora cannot train no adapter; give peft_config=method.config"),
            ("kl-anchor", None, "kl-anchor cannot train no adapter"),
            ("full", LoraConfig(r=4), "full trains the model itself, without an adapter; leave it out"),
            ("pissa", LoraConfig(r=4), "pissa cannot train another LoraConfig"),
            ("pissa", LoraNullConfig(r=4, variant="v1"), "pissa cannot train another LoraNullConfig"),
            ("mica", LoraConfig(r=4), "mica cannot train another LoraConfig"),
            ("lora", LoraNullConfig(r=4), "lora cannot train another LoraNullConfig"),
            ("oft", LoraConfig(r=4), "oft cannot train another LoraConfig"),
            ("lora-null-v1", LoraNullConfig(r=4, variant="v2"), "lora-null-v1 cannot train another LoraNullConfig"),
            ("nb-lora", LoraNullConfig(r=4, variant="nb", null_multiple=2), "nb-lora cannot train another"),
            ("lora", LoraConfig(r=4, init_lora_weights="eva"), "lora cannot train another LoraConfig of .*'eva'"),
            (
                "lora-fa",
                LoraConfig(r=4, init_lora_weights="mica"),
                "lora-fa cannot train another LoraConfig of .*'mica'",
            ),
            ("keeplora", LoraConfig(r=4, init_lora_weights="gaussian"), "keeplora cannot train another LoraConfig"),
        ],
    )
    def test_a_method_on_another_adapter_than_its_own_is_refused(self, tmp_path, name, config, said):
        with pytest.raises(UserError, match=f"peft_config: {said}"):
            make(tmp_path, config or "none", method=make_method(name))
        if config is not None:
            with pytest.raises(UserError, match=f"peft_config: {said}"):
                make(tmp_path, "none", model=get_peft_model(tiny_model(), config), method=make_method(name))

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
    @pytest.mark.parametrize("name", ["lora", "kl-anchor", "lora-fa"])
    def test_plain_lora_is_refused_on_a_base_that_peft_rewrites(self, tmp_path, name, start):
        config = LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj"])
        with pytest.raises(UserError, match=f"peft_config: {name} cannot train another LoraConfig of .*'{start}'"):
            make(tmp_path, config, method=make_method(name))
        with pytest.raises(UserError, match=f"method: {name} would train or save something else"):
            make(tmp_path, "none", model=get_peft_model(tiny_model(), config), method=make_method(name))

    @pytest.mark.parametrize("name", ["lora-null-v2", "lora-fa"])
    def test_a_trained_lora_goes_on_under_a_method_that_only_freezes(self, tmp_path, name):
        first = make(tmp_path / "1", CONFIGS["lora"]())
        first.train()
        first.save_model(tmp_path / "saved")
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved", is_trainable=True)
        A = {name: layer.lora_A["default"].weight.clone() for name, layer in adapted_layers(model).items()}
        second = make(tmp_path / "2", "none", model=model, method=make_method(name))
        second.train()
        for key, layer in adapted_layers(second.model).items():
            assert torch.equal(layer.lora_A["default"].weight, A[key])
        assert far(second.model, first.model) > 1e-3

    def test_and_under_no_method_that_starts_it_otherwise(self, tmp_path):
        model = get_peft_model(tiny_model(), CONFIGS["lora"]())
        torch.nn.init.normal_(next(iter(adapted_layers(model).values())).lora_B["default"].weight)
        for name in (
            "lora-null-v1",
            "nb-lora",
            "pissa",
            "milora",
            "corda",
            "sc-lora",
            "mica",
            "eva",
            "lora-ga",
            "keeplora",
        ):
            with pytest.raises(UserError, match=f"method: {name} would train .* trained already; leave method out"):
                make(tmp_path, "none", model=model, method=make_method(name))

    @pytest.mark.parametrize("name", ["clora", "oplora", "roselora"])
    def test_and_on_a_residual_base_under_no_method_that_takes_its_product_for_the_change(self, tmp_path, name):
        first = make(tmp_path, CONFIGS["v1"]())
        first.train()
        with pytest.raises(UserError, match=f"method: {name} would train .* trained already; leave method out"):
            make(tmp_path, "none", model=first.model, method=make_method(name, {"k": 2} if name != "roselora" else {}))

    @pytest.mark.parametrize("name", ["pissa", "milora", "corda", "sc-lora", "eva", "lora-ga"])
    def test_an_adapter_that_a_method_starts_needs_the_method(self, tmp_path, name):
        config = make_method(name).config(r=4, target_modules=["q_proj"])
        with pytest.raises(UserError, match=r"method: .* is started by a method, and none is given; pass method="):
            make(tmp_path, config)

    def test_live_ones_too_until_they_are_started(self, tmp_path):
        method = make_method("pissa")
        model = get_peft_model(tiny_model(), method.config(r=4, target_modules=["q_proj"]))
        with pytest.raises(UserError, match=r"such as make_method\('pissa'\)"):
            make(tmp_path / "1", "none", model=model)
        first = make(tmp_path / "2", "none", model=model, method=method)
        first.train()
        second_stage(first.model, tmp_path / "3").train()
        second_stage(first.model, tmp_path / "4", method=make_method("pissa")).train()

    def test_an_optimizer_that_eva_would_leave_behind(self, tmp_path):
        method = make_method("eva")
        model = get_peft_model(tiny_model(), method.config(r=2, target_modules="all-linear"))
        own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(UserError, match="optimizers: eva gives the layers new factors"):
            make(tmp_path, "none", model=model, method=method, optimizers=(own, None))
        trainer = make(tmp_path, method.config(r=2, target_modules="all-linear"), method=method)
        trainer.create_optimizer_and_scheduler(4)  # as one does to look at the rates
        with pytest.raises(UserError, match="optimizers: eva gives the layers new factors"):
            trainer.train()

    def test_lora_may_be_drawn_in_any_way(self, tmp_path):
        make(tmp_path, LoraConfig(r=4, init_lora_weights="gaussian"), method=make_method("kl-anchor"))

    def test_pissa_needs_no_texts(self, tmp_path):
        method = make_method("pissa")
        trainer = make(tmp_path, method.config(r=4, target_modules="all-linear"), method=method, calibration=None)
        trainer.train()
        assert all(residual_of(layer) is not None for layer in adapted_layers(trainer.model).values())
        assert trainer.drift_meter is None


class RewardTrainerWithStart(LoraNullMixin, RewardTrainer):
    """The mixin over a trainer whose model has a head of its own."""


def reward_model(seed):
    torch.manual_seed(seed)
    config = tiny_model().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(tiny_model().model.state_dict())
    return model


@pytest.mark.parametrize("name", ["sc-lora", "kl-anchor"])
def test_methods_that_read_rows_or_predictions_under_a_classifier(name, tmp_path):
    method = make_method(name)
    trainer = lambda: RewardTrainerWithStart(  # noqa: E731
        model=reward_model(1),
        args=RewardConfig(**quick(tmp_path, max_length=64, max_steps=1)),
        train_dataset=SCORED,
        processing_class=tiny_tokenizer(),
        method=method,
        peft_config=method.config(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"),
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )
    if name == "sc-lora":
        trainer().train()
        return
    with pytest.raises(
        UserError, match="kl-anchor compares next-token predictions, and LlamaForSequenceClassification"
    ):
        trainer().train()


SCORED = Dataset.from_list([{"chosen": f"Q: {i} is {2 * i}", "rejected": f"Q: {i} or no"} for i in range(24)])
WHAT_TRAINS = {
    "modules_to_save": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "tied modules_to_save": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "trainable tokens": dict(trainable_token_indices=tiny_tokenizer()("Q+1")["input_ids"]),
    "norms": dict(modules_to_save=["input_layernorm"]),
    "reward head": dict(task_type="SEQ_CLS"),
}


def run_of(kind, what, folder, **options):
    config = CONFIGS[kind](**WHAT_TRAINS[what])
    options = {"save_strategy": "steps", "save_steps": 3, **options}
    if what != "reward head":
        return make(folder, config, model=tiny_model(tie_word_embeddings="tied" in what), **options)
    return RewardTrainerWithStart(
        model=reward_model(1),
        args=RewardConfig(**quick(folder, max_length=64, **options)),
        train_dataset=SCORED,
        processing_class=tiny_tokenizer(),
        peft_config=config,
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )


class TestWhatTrainsIsWhatIsKept:
    @pytest.mark.parametrize("what", WHAT_TRAINS)
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_resumes_in_another_folder_to_the_same_bits(self, kind, what, tmp_path):
        whole = run_of(kind, what, tmp_path / "whole")
        before = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
        whole.train()
        moved = [
            name for name, p in whole.model.named_parameters() if name in before and not torch.equal(p, before[name])
        ]
        assert any("lora_" not in name for name in moved), "nothing but factors trained: the test tests nothing"
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "elsewhere" / "checkpoint-3")
        shutil.rmtree(tmp_path / "whole")
        resumed = run_of(kind, what, tmp_path / "new")
        resumed._calibration_dataset = "must not be read"
        resumed.train(resume_from_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-3"))
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
            assert torch.equal(a, b), name
        assert losses(resumed) == losses(whole)
        if what == "modules_to_save":
            resumed.save_model(tmp_path / "saved")
            assert far(PeftModel.from_pretrained(tiny_model(), tmp_path / "saved"), resumed.model) < 1e-4

    @pytest.mark.parametrize("kind", ["v1", "v2", "nb"])
    def test_resumes_without_the_texts(self, kind, tmp_path):
        whole = make(tmp_path / "whole", CONFIGS[kind](), save_strategy="steps", save_steps=3)
        whole.train()
        checkpoint = tmp_path / "whole" / "checkpoint-3"
        resumed = make(tmp_path / "new", CONFIGS[kind](), calibration=None, init_folder=checkpoint / "init")
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_the_best_is_loaded_whatever_trains(self, kind, tmp_path):
        options = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True)
        options |= dict(metric_for_best_model="earliness", greater_is_better=True)
        config = CONFIGS[kind](**WHAT_TRAINS["modules_to_save"])
        trainer = make(tmp_path, config, save_strategy="steps", eval_rows=ROWS.select(range(4)), **options)
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_earliness": -trainer.state.global_step}
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("-2")
        at_2, _, at_6 = (line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
        assert evaluate()["eval_loss"] == pytest.approx(at_2, rel=1e-5) != pytest.approx(at_6, rel=1e-5)

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_tied_modules_are_saved_once_and_read_by_plain_peft(self, kind, tmp_path):
        trainer = run_of(kind, "tied modules_to_save", tmp_path)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        fresh = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True), tmp_path / "saved")
        assert far(fresh, trainer.model) < 1e-4
        trainer.method.save(trainer.model, tmp_path / "plain")
        assert far(PeftModel.from_pretrained(tiny_model(tie_word_embeddings=True), tmp_path / "plain"), fresh) < 1e-4

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_an_adapter_of_another_name(self, kind, tmp_path):
        def trainer(folder):
            model = get_peft_model(tiny_model(), CONFIGS[kind](), adapter_name="mine")
            return make(folder, "none", model=model, save_strategy="steps", save_steps=3)

        whole = trainer(tmp_path / "whole")
        whole.train()
        assert far(PeftModel.from_pretrained(tiny_model(), tmp_path / "whole/checkpoint-6/mine"), whole.model) < 1e-4
        resumed = trainer(tmp_path / "new")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("name", ["pissa", "milora", "corda", "lora-ga", "lora-fa", "mica", "eva"])
    def test_every_method_resumes_its_modules_to_save(self, name, tmp_path):
        def trainer(folder):
            method = make_method(name, {"batch_rows": 16, "rows": 16} if name == "eva" else None)
            config = method.config(
                r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
            )
            return make(folder, config, method=method, save_strategy="steps", save_steps=3)

        whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "new")
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert losses(resumed) == losses(whole)


OTHER = [f"zebra {i * i} JUMPS over {chr(65 + i % 26) * 3}, quick!" for i in range(64)]


class TestTheStartIsTheCheckpointsOwn:
    @pytest.mark.parametrize("kind", ["v1", "v2"])
    def test_a_start_made_since_in_the_same_folder_is_not_read(self, kind, tmp_path):
        options = dict(save_strategy="steps", save_steps=3)
        first = make(tmp_path, CONFIGS[kind](), **options)
        first.train()
        again = make(tmp_path, CONFIGS[kind](), calibration=OTHER, **options)
        again._prepare(resuming=False)  # and dies before its first checkpoint
        resumed = make(tmp_path, CONFIGS[kind](), calibration=OTHER, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses(resumed) == losses(first)
        assert far(resumed.model, first.model) == 0

    def test_another_start_is_refused(self, tmp_path):
        first = make(tmp_path / "1", CONFIGS["v1"](), save_strategy="steps", save_steps=6)
        first.train()
        other = make(tmp_path / "2", CONFIGS["v1"](), calibration=OTHER)
        other._prepare(resuming=False)
        with pytest.raises(UserError, match="do not start where adapter 'default' does"):
            other._load_from_checkpoint(str(tmp_path / "1" / "checkpoint-6"))

    def test_a_checkpoint_without_its_start_is_refused(self, tmp_path):
        first = make(tmp_path / "1", CONFIGS["v1"](), save_strategy="steps", save_steps=6)
        first.train()
        shutil.rmtree(tmp_path / "1" / "checkpoint-6" / "init")
        mark_complete(tmp_path / "1" / "checkpoint-6")
        resumed = make(tmp_path / "1", CONFIGS["v1"](), max_steps=8)
        with pytest.raises(UserError, match="does not hold what it started from"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-6"))

    def test_another_trainer_refuses_moments_of_rank_r_beside_factors_of_2r(self, tmp_path):
        make(tmp_path, CONFIGS["v1"](), max_steps=1, save_strategy="steps", save_steps=1).train()
        plain = SFTTrainer(tiny_model(), SFTConfig(**quick(tmp_path)), train_dataset=ROWS, processing_class=tiny_tokenizer(),
                           peft_config=LoraConfig(r=8, target_modules="all-linear"))  # fmt: skip
        with pytest.raises(ValueError, match="a different number of parameter groups"):  # its fused Adam would crash
            plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    def test_one_initialized_by_hand_resumes_with_one_initialized_so_again(self, tmp_path):
        models = [get_peft_model(tiny_model(), CONFIGS["v1"]()) for _ in range(2)]
        for model in models:
            initialize_lora_null_weights(model, BATCHES, min_tokens=1, progress=False)
        start = {name: residual_of(layer).A for name, layer in adapted_layers(models[0]).items()}
        options = dict(max_steps=2, save_strategy="steps", save_steps=1, calibration=None)
        first = make(tmp_path, "none", model=models[0], **options)
        first.train()
        assert all(torch.equal(residual_of(x).A, start[n]) for n, x in adapted_layers(first.model).items())
        checkpoint = tmp_path / "checkpoint-1"
        resumed = make(tmp_path / "2", "none", model=models[1], **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert far(resumed.model, first.model) == 0
        for config, line in (
            (CONFIGS["v1"](), "a started v1 adapter, this run with no .* with its v1 adapter, started as"),
            (LoraConfig(r=8, target_modules="all-linear"), r"moments of shape \(4, \d+\) for a weight of shape \(8"),
        ):
            fresh = make(tmp_path / "3", config, **options | ({"calibration": TEXTS} if config.r == 4 else {}))
            with pytest.raises(UserError, match=line):
                fresh.train(resume_from_checkpoint=str(checkpoint))
            (checkpoint / "method.json").unlink(missing_ok=True)  # then a LoRA of rank 2r but for its moments
            mark_complete(checkpoint)

    @pytest.mark.parametrize("name", ["kl-anchor", "clora", "oplora", "roselora", "lora-fa", "lora-null-v2"])
    def test_so_is_one_of_another_method(self, name, tmp_path):
        first = make(tmp_path / "1", CONFIGS["lora"](), max_steps=2, save_strategy="steps", save_steps=2)
        first.train()
        method = make_method(name, {"k": 8} if name in ("clora", "oplora") else {})
        resumed = make(tmp_path / "2", method.config(r=4, target_modules="all-linear"), method=method)
        with pytest.raises(UserError, match=f"was trained by lora, this run trains by {name}; give method lora"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))

    def test_roselora_says_what_a_checkpoint_of_another_trainer_lacks(self, tmp_path):
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
        method = make_method("roselora")
        trainer = make(tmp_path, method.config(r=4), method=method)
        with pytest.raises(UserError, match=r"none of roselora, roselora\.safetensors is missing"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    @pytest.mark.parametrize(
        "changed, said",
        [
            ({"lora_alpha": 64}, "has lora_alpha 8, this run asks for 64"),
            ({"use_rslora": True}, "has use_rslora False, this run asks for True"),
            ({"r": 8}, "has r 4, this run asks for 8"),
            ({"alpha_pattern": {"q_proj": 1}}, "has alpha_pattern {}, this run asks for {'q_proj': 1}"),
            ({"rank_pattern": {"q_proj": 1}}, "has rank_pattern {}, this run asks for {'q_proj': 1}"),
            ({"bias": "all"}, "has bias none, this run asks for all"),
            ({"use_dora": True}, "has use_dora False, this run asks for True"),
            ({"modules_to_save": ["lm_head"]}, r"has modules_to_save None, this run asks for \['lm_head'\]"),
            ({"exclude_modules": ["q_proj"]}, r"adapts model\.layers\.0\.self_attn\.q_proj, this run does not"),
        ],
    )
    def test_so_is_another_adapter(self, changed, said, tmp_path):
        first = make(tmp_path / "1", CONFIGS["lora"](), max_steps=2, save_strategy="steps", save_steps=2)
        first.train()
        resumed = make(tmp_path / "2", LoraConfig(**{"r": 4, "target_modules": "all-linear", **changed}))
        with pytest.raises(UserError, match=f"resume: .*checkpoint-2 {said}"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-2"))

    @pytest.mark.parametrize(
        "name, options, changed",
        [
            ("sc-lora", {"rows": 8}, {"beta": 0.1}),
            ("clora", {"k": 8}, {"weight": 2.0}),
            ("oft", {"block_size": 16}, {"exact": True}),
        ],
    )
    def test_so_is_another_option_of_the_method(self, name, options, changed, tmp_path):
        methods = [make_method(name, given) for given in (options, options | changed)]
        for method, steps in zip(methods, (2, 4)):
            config = method.config(r=4, target_modules="all-linear")
            trainer = make(tmp_path, config, method=method, max_steps=steps, save_strategy="steps", save_steps=2)
            if steps == 2:
                trainer.train()
        (key,) = changed
        with pytest.raises(UserError, match=rf"resume: .* has method\.options\.{name}\.{key} .*, this run asks for "):
            trainer.train(resume_from_checkpoint=True)

    def test_so_are_other_texts_where_they_are_read_in_training(self, tmp_path):
        for texts in (TEXTS, TEXTS[:40]):
            method = make_method("kl-anchor")
            config = method.config(r=4, target_modules="all-linear")
            options = dict(calibration=texts, max_steps=2, save_strategy="steps", save_steps=2)
            trainer = make(tmp_path, config, method=method, **options)
            if texts is TEXTS:
                trainer.train()
        with pytest.raises(UserError, match=r"has calibration texts 64 \(.*\), this run asks for 40 \("):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("name", ["clora", "kl-anchor", "replay"])
    def test_so_is_another_seed_where_it_is_drawn_from_in_training(self, name, tmp_path):
        method = make_method(name, {"k": 8} if name == "clora" else None)
        config = method.config(r=4, target_modules="all-linear")
        options = dict(method=method, max_steps=1, save_strategy="steps", save_steps=1)
        make(tmp_path, config, **options).train()
        with pytest.raises(UserError, match="has seed 42, this run asks for 5"):
            make(tmp_path, config, **options, seed=5).train(resume_from_checkpoint=True)

    def test_but_dropout_and_what_is_logged_may_change(self, tmp_path):
        make(tmp_path, CONFIGS["lora"](), max_steps=2, save_strategy="steps", save_steps=2).train()
        again = make(tmp_path, CONFIGS["lora"](lora_dropout=0.1), max_steps=4, logging_steps=2)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4

    @pytest.mark.parametrize("kind", ["v1", "v2"])
    def test_each_checkpoint_holds_its_own_trainers_start(self, kind, tmp_path):
        """Also where another trainer has begun in the same folder, or the trainer was given another one."""
        out, save = tmp_path / "out", {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
        first = make(out, CONFIGS[kind](), **save)
        first.train()
        key = read_report(out / "checkpoint-2" / "init")["key"]
        make(out, CONFIGS[kind](), calibration=[text + " once more" for text in TEXTS], **save).train()
        assert read_report(out / "init")["key"] != key
        first.train()
        assert read_report(out / "checkpoint-2" / "init")["key"] == key
        first.args.output_dir = str(tmp_path / "elsewhere")
        first.train()
        assert read_report(tmp_path / "elsewhere" / "checkpoint-2" / "init")["key"] == key
        make(tmp_path / "elsewhere", CONFIGS[kind](), **save | {"max_steps": 3}).train(resume_from_checkpoint=True)
        for place in (out, tmp_path / "elsewhere", cached_folder(key)):
            shutil.rmtree(place, ignore_errors=True)
        with pytest.raises(UserError, match=r"output_dir: .* no longer holds what this trainer started from"):
            first.train()

    def test_the_output_folder_itself_is_no_checkpoint(self, tmp_path):
        make(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        with pytest.raises(
            UserError, match=r"is no checkpoint \(trainer_state.json is missing\); take .*checkpoint-2$"
        ):
            make(tmp_path).train(resume_from_checkpoint=str(tmp_path))

    @pytest.mark.parametrize("damage", ["cut short", "begun", "not there"])
    def test_so_is_one_that_is_not_whole_by_its_name(self, damage, tmp_path):
        make(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
        last = tmp_path / "checkpoint-4"
        if damage == "cut short":
            (last / "optimizer.pt").write_bytes(b"")
        elif damage == "begun":
            (last / "complete.json").rename(last / "begun.json")
        else:
            last = tmp_path / "checkpoint-44"
        said = (
            "is no folder; take .*checkpoint-4" if damage == "not there" else "was not written .* take .*checkpoint-2"
        )
        with pytest.raises(UserError, match=f"resume: {last} {said}$"):
            make(tmp_path).train(resume_from_checkpoint=str(last))

    def test_nor_is_one_of_a_start_by_the_whole_model(self, tmp_path):
        method = make_method("lora-ga", {"rows": 8})
        trainer = make(tmp_path, method.config(r=2, target_modules=["q_proj"]), method=method, calibration=None)
        with pytest.raises(UserError, match=r"does not hold what it started from \(init/layers.json is missing\)"):
            trainer._finished_start(tmp_path)

    @pytest.mark.parametrize("left", ["nothing", "parts alone", "all"])
    def test_a_start_is_reused_where_it_is_finished(self, left, tmp_path):
        first = make(tmp_path, CONFIGS["v2"]())
        first._prepare(resuming=False)
        kept = tmp_path / "init"
        if left == "nothing":
            shutil.rmtree(kept)
        elif left == "parts alone":
            (kept / "layers.json").unlink()
        again = make(tmp_path, CONFIGS["v2"](), calibration=OTHER, reuse_init=True)
        if left == "all":
            again._prepare(resuming=False)
            assert far(again.model, first.model) == 0 and again.layer_report.key == first.layer_report.key
            return
        with pytest.raises(UserError, match=r"holds no complete initialization \(layers.json is missing\)"):
            again._prepare(resuming=False)

    def test_two_starts_are_refused(self, tmp_path):
        for folder, texts in (("1", TEXTS), ("2", OTHER)):
            make(tmp_path / folder, CONFIGS["v2"](), calibration=texts)._prepare(resuming=False)
        with pytest.raises(UserError, match="holds another initialization than"):
            make(tmp_path / "1", CONFIGS["v2"](), reuse_init=True, init_folder=tmp_path / "2")
        make(tmp_path / "1", CONFIGS["v2"](), reuse_init=True, init_folder=tmp_path / "1")

    def test_what_else_lies_beside_a_start_stays_there(self, tmp_path):
        (tmp_path / "init" / "mine").mkdir(parents=True)
        (tmp_path / "init" / "notes.txt").write_text("mine")
        whole = make(tmp_path, CONFIGS["v1"](), save_strategy="steps", save_steps=3)
        whole.train()
        make(tmp_path, CONFIGS["v1"](), max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (tmp_path / "init" / "mine").is_dir() and (tmp_path / "init" / "notes.txt").read_text() == "mine"
        assert not (tmp_path / "checkpoint-3" / "init" / "notes.txt").exists()

    def test_a_checkpoint_in_the_place_of_an_earlier_ones_keeps_nothing_of_it(self, tmp_path):
        make(tmp_path, CONFIGS["v1"](), save_strategy="steps", save_steps=3).train()
        again = dict(calibration=None, save_strategy="steps", save_steps=3)
        make(tmp_path, CONFIGS["lora"](), **again).train()
        assert not (tmp_path / "checkpoint-3" / "init" / "layers.json").exists()
        make(tmp_path, CONFIGS["lora"](), **again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    def test_of_two_runs_in_one_folder_only_the_second_is_left(self, tmp_path):
        make(tmp_path, CONFIGS["v1"]()).train()
        old = json.loads((tmp_path / "init" / "layers.json").read_text())
        make(tmp_path, CONFIGS["lora"]()).train()
        assert (
            sorted(p.name for p in (tmp_path / "init").iterdir()) == ["factors.all.safetensors", "layers.json"]
            and old["layers"]
        )

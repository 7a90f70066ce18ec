"""Guards look at the harm itself, early; warn where it may be meant; and lose nothing that was trained."""

import contextlib
import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import BdLoraConfig
from safetensors.torch import load_file
from test_dpo import LoraNullGRPOTrainer
from test_dpo import make as make_dpo
from test_trainer import losses, make
from tiny import logits, random_batches, tiny_model, tiny_tokenizer
from torch.utils.data import BatchSampler, Sampler
from trainers import CUT, PAIRS, ROWS, TEXTS, quick
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput
from trl import GRPOConfig, SFTConfig, SFTTrainer
from world import make_world

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.recipes import measure
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.models.bases import Base, load_base, load_tokenizer
from lora_null.start import InitOptions
from lora_null.targets import add_adapter
from lora_null.trainer import CalibrationArgs, LoraNullDPOTrainer, LoraNullMixin, LoraNullSFTTrainer
from lora_null.trainer.collated_rows import check_last_batches
from lora_null.trainer.decay import DecayToStart
from lora_null.trainer.methods import METHODS, adapter_parameters, make_method
from lora_null.trainer.reference import has_reference

END = 2


@pytest.mark.parametrize("trainer", [LoraNullSFTTrainer, LoraNullDPOTrainer])
@pytest.mark.parametrize(
    "given",
    [
        {"calibration_dataset": TEXTS},
        {"calibration_args": CUT},
        {"init_options": InitOptions()},
        {"init_folder": "somewhere"},
        {"reuse_init": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_only_an_adapter_needs_is_not_ignored_without_one(trainer, given):
    with pytest.raises(UserError, match=f"{next(iter(given))}: would not be read, there is no adapter"):
        trainer(model=tiny_model(), **given)


@pytest.mark.parametrize("name", ["full", "lora", "lora-null-v2"])
def test_an_adapter_that_transformers_has_loaded_is_not_written_over_and_nothing_is_saved_without_it(tmp_path, name):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    method, integrated = make_method(name), AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    config = method.config(r=4, target_modules=["down_proj"])
    for model, said in (
        (integrated, "transformers has loaded an adapter into it"),
        (str(tmp_path / "adapter"), "is an"),
    ):
        with pytest.raises(UserError, match=rf"^model: .*{said}.*; load its base with AutoModelForCausalLM"):
            make(tmp_path, config or "none", method=method, model=model)
    if name == "lora-null-v2":
        with pytest.raises(UserError, match=r"^model: transformers has loaded an adapter"):
            initialize_lora_null_weights(get_peft_model(integrated, config), random_batches())


@pytest.mark.parametrize("name", ["full", "lora", "lora-null-v2"])
def test_the_adapter_of_an_earlier_trainer_is_not_trained_over(tmp_path, name):
    base = tiny_model()
    make(tmp_path / "first", LoraNullConfig(r=4), model=base, max_steps=1).train()
    method = make_method(name)
    with pytest.raises(
        UserError,
        match=r"^model: still holds the adapter that an earlier trainer, or inject_adapter_in_model, put into it",
    ):
        make(tmp_path, method.config(r=4, target_modules=["q_proj"]) or "none", method=method, model=base)


def test_an_adapter_that_is_drawn_anew_trains_what_its_own_config_says():
    base = tiny_model()
    get_peft_model(base, LoraNullConfig(r=4, variant="v2", target_modules=["q_proj"]))
    again = get_peft_model(base, LoraNullConfig(r=4, variant="v1", target_modules=["q_proj"]))
    initialize_lora_null_weights(again, random_batches(), min_tokens=1, progress=False)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("lora_")[2][0] for name in trained} == {"A", "B"}


@pytest.mark.parametrize("given, said", [
    ({"method": "pissa"}, r"method: takes what make_method gives, not 'pissa'; make_method\('pissa'\)"),
    ({"method": METHODS["oft"]}, r"method: takes what make_method gives, not <class .*OFT'>; make_method\('oft'\)"),
    ({"calibration_args": {"samples": 3}}, r"calibration_args: takes CalibrationArgs\(…\), not a dict"),
    ({"init_options": {"seed": 3}}, r"init_options: takes InitOptions\(…\), not a dict"),
])  # fmt: skip
def test_what_is_of_another_kind_is_one_line_before_a_model_loads(given, said):
    with pytest.raises(UserError, match=said):
        LoraNullSFTTrainer(model="not loaded", peft_config=LoraNullConfig(r=4), calibration_dataset=TEXTS, **given)


@pytest.mark.parametrize("count, here", [(4, 2), (4, 4), (1, 1)])
def test_saving_on_each_of_several_nodes_is_one_line_before_a_model_loads(count, here, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(SFTConfig, "world_size", count)
    expected = (
        "^save_on_each_node: what a training starts from" if here < count else "^calibration_dataset: LoRA-Null needs"
    )
    with pytest.raises(UserError, match=expected):
        args = SFTConfig(tmp_path, save_on_each_node=True, use_cpu=True)
        LoraNullSFTTrainer("not loaded", args, peft_config=LoraNullConfig(r=4))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_no_adapted_module_is_refused(tmp_path, field):
    """The key is a regular expression of the end of a name, as PEFT reads it."""
    for key in ("q_prj", "lm_head", "layers.7.self_attn.q_proj"):
        options = {"r": 4, "target_modules": TWO, field: {key: 2, "v_proj": 2}}
        with pytest.raises(UserError, match=rf"{field}: no adapted module matches '{key}' \((did you|choose)"):
            make(tmp_path, LoraNullConfig(**options))
        with pytest.raises(UserError, match=f"{field}: no adapted module"):
            add_adapter(tiny_model(), LoraConfig(**options))  # as recipes do
    for key in ("q_proj", r"layers\.[01]\.self_attn.q_proj", "^model.layers.1.self_attn.v_proj"):
        make(tmp_path, LoraNullConfig(r=4, target_modules=TWO, **{field: {key: 2}}))
    add_adapter(tiny_model(), peft.LoHaConfig(r=4, target_modules=TWO, **{field: {"q_proj": 2}}))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"modules_to_save": ["lmhead"]}, r"modules_to_save: no module matches 'lmhead' \(did you mean 'lm_head'\?\)"),
        ({"target_modules": "q_proj"}, r"no module matches 'q_proj', a text is a pattern .*; give \['q_proj'\]"),
        (
            {"target_modules": ".*qproj"},
            r"target_modules: no module matches '.\*qproj', a text is a pattern for the whole name",
        ),
        ({"target_modules": ["q_prjo"]}, r"target_modules: no module matches 'q_prjo' \(did you mean 'q_proj'\?\)"),
        ({"exclude_modules": ["qproj"]}, r"exclude_modules: no module matches 'qproj' \(did you mean 'q_proj'\?\)"),
        ({"layers_to_transform": [1, 7]}, "layers_to_transform: there is no layer 7, the last of 2 is 1"),
    ],
)
def test_names_and_numbers_that_the_model_has_not_are_refused(tmp_path, given, said):
    """PEFT takes them in silence, and does not do what was asked for."""
    with pytest.raises(UserError, match=said):
        make(tmp_path, LoraNullConfig(**{"r": 4, "target_modules": TWO, **given}))
    with pytest.raises(UserError, match=said):
        add_adapter(tiny_model(), LoraConfig(**{"r": 4, "target_modules": TWO, **given}))


def test_a_merged_adapter_does_not_train_and_begins_nothing(tmp_path):
    """Taken out again, the merged product would be of other factors than the initialization has left."""
    trainer = make(tmp_path, LoraNullConfig(r=4, variant="v1"))
    trainer.model.merge_adapter()
    with pytest.raises(UserError, match=r"^model: its adapter is merged into the weights; model.unmerge_adapter\(\)"):
        trainer.train()
    assert not (tmp_path / "init").exists()
    trainer.model.unmerge_adapter()
    trainer.train()
    trainer.model.set_adapter("default")
    with trainer.model.disable_adapter():
        assert (logits(trainer.model) - logits(tiny_model())).abs().max() < 1e-4


def test_a_lora_null_config_beside_an_adapter_of_peft_says_which_came_first():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=TWO), adapter_name="one")
    model.add_adapter("mine", LoraNullConfig(r=4, target_modules=TWO))
    with pytest.raises(
        UserError, match=r"carries a Linear of PEFT, made by the adapter 'one'; add the LoraNullConfig before"
    ):
        initialize_lora_null_weights(model, random_batches(), adapter_name="mine", min_tokens=1)


def test_an_optimizer_from_before_the_adapter_is_refused_and_one_of_a_part_told_of(tmp_path, capsys):
    bare = tiny_model()
    with pytest.raises(UserError, match="optimizers: holds nothing that trains, it was made before the adapter"):
        make(tmp_path, model=bare, optimizers=(torch.optim.AdamW(bare.parameters()), None))
    with pytest.raises(UserError, match="optimizers: holds nothing that trains; give its class"):
        own = torch.optim.AdamW(tiny_model().parameters())
        LoraNullSFTTrainer(tiny_model(), make(tmp_path).args, train_dataset=ROWS, processing_class=tiny_tokenizer(),
                           optimizers=(own, None))  # fmt: skip
    assert "optimizers" not in capsys.readouterr().err
    for left_out, told in ((0, False), (1, True)):
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
        trained = [p for p in model.parameters() if p.requires_grad]
        make(tmp_path, "none", model=model, optimizers=(torch.optim.AdamW(trained[left_out:]), None))
        assert ("lora_B.default.weight (1 of 14 parameters that train)" in capsys.readouterr().err) == told


def test_an_optimizer_that_is_put_in_later_is_looked_at_too(tmp_path):
    trainer = make(tmp_path)
    trainer.optimizer = torch.optim.AdamW(tiny_model().parameters())
    with pytest.raises(UserError, match="optimizers: holds nothing that trains"):
        trainer.train()
    assert not (tmp_path / "init").exists()


def making(kind):
    """Return a `create_optimizer` of one's own, whose optimizer is of this kind and decays."""

    def create_optimizer(self, *_, **__):
        self.optimizer = kind([p for p in self.model.parameters() if p.requires_grad], weight_decay=0.1)
        return self.optimizer

    return create_optimizer


@pytest.mark.parametrize(
    "config, kind, message",
    [
        ({"variant": "v1"}, torch.optim.Adam, "decay_to_start: is defined for AdamW, not for Adam"),
        ({"variant": "nb"}, type("AdamWScheduleFree", (torch.optim.AdamW,), {}), "averages weights"),
    ],
)
def test_an_optimizer_of_an_overridden_method_is_looked_at_too(tmp_path, monkeypatch, config, kind, message):
    trainer = make(tmp_path, LoraNullConfig(r=4, **config))
    monkeypatch.setattr(type(trainer), "create_optimizer", making(kind))
    with pytest.raises(UserError, match=message):
        trainer.train()


def test_decay_of_an_overridden_methods_optimizer_goes_to_the_start(tmp_path, monkeypatch):
    trainer = make(tmp_path, LoraNullConfig(r=4, variant="v1"), optim="adafactor", weight_decay=0.0)
    assert not any(isinstance(callback, DecayToStart) for callback in trainer.callback_handler.callbacks)
    monkeypatch.setattr(type(trainer), "create_optimizer", making(torch.optim.AdamW))
    trainer.train()
    assert sum(isinstance(callback, DecayToStart) for callback in trainer.callback_handler.callbacks) == 1


def test_what_transformers_would_refuse_late_is_refused_before_the_initialization(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_null.trainer.optimizers.is_liger_kernel_available", lambda: False)
    for options, message in (
        ({"use_liger_kernel": True}, "use_liger_kernel: needs the package liger-kernel"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 1000}, "dataloader_drop_last: leaves no row"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_type: .* argument 'foo'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path, **options).train()
        assert not (tmp_path / "init").exists()


def test_prompts_are_counted_as_often_as_they_are_sampled(tmp_path):
    """Eight answers to each of four prompts fill batches of eight, which two answers to each do not of sixteen."""

    def trainer(**changes):
        return LoraNullGRPOTrainer(
            model=tiny_model(),
            args=GRPOConfig(**quick(tmp_path, max_steps=2, max_completion_length=4, **changes)),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            train_dataset=PAIRS.select(range(4)).select_columns("prompt"),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4),
        )

    fits = trainer(num_generations=8, per_device_train_batch_size=8, dataloader_drop_last=True)
    fits.train()
    assert fits.state.global_step == 2
    with pytest.raises(UserError, match="training data: its 4 rows do not fill a batch; give more, or smaller"):
        trainer(num_generations=2, per_device_train_batch_size=16).train()


def test_batches_that_are_left_out_can_be_passed_too(tmp_path):
    trainer = make(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=1000)
    trainer._preflight = "off"
    trainer.train()
    assert not trainer.state.global_step


@pytest.mark.parametrize(
    "rows, repeated, changes",
    [(5, 3, {}), (8, 0, {}), (5, 0, {"dataloader_drop_last": True}), (9, 0, {"max_steps": 2})],
)
def test_rows_that_several_processes_repeat_are_told(caplog, rows, repeated, changes):
    args = {"dataloader_drop_last": False, "train_batch_size": 2, "max_steps": -1, "gradient_accumulation_steps": 1}
    each, whole = BatchSampler(range(rows), 2, False), range(rows)
    taken = [
        i for index in range(2) for batch in BatchSamplerShard(each, 2, index) for i in batch
    ]  # what accelerate does
    trainer = type("Plain", (SimpleNamespace,), {"_get_train_sampler": Trainer._get_train_sampler})()
    trainer.args, trainer.train_dataset = SimpleNamespace(**args | changes), whole
    trainer.accelerator = SimpleNamespace(num_processes=2)
    check_last_batches(trainer, "error")
    told = f"{rows} rows do not fill the last batches of 2 processes, which take {repeated} of the first rows again"
    assert (told in caplog.text) == bool(repeated) and bool(caplog.text) == bool(repeated)
    assert changes or len(taken) - rows == repeated


SPLIT = {"near": ROWS.select(range(4)), "far": ROWS.select(range(4, 8))}


@pytest.mark.parametrize("kind, rows, options, said", [
    ("sft", SPLIT, {"load_best_model_at_end": True}, r"'eval_loss' \(.*eval_(far|near)_loss"),
    ("sft", SPLIT, {"metric_for_best_model": "eval_near_loss"}, None),
    ("sft", SPLIT["far"], {"metric_for_best_model": "mean_token_accuracy"}, None),
    ("sft", SPLIT["far"], {"metric_for_best_model": "no_such", "eval_strategy": "no"}, None),
    ("plain", SPLIT["far"], {"metric_for_best_model": "eval_los"}, r"'eval_los' \(did you mean 'eval_loss'\?\)"),
    ("plain", SPLIT["far"], {"metric_for_best_model": "loss"}, None),
    ("plain", SPLIT["far"], {"metric_for_best_model": "f1"}, r"'eval_f1' \("),
    ("computes", SPLIT["far"], {"metric_for_best_model": "f1"}, None),
    ("evaluates", SPLIT, {"metric_for_best_model": "f1"}, None),
])  # fmt: skip
def test_a_best_metric_that_no_evaluation_gives(tmp_path, kind, rows, options, said):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 2,
        **options,
    }
    if kind == "plain" or kind == "computes":
        tokenize = lambda row: {"input_ids": [5, 6, END], "labels": [-100, 6, END], "attention_mask": [1, 1, 1]}  # noqa: E731
        trainer = PlainTrainer(
            model=get_peft_model(tiny_model(), LoraNullConfig(r=4)),
            args=TrainingArguments(**quick(tmp_path, **options)),
            train_dataset=ROWS.map(tokenize, remove_columns=ROWS.column_names),
            eval_dataset=rows.map(tokenize, remove_columns=ROWS.column_names),
            processing_class=tiny_tokenizer(),
            calibration_dataset=TEXTS,
            calibration_args=CUT,
            compute_metrics=(lambda _: {"f1": 1.0}) if kind == "computes" else None,
        )
    else:
        trainer = make(tmp_path, eval_rows=rows, **options)
    if kind == "evaluates":
        trainer.evaluate = lambda **_: {"eval_f1": 1.0}
    if said is None:
        trainer.train()
        return
    trainer._prepare = None
    with pytest.raises(UserError, match=f"metric_for_best_model: no evaluation gives {said}"):
        trainer.train()


class _Unsized(Sampler):
    def __iter__(self):
        return iter(range(48))


class _NotSaying(_Unsized):
    def __len__(self):
        raise TypeError


@pytest.mark.parametrize("sampler", [None, _Unsized(), _NotSaying()], ids=["none", "unsized", "says not"])
def test_a_sampler_that_does_not_say_how_many_it_takes(tmp_path, sampler, caplog, monkeypatch):
    monkeypatch.setattr(LoraNullSFTTrainer, "_get_train_sampler", lambda *_: sampler)
    trainer = make(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 6
    trainer.accelerator = SimpleNamespace(num_processes=5)
    check_last_batches(trainer, "error")
    assert "48 rows do not fill the last batches of 5 processes" in caplog.text


@pytest.mark.parametrize("kind", ["sft", "a second trainer", "dpo", "full"])
def test_a_copy_of_a_trainers_model_computes_with_its_own_weights(tmp_path, kind):
    if kind == "dpo":
        trainer = make_dpo(tmp_path, LoraNullConfig(r=4))
    else:
        whole = {"config": "none", "method": make_method("full")} if kind == "full" else {}
        trainer = make(tmp_path, **whole)
    if kind == "a second trainer":
        trainer = make(tmp_path, "none", model=trainer.model)
    before = copy.deepcopy(trainer.model)
    of_base, fused = logits(before).clone(), {**random_batches(1)[0], "fused_lm_head": True}
    fused["labels"] = fused["input_ids"]
    loss = before(**fused).loss
    trainer.train()
    assert torch.equal(logits(before), of_base) and torch.equal(before(**fused).loss, loss)
    assert not torch.equal(logits(trainer.model), of_base)


class HandsOn(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class OwnTrainer(LoraNullMixin, HandsOn):
    learns_next_token = True


@pytest.mark.parametrize("given", [{"method": make_method("full")}, {"calibration_dataset": TEXTS}])
def test_a_model_that_is_made_when_training_begins_is_refused(tmp_path, given):
    with pytest.raises(UserError, match=r"^model_init: makes a new model when training begins"):
        PlainTrainer(model_init=tiny_model, args=TrainingArguments(str(tmp_path), report_to="none"), **given)


def test_a_checkpoint_of_another_trainer_tells_that_no_drift_is_reported(tmp_path, caplog):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    given = {"train_dataset": ROWS, "processing_class": tiny_tokenizer(), "peft_config": config}
    theirs = SFTTrainer(tiny_model(), args=SFTConfig(**quick(tmp_path, **changes)), **given)
    theirs.train()
    ours = make(tmp_path / "ours", config, **changes)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "no drift is reported" in caplog.text and "holds no start" in caplog.text


class PlainTrainer(LoraNullMixin, Trainer):
    pass


def test_a_constructor_that_hands_its_arguments_on(tmp_path):
    options = dict(max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no")
    given = dict(processing_class=tiny_tokenizer(), calibration_dataset=TEXTS, calibration_args=CUT)
    trainer = OwnTrainer(
        tiny_model(), SFTConfig(str(tmp_path), **options), train_dataset=ROWS, peft_config=LoraNullConfig(r=4), **given
    )
    trainer.train()
    assert trainer.layer_report.layers
    with pytest.raises(UserError, match="calibration_dataset: LoRA-Null needs texts"):
        OwnTrainer(tiny_model(), SFTConfig(str(tmp_path), **options), peft_config=LoraNullConfig(r=4))


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_new_tokens_of_tied_embeddings_are_refused_where_trl_cannot_read_them(variant, tmp_path):
    new = LoraNullConfig(r=4, target_modules=["q_proj"], variant=variant, trainable_token_indices=[5, 6])
    with pytest.raises(UserError, match=r"trainable_token_indices: with tied embeddings .* ensure_weight_tying=True"):
        make(tmp_path, new, model=tiny_model(tie_word_embeddings=True))
    instead = dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tied = LoraNullConfig(r=4, target_modules=["q_proj"], variant=variant, **instead)
    make(tmp_path, tied, model=tiny_model(tie_word_embeddings=True), max_steps=1).train()
    both = LoraNullConfig(r=4, variant=variant, trainable_token_indices={"embed_tokens": [5], "lm_head": [5]})
    with pytest.raises(
        UserError, match=r"indices: TRL's loss cannot read what trains of the head; give .* leave the head out"
    ):
        make(tmp_path, both, model=tiny_model())


def test_a_trainer_without_a_tokenizer(tmp_path):
    options = dict(max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    arguments = TrainingArguments(str(tmp_path), **options)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1]}] * 8)
    windows = [{"input_ids": list(range(4, 44))}] * 10
    for calibration, said in ((windows, None), (TEXTS, "processing_class: calibration texts need a tokenizer")):
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
        trainer = PlainTrainer(model, arguments, train_dataset=rows, calibration_dataset=calibration)
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            trainer.train()
            assert trainer.layer_report.layers


@pytest.mark.parametrize("name, beta, compared", [("DPO", 0.1, True), ("KTO", 0.1, True), ("GRPO", 0.1, True), ("GRPO", 0.0, False), ("SFT", 0.1, False)])  # fmt: skip
def test_who_compares_with_a_reference(name, beta, compared):
    kind = type("Own", (type(f"{name}Trainer", (), {}),), {})
    assert has_reference(kind, SimpleNamespace(beta=beta)) is compared


def test_nothing_that_is_given_is_not_read(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(UserError, match="calibration_args: would not be read, there is no calibration_dataset"):
        LoraNullSFTTrainer(
            tiny_model(),
            SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
            peft_config=config,
            calibration_args=CalibrationArgs(samples=8),
        )


@pytest.mark.parametrize("name", ["lora", "eva"])
def test_the_drift_of_a_layer_that_is_no_plain_lora_is_not_reported_under_a_method_either(tmp_path, capsys, name):
    method = make_method(name)
    config = method.config(r=4, target_modules=TWO, use_dora=True)
    trainer = make(tmp_path, config, method=method, max_steps=1)
    trainer.train()
    assert "drift_mean" not in trainer.state.log_history[0]
    assert "no drift is reported" in capsys.readouterr().err


def without_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def rows_of(labels, count=8):
    return Dataset.from_dict({"input_ids": [[5, 6, END]] * count, "labels": [labels] * count})


class TestEndToken:
    @pytest.mark.parametrize("tokenizer", [without_pad, tiny_tokenizer])
    def test_a_pad_that_is_the_end_token_trains_where_the_end_is_learned(self, tmp_path, tokenizer):
        trainer = make(tmp_path, tokenizer=tokenizer())
        trainer.train()
        assert trainer.state.global_step == 6

    def test_the_same_for_preferences(self, tmp_path, monkeypatch):
        monkeypatch.setattr("test_dpo.tiny_tokenizer", without_pad)
        make_dpo(tmp_path, LoraNullConfig(r=4)).train()

    def test_a_collator_that_masks_the_end_with_the_padding(self, tmp_path):
        """The rows hold their end token; what the collator makes of them does not."""
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        trainer = make(tmp_path, tokenizer=tokenizer)
        trainer.data_collator = _MaskingCollator(tokenizer)
        assert all(END in row["labels"] for row in trainer.train_dataset)
        with pytest.raises(UserError, match="'</s>' is in no label in the 48 rows looked at"):
            trainer.train()

    def test_another_end_that_generation_stops_at(self, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[-100, -100, 7]] * 8})
        with pytest.raises(UserError, match="is in no label"):
            make(tmp_path / "a", rows=rows, max_length=16).train()
        trainer = make(tmp_path / "b", rows=rows, max_length=16)
        trainer.model.generation_config.eos_token_id = [END, 7]
        trainer.train()

    def test_text_without_answers_is_warned_of(self, tmp_path, capsys):
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8})
        make(tmp_path, rows=rows, max_length=16).train()
        assert "the model does not learn to stop" in capsys.readouterr().err

    def test_rows_that_are_all_cut(self, tmp_path, capsys):
        make(tmp_path, max_length=12).train()
        assert "every row is cut at max_length (12)" in capsys.readouterr().err

    def test_the_one_row_that_ends_is_found(self, tmp_path):
        masked = {"input_ids": [[5, 6, 7]] * 300, "labels": [[-100, -100, 7]] * 300}
        masked["labels"][233] = [-100, -100, END]
        make(tmp_path, rows=Dataset.from_dict(masked), max_length=16).train()

    @pytest.mark.parametrize("kind", [LlamaForTokenClassification, BertForMaskedLM])
    def test_labels_that_are_no_next_tokens_need_no_end(self, tmp_path, kind):
        torch.manual_seed(0)
        sizes = dict(vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[-100, 1, 0]] * 8})
        trainer = PlainTrainer(
            model=get_peft_model(kind(kind.config_class(**sizes)), LoraConfig(r=4, target_modules="all-linear")),
            args=TrainingArguments(**quick(tmp_path, max_steps=1)),
            train_dataset=rows,
            data_collator=DataCollatorForTokenClassification(tiny_tokenizer()),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        assert trainer.state.global_step == 1

    @pytest.mark.parametrize(
        "labels, said",
        [
            ([-100] * 3, "every label is masked"),
            ([-100, 6, -100], "is in no label"),
            ([6, -100, -100], "is in no label"),  # shifted by the collator
        ],
    )
    def test_next_tokens_of_a_model_whose_head_has_another_name(self, tmp_path, labels, said):
        class Own(LlamaPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.model, self.output_layer = LlamaModel(config), torch.nn.Linear(config.hidden_size, 101)
                self.post_init()

            def forward(self, input_ids=None, attention_mask=None, labels=None, **_):
                logits = self.output_layer(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
                return CausalLMOutput(ForCausalLMLoss(logits, labels, 101), logits)

        def train(labels):
            trainer = PlainTrainer(
                model=get_peft_model(Own(tiny_model().config), LoraConfig(r=4, target_modules=["q_proj"])),
                args=TrainingArguments(**quick(tmp_path, max_steps=1)),
                train_dataset=Dataset.from_dict({"input_ids": [[5, 6, END]] * 8, "labels": [labels] * 8}),
                data_collator=DataCollatorForTokenClassification(tiny_tokenizer()),
                processing_class=tiny_tokenizer(),
            )
            trainer.train()
            return trainer.state.global_step

        with pytest.raises(UserError, match=said):
            train(labels)
        assert train([-100, 6, END]) == train([-100, END, -100]) == 1
        assert train([-100, 1, 0]) == train([-100, -100, 1]) == 1  # those of a token classifier of one's own


class _MaskingCollator(DataCollatorForLanguageModeling):
    """transformers' own: labels are the ids, −100 wherever the id is the padding's; and here also on prompts."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, mlm=False)

    def torch_call(self, examples):
        batch = super().torch_call([{"input_ids": row["input_ids"]} for row in examples])
        batch["labels"][:, :2] = -100
        return batch


class TestMaskedRows:
    def test_the_first_batches_may_be_masked(self, tmp_path):
        labels = [[-100] * 3] * 100 + [[-100, 6, END]] * 20
        rows = Dataset.from_dict({"input_ids": [[5, 6, END]] * 120, "labels": labels})
        make(tmp_path, rows=rows, max_length=None).train()

    def test_all_may_not(self, tmp_path):
        with pytest.raises(UserError, match="every label is masked in the 200 rows looked at"):
            make(tmp_path, rows=rows_of([-100] * 3, 200), max_length=None).train()

    def test_none_is_left(self, tmp_path):
        with pytest.raises(UserError, match="no row is left to train on"):
            make(tmp_path, rows=rows_of([-100] * 3), max_length=16).train()

    def test_a_stream(self, tmp_path):
        trainer = make(tmp_path, rows=ROWS.to_iterable_dataset())
        trainer.train()
        assert trainer.state.global_step == 6

    def test_pairs_that_are_equal_at_first(self, tmp_path):
        same = PAIRS["chosen"][:16] + PAIRS["rejected"][16:]
        pairs = PAIRS.remove_columns("rejected").add_column("rejected", same)
        make_dpo(tmp_path, LoraNullConfig(r=4), pairs=pairs).train()

    def test_packed_rows(self, tmp_path):
        make(tmp_path, packing=True, packing_strategy="wrapped", max_length=24).train()


class TestTheWayPast:
    @pytest.mark.parametrize("mode, said", [("warn", 1), ("off", 0)])
    def test_every_finding_can_be_passed(self, tmp_path, capsys, mode, said):
        trainer = LoraNullSFTTrainer(
            model=tiny_model(),
            args=make(tmp_path).args,
            train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[-100, -100, 7]] * 8}),
            processing_class=tiny_tokenizer(),
            peft_config=LoraNullConfig(r=4),
            calibration_dataset=TEXTS,
            calibration_args=CUT,
            preflight=mode,
        )
        trainer.train()
        assert capsys.readouterr().err.count("preflight: training data: the end token") == said

    def test_another_word_is_refused(self):
        with pytest.raises(UserError, match=r"preflight: no 'warning' \(did you mean 'warn'\?\)"):
            LoraNullSFTTrainer(model=tiny_model(), preflight="warning")


class TestNothingTrained:
    def test_a_step_of_warm_up(self, tmp_path, capsys):
        trainer = make(tmp_path, max_steps=1, warmup_steps=1, save_strategy="steps", save_steps=1)
        assert trainer.train().global_step == 1
        assert "after 1 steps nothing has changed, the learning rate was 0 in every step" in capsys.readouterr().err
        assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()

    def test_no_signal(self, tmp_path, capsys):
        trainer = make(tmp_path, max_steps=2)
        trainer.compute_loss = lambda model, inputs, **_: sum(
            (p * 0).sum() for p in model.parameters() if p.requires_grad
        )
        trainer.train()
        assert "after 2 steps nothing has changed, every gradient was 0" in capsys.readouterr().err

    def test_a_projection_alone_is_no_step(self, tmp_path, capsys):
        """It moves the last bits of nb-lora's A."""
        trainer = make(tmp_path, LoraNullConfig(r=4, variant="nb"), max_steps=3, learning_rate=0.0)
        trainer.train()
        assert "after 3 steps nothing has changed, the learning rate was 0 in every step" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["lora", "lora-null-v1", "nb-lora", "full"])
    def test_it_is_seen_that_something_moved(self, tmp_path, capsys, name):
        method = make_method(name)
        config = method.config(r=4, target_modules="all-linear") or LoraConfig(r=4)
        trainer = make(tmp_path, config, method=method if name != "full" else None)
        assert not trainer.train().metrics.get("failed") and trainer.something_moved
        assert "nothing has changed" not in capsys.readouterr().err

    def test_a_recipe_ends(self, tmp_path, capsys):
        recipe = make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4})
        words = ["training.max_steps=1", "training.warmup_steps=1", "training.save_steps=1"]
        assert main([str(recipe), *words]) == 0
        assert (tmp_path / "out/lora-null-v2/adapter/adapter_model.safetensors").is_file()
        assert "nothing has changed, the learning rate was 0" in capsys.readouterr().err


ALL = "all-linear"
TWO = ["q_proj", "v_proj"]
KINDS = {
    "dora": LoraConfig(r=4, target_modules=ALL, use_dora=True),
    "bias all": LoraConfig(r=4, target_modules=ALL, bias="all"),
    "bias lora_only": LoraConfig(r=4, target_modules=TWO, bias="lora_only"),
    "rslora": LoraConfig(r=4, target_modules=ALL, use_rslora=True),
    "a bias of B": LoraConfig(r=4, target_modules=TWO, lora_bias=True),
    "block diagonal": LoraConfig(
        r=4, target_modules=TWO, use_bdlora=BdLoraConfig(target_modules_bd_a=TWO, target_modules_bd_b=[], nblocks=2)
    ),
    "one layer": LoraConfig(r=4, target_modules=TWO, layers_to_transform=[1]),
    "parameters": LoraConfig(r=4, target_modules=TWO, target_parameters=["mlp.down_proj.weight"]),
    "embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=4, target_modules=ALL, trainable_token_indices=[5, 6]),
    "modules_to_save": LoraConfig(r=4, target_modules=ALL, modules_to_save=["lm_head"]),
    "pissa": LoraConfig(r=4, target_modules=TWO, init_lora_weights="pissa"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=TWO),
    "lokr": peft.LoKrConfig(r=4, target_modules=TWO),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=TWO),
    "vera": peft.VeraConfig(r=4, target_modules=TWO),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=TWO),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompts": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# ‖ΔW X‖ of these is not the ‖s·BA X‖ that a drift meter follows.
UNMEASURED = {"dora", "parameters", "embeddings", "pissa", "ia3", "loha", "lokr", "oft", "vera", "adalora", "norms"}
UNMEASURED |= {"prompts", "block diagonal"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_adapter_of_peft_trains_logs_and_saves(tmp_path, kind, capsys):
    model = tiny_model(attention_bias=True)
    fresh = get_peft_model(tiny_model(attention_bias=True), KINDS[kind])
    assert adapter_parameters(fresh) == {name for name, p in fresh.named_parameters() if p.requires_grad}
    trainer = make(tmp_path, KINDS[kind], model=model, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert len(losses(trainer)) == 2 and load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert ("drift_mean" in trainer.state.log_history[0]) == (kind not in UNMEASURED)
    assert ("no drift is reported" in capsys.readouterr().err) == (kind in UNMEASURED)


def test_a_second_adapters_parameters_are_its_own():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=TWO, modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
    other = adapter_parameters(model, "other")
    assert len(other) == 4 and all("o_proj" in name and ".other." in name for name in other)
    assert not adapter_parameters(model) & other and any("lm_head" in name for name in adapter_parameters(model))


class TestWhatTrains:
    def test_a_weight_of_the_base_that_would_be_lost(self, tmp_path):
        trainer = make(tmp_path)
        trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
        with pytest.raises(UserError, match=r"base_model.model.model.norm.weight \(1 parameters\) trains"):
            trainer.train()

    def test_a_part_of_the_adapter_that_was_frozen_on_purpose(self, tmp_path, capsys):
        trainer = make(tmp_path, LoraConfig(r=4, target_modules=TWO))
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "layers.1." in name)
        trainer.train()
        assert "(4 of 8 parameters of the adapter) does not train" in capsys.readouterr().err


class TestRecipeTokens:
    def base(self, folder, **tokens):
        make_world(folder)
        return Base(ModelSection(name_or_path=str(folder / "model"), dtype="float32", **tokens))

    def test_without_a_pad_token_the_end_token_pads_as_in_trl(self, tmp_path):
        base = self.base(tmp_path)
        without_pad().save_pretrained(tmp_path / "model")
        assert load_tokenizer(base).pad_token == "</s>"

    def test_named_ones_are_taken_and_generation_stops_there(self, tmp_path):
        base = self.base(tmp_path, pad_token="<unk>", eos_token="!")
        tokenizer = load_tokenizer(base)
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "!")
        model = load_base(base)
        assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, END]

    def test_one_that_is_not_there_is_refused_before_a_model_loads(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("a model was loaded"))
        recipe = make_world(tmp_path)
        assert main([str(recipe), "model.pad_token='<pda>'"]) == 2
        assert "has no token '<pda>' (did you mean '<pad>'?)" in capsys.readouterr().err
        assert main([str(recipe), "training.pad_token='<pda>'"]) == 2
        assert "has no token '<pda>' (did you mean '<pad>'?)" in capsys.readouterr().err

    def test_a_recipe_trains_with_pad_as_end_token(self, tmp_path):
        recipe = make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4})
        without_pad().save_pretrained(tmp_path / "model")
        assert main([str(recipe)]) == 0
        (row,) = [r for r in json.loads((tmp_path / "out/results.json").read_text())["rows"] if r["method"] != "base"]
        assert row["drift"]["mean"] > 0


def test_roselora_goes_on_from_the_checkpoint_it_is_given(tmp_path):
    """Whichever folder it lies in, and whatever else the output folder holds."""

    def trainer(folder, seed=42):
        method = make_method("roselora", {"final_fraction": 0.3, "begin": 0.0, "end": 0.8})
        config = method.config(r=4, lora_alpha=4, target_modules="all-linear")
        options = dict(method=method, save_strategy="steps", save_steps=3, seed=seed)
        return make(folder, config, **options)

    whole = trainer(tmp_path / "a")
    whole.train()
    trainer(tmp_path / "b", seed=7).train()  # leaves a checkpoint-3 of its own
    (tmp_path / "a" / "checkpoint-3").rename(tmp_path / "kept")
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_trl_and_this_package_train_alike_where_nothing_is_wrong(tmp_path):
    """Looking at batches first draws no random number that training would have drawn."""
    ours = make(tmp_path / "a", LoraConfig(r=4, target_modules=ALL), calibration=None)
    ours.train()
    plain = SFTTrainer(
        model=tiny_model(),
        args=replace(ours.args, output_dir=str(tmp_path / "b")),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=ALL),
    )
    plain.train()
    assert losses(ours) == losses(plain)

import json
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chats import assistant, user
from datasets import ClassLabel, Dataset, Value
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import losses_over, random_batches, save_tiny, tiny_model, tiny_tokenizer
from trainers import CUT, PAIRS, ROWS, TEXTS, quick
from transformers import LlamaConfig
from trl import DPOConfig, SFTConfig, SFTTrainer
from trl.trainer import utils

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights, layerwise
from lora_null.layer import _say_once, adapted_layers
from lora_null.trainer import CalibrationArgs, LoraNullDPOTrainer, LoraNullSFTTrainer, calibration_windows, own_texts
from lora_null.trainer.calibration_data import as_batches, padded_batches
from lora_null.trainer.checkpoints import is_whole, last_checkpoint, mark_complete

LABELED = Dataset.from_dict({"prompt": ["a"] * 4, "completion": [0, 1, 1, 0]}).cast_column(
    "completion", ClassLabel(names=["no", "yes"])
)


TALKS = Dataset.from_list([{"messages": [user("a"), assistant("b")]}] * 4)
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FROM_VALUE = Dataset.from_list([{"conversations": TURNS}] * 4)


def make(
    folder,
    config=None,
    *,
    rows=ROWS,
    calibration=TEXTS,
    model=None,
    tokenizer=None,
    method=None,
    init_folder=None,
    reuse_init=False,
    eval_rows=None,
    decay_to_start=None,
    optimizers=(None, None),
    optimizer_class=None,
    callbacks=None,
    **options,
):
    """A trainer; `config` is "none" where the model is a PeftModel already."""
    return LoraNullSFTTrainer(
        model=model or tiny_model(),
        args=SFTConfig(**quick(folder, **options)),
        train_dataset=rows,
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=None if config == "none" else config or LoraNullConfig(r=4, variant="v2"),
        calibration_dataset=calibration,
        calibration_args=CUT if calibration is not None else None,
        method=method,
        init_folder=init_folder,
        reuse_init=reuse_init,
        decay_to_start=decay_to_start,
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer_class,
        callbacks=callbacks,
        eval_dataset=eval_rows,
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_second_training_tells_what_its_optimizer_keeps(tmp_path, caplog):
    config = LoraNullConfig(r=4, variant="nb")
    trainer = make(tmp_path, config, model=save_tiny(tmp_path / "model"), max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.args.learning_rate = 1e-3
    trainer.train()
    assert (
        caplog.text.count("learning_rate: the optimizer of the first training goes on with 0.01, not with 0.001") == 1
    )
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2
    trainer.optimizer = None
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3 and caplog.text.count("goes on with") == 1
    trainer.args.weight_decay = 0.5
    for _ in range(2):  # it is not read in the third one either
        caplog.clear()
        trainer.train()
        assert "weight_decay: the optimizer of the first training goes on with 0.0, not with 0.5" in caplog.text
    for layer in adapted_layers(trainer.model).values():
        A, N = layer.lora_A["default"].weight.detach().double(), layer.bases["default"].vectors.double()
        assert (A - A @ N @ N.pinverse()).norm() < 1e-5 * A.norm()


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_initializes_once_before_the_first_step(tmp_path, variant, caplog):
    _say_once.cache_clear()
    trainer = make(tmp_path, LoraNullConfig(r=4, variant=variant))
    assert isinstance(trainer, SFTTrainer)
    trainer.train()
    assert "never initialized" not in caplog.text
    assert {path.name for path in (tmp_path / "init").iterdir()} == {
        "factors.model.layers.0.safetensors",
        "factors.model.layers.1.safetensors",
        "layers.json",
    }
    start = {
        key: value
        for i in (0, 1)
        for key, value in load_file(tmp_path / f"init/factors.model.layers.{i}.safetensors").items()
    }
    for name, layer in adapted_layers(trainer.model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(A, start[f"{name}.A"]) == (variant == "v2")
        assert not torch.equal(B, start[f"{name}.B"])
    plain = SFTTrainer(
        model=tiny_model(),
        args=trainer.args,
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    plain.train()
    first = next(line["loss"] for line in plain.state.log_history if "loss" in line)
    assert losses(trainer)[0] == pytest.approx(first, rel=1e-5)  # the same first batch, before any step
    drift = [line["drift_mean"] for line in trainer.state.log_history if "drift_mean" in line]
    assert len(drift) == 6 and drift[-1] > 0
    report = json.loads((tmp_path / "init" / "layers.json").read_text())
    assert len(report["layers"]) == 14 and report["tokens"] > 256


def test_zero_b_form_is_the_papers_residual_form_in_float64():
    """v2 as the paper writes it: base W0 − s·B0A0, A0 frozen, B trained from B0; the same losses over 20 Adam steps."""
    batches = random_batches()
    ours = get_peft_model(tiny_model().double(), LoraNullConfig(r=4, variant="v2"), autocast_adapter_dtype=False)
    initialize_lora_null_weights(ours, batches, min_tokens=1, progress=False)
    paper = get_peft_model(tiny_model().double(), LoraNullConfig(r=4, variant="v1"), autocast_adapter_dtype=False)
    initialize_lora_null_weights(paper, batches, min_tokens=1, progress=False)
    for layer in adapted_layers(paper).values():
        layer.lora_A["default"].weight.requires_grad_(False)

    zero_b, residual = (losses_over(model, batches, steps=20) for model in (ours, paper))
    assert max(abs(a - b) for a, b in zip(zero_b, residual)) < 1e-5
    assert zero_b[0] - min(zero_b) > 0.1


def test_resumed_run_ends_in_the_same_bits(tmp_path):
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make(tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed._calibration_dataset = "must not be read"
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert losses(resumed) == losses(whole)
    assert resumed.drift_meter.measure() == whole.drift_meter.measure()


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_checkpoint_loads_with_plain_peft_on_the_original_base(tmp_path, variant):
    trainer = make(tmp_path, LoraNullConfig(r=4, variant=variant), save_strategy="steps", save_steps=6)
    trainer.train()
    fresh = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-6").eval()
    batch = random_batches(1)[0]
    with torch.no_grad():
        kept = batch["attention_mask"].bool()
        difference = (trainer.model.eval()(**batch).logits - fresh(**batch).logits)[kept].abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("epochs, steps", [(1.5, 18), (2, 24), (1.75, 21), (1, 18)])
def test_a_finished_run_goes_on_to_more_epochs(tmp_path, epochs, steps):
    """48 rows in batches of 4: 12 steps an epoch; fewer epochs than were trained take none."""
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 18}
    make(tmp_path, num_train_epochs=1.5, **options).train()
    resumed = make(tmp_path, num_train_epochs=epochs, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))
    assert resumed.state.global_step == steps


def test_a_batch_size_that_was_found_counts_the_steps_of_a_resumed_run(tmp_path, monkeypatch):
    def trainer(folder):
        options = dict(
            max_steps=-1, num_train_epochs=1, save_strategy="steps", save_steps=7, auto_find_batch_size=True
        )
        found = make(folder, **options, per_device_train_batch_size=8)
        step = found.training_step

        def out_of_memory(model, inputs, *rest):
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return step(model, inputs, *rest)

        found.training_step = out_of_memory
        return found

    whole = trainer(tmp_path / "whole")
    assert whole.train().global_step == 12  # 48 rows by 4
    resumed = trainer(tmp_path / "resumed")
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7")).global_step == 12
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("taught", ["completions", "nothing"])
def test_the_head_is_multiplied_with_what_is_taught_alone(tmp_path, monkeypatch, taught):
    """The loss and its gradients are what the full logits of a plain forward pass give."""
    trainer = make(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    if taught == "nothing":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    taught = batch["labels"][:, 1:] != -100
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    logits = trainer.model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[taught], batch["labels"][:, 1:][taught], reduction="sum") / 50
    expected = torch.autograd.grad(expected + 0 * logits.sum(), trained)
    apply, rows = utils._ChunkedLogProbFunction.apply, []
    spy = SimpleNamespace(apply=lambda hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", spy)
    found = torch.autograd.grad(trainer.compute_loss(trainer.model, batch, num_items_in_batch=50), trained)
    assert rows == [int(taught.sum())]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.dist(ours, theirs) <= 1e-5 * theirs.norm()


def test_a_run_that_is_resumed_at_its_end_has_the_best_model_too(tmp_path):
    def trainer():
        options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
        options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
        return make(tmp_path, eval_rows=ROWS.select(range(4)), **options)

    whole, resumed = trainer(), trainer()
    ended = whole.train()
    assert whole.state.best_model_checkpoint.endswith("-2")
    moved = []
    resumed.place_model_on_device = False  # as under DeepSpeed, whose first step would place it
    resumed._move_model_to_device = lambda *given: moved.append(given)
    again = resumed.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert moved == [(resumed.model, resumed.args.device)]
    assert again.metrics.keys() >= ended.metrics.keys() and again.metrics["train_loss"] > 0


@pytest.mark.parametrize("best", ["moved", "gone"])
@pytest.mark.parametrize("at", [4, 6])
def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(tmp_path, at, best, caplog):
    def trainer(folder):
        options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
        options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
        return make(folder, eval_rows=ROWS.select(range(4)), **options)

    whole = trainer(tmp_path / "old")
    whole.train()
    (tmp_path / "old").rename(tmp_path / "new")
    if best == "gone":
        shutil.rmtree(tmp_path / "new" / "checkpoint-2")
    resumed = trainer(tmp_path / "new")
    with caplog.at_level("WARNING", logger="lora_null.trainer.checkpoints"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "new" / f"checkpoint-{at}"))
    assert ("the best checkpoint so far" in caplog.text) == (best == "gone")
    same = [torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())]
    assert all(same) == (best == "moved")
    if best == "moved":
        assert resumed.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")


@pytest.mark.parametrize("only", [True, False])
def test_a_checkpoint_without_its_optimizer_is_told_of(tmp_path, only, caplog):
    options = dict(save_strategy="steps", save_steps=1, save_only_model=only)
    make(tmp_path, max_steps=1, **options).train()
    with caplog.at_level("WARNING", logger="lora_null.trainer.checkpoints"):
        make(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=True)
    assert ("holds no optimizer (save_only_model)" in caplog.text) == only


def test_what_the_optimizer_of_a_checkpoint_holds_is_told_where_something_else_is_asked(tmp_path, caplog):
    make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for asked in ({}, {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.99}):
        caplog.clear()
        with caplog.at_level("WARNING", logger="lora_null.trainer.checkpoints"):
            resumed = make(tmp_path, max_steps=2, **asked)
            resumed.train(resume_from_checkpoint=True)
        told = [line for line in caplog.messages if "the optimizer goes on with" in line]
        assert [line.split(" with ")[1].split(",")[0] for line in told] == (
            ["adam_beta1 and adam_beta2 (0.9", "learning_rate 0.01", "weight_decay 0.0"] if asked else []
        )
        assert {group["initial_lr"] for group in resumed.optimizer.param_groups} == {1e-2}


def test_resume_without_a_checkpoint_is_a_users_mistake_that_last_checkpoint_does_not_make(tmp_path):
    half = tmp_path / "checkpoint-1"
    half.mkdir()
    (half / "begun.json").write_text("{}")
    with pytest.raises(UserError, match=r"no whole checkpoint .* train\(\) without"):
        make(tmp_path).train(resume_from_checkpoint=True)
    options = {"save_strategy": "steps", "save_steps": 1}
    for steps in (1, 2):
        trainer = make(tmp_path, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
        assert trainer.state.global_step == steps and is_whole(half)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_gradient_checkpointing_trains(tmp_path, variant):
    with_it = make(tmp_path / "a", LoraNullConfig(r=4, variant=variant), gradient_checkpointing=True)
    with_it.train()
    without = make(tmp_path / "b", LoraNullConfig(r=4, variant=variant))
    without.train()
    assert losses(with_it) == pytest.approx(losses(without), rel=1e-4)


def test_an_evaluation_that_would_round_the_model_is_refused(tmp_path):
    """Before the training or after it, when it is to be saved."""
    with pytest.raises(UserError, match="bf16_full_eval: an evaluation would round what trains for good"):
        make(tmp_path, bf16_full_eval=True)


@pytest.mark.parametrize("given", [{}, {"lr": 1e-3}])
def test_a_rate_that_the_optimizers_options_lack_is_told(tmp_path, given, capsys):
    make(tmp_path, LoraConfig(r=4), optimizer_class=(torch.optim.AdamW, given), max_steps=1).train()
    assert ("learning_rate: 0.01 is not read by AdamW" in capsys.readouterr().err) == (not given)


@pytest.mark.parametrize("whole", [[], ["lm_head"]])
def test_what_trains_in_the_low_precision_of_the_base_is_told(tmp_path, whole, capsys):
    make(tmp_path, LoraNullConfig(r=4, modules_to_save=whole), model=tiny_model().bfloat16())
    said = "lm_head.modules_to_save.default.weight (1 of 15 parameters that train) is torch.bfloat16, in which small steps"
    assert (said in capsys.readouterr().err) == bool(whole)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: One of min_lr"),
        ({"optim": "galore_adamw"}, "optim: You need to install `galore_torch`"),
        ({"optim": "galore_adamw_layerwise"}, "optim: You need to install `galore_torch`"),
        (
            {"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2},
            "optim: galore_adamw_layerwise steps in",
        ),
        ({"optim": "grokadamw"}, "optim: Please install grokadamw"),
    ],
)
def test_a_schedule_or_optimizer_that_cannot_be_is_found_before_the_initialization(tmp_path, monkeypatch, wrong, line):
    trainer = make(tmp_path, LoraNullConfig(r=4), **wrong)
    monkeypatch.setattr(trainer, "_prepare", lambda **_: pytest.fail("the initialization began"))
    with pytest.raises(UserError, match=f"^{line}"):
        trainer.train()


def test_a_checkpoint_saved_for_a_signal_by_transformers_is_whole(tmp_path):
    """As `enable_jit_checkpoint` writes it: a mark lies in the folder until the save has ended."""
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("optimizer.pt", "checkpoint-is-incomplete.txt"):
        (tmp_path / "checkpoint-3" / name).write_text("x")
    mark_complete(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "checkpoint-is-incomplete.txt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_any_other_adapter_only_gets_its_drift_measured(tmp_path):
    trainer = make(tmp_path, LoraConfig(r=4, target_modules="all-linear"))
    trainer.train()
    assert trainer.layer_report is None and trainer.drift_meter.summary()["mean"] > 0
    assert json.loads((tmp_path / "init" / "layers.json").read_text())["layers"] == []


@pytest.mark.parametrize(
    "rows, said",
    [
        ({"rows": list(ROWS)}, "train_dataset: a list, not a data set"),
        ({"rows": ROWS.select([])}, "train_dataset: holds no row"),
        ({"eval_rows": {"a": ROWS, "b": ROWS.select([])}}, r"eval_dataset\['b'\]: holds no row"),
        ({"rows": LABELED}, "train_dataset: 'completion' is a number of a class"),
        ({"rows": LABELED.rename_column("completion", "about"), "dataset_text_field": "about"}, "'about' is a number"),
        ({"rows": LABELED.cast_column("completion", Value("int8"))}, r"'completion' is int8, not text; cast_column"),
        ({"rows": LABELED.rename_column("completion", "text")}, "'text' is a number of a class"),
    ],
)
def test_rows_of_which_no_text_can_be_learned_are_one_line(rows, said, tmp_path):
    with pytest.raises(UserError, match=said):
        make(tmp_path, **rows)


@pytest.mark.parametrize(
    "rows, lacks, said",
    [
        (ROWS, ["eos_token"], "processing_class: has no end token to write behind a text; set its eos_token"),
        (PAIRS.to_iterable_dataset(), ["eos_token"], "processing_class: has no end token"),
        (TALKS, ["eos_token", "pad_token"], "train_dataset: holds conversations, and processing_class has no chat template"),
        (FROM_VALUE, [], "train_dataset: holds conversations"),
        (Dataset.from_dict({"chosen": TALKS["messages"], "rejected": TALKS["messages"]}), [], "holds conversations"),
        (Dataset.from_dict({"input_ids": [[5, 6]] * 4}), ["eos_token", "pad_token"], "has no token to pad with"),
        (Dataset.from_dict({"input_ids": [[5, 6]] * 4}), ["eos_token"], None),
    ],
)  # fmt: skip
def test_what_a_tokenizer_lacks_to_write_the_rows_is_one_line_before_a_model_loads(rows, lacks, said, tmp_path):
    tokenizer = tiny_tokenizer()
    for name in lacks:
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # and no weights
    kind, args = (LoraNullDPOTrainer, DPOConfig) if "chosen" in rows.column_names else (LoraNullSFTTrainer, SFTConfig)
    with pytest.raises(UserError if said else OSError, match=said):
        kind(
            model=str(tmp_path),
            args=args(**quick(tmp_path)),
            train_dataset=rows,
            peft_config=LoraNullConfig(r=4),
            calibration_dataset=TEXTS,
        )


SAID = [user("a"), assistant("b")]
READ_AS_TEXT = {  # rows whose other columns TRL does not read
    "a count of messages": {"text": "a b", "messages": 2},
    "no completion": {"text": "a b", "completion": None},
    "a number beside": {"text": "a b", "completion": 3},
    "prepared conversations": {"text": "a b", "conversations": SAID},
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c", "conversations": SAID},
    "a template of its own": {
        "messages": SAID,
        "chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"},
    },
}


@pytest.mark.parametrize("row", READ_AS_TEXT.values(), ids=READ_AS_TEXT)
def test_columns_that_are_not_read_are_not_checked(row, tmp_path):
    kind, args = (LoraNullDPOTrainer, DPOConfig) if "chosen" in row else (LoraNullSFTTrainer, SFTConfig)
    kind(
        model=tiny_model(),
        args=args(**quick(tmp_path)),
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=tiny_tokenizer(),
        peft_config=LoraNullConfig(r=4),
        calibration_dataset=TEXTS,
    )


def test_layers_without_a_list_of_targets_are_one_line():
    with pytest.raises(UserError, match="layers_to_transform: goes with a list of target_modules"):
        LoraNullConfig(r=4, layers_to_transform=[1])


def test_no_calibration_data_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="calibration_dataset"):
        make(tmp_path, calibration=None)


class TestPreflight:
    def test_end_is_never_trained(self, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[-100, 6, 7]] * 8})
        with pytest.raises(UserError, match="is in no label"):
            make(tmp_path, rows=rows, max_length=16).train()

    def test_all_labels_masked(self, tmp_path):
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8, "labels": [[-100] * 3] * 8})
        with pytest.raises(UserError, match="every label is masked"):
            make(tmp_path, rows=rows, max_length=None).train()

    def test_nothing_trains(self, tmp_path):
        trainer = make(tmp_path)
        for parameter in trainer.model.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(UserError, match="no parameter trains"):
            trainer.train()


class TestCalibration:
    def test_packed_windows_are_full_and_joined_by_blank_lines(self):
        tokenizer = tiny_tokenizer()
        windows = calibration_windows(TEXTS, tokenizer, CalibrationArgs(samples=5, max_length=40, mode="packed"))
        assert [len(window) for window in windows] == [40] * 5
        text = tokenizer.decode([token for window in windows for token in window])
        assert "\n\nwho was the" in text

    def test_separate_windows_are_single_texts(self):
        windows = calibration_windows(
            TEXTS, tiny_tokenizer(), CalibrationArgs(samples=9, max_length=10, mode="separate")
        )
        assert len(windows) == 9 and all(len(window) <= 10 for window in windows)

    @pytest.mark.parametrize("mode", ["packed", "separate"])
    def test_a_window_holds_more_than_the_start_token(self, mode):
        tokenizer, cut = tiny_tokenizer(), CalibrationArgs(samples=9, max_length=1, mode=mode)
        assert calibration_windows(TEXTS, tokenizer, cut)[0] != [tokenizer.bos_token_id]
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
        with pytest.raises(UserError, match="max_length: 1 is the start token <s> alone"):
            calibration_windows(TEXTS, tokenizer, cut)

    @pytest.mark.parametrize("mode", ["packed", "separate"])
    def test_fewer_windows_than_asked_are_said(self, mode, caplog):
        found = calibration_windows(TEXTS, tiny_tokenizer(), CalibrationArgs(samples=999, max_length=40, mode=mode))
        tokens = sum(map(len, found))
        assert f"calibration: {len(found)} of 999 windows, {tokens:,} tokens: there is no more text" in caplog.text

    def test_the_draw_depends_on_the_seed_alone(self):
        draw = lambda seed: calibration_windows(TEXTS, tiny_tokenizer(), CalibrationArgs(8, 32, "packed", seed))  # noqa: E731
        assert draw(1) == draw(1) != draw(2)

    def test_batches_hold_every_window_once(self):
        windows = [[7] * n for n in (3, 900, 50, 50, 2, 1024, 700, 3000)]
        batches = padded_batches(windows, 0)
        assert sorted(int(n) for batch in batches for n in batch["attention_mask"].sum(1)) == sorted(map(len, windows))
        assert all(batch["input_ids"].numel() <= 4096 for batch in batches)

    @pytest.mark.parametrize(
        "wrong, said",
        [
            ({"mode": "seperate"}, r"mode: no 'seperate' \(did you mean 'separate'\?\)"),
            ({"samples": 0}, "samples: must be a whole number of at least 1, not 0"),
            ({"samples": 1.5}, "samples: must be a whole number of at least 1, not 1.5"),
            ({"max_length": -5}, "max_length: must be a whole number of at least 1, not -5"),
            ({"max_length": True}, "max_length: must be a whole number of at least 1, not True"),
            ({"seed": "0"}, "seed: must be a whole number of at least 0, not '0'"),
        ],
    )
    def test_arguments_that_cannot_be(self, wrong, said):
        with pytest.raises(UserError, match=f"calibration_args.{said}"):
            CalibrationArgs(**wrong)

    @pytest.mark.parametrize("rows", [[], [{"question": "who"}], [" ", ""]])
    def test_unusable_data_is_a_users_mistake(self, rows):
        with pytest.raises(UserError, match="calibration"):
            as_batches(rows, tiny_tokenizer(), CUT)


def test_a_model_writes_by_its_own_distribution_whatever_its_generation_settings():
    model, asked = tiny_model(), dict(count=4, max_tokens=24)
    expected = own_texts(model, tiny_tokenizer(), **asked)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2, min_p=0.2)
    assert own_texts(model, tiny_tokenizer(), **asked) == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("hub_strategy", ["end", "checkpoint"])
def test_a_push_leaves_out_what_only_this_machine_needs(tmp_path, monkeypatch, hub_strategy):
    pushed = {}

    def upload_folder(self, *, folder_path, ignore_patterns=None, path_in_repo="", **options):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed.setdefault(path_in_repo, set()).update(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        return Future()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    hub = {"push_to_hub": True, "hub_model_id": "me/it", "hub_strategy": hub_strategy, "hub_always_push": True}
    trainer = make(tmp_path, **hub, save_strategy="steps", save_steps=3)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "rows.json").write_text("[]")
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    trainer.push_to_hub()
    assert (tmp_path / "init" / "layers.json").is_file() and "adapter_model.safetensors" in pushed[""]
    assert not [name for name in pushed[""] if name.startswith(("init/", "probe/", "training_args"))]
    resumable = {name.partition("/")[0] for name in pushed.get("last-checkpoint", ())}
    assert ("init" in resumable) == (hub_strategy == "checkpoint")


def test_two_trainers_from_one_seed_start_equal(tmp_path):
    one, other = make(tmp_path / "a"), make(tmp_path / "b")
    for trainer in (one, other):
        trainer._prepare(resuming=False)
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_walk_that_was_asked_for_is_refused_where_there_is_no_chain(tmp_path, monkeypatch):
    unfit = layerwise.DoesNotFit("no chain")
    monkeypatch.setattr(layerwise, "walk_layers", lambda *_, **__: (_ for _ in ()).throw(unfit))
    trainer = make(tmp_path)
    trainer._init_options = replace(trainer._init_options, form="layers")
    with pytest.raises(UserError, match="this model cannot be walked layer by layer, no chain"):
        trainer._prepare(resuming=False)

"""Methods that others offer against forgetting: their starts and penalties against float64 oracles, and where they are refused."""

import itertools
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_methods import OPTIONS, assert_drift, factors, make, started
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trainers import CUT, ROWS, TEXTS, quick
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from world import make_world

from lora_null import UserError
from lora_null.layer import adapted_layers, factors_of
from lora_null.recipes.__main__ import main
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.models.plan import check_methods
from lora_null.trainer import LoraNullDPOTrainer, LoraNullMixin, LoraNullSFTTrainer, mixin
from lora_null.trainer.methods import METHODS, MicroBatch, make_method
from lora_null.trainer.methods.sc_lora import first_rows

PAIRS = Dataset.from_dict(
    {
        "prompt": [f"Q: {i}+{i}\nA:" for i in range(16)],
        "chosen": [f" {2 * i} is it" for i in range(16)],
        "rejected": [f" {3 * i} or so" for i in range(16)],
    }
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NAMES = ("sc-lora", "kl-anchor", "replay", "clora", "oft", "oplora", "keeplora")


def one_by_one(texts):
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    return [{"input_ids": torch.tensor([i]), "attention_mask": torch.ones(1, len(i), dtype=torch.long)} for i in ids]


def gradients(trainer, **inputs):
    """Return the loss of one pass as the trainer computes it, and its gradients."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = inputs.pop("passes", 1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, batch, **inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.item(), found


def perturbed(trainer):
    """Let the adapter do something: B is 0 at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return trainer


# --- SC-LoRA ---


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_sc_lora_starts_in_the_outputs_of_the_task_and_not_of_the_knowledge(tmp_path, beta):
    trainer = started(tmp_path, "sc-lora", options={"beta": beta, "rows": 20})
    layers = adapted_layers(trainer.model)
    task = [{"input_ids": torch.tensor([row["input_ids"]])} for row in trainer.train_dataset.select(range(20))]
    task = [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in task]
    inputs = [oracle.capture_inputs(tiny_model(), layers, batches) for batches in (one_by_one(TEXTS), task)]
    for key in layers:
        W = tiny_model().get_submodule(key).weight.detach().double().numpy()
        kept, new = (W @ (X[key] @ X[key].T / X[key].shape[1]) @ W.T for X in inputs)
        values, vectors = np.linalg.eigh((1 - beta) * new - beta * kept)
        Q = vectors[:, -4:]
        A, B, s = factors(trainer, key)
        gap = (values[-4] - values[-5]) / np.abs(values).max()
        np.testing.assert_allclose(s * B @ B.T, Q @ Q.T, atol=1e-5 / gap)
        np.testing.assert_allclose(s * B @ A, Q @ Q.T @ W, atol=1e-5 / gap)
        np.testing.assert_allclose(A, B.T @ W, atol=1e-5)  # both with √s divided out
        base = layers[key].get_base_layer().weight.detach().double().numpy()
        np.testing.assert_allclose(base + s * B @ A, W, atol=1e-6)


def test_sc_lora_measures_a_model_that_is_no_chain_of_layers_as_a_whole(tmp_path, monkeypatch):
    from lora_null import layerwise

    walked = started(tmp_path / "a", "sc-lora", options={"rows": 8})
    unfit = layerwise.DoesNotFit("no chain")
    monkeypatch.setattr(layerwise, "walk_layers", lambda *_, **__: (_ for _ in ()).throw(unfit))
    whole = make(tmp_path / "b", "sc-lora", options={"rows": 8})
    tensors = whole.method.compute(whole, whole.method.training_batches(whole))
    for name, layer in adapted_layers(walked.model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"], B @ A, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_sc_lora_reads_preferences_as_the_collator_cuts_them(mode):
    pairs = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    ]
    cut = DataCollatorForPreference(pad_token_id=0, max_length=5, truncation_mode=mode)(pairs)
    trainer = SimpleNamespace(train_dataset=pairs, args=SimpleNamespace(max_length=5, truncation_mode=mode))
    wanted = [ids[mask.bool()].tolist() for ids, mask in zip(cut["input_ids"][:2], cut["attention_mask"][:2])]
    assert first_rows(trainer, 9) == wanted and len(wanted[0]) == 5


def test_sc_lora_reads_each_document_of_a_packed_row_by_itself():
    packed = [{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}, {"input_ids": [6, 7, 8], "seq_lengths": [1, 2]}]
    trainer = SimpleNamespace(train_dataset=packed)
    for rows, documents in ((9, 4), (3, 3), (1, 1)):
        assert first_rows(trainer, rows) == [[1, 2], [3, 4, 5], [6], [7, 8]][:documents]


# --- terms of the loss ---


def anchor_oracle(trainer, rows, weight):
    """The mean KL a token of the rows, one at a time in float64, and what it adds to the gradients."""
    model = trainer.model.double()
    total, tokens = 0.0, sum(map(len, rows))
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            p = tiny_model().double()(ids).logits[0].softmax(-1)
        q = model(ids).logits[0].softmax(-1)
        total = total + (p * (p.log() - q.log())).sum() / tokens
    (weight * total).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.float()
    return total.item(), found


def penalty_oracle(trainer, weight):
    """λ/2·(‖AP‖² + ‖QᵀB‖²) and its gradients λ A P Pᵀ and λ Q Qᵀ B, from the method's own P and Q."""
    total, found = 0.0, {}
    for name, (P, Q) in trainer.method.bases.items():
        P, Q = P.double(), Q.double()
        for basis in (P, Q):
            torch.testing.assert_close(
                basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-5, rtol=0
            )
        layer = adapted_layers(trainer.model)[name]
        A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        total += 0.5 * torch.trace(A @ P @ P.T @ A.T) + 0.5 * torch.trace(B.T @ Q @ Q.T @ B)
        found[f"base_model.model.{name}.lora_A.default.weight"] = weight * A @ P @ P.T
        found[f"base_model.model.{name}.lora_B.default.weight"] = weight * Q @ Q.T @ B
    return float(total), found


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ["kl-anchor", "clora"])
def test_a_term_is_added_once_a_step_whatever_its_passes(tmp_path, name, passes):
    """The sum over the passes of a step, and its gradients, against the plain loss and a float64 oracle."""
    options = {
        "kl-anchor": {"weight": 0.7, "batch_rows": 5, "tokens": 20, "every": 1},
        "clora": {"weight": 0.7, "k": 6},
    }[name]
    trainer = perturbed(started(tmp_path, name, options=options))
    terms, trainer.method.terms = trainer.method.terms, ()
    plain, plain_gradients = gradients(trainer, num_items_in_batch=100)
    trainer.method.terms = terms
    losses, summed = 0.0, {}
    for _ in range(passes):
        loss, found = gradients(trainer, num_items_in_batch=100, passes=passes)
        losses += loss - plain
        summed = {key: summed.get(key, 0) + value - plain_gradients[key] for key, value in found.items()}
    wanted, exact = (
        anchor_oracle(trainer, trainer.method.rows_at(0), 0.7) if name == "kl-anchor" else penalty_oracle(trainer, 0.7)
    )
    assert wanted > 0 and losses == pytest.approx(0.7 * wanted, rel=1e-4)
    for key, gradient in exact.items():
        torch.testing.assert_close(
            summed[key].double(), gradient, rtol=1e-3, atol=1e-5 * (1 + gradient.abs().max().item())
        )
    assert trainer._logged_terms()[terms[0]] == pytest.approx(wanted, rel=1e-4)


def test_a_trainer_that_divides_by_the_passes_does_not_divide_the_term(tmp_path):
    trainer = perturbed(started(tmp_path, "clora"))
    trainer.loss_is_scaled_for_ga = False
    trainer.current_gradient_accumulation_steps = 4
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model.train()
    first, second = (trainer.compute_loss(trainer.model, dict(batch)) for _ in range(2))
    assert (first - second).item() == pytest.approx(4 * penalty_oracle(trainer, 1.0)[0], rel=1e-4)
    trainer.model.eval()  # an evaluation's loss is the data's alone
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(second.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["kl-anchor", "clora"])
@pytest.mark.parametrize("calls, passes", [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_a_trainer_whose_loss_is_computed_elsewhere_or_twice_takes_no_term(tmp_path, monkeypatch, name, calls, passes):
    class Own(LoraNullSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rest = (return_outputs, num_items_in_batch)
            losses = [super(Own, self).compute_loss(model, dict(inputs), *rest) for _ in range(calls)]
            return sum(losses) / calls if calls else model(**inputs).loss

    monkeypatch.setattr("test_methods.LoraNullSFTTrainer", Own)
    trainer = make(tmp_path, name, gradient_accumulation_steps=passes)
    said = rf"method: {name} adds its term in .* Own does not call .*\(passes .*: {passes}, calls: {calls * passes}\)"
    with pytest.raises(UserError, match=said):
        trainer.train()
    assert not trainer.state.global_step


def test_a_step_of_fewer_passes_than_asked_has_its_term(tmp_path):
    """48 rows fill 12 batches, of which the second step of an epoch takes the last 4; a resumed run may begin with it."""
    epoch = {"gradient_accumulation_steps": 8, "max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps"}
    make(tmp_path, "kl-anchor", save_steps=1, **epoch).train()
    make(tmp_path, "kl-anchor", save_steps=1, **epoch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_anchor_s_texts_follow_each_other_and_enter_every_mth_step(tmp_path):
    trainer = started(tmp_path, "kl-anchor", options={"every": 3, "batch_rows": 10, "weight": 2.0, "tokens": 7})
    method = trainer.method
    assert sorted(map(tuple, method.windows)) == sorted(
        tuple(tiny_tokenizer()(text)["input_ids"][:7]) for text in TEXTS
    )
    seen = [row for step in range(0, 21, 3) for row in method.rows_at(step)]
    assert seen[:64] == method.windows and seen[64:] == method.windows[:6]
    trainer.model.train()
    modes = []
    trainer.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    found = [method.extra_loss(trainer, trainer.model, MicroBatch(step, 0, 1)) for step in range(4)]
    assert [bool(terms) for terms in found] == [True, False, False, True]
    assert modes == [False, True] * 2  # the base answers without dropout, the model that trains with it
    assert found[0]["anchor_kl"].weight == 6.0 and found[0]["anchor_kl"].value.item() == pytest.approx(0, abs=1e-6)
    more = make_method("kl-anchor", {"batch_rows": 100})
    more.windows = [[1], [2, 3]]
    assert more.rows_at(0) == [[1], [2, 3]]  # each once


@pytest.mark.parametrize("room", [4096, 60])
@pytest.mark.parametrize(("world", "passes"), [(2, 1), (3, 2), (8, 1), (2, 4)])
def test_the_anchor_s_texts_are_shared_out_among_processes_and_passes(tmp_path, monkeypatch, world, passes, room):
    """The mean over the processes of what they add up to over the passes is what one process finds, 5 texts a step.

    Of longer texts (here: where less room is) a process makes several batches, one of one length more than another.
    """
    trainer = perturbed(started(tmp_path, "kl-anchor", options={"batch_rows": 5}))
    trainer.model.train()
    monkeypatch.setattr("lora_null.trainer.calibration_data.TOKENS_PER_BATCH", room)
    runs = []
    trainer.model.register_forward_pre_hook(lambda *_: runs.append(1))

    def value(index, world, passes):
        monkeypatch.setattr("lora_null.trainer.methods.kl_anchor.process_index", lambda: index)
        monkeypatch.setattr("lora_null.trainer.methods.kl_anchor.num_processes", lambda: world)
        terms = [trainer.method.extra_loss(trainer, trainer.model, MicroBatch(3, i, passes)) for i in range(passes)]
        return [term["anchor_kl"].value.item() for term in terms if term], len(runs)

    with torch.no_grad():
        found, ran = zip(*(value(index, world, passes) for index in range(world)))
        shares, ran = list(found), [b - a for a, b in zip((0, *ran), ran)]
        assert len({len(share) for share in shares}) == len(set(ran)) == 1  # all of them run the model as often
        assert sum(map(sum, shares)) / world == pytest.approx(sum(value(0, 1, 1)[0]), rel=1e-5)


@pytest.mark.parametrize("name", ["kl-anchor", "clora"])
def test_terms_are_logged(tmp_path, name):
    trainer = make(tmp_path, name, gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    values = [line[trainer.method.terms[0]] for line in trainer.state.log_history if "loss" in line]
    assert len(values) == 3 and all(math.isfinite(value) and value >= 0 for value in values)
    assert values[-1] > values[0] if name == "kl-anchor" else values[-1] < values[0]


@pytest.mark.parametrize("name", ["kl-anchor", "clora"])
def test_passes_and_batches_of_a_step_come_to_the_same(tmp_path, name):
    """Two passes of two rows are one pass of four; without Adam, which makes much of a gradient near zero."""
    plain = {"optim": "sgd", "learning_rate": 0.1}
    batches = ({"per_device_train_batch_size": 4 // n, "gradient_accumulation_steps": n} for n in (1, 2))
    one, two = (make(tmp_path / str(i), name, **plain, **batch) for i, batch in enumerate(batches))
    for trainer in (one, two):
        trainer.train()
    assert one.drift_meter.summary()["mean"] > 1e-3
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].supports_preferences])
def test_preferences(tmp_path, name):
    method = make_method(name, {**OPTIONS, "kl-anchor": {}}.get(name))
    arguments = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=4, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = LoraNullDPOTrainer(
        model=str(save_tiny(tmp_path / "model")), args=arguments, train_dataset=PAIRS, processing_class=tiny_tokenizer(), method=method,
        peft_config=method.config(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        calibration_dataset=TEXTS, calibration_args=CUT,
    )  # fmt: skip
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and log[-1]["loss"] < log[0]["loss"]
    assert all(term in line for term in method.terms for line in log)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_anchor_under_gradient_checkpointing_and_autocast_with_dropout(tmp_path, passes):
    """Its first value is 0 to rounding: both passes are the base's; then the same log as without checkpointing."""
    logs = []
    for checkpointing in (False, True):
        trainer = make(
            tmp_path / str(checkpointing), "kl-anchor", options={"every": 1}, bf16=True, gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=passes, adapter={"lora_dropout": 0.1}, max_steps=3,
        )  # fmt: skip
        trainer.train()
        logs.append([line["anchor_kl"] for line in trainer.state.log_history if "anchor_kl" in line])
    assert abs(logs[0][0]) < 1e-6 and logs[0][2] > 1e-5
    assert logs[1] == pytest.approx(logs[0], rel=1e-2, abs=1e-6)


def test_an_adapter_that_was_trained_goes_on_with_a_term(tmp_path):
    """The anchor is the original model, not where the second training starts."""
    first = make(tmp_path / "a", "lora")
    first.train()
    config = make_method("kl-anchor")
    arguments = DPOConfig(
        output_dir=str(tmp_path / "b"), use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    second = LoraNullDPOTrainer(
        model=first.model, args=arguments, train_dataset=PAIRS, processing_class=tiny_tokenizer(), method=config,
        calibration_dataset=iter(TEXTS), calibration_args=CUT,
    )  # fmt: skip
    perturbed(second)
    second.train()
    assert second.state.log_history[0]["anchor_kl"] > 1e-3


def test_a_term_enters_the_first_step_after_one_that_ran_out_of_memory(tmp_path, monkeypatch):
    trainer = make(tmp_path, "clora", max_steps=2, auto_find_batch_size=True)
    asked, step, failures = [], trainer.training_step, iter([True])
    term = trainer.method.extra_loss
    monkeypatch.setattr(
        trainer.method, "extra_loss", lambda t, m, now: asked.append((now.step, now.index)) or term(t, m, now)
    )

    def out_of_memory_once(*args):
        loss = step(*args)
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    trainer.training_step = out_of_memory_once
    trainer.train()
    assert asked == [(0, 0), (0, 0), (1, 0)]


def test_clora_draws_its_subspaces_from_the_seed_of_each_run_and_for_each_layer(tmp_path):
    method = make_method("clora", {"k": 8})

    def drawn(seed):
        arguments = make(tmp_path, "clora", options={"k": 8}, seed=seed, max_steps=2).args
        trainer = LoraNullSFTTrainer(
            model=tiny_model(), args=arguments, train_dataset=ROWS, processing_class=tiny_tokenizer(), method=method,
            peft_config=method.config(r=4, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        return [basis for i in (0, 1) for basis in method.bases[f"model.layers.{i}.self_attn.q_proj"]]

    one, other, again = drawn(1), drawn(2), drawn(1)
    assert all(map(torch.equal, one, again))
    for P, Q in itertools.combinations([*one, *other], 2):
        assert np.linalg.norm(P.T @ Q, 2) < 0.99


def test_the_anchor_reads_its_texts_without_the_noise_that_the_rows_get(tmp_path):
    trainer = make(tmp_path, "kl-anchor", options={"every": 1}, neftune_noise_alpha=5.0, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["anchor_kl"] == pytest.approx(0, abs=1e-5)  # B is 0


@pytest.mark.parametrize("biased", [True, False])
def test_the_anchor_is_the_base_and_so_its_biases_must_not_train(tmp_path, biased):
    with pytest.raises(UserError, match=r"^bias: kl-anchor compares with") if biased else nullcontext():
        make(tmp_path, "kl-anchor", adapter={"bias": "lora_only"}, model=tiny_model(attention_bias=biased))


@pytest.mark.parametrize("name", ["kl-anchor", "replay"])
def test_texts_come_in_an_order_drawn_with_the_seed_of_the_run(name):
    texts = [[i] for i in range(10, 42)]
    rows = Dataset.from_dict({"input_ids": [[1]] * 8, "labels": [[1]] * 8})

    def order(seed):
        method = make_method(name, {"share": 0.8} if name == "replay" else {})
        arguments = SimpleNamespace(seed=seed, max_length=None)
        found = method.training_data(SimpleNamespace(args=arguments, train_dataset=rows), texts)
        return method.windows if name == "kl-anchor" else [ids for ids in found["input_ids"] if ids != [1]]

    one, other = order(42), order(43)
    assert sorted(one) == sorted(other) == texts and order(42) == one
    assert one != texts and other != texts and one != other


# --- replay ---


def test_replay_mixes_whole_texts_evenly_among_all_rows(tmp_path, caplog):
    trainer = make(tmp_path, "replay", options={"share": 0.25})
    before = list(trainer.train_dataset)
    with caplog.at_level("INFO", "lora_null"):
        trainer._prepare(resuming=False)
    assert "16 calibration texts (16 distinct) among 48 training rows" in caplog.text
    rows = list(trainer.train_dataset)
    texts = {tuple(tiny_tokenizer()(text)["input_ids"]) for text in TEXTS}
    replayed = [i for i, row in enumerate(rows) if tuple(row["input_ids"]) in texts]
    assert len(rows) == 64 and len(replayed) == 16
    assert [row["input_ids"] for i, row in enumerate(rows) if i not in replayed] == [
        row["input_ids"] for row in before
    ]
    assert all(rows[i]["labels"] == rows[i]["input_ids"] for i in replayed)
    assert all(sum(4 * k <= i < 4 * k + 4 for i in replayed) == 1 for k in range(16))
    again = make(tmp_path, "replay", options={"share": 0.25})
    again._prepare(resuming=False)
    assert list(again.train_dataset) == rows


def test_replay_hides_no_row_that_teaches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("test_methods.ROWS", Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8))
    with pytest.raises(UserError, match="label"):
        make(tmp_path, "replay", max_length=None).train()


def test_replay_mixes_once_where_an_attempt_was_broken_off(tmp_path, monkeypatch):
    def broken_off(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = make(tmp_path, "replay", max_steps=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mixin, "compute_start", broken_off)
        trainer.train()
    trainer.train()
    assert len(trainer.train_dataset) == 60


def test_replay_mixes_among_the_rows_of_a_second_training_too(tmp_path):
    trainer = make(tmp_path, "replay", max_steps=1)
    rows = trainer.train_dataset
    for given, mixed in ((rows, 60), (None, 60), (rows.select(range(24)), 30)):
        trainer.train_dataset = given or trainer.train_dataset
        trainer.train()
        assert len(trainer.train_dataset) == mixed


def test_replay_takes_texts_again_cuts_them_and_makes_epochs_longer(tmp_path):
    trainer = make(tmp_path, "replay", options={"share": 0.75}, max_length=12, max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert len(trainer.train_dataset) == 192 and trainer.state.max_steps == 48  # 144 texts of 64
    assert trainer.method.rows_trained_on(48) == 192
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 12


def test_replay_refuses_rows_that_it_cannot_mix(tmp_path):
    trainer = make(tmp_path, "replay")
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(UserError, match=r"replay mixes texts among tokenized rows .* is a IterableDataset"):
        trainer.train()


class _PlainTrainer(LoraNullMixin, Trainer):
    pass


def plain_replay(folder, rows, **training):
    """Replay under Transformers' own trainer and arguments, which know no `max_length`."""
    tokenizer, method = tiny_tokenizer(), make_method("replay")
    return _PlainTrainer(
        model=get_peft_model(tiny_model(), method.config(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
        args=TrainingArguments(**quick(folder, **training)),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        method=method,
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )


def test_replay_under_a_trainer_that_is_not_trls(tmp_path):
    rows = Dataset.from_list([dict(tiny_tokenizer()(f"{i} is it</s>")) for i in range(48)])
    trainer = plain_replay(tmp_path, rows)
    trainer.train()
    assert trainer.train_dataset.column_names == rows.column_names == ["input_ids", "attention_mask"]
    assert len(trainer.train_dataset) == 60
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in trainer.train_dataset)


def test_replay_leaves_no_column_out_unsaid(tmp_path, caplog):
    ids = [5, 6, 7, 2]
    rows = Dataset.from_dict({"input_ids": [ids] * 48, "position_ids": [[3, 4, 5, 6]] * 48, "source": [0] * 48})
    with pytest.raises(UserError, match="replay's texts have no position_ids, which the rows have"):
        plain_replay(tmp_path / "1", rows).train()
    rows = rows.remove_columns("position_ids")
    for removed, told in ((True, 0), (False, 1)):
        plain_replay(tmp_path / str(removed), rows, remove_unused_columns=removed).train()
        assert caplog.text.count("replay: the rows are trained on without source, which texts have not") == told


def test_replay_refuses_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("test_methods.ROWS", ROWS.to_iterable_dataset())
    with pytest.raises(UserError, match=r"replay mixes texts among tokenized rows .* is a IterableDataset$"):
        make(tmp_path, "replay").train()


# --- KeepLoRA ---


@pytest.mark.parametrize("of_weight, of_inputs", [(0.5, 0.9), (0.0, 0.9), (0.5, 0.0)])
def test_keeplora_starts_from_the_gradient_outside_of_what_is_kept(tmp_path, of_weight, of_inputs):
    options = {"rows": 8, "weight_energy": of_weight, "input_energy": of_inputs}
    trainer = started(tmp_path, "keeplora", options=options)
    base = tiny_model().double()
    for i in (0, 4):
        base(**trainer.data_collator([trainer.train_dataset[j] for j in range(i, i + 4)])).loss.backward()
    layers = adapted_layers(trainer.model)
    inputs = oracle.capture_inputs(tiny_model(), layers, one_by_one(TEXTS))
    for key in layers:
        W, X, G = (
            base.get_submodule(key).weight.detach().numpy(),
            inputs[key],
            base.get_submodule(key).weight.grad.numpy(),
        )
        M = oracle_of_kept(W, X, of_weight, of_inputs)
        A, B, _ = factors(trainer, key)
        assert not B.any() and 0 < M.shape[1] <= X.shape[0] - 4
        np.testing.assert_allclose(A @ M, 0, atol=1e-4)  # the captured inputs are float32, as the model is
        np.testing.assert_allclose(A @ A.T, np.eye(4), atol=1e-5)
        outside = G - G @ M @ M.T
        caught, most = np.linalg.norm(outside @ A.T) ** 2, (np.linalg.svd(outside)[1][:4] ** 2).sum()
        assert caught == pytest.approx(most, rel=1e-4)


def oracle_of_kept(W, X, of_weight, of_inputs):
    """Add directions one at a time while too little is held."""
    _, S, Vh = np.linalg.svd(W, full_matrices=False)
    count = 0
    while (S[: count + 1] ** 2).sum() < of_weight * (S**2).sum():
        count += 1
    M = Vh[:count].T
    while np.linalg.norm(M.T @ X) ** 2 < of_inputs * np.linalg.norm(X) ** 2:
        left = X - M @ (M.T @ X)
        M = np.hstack([M, np.linalg.svd(left, full_matrices=False)[0][:, :1]])
    return M


def test_keeplora_keeps_out_all_through_training(tmp_path):
    trainer = make(tmp_path / "run", "keeplora", weight_decay=0.1)
    trainer.train()
    trainer.method.save(trainer.model, tmp_path / "saved")
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").merge_and_unload()
    inputs = oracle.capture_inputs(tiny_model(), adapted_layers(trainer.model), one_by_one(TEXTS))
    for key, X in inputs.items():
        W0, W = (model.get_submodule(key).weight.detach().double().numpy() for model in (tiny_model(), merged))
        moved, M = W - W0, oracle_of_kept(W0, X, 0.5, 0.9)
        assert np.linalg.norm(moved) > 1e-2 * np.linalg.norm(W0)
        assert np.linalg.norm(moved @ M) < 1e-5 * np.linalg.norm(moved)


def test_keeplora_says_where_too_little_is_free(tmp_path):
    trainer = make(tmp_path, "keeplora", options={"rows": 8, "weight_energy": 0.0, "input_energy": 0.9999999})
    with pytest.raises(
        UserError, match=r"method\.options\.keeplora: \S+ has only \d directions .* r = 4; lower weight_energy"
    ):
        trainer.train()


@pytest.mark.parametrize("name", ["sc-lora", "keeplora"])
def test_too_few_tokens_to_keep_are_refused(tmp_path, name):
    trainer = make(tmp_path, name)
    trainer._calibration_dataset = TEXTS[:4]
    with pytest.raises(UserError, match=r"calibration: only \d+ tokens, at least 256 are needed"):
        trainer.train()


def test_keeplora_is_computed_anew_for_other_texts_where_no_drift_is_measured_of_them(tmp_path):
    found = []
    for texts in (TEXTS, [text[::-1] for text in TEXTS]):
        trainer = make(tmp_path, "keeplora")
        trainer._drift_is_measurable = lambda: False
        trainer._calibration_dataset = texts
        trainer._prepare(resuming=None)
        found.append(torch.cat([A.flatten() for A, _ in map(factors_of, adapted_layers(trainer.model).values())]))
    assert not torch.equal(*found)


# --- OFT, OPLoRA ---


@pytest.mark.parametrize("name", ["oplora", "keeplora"])
def test_dora_would_move_the_directions_that_are_kept(tmp_path, name):
    with pytest.raises(UserError, match=f"use_dora: {name} keeps directions of W0"):
        make(tmp_path, name, adapter={"use_dora": True}, options={"k": 4} if name == "oplora" else {})


@pytest.mark.parametrize("exact", [False, True])
def test_oft_is_a_rotation_of_the_inputs(tmp_path, exact):
    trainer = make(tmp_path / "run", "oft", options={"block_size": 8, "exact": exact})
    trainer.train()
    trainer.method.save(trainer.model, tmp_path / "saved")
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").merge_and_unload()
    drift = trainer.drift_meter.measure()
    X = oracle.capture_inputs(tiny_model(), drift, one_by_one(TEXTS))
    for name, value in drift.items():
        W0, W = (model.get_submodule(name).weight.detach().double().numpy() for model in (tiny_model(), merged))
        np.testing.assert_allclose(W @ W.T, W0 @ W0.T, atol=1e-3 if exact else 0.2 * np.abs(W0 @ W0.T).max())
        assert_drift(trainer, name, value, W - W0, W0, X[name])


def test_oplora_leaves_the_leading_singular_triples_alone(tmp_path):
    trainer = make(tmp_path / "run", "oplora", options={"k": 6}, weight_decay=0.1)
    trainer.train()
    trainer.method.save(trainer.model, tmp_path / "saved")
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").merge_and_unload()
    for name in adapted_layers(trainer.model):
        W0, W = (model.get_submodule(name).weight.detach().double().numpy() for model in (tiny_model(), merged))
        U, S, Vh = np.linalg.svd(W0, full_matrices=False)
        assert np.linalg.norm(W - W0) > 1e-2 * np.linalg.norm(W0)
        np.testing.assert_allclose(W @ Vh[:6].T, U[:, :6] * S[:6], atol=1e-5)
        np.testing.assert_allclose(U[:, :6].T @ W, S[:6, None] * Vh[:6], atol=1e-5)


def test_oplora_trains_as_with_the_projections_in_the_forward_pass(tmp_path):
    """Against (I − UUᵀ) B A (I − VVᵀ) written out, its A and B free, under the same Adam."""
    trainer = make(tmp_path, "oplora", options={"k": 6}, max_steps=5, max_grad_norm=0.0, learning_rate=3e-3)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    batches = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (batches.append(dict(inputs)), step(model, inputs, *rest))[1]
    trainer.train()
    base = tiny_model()
    free, moved = {}, {}
    for name in adapted_layers(trainer.model):
        linear = base.get_submodule(name)
        U, _, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        PL, PR = torch.eye(len(U)) - U[:, :6] @ U[:, :6].T, torch.eye(Vh.shape[1]) - Vh[:6].T @ Vh[:6]
        A, B = (start[f"base_model.model.{name}.lora_{k}.default.weight"].requires_grad_() for k in "AB")
        free[name], moved[name] = (A, B), lambda A=A, B=B, PL=PL, PR=PR: 2 * PL @ B @ A @ PR  # s = 8/4
        linear.register_forward_hook(lambda _, x, out, name=name: out + x[0] @ moved[name]().T)
    optimizer = torch.optim.AdamW([p for pair in free.values() for p in pair], lr=3e-3, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        base(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        optimizer.step()
    for name in free:
        A, B, s = factors(trainer, name)
        wanted = moved[name]().detach().double().numpy()
        assert np.linalg.norm(s * B @ A - wanted) < 2e-3 * np.linalg.norm(wanted)


class _Break(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_is_broken_off_leaves_no_hook_behind(tmp_path, name):
    """Another trainer may go on with the model, by another method."""

    def hooks():
        of_modules = [getattr(module, kind) for module in trainer.model.modules() for kind in HOOKS]
        return sum(map(len, [*of_modules, *(p._backward_hooks or () for p in trainer.model.parameters())]))

    trainer = make(tmp_path, name)
    before = hooks()
    trainer.add_callback(_Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and hooks() == before


# --- refused before work ---


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("sc-lora", {"beta": 1.5}, r"sc-lora\.beta: must be between 0 and 1, not 1\.5"),
        ("sc-lora", {"rows": 0}, r"sc-lora\.rows: must be a whole number of at least 1, not 0"),
        ("eva", {"batch_rows": 0}, r"eva\.batch_rows: must be a whole number of at least 1, not 0"),
        ("eva", {"rho": 0.5}, r"eva\.rho: must be a number of at least 1, not 0\.5"),
        ("eva", {"rho": "x"}, "wrong type"),
        ("lora-ga", {"rows": 0}, r"lora-ga\.rows: must be a whole number of at least 1, not 0"),
        ("osf", {"effective_rank": 1.5}, r"osf\.effective_rank: must be a whole number of at least 1, or a fraction"),
        ("osf", {"effective_rank": 0}, r"osf\.effective_rank: must be a whole number of at least 1"),
        ("kl-anchor", {"weight": 0}, r"kl-anchor\.weight: must be a number above 0, not 0"),
        ("kl-anchor", {"weight": float("nan")}, r"kl-anchor\.weight: must be a number above 0, not nan"),
        ("kl-anchor", {"every": 1.5}, r"kl-anchor\.every: must be a whole number of at least 1, not 1\.5"),
        ("kl-anchor", {"tokens": "long"}, r"kl-anchor\.tokens: must be a whole number of at least 1, not long"),
        ("replay", {"share": 1}, r"replay\.share: must be above 0 and below 1, not 1"),
        ("replay", {"share": "half"}, "wrong type"),
        ("clora", {"k": 0}, r"clora\.k: must be a whole number of at least 1, not 0"),
        ("clora", {"weigth": 1}, r"no option 'weigth' \(did you mean 'weight'\?\)"),
        ("oft", {"block_size": 1}, r"oft\.block_size: must be a whole number of at least 2, not 1"),
        ("oft", {"exact": "yes"}, r"oft\.exact: must be true or false, not yes"),
        ("keeplora", {"rows": 0}, r"keeplora\.rows: must be a whole number of at least 1, not 0"),
        (
            "keeplora",
            {"input_energy": 1},
            r"keeplora\.input_energy: must be a share from 0 to below 1, such as 0\.99, not 1",
        ),
        ("oplora", {"k": True}, r"oplora\.k: must be a whole number of at least 1, not True"),
    ],
)
def test_options(name, wrong, said):
    with pytest.raises(UserError, match=said):
        make_method(name, wrong)


def test_layers_that_are_too_small(tmp_path):
    for name in ("clora", "oplora"):
        with pytest.raises(UserError, match=rf"{name}\.k: 17 is larger than .*k_proj allows .* = 16"):
            make(tmp_path, name, options={"k": 17})
    with pytest.raises(
        UserError, match=r"oft\.block_size: 32 does not divide the 48 inputs of .*; .* divides all is 16"
    ):
        make(tmp_path, "oft", options={"block_size": 32})


@pytest.mark.parametrize("name", ["sc-lora", "kl-anchor", "replay", "keeplora"])
def test_texts_are_needed(name):
    from trl import SFTConfig

    method = make_method(name)
    with pytest.raises(UserError, match=f"calibration_dataset: {name} needs texts"):
        LoraNullSFTTrainer(
            model=tiny_model(), args=SFTConfig(output_dir="x", use_cpu=True, bf16=False, report_to="none"),
            train_dataset=ROWS, processing_class=tiny_tokenizer(), peft_config=method.config(r=4), method=method,
        )  # fmt: skip


def test_conv1d(tmp_path):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=128))

    with pytest.raises(UserError, match=r"oft adapts torch\.nn\.Linear alone, and GPT2LMHeadModel has Conv1D"):
        make(tmp_path, "oft", model=gpt2())
    for name in ("sc-lora", "kl-anchor", "clora", "oplora", "keeplora"):
        trainer = make(tmp_path / name, name, model=gpt2(), max_steps=2)
        trainer._prepare(resuming=False)
        ids = torch.arange(10, 20)[None]
        with torch.no_grad():
            assert (trainer.model.eval()(ids).logits - gpt2().eval()(ids).logits).abs().max() < 1e-4
        trainer._prepared = True
        trainer.train()


# --- the command ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "kl-anchr"], "did you mean 'kl-anchor'?"),
        (
            ["method.options={kl-anchor: {evry: 2}}", "--method", "kl-anchor"],
            "no option 'evry' (did you mean 'every'?)",
        ),
        (["method.options.clora.k=500", "--method", "clora"], "method.options.clora.k: 500 is larger than"),
        (["--method", "oft"], "method.options.oft.block_size: 32 does not divide the 48 inputs"),
        (["--method", "replay", "trainer=dpo"], "replay learns no preferences (DPO); those that do: "),
        (["--method", "oft", "model.quantization=nf4"], "oft needs plain weights, not a quantized base"),
        (["--method", "sc-lora", "model.quantization=int8"], "sc-lora needs plain weights, not a quantized base"),
    ],
)
def test_mistakes_are_one_line_before_a_model_loads(tmp_path, capsys, monkeypatch, words, said):
    recipe = make_world(tmp_path)
    monkeypatch.setattr("lora_null.recipes.measure.base_to_run", lambda *_: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert main([str(recipe), "--dry-run", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_vllm_serves_no_oft(tmp_path):
    recipe = load_recipe(str(make_world(tmp_path)), ["method.name=oft", "eval.backend=vllm"])
    with pytest.raises(UserError, match=r"eval\.backend: vllm runs no adapter of oft"):
        check_methods(recipe, None)


def test_rivals_by_the_command(tmp_path, capsys):
    options = {"clora": {"k": 8}, "oplora": {"k": 8}, "oft": {"block_size": 16}, "sc-lora": {"rows": 16}}
    options["keeplora"] = {"rows": 8, "weight_energy": 0.5, "input_energy": 0.9}
    recipe = make_world(tmp_path, method={"name": ",".join(NAMES), "rank": 4, "options": options})
    assert main([str(recipe), "--dry-run"]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "kl-anchor: each step two forward passes" in plan and "an epoch has 1.25 times the steps" in plan
    names = ("kl-anchor", "oft")  # a run of each; how all train is told above
    assert main([str(recipe), "--method", ",".join(names)]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert set(rows) == {"base", *names}
    for name in names:
        assert rows[name]["drift"]["mean"] > 0 and rows[name]["adapter_params"] > 0
        PeftModel.from_pretrained(tiny_model(), tmp_path / "out" / name / "adapter")
        for line in (tmp_path / "out" / name / "train_log.jsonl").read_text().splitlines():
            assert set(METHODS[name].terms) <= set(json.loads(line))

"""Probes: measured while any Trainer trains, exactly, and without any trace in what it trains."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_null.eval_harness import AnswerTask, Metric, MTBenchTask, Probe, few_rows
from lora_null.eval_harness.likelihood import tokenize_pairs
from lora_null.eval_harness.probe import Point, nice_number
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.probes import plan_probes
from lora_null.utils.errors import UserError

FACTS = [(f"Q: who was king {i}\nA:", f" k{i} of {'the' * (i % 3)} land") for i in range(30)]
SUMS = [(f"Q: what is {i}+{i}\nA:", f" {2 * i}") for i in range(12)]
TASKS = [AnswerTask("facts", FACTS[:12], kl=True, role="retention"), AnswerTask("sums", SUMS)]


def trainer(folder, steps=6, start=True, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=start)
    model = get_peft_model(tiny_model(), config)
    texts = tiny_tokenizer()([question + answer for question, answer in SUMS])["input_ids"]
    rows = [{"input_ids": ids[:12], "labels": ids[:12], "attention_mask": [1] * 12} for ids in texts]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, seed=0, **{"save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows)


class Early(TrainerCallback):
    def on_evaluate(self, args, state, control, **_):
        control.should_training_stop = True


def test_a_training_that_ends_early_is_measured_there(tmp_path):
    early = trainer(tmp_path)
    early.eval_dataset, early.args.eval_strategy, early.args.eval_steps = early.train_dataset, "steps", 3
    early.add_callback(Early())
    probe = Probe(early, TASKS, tokenizer=tiny_tokenizer(), every=100, batch_size=5)
    early.add_callback(probe)
    early.train()
    assert [point.step for point in probe.points] == [0, 3]


def kl_oracle(model):
    """KL(base ‖ model) over all answer tokens, in float64, a text at a time."""
    total = tokens = 0
    model = model.eval().double()
    for pair in tokenize_pairs(tiny_tokenizer(), FACTS[:12], "facts", None):
        ids = torch.tensor([pair.ids])
        with torch.no_grad():
            now = model(input_ids=ids).logits[0].log_softmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits[0].log_softmax(-1)
        at = slice(pair.start - 1, len(pair.ids) - 1)
        total += float((base[at].exp() * (base[at] - now[at])).sum())
        tokens += len(pair.ids) - pair.start
    return total / tokens


def test_in_any_trainer_and_without_a_trace(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    probed = trainer(tmp_path / "probed")
    probe = Probe(probed, TASKS, tokenizer=tiny_tokenizer(), every=4, batch_size=5)
    probed.add_callback(probe)
    probed.train()
    for (name, one), (_, other) in zip(plain.model.named_parameters(), probed.model.named_parameters()):
        assert torch.equal(one, other), name
    assert [point.step for point in probe.points] == [0, 4, 6]
    lines = [line for line in probed.state.log_history if "probe/facts kl" in line]
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert (
        set(lines[0]) >= {"probe/facts nll", "probe/sums nll", "probe/seconds"} and lines[0]["probe/facts kl"] < 1e-6
    )
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (plain, probed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6  # no line of the trainer's own is lost
    found = probe.points[-1].metrics["facts kl"]
    assert found.value == pytest.approx(kl_oracle(probed.model), rel=1e-4) and found.value > 1e-3 and found.stderr > 0


def test_another_models_predictions_are_not_the_bases(tmp_path):
    """What an earlier training left in the same folder, of another model with the same tokenizer, is written anew."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        probed = trainer(tmp_path / "out")
        with torch.no_grad():
            for name, parameter in probed.model.named_parameters():
                parameter.add_(0.0 if "lora_" in name else 0.01 * seed)
        probe = Probe(probed, TASKS, tokenizer=tiny_tokenizer(), every=4)
        probed.add_callback(probe)
        probed.train()
        assert probe.points[0].metrics["facts kl"].value < 1e-6


def test_what_a_folder_lacks_of_the_bases_predictions_is_recorded(tmp_path):
    for tasks in (TASKS, [*TASKS, replace(TASKS[0], name="more")]):
        run = trainer(tmp_path / "out")
        probe = Probe(run, tasks, tokenizer=tiny_tokenizer(), every=4, reference_dir=tmp_path / "base")
        run.add_callback(probe)
        run.train()
    assert probe.points[0].metrics["more kl"].value == pytest.approx(
        probe.points[0].metrics["facts kl"].value, abs=1e-9
    )


def test_a_run_that_goes_on_in_another_folder_still_has_the_bases_predictions(tmp_path):
    found = []
    for folder, resumed in (("one", None), ("other", str(tmp_path / "one" / "checkpoint-4"))):
        run = trainer(tmp_path / folder, save_strategy="steps", save_steps=4)
        probe = Probe(run, TASKS, tokenizer=tiny_tokenizer(), every=4)
        run.add_callback(probe)
        run.train(resume_from_checkpoint=resumed)
        found.append(probe.points[-1].metrics["facts kl"].value)
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0


def test_a_base_that_peft_has_changed_is_not_taken_for_the_base(tmp_path):
    run = trainer(tmp_path, start="pissa")
    run.add_callback(Probe(run, TASKS, tokenizer=tiny_tokenizer()))
    with pytest.raises(UserError, match="init_lora_weights='pissa' has changed the base; give reference_dir"):
        run.train()


def test_auto_keeps_to_its_share_and_too_many_are_said(tmp_path, caplog):
    run = trainer(tmp_path, steps=8)
    auto = Probe(run, TASKS, tokenizer=tiny_tokenizer(), every="auto", share=0.05, every_file=tmp_path / "probe.json")
    often = Probe(run, TASKS, tokenizer=tiny_tokenizer(), every=1, share=0.01)
    run.add_callback(auto)
    run.add_callback(often)
    with caplog.at_level("WARNING"):
        run.train()
    assert auto.every == json.loads((tmp_path / "probe.json").read_text())["every"] >= 1
    assert "of the training's time" in caplog.text and "every=auto" in caplog.text
    again = Probe(run, TASKS, tokenizer=tiny_tokenizer(), every_file=tmp_path / "probe.json")
    again._load_every()
    assert again.every == auto.every  # a run that is started again probes where it did


@pytest.mark.parametrize(
    ("least", "found"), [(0.0, 1), (1.0, 1), (1.2, 2), (5.0, 5), (5.1, 10), (34, 50), (1001, 2000)]
)
def test_the_number_of_steps_is_a_round_one(least, found):
    assert nice_number(least) == found


def test_rows_are_drawn_once_for_all_and_not_by_their_order():
    few, rows = few_rows(TASKS[0], 6)
    assert few_rows(TASKS[0], 6)[1] == rows == sorted(set(rows)) and len(rows) == 6
    assert few.pairs == [FACTS[i] for i in rows] and few.kl and few.role == "retention"
    assert len({b - a for a, b in itertools.pairwise(rows)}) > 1  # a period of the file is not met
    assert few_rows(TASKS[1], 100)[1] == list(range(12)) and few_rows(TASKS[1], 100, limit=5)[1] == list(range(5))


def test_a_task_without_rows_is_probed_only_where_that_is_asked():
    tasks = [AnswerTask("facts", [("a", f"{i}") for i in range(100)], role="retention", kl=True)]
    tasks += [AnswerTask("sums", [("1", f"{i}") for i in range(100)]), MTBenchTask("MT-Bench", [], str)]
    plan = plan_probes(load_recipe("quickstart", ["budget.at_most=0.01"]), tasks, {})
    assert [(task.label, len(plan.rows[task.key])) for task in plan.tasks] == [("facts", 32), ("sums", 8)]
    with pytest.raises(UserError, match="'MT-Bench': cannot be probed, it has no rows to choose from"):
        plan_probes(load_recipe("quickstart", ["eval.probe.task=4"]), tasks, {})


def test_a_checkpoint_holds_the_points_also_of_a_diverged_run(tmp_path):
    run = trainer(tmp_path)
    one, other = (Probe(run, TASKS, tokenizer=tiny_tokenizer(), every=4) for _ in range(2))
    metrics = {"facts kl": Metric(math.nan, None, 12, False, "retention", "nats")}
    one.points = [Point(4, metrics, {"facts kl": [1.0, math.inf]}, 0.5)]
    one.save_state(tmp_path)
    other.load_state(tmp_path)
    (point,) = other.points
    assert point.step == 4 and math.isnan(point.metrics["facts kl"].value) and point.samples["facts kl"][0] == 1.0


def test_mistakes_are_named(tmp_path):
    run = trainer(tmp_path)
    for options, message in (
        ({"every": 0}, "every: must be a whole number"),
        ({"every": "often"}, "or auto, not 'often'"),
        ({"share": 0}, "share: must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            Probe(run, TASKS, tokenizer=tiny_tokenizer(), **options)

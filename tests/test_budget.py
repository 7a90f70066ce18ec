"""A budget of forgetting: what is saved keeps it on rows that no probe used, whatever interrupts the run."""

import json
import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import losses_over, random_batches, tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from world import base, make_world, write_rows

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.adapters.plain import save_plain_adapter
from lora_null.adapters.strength import Strength
from lora_null.eval_harness import AnswerTask, Evaluation, Metric, evaluate
from lora_null.recipes import measure, run
from lora_null.recipes.__main__ import main
from lora_null.recipes.budget import (
    BudgetPlan,
    Measurement,
    PlannedBound,
    check_budget,
    forgotten,
    largest_strength,
    repair_to_budget,
    scale_to_budget,
    within,
)
from lora_null.recipes.commands.report import results_so_far
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import BudgetSection
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.results import Budget, Estimate, GivenUp
from lora_null.utils.errors import UserError


@pytest.mark.parametrize("variant", ["lora", "mica", "v1", "v2"])
def test_a_strength_is_the_change_times_it_live_and_saved(tmp_path, variant):
    """Against W0 + c·ΔW in float64, ΔW taken from the merged weights."""
    batches = random_batches()
    if variant in ("lora", "mica"):
        start = {"init_lora_weights": "mica" if variant == "mica" else True}
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **start)
        model = get_peft_model(tiny_model(), config)
    else:
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant=variant, task_type="CAUSAL_LM"))
        initialize_lora_null_weights(model, batches, progress=False)
    losses_over(model, batches, steps=4)
    save_plain_adapter(model, tmp_path / "whole")
    merged = PeftModel.from_pretrained(tiny_model().double(), tmp_path / "whole").merge_and_unload()
    strength, batch = Strength(model), batches[0]
    for value in (0.3, 1.25, 0.0):
        strength.set(value)
        save_plain_adapter(model, tmp_path / f"{value}")
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / f"{value}")
        expected = tiny_model().double()
        with torch.no_grad():
            for weight, changed in zip(expected.parameters(), merged.parameters(), strict=True):
                weight += value * (changed - weight)
            wanted = expected.eval()(**batch).logits
            for found in (model, again):
                assert (found.eval()(**batch).logits - wanted).abs().max() < 1e-4
        whole, scaled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", f"{value}"))
        assert all(torch.equal(whole[key], scaled[key]) for key in whole)  # the strength is in lora_alpha alone
    with strength.at(0.5):
        assert strength.value == 0.5
    assert strength.value == 0.0


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_a_scaling_does_not_reach_has_no_strength(option):
    """At strength 0 the model would not be its base."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **option)
    with pytest.raises(UserError, match=f"has {next(iter(option))}.*, which its scaling does not reach"):
        Strength(get_peft_model(tiny_model(attention_bias=True), config))


def test_of_two_adapters_at_once_neither_has_a_strength():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="default, other are active together"):
        Strength(model)


def test_the_largest_strength_is_found_by_bisection():
    def largest(forgets, at_most):
        return largest_strength(lambda s: within(Estimate(*forgets(s)), at_most))

    def forgets(s):
        return 0.09 * s**2, 0.01 * s**2

    found = largest(forgets, 0.025)
    assert found == pytest.approx(0.5, abs=2**-7) and within(Estimate(*forgets(found)), 0.025)
    assert largest(forgets, 0.2) == 1.0
    far = largest(lambda s: (400 * s**2, 0.0), 0.01)  # a training that went far
    assert far == pytest.approx(0.005, rel=0.014) and far < 0.005
    assert largest(lambda s: (1.0, 0.1), 0.025) == 0.0
    assert largest(lambda s: (float("nan") if s > 0.3 else 0.0, None), 0.01) == pytest.approx(0.3, abs=0.01)


PAIRS = [(f"Q: {i}\nA:", f" k{i}" + "x" * (i % 4)) for i in range(24)]


def evaluation(values, unit="nats", higher=False, name="facts kl", weights=None):
    metric = Metric(float(np.mean(values)), 0.1, len(values), higher, "retention", unit)
    return Evaluation({name: metric}, {}, 0.0, {name: list(map(float, values))}, (weights and {name: weights}) or {})


def test_what_is_forgotten_is_paired_and_weighted_by_answer_tokens():
    random = np.random.default_rng(0)
    before, after = random.random(24), random.random(24)
    tokens = np.array([len(tiny_tokenizer()(q + a)["input_ids"]) - _common(q, q + a) for q, a in PAIRS], dtype=float)
    weights = evaluate(tiny_model(), tiny_tokenizer(), [AnswerTask("facts", PAIRS)]).weights["facts nll"]
    base = evaluation(before, name="facts nll", weights=weights)
    found = forgotten("facts nll", evaluation(after, name="facts nll"), base, frozenset({0, 5}))
    kept = [i for i in range(24) if i not in (0, 5)]
    change, t = ((after - before) * tokens)[kept], tokens[kept]
    mean = change.sum() / t.sum()
    error = np.sqrt(22 / 21 * np.sum((change - mean * t) ** 2)) / t.sum()
    assert found == pytest.approx((mean, error))
    answers, all_right = (evaluation(x, "fraction", True, "acc") for x in ([0, 1, 1, 0], [1, 1, 1, 1]))
    error = np.std([1, 0, 0, 1], ddof=1) / 2
    assert forgotten("acc", answers, all_right, discordant=0) == pytest.approx((0.5, error))
    assert forgotten("acc", answers, all_right) == pytest.approx((0.5, np.hypot(error, np.sqrt(2 / (4 * 3)))))
    assert forgotten("acc", all_right, all_right) == pytest.approx((0, np.sqrt(2 / (4 * 3))))


def _common(prompt, text):
    one, other = (tiny_tokenizer()(x)["input_ids"] for x in (prompt, text))
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), len(one))


class Fake:
    """A model whose forgetting is known: c² on the probed rows, `worse` times that on the others; of notes `times` that."""

    def __init__(self, worse, times=1.0):
        self.worse, self.times, self.value = worse, times, 1.0

    def set(self, value):
        self.value = value

    def at(self, value):
        return _At(self, value)

    def evaluate(self, tasks):
        found = Evaluation({}, {}, 0.0)
        for task in tasks:
            squares = self.value**2 * (1 if len(task.pairs) == 8 else self.worse)
            squares *= self.times if task.name == "notes" else 1
            one = evaluation(np.full(len(task.pairs), squares), name=f"{task.name} kl")
            found.metrics |= one.metrics
            found.samples |= one.samples
        return found


def plan_of(**allowed):
    """The budget of several KLs, each measured on 8 probed rows of 24, and the base's evaluations of both."""
    bounds, zeros = [], [Evaluation({}, {}, 0.0), Evaluation({}, {}, 0.0)]
    for name, at_most in allowed.items():
        task, few = (AnswerTask(name, PAIRS[:n], kl=True, role="retention") for n in (24, 8))
        bounds.append(PlannedBound(f"{name} kl", at_most, task, few, frozenset(range(8))))
        for found, n in zip(zeros, (8, 24)):
            one = evaluation(np.zeros(n), name=f"{name} kl")
            found.metrics |= one.metrics
            found.samples |= one.samples
    return BudgetPlan("scale", bounds), zeros


class _At:
    def __init__(self, model, value):
        self.model, self.new, self.old = model, value, model.value

    def __enter__(self):
        self.model.value = self.new

    def __exit__(self, *_):
        self.model.value = self.old


@pytest.mark.parametrize(("worse", "again"), [(1.0, False), (3.0, True), (1e9, True)])
def test_the_rows_that_no_probe_used_have_the_last_word(worse, again):
    plan, zeros = plan_of(facts=0.09)
    model = Fake(worse)
    held = scale_to_budget(Measurement(model.evaluate, plan, *zeros), model)
    assert held.n == 16 and held.kept and model.value == held.strength
    assert held.value <= 0.09 and held.value == pytest.approx(held.strength**2 * worse)
    assert (held.first_check is not None) == again
    if worse == 1e9:
        assert held.strength == 0.0
    else:
        assert held.value > 0.09 * 0.85  # no more is given up than needed


@pytest.mark.parametrize("times", [0.1, 0.9, 4.0])
def test_of_several_bounds_all_are_kept_and_the_tightest_is_told(times):
    plan, zeros = plan_of(facts=0.09, notes=0.04)
    model = Fake(1.5, times)
    held = scale_to_budget(Measurement(model.evaluate, plan, *zeros), model)
    (other,) = held.others
    used = {bound.measure: bound.value / bound.at_most for bound in (held, other)}
    assert used["facts kl"] == pytest.approx(1.5 * held.strength**2 / 0.09)
    assert used["notes kl"] == pytest.approx(1.5 * held.strength**2 * times / 0.04)
    assert held.kept and other.kept and 0.85 < max(used.values()) <= 1  # no more is given up than needed
    assert held.measure == max(used, key=used.get) == ("facts kl" if times == 0.1 else "notes kl")
    assert held.first_check is not None and other.first_check is None
    told = held.sentence()
    assert (
        "facts KL" in told and "at most 0.09 allowed" in told and "notes KL" in told and "at most 0.04 allowed" in told
    )
    assert f"these rows first gave {held.first_check:.3g} of {held.measure[:5]} KL" in told


@pytest.mark.parametrize(("worse", "weight"), [(0.1, 1.0), (1.0, 1.0), (1.2, 10.0), (3.0, 10.0), (1e9, 100.0)])
def test_a_repair_takes_the_smallest_weight_that_keeps_a_budget(worse, weight):
    plan, zeros = plan_of(facts=0.03)
    model, measured = Fake(worse), []
    at = {0.0: 0.5, 0.1: 0.4, 1.0: 0.17, 10.0: 0.01, 100.0: 0.005}  # the square is forgotten

    def apply(of):
        measured.append(of)
        model.value = at[of]

    held = repair_to_budget(Measurement(model.evaluate, plan, *zeros), list(at), apply)
    assert held.weight == weight and measured[-1] == weight and held.n == 16
    assert held.kept == (worse < 1e9) and held.value == pytest.approx(at[weight] ** 2 * worse)


def test_a_perplexity_bounds_nothing():
    """Its samples are log-likelihoods, which fall where it rises."""
    samples = [-1.0, -3.0] * 20
    metrics = {
        "l/perplexity": Metric(math.exp(2), 0.1, 40, False, "retention"),
        "l/acc": Metric(0.5, 0.1, 40, True, "retention"),
    }
    found = Evaluation(metrics, {}, 0.0, samples={"l/perplexity": samples, "l/acc": [0.0, 1.0] * 20})
    budget = BudgetPlan("scale", [PlannedBound("l/perplexity", 0.05, None, None, frozenset())])
    with pytest.raises(UserError, match=r"'l/perplexity' is no mean of a value for each question.*l/acc"):
        check_budget(budget, found, found)


@pytest.mark.parametrize(
    ("at_most", "right", "message"),
    [
        (0.2, 0.1, "0.2 (a fraction) is not below the 0.1 that the base has of acc on the 40 rows of the check"),
        (2, 0.9, "2 (a fraction) is not below the 0.9 that the base has of acc on the 40 rows"),
        (0.03, 0.9, "0.03 (a fraction) is finer than the 40 answers that acc is checked on can tell (0.036)"),
        (0.04, 0.9, None),
    ],
)
def test_a_bound_on_an_accuracy_is_one_that_can_be_broken_and_told(at_most, right, message):
    few, whole = (evaluation([i % 10 < 10 * right for i in range(n)], "fraction", True, "acc") for n in (10, 50))
    budget = BudgetPlan("scale", [PlannedBound("acc", at_most, None, None, frozenset(range(40, 50)))])
    with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
        check_budget(budget, few, whole)


def test_a_kl_beyond_what_the_answers_cost_is_no_bound():
    """As 5 for "no more than 5%": in nats per token nothing could break it."""
    few, whole = (evaluation([0.0] * n, "nats", False, "facts kl") for n in (10, 50))
    whole.metrics["facts nll"] = Metric(1.9, 0.1, 50, False, "retention", "nats")
    for at_most, refused in ((5, True), (0.05, False)):
        task = SimpleNamespace(name="facts")
        budget = BudgetPlan("scale", [PlannedBound("facts kl", at_most, task, None, frozenset(range(40, 50)))])
        with pytest.raises(UserError, match=r"5 nats per token is not below the 1\.9") if refused else nullcontext():
            check_budget(budget, few, whole)


@pytest.mark.parametrize(
    ("measure", "unit", "said", "most"),
    [
        ("facts kl", "nats", "facts KL 0.02 nats per token", "0.1"),
        ("facts nll", None, "rise of facts NLL 0.02 nats per token", "0.1"),  # of a version that kept no unit
        ("nq", "fraction", "fall of NQ 2 points", "10"),
        ("pairs reward margin", "margin", "fall of pairs reward margin 0.02", "0.1"),
    ],
)
def test_what_is_lost_is_told_as_a_change(measure, unit, said, most):
    facts = {"strength": 0.5, "step": 1, "steps": 1, "value": 0.02, "n": 9, "kept": True}
    given_up = GivenUp(full=0.5, kept=0.375, lost=0.125, stderr=0.02, unit="fraction")
    told = Budget(
        measure=measure, unit=unit, at_most=0.1, then="scale", learned={"gsm8k": given_up}, **facts
    ).sentence()
    assert told.startswith(f"{said} on 9 rows that no probe used, at most {most} allowed")
    assert told.endswith("given up: 12.5 ± 2 points of GSM8K (37.5 as saved, 50 where training ended)")


@pytest.mark.parametrize(
    ("full", "kept", "told"),
    [
        (12.4702, 12.5294, "12.529 repaired, 12.47 before"),
        (2.0, 2.0, "2 repaired, 2 before"),
        (0.5, 9.7, "9.7 repaired, 0.5"),
    ],
)
def test_what_was_given_up_is_seen_in_the_values_before_and_after(full, kept, told):
    given_up = GivenUp(full=full, kept=kept, lost=kept - full, stderr=0.01, unit="nats")
    held = {
        "measure": "facts kl",
        "at_most": 0.1,
        "value": 0.05,
        "n": 9,
        "kept": True,
        "then": "repair",
        "strength": 1,
    }
    assert f"({told}" in Budget(**held, weight=0.1, step=0, steps=0, learned={"sums nll": given_up}).sentence()


def recipe(folder, **changes):
    evaluation = {
        "batch_size": 4,
        "cache": False,
        "retention": [{"answers": "facts", "path": str(folder / "facts.jsonl"), "limit": 40}],
        "task": [{"answers": "numbers", "path": str(folder / "numbers.jsonl"), "limit": 10}],
        "probe": {"every": 2, "retention": 12, "task": 6},
    }
    method = {"name": "lora-null-v1", "rank": 4}
    return make_world(folder, method=method, eval=evaluation, **changes)


WORDS = ["training.max_steps=6", "training.save_steps=1", "training.save_total_limit=2", "training.learning_rate=4e-3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The same run under each kind of budget, in a folder of its own."""
    folder = tmp_path_factory.mktemp("budget")
    path = recipe(folder)
    for then in ("scale", "stop", "rewind"):
        words = [f"budget={{at_most: 0.1, then: {then}}}", "--output-dir", str(folder / then), *WORDS]
        assert main([str(path), *words]) == 0
    return folder


def row(out):
    return json.loads((out / "results.json").read_text())["rows"][1]


@pytest.mark.parametrize("then", ["scale", "stop", "rewind"])
def test_what_is_saved_keeps_the_budget_on_unseen_rows(finished, then):
    kept = row(finished / then)["budget"]
    lines = [
        json.loads(line) for line in (finished / then / "lora-null-v1" / "train_log.jsonl").read_text().splitlines()
    ]
    probes = {line["step"]: line["probe/facts kl"] for line in lines if "probe/facts kl" in line}
    assert max(probes.values()) > 0.1  # without a budget it would be broken
    assert kept["kept"] and kept["value"] + kept["stderr"] <= 0.1 and kept["n"] == 28 and kept["measure"] == "facts kl"
    if then == "scale":
        assert kept["step"] == 6 and kept["strength"] < 1 and kept["reached"] is None
    else:
        assert kept["reached"] == max(probes) <= 6
        assert kept["step"] == kept["reached"] - (2 if then == "rewind" else 0) > 0
    learned = kept["learned"]["numbers nll"]
    assert learned["lost"] == pytest.approx(learned["kept"] - learned["full"], abs=1e-6) and learned["stderr"] > 0
    model = PeftModel.from_pretrained(base(finished), finished / then / "lora-null-v1" / "adapter")
    facts = [json.loads(line) for line in (finished / "facts.jsonl").read_text().splitlines()][:40]
    pairs = [(f"Question: {fact['question']}\nAnswer:", f" {fact['answer'][0]}") for fact in facts]
    task = AnswerTask("facts", pairs, kl=True, role="retention")
    again = evaluate(model, tiny_tokenizer(), [task], reference_dir=finished / then / "base")
    saved = row(finished / then)["metrics"]["facts kl"]["value"]
    assert again.metrics["facts kl"].value == pytest.approx(saved, rel=1e-4)


class Blow(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("then", "where"), [("scale", 3), ("rewind", 3), ("rewind", "saving")])
def test_a_budgeted_run_that_is_broken_off_ends_in_the_same_bits(finished, tmp_path, monkeypatch, then, where):
    out, words = tmp_path / "out", [str(finished / "tiny.yaml"), f"budget={{at_most: 0.1, then: {then}}}", *WORDS]
    reached = row(finished / then)["budget"]["reached"] or 6
    with monkeypatch.context() as patch:
        if isinstance(where, int):
            made = run._make_trainer
            step = min(where, reached - 1)
            patch.setattr(run, "_make_trainer", lambda *a: (trainer := made(*a), trainer.add_callback(Blow(step)))[0])
        else:
            stop = (run, "_save")
            patch.setattr(*stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*words, "--output-dir", str(out)]) == 130
    assert main([*words, "--output-dir", str(out), "--resume"]) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (out / "lora-null-v1" / name).read_bytes() == (finished / then / "lora-null-v1" / name).read_bytes()
    one, other = row(out), row(finished / then)
    assert all(one[key] == other[key] for key in ("metrics", "budget", "drift"))


def test_a_repair_works_in_one_process_and_on_one_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_null.recipes.job.num_processes", lambda: 2)
    assert main([str(recipe(tmp_path)), "budget={at_most: 0.1, then: repair}"]) == 2
    assert "budget.then: repair works in one process; use scale, or lora-null repair" in capsys.readouterr().err
    with pytest.raises(UserError, match="repair is not for a sequence's tasks"):
        load_recipe("sequence", ["budget={at_most: 0.1, then: repair}"])


def test_a_state_in_which_a_warmup_has_moved_nothing_is_the_base_again(tmp_path):
    words = [str(recipe(tmp_path)), "budget={at_most: 0.0005, then: rewind}", "eval.probe.every=1", *WORDS]
    assert main([*words, "training.warmup_steps=2"]) == 0
    found = row(tmp_path / "out")
    assert found["budget"]["step"] == 0 and found["magnitude"]["total"] == 0
    assert "is the base again" in (tmp_path / "out" / "report.md").read_text()


def test_a_strength_of_zero_keeps_the_step_that_it_was_of(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_null.recipes.budget.largest_strength", lambda *_, **__: 0.0)
    assert main([str(recipe(tmp_path)), "budget={at_most: 0.0005, then: scale}", *WORDS]) == 0
    held = row(tmp_path / "out")["budget"]
    assert held["strength"] == 0 and held["step"] == held["steps"]


def test_a_run_that_was_rewound_to_its_start_goes_on(tmp_path):
    words = [str(recipe(tmp_path)), "budget={at_most: 0.0005, then: rewind}", "eval.probe.every=1", *WORDS]
    assert main(words) == 0
    out, before = tmp_path / "out", row(tmp_path / "out")
    assert before["budget"]["step"] == 0 and before["budget"]["reached"]
    for name in ("lora-null-v1/row.json", "results.json", "report.html"):
        (out / name).unlink()
    assert main([*words, "--resume"]) == 0
    assert all(row(out)[key] == before[key] for key in ("metrics", "budget"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget={at_most: 0}"], "budget.at_most: input should be greater than 0"),
        (["--max-forgetting", "little"], "budget.at_most: input should be a valid number"),
        (["budget={at_most: 0.1, then: stopp}"], "'scale', 'stop', 'rewind' or 'repair'"),
        (["budget={at_most: 0.1, then: repair}", "--seeds", "0,1"], "budget.then: repair is not for a grid's runs; lora-null repair"),
        (["budget={at_most: 0.1, then: repair}", "--method", "full"], "full leaves no plain LoRA"),
        (["budget={at_most: 0.1, measure: fact kl}"], "the run has no 'fact kl' in eval.retention (did you mean 'facts kl'?)"),
        (["budget={at_most: 0.1, measure: [facts nll, facts kk]}"], "the run has no 'facts kk' in eval.retention (did you mean 'facts kl'?)"),
        (["budget={at_most: 0.1, measure: [facts kl, facts kl]}"], "budget.measure: names 'facts kl' twice"),
        (["budget={at_most: {facts kl: 0.1, facts nll: 0}}"], "budget.at_most.facts nll: input should be greater than 0"),
        (["budget={at_most: 0.1, measure: 'facts kl,facts nl'}"], "the run has no 'facts nl' in eval.retention (did you mean 'facts nll'?)"),
        (["budget={at_most: 0.1, measure: [all, facts kl]}"], "budget.measure: all is every entry of eval.retention and stands alone"),
        (["budget.measure=facts kl", "--max-forgetting", "facts kl=0.1,facts nll=0.2"], "budget.at_most: names the metrics already, as budget.measure does"),
        (["--max-forgetting", "facts kl=0.1,0.2"], "--max-forgetting: 'facts kl=0.1,0.2' is no number, nor one for each of several metrics, as"),
        (["--max-forgetting", "facts kl=0.1,facts kl=0.2"], "is no number, nor one for each of several metrics"),
        (["budget={at_most: 0.1, measure: numbers nll}"], "the run has no 'numbers nll' in eval.retention"),
        (["--max-forgetting", "0.1", "eval.retention=[]"], "eval.retention is empty"),
        (["--max-forgetting", "0.1", "eval.before=false"], "counted from the base"),
        (["--max-forgetting", "0.1", "eval.probe.retention=36"], "at least 8 are needed for the probe"),
        (["--max-forgetting", "0.1", "eval.probe=null", "eval.retention=[{forgetting: web, path: facts.jsonl, field: question, limit: 14}]"], "web has 14 rows, 7 of them probed"),
        (["--max-forgetting", "0.1", "eval.probe.retention=0"], "not measured by eval.probe.retention"),
        (["budget={at_most: 0.1, then: stop}", "--method", "roselora"], "budget.then: roselora is as sparse as asked only at"),
        (["--max-forgetting", "0.1", "--method", "full"], "full leaves no plain LoRA"),
        (["eval.strengths=[0.5,half]"], "eval.strengths.1: input should be a valid number"),
        (["eval.strengths=[3]"], "less than or equal to 2"),
        (["eval.probe.every=0"], "eval.probe.every"),
        (["eval.probe.retention=-1"], "a number of rows"),
        (["eval.probe={retention: 0, task: 0}"], "measures nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_loads(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("a model was loaded"))
    path = str(recipe(tmp_path))
    capsys.readouterr()
    assert main([path, *words]) == 2
    *told, last = capsys.readouterr().err.strip().splitlines()
    assert message in last and last.startswith("error: ") and not any("error" in line for line in told)


def test_a_budget_is_shared_out_among_the_tasks_of_a_sequence():
    for then in ("scale", "rewind"):
        stages = stage_recipes(load_recipe("sequence", [f"budget={{at_most: 0.3, then: {then}}}"]))
        assert [(stage.budget.at_most, stage.budget.then) for stage in stages] == [
            (pytest.approx(0.3 * part), then) for part in (1 / 3, 2 / 3, 1)
        ]
    (*_, last) = stages = stage_recipes(load_recipe("sequence", ["budget={at_most: {a: 0.3, b: 0.6}}"]))
    assert stages[0].budget.at_most == pytest.approx({"a": 0.1, "b": 0.2}) and last.budget.at_most == {
        "a": 0.3,
        "b": 0.6,
    }
    assert [stage.budget for stage in stage_recipes(load_recipe("sequence"))] == [None] * 3


@pytest.mark.parametrize("then", ["scale", "rewind"])
def test_a_run_keeps_every_bound(tmp_path, then):
    """The second entry's, which alone ends the training or lowers the strength."""
    path, rows = recipe(tmp_path), [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    notes = write_rows(tmp_path / "notes.jsonl", rows[40:80])
    entries = f"[{{answers: facts, path: {tmp_path}/facts.jsonl, limit: 40}}, {{answers: notes, path: {notes}}}]"
    words = [
        f"eval.retention={entries}",
        f"budget.then={then}",
        "--max-forgetting",
        "facts kl=4, notes kl=0.03",
        *WORDS,
    ]
    assert main([str(path), *words]) == 0
    found = row(tmp_path / "out")
    kept, (other,) = found["budget"], found["budget"]["others"]
    assert (kept["measure"], kept["at_most"], other["measure"], other["at_most"]) == ("notes kl", 0.03, "facts kl", 4)
    assert kept["kept"] and kept["value"] + kept["stderr"] <= 0.03 and other["kept"] and other["n"] == 28
    assert kept["strength"] < 1 if then == "scale" else kept["reached"] and kept["step"] < kept["reached"]
    told = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["budget"]
    assert told == f"at most 4 of facts kl and 0.03 of notes kl, {then}"
    dry = [
        str(path),
        words[0],
        "budget={at_most: 0.1, measure: all}",
        "--dry-run",
        "--output-dir",
        str(tmp_path / "x"),
    ]
    assert main(dry) == 0


def test_a_budget_below_the_bases_own_noise_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_make_trainer", lambda *_: pytest.fail("a training began"))
    assert main([str(recipe(tmp_path)), "--max-forgetting", "1e-14"]) == 2
    assert "is not above the base's own noise: measured twice, facts kl of the same weights" in capsys.readouterr().err


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 1
doc_to_choice: ["it is", "no"]
output_type: multiple_choice
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.parametrize(
    ("entry", "measure", "limit", "left"),
    [
        ("{{answers: facts, path: {0}/{1}.jsonl}}", "facts kl", 40, 30),
        ("{{answers: facts, path: {0}/{1}.jsonl}}", "facts kl", 35, 30),
        ("{{forgetting: web, path: {0}/{1}.jsonl, field: question}}", "web forgetting", 40, 30),
        ("{{task: {0}/{1}/mine.yaml}}", "mine/acc", 40, 30),
    ],
)
def test_the_probe_may_have_rows_of_its_own_and_common_ones_are_not_checked(tmp_path, entry, measure, limit, left):
    path = recipe(tmp_path)
    facts = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "few.jsonl", facts[30:50])
    for name in ("few", "facts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(TASK.replace("ROWS", str(tmp_path / f"{name}.jsonl")))
    whole, own = (entry.format(tmp_path, name) for name in ("facts", "few"))
    words = [f"eval.retention=[{whole}]", f"eval.probe.retention=[{own}]", f"eval.limit={limit}"]
    words += ["--max-forgetting", "0.5", "training.max_steps=2", "training.save_strategy=no"]
    assert main([str(path), *words]) == 0
    kept = row(tmp_path / "out")["budget"]
    assert kept["measure"] == measure and kept["n"] == left  # rows 31 to 40 of the whole set were probed


def test_a_run_repairs_what_it_trained(tmp_path, monkeypatch, capsys):
    """Beside each adapter stands its repair, at the smallest weight that keeps the budget on rows that no probe used.

    A run that was killed after a repair was saved leaves the same bytes, also where its recipe names texts by a relative path.
    """
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "facts.jsonl").symlink_to(tmp_path / "facts.jsonl")
    monkeypatch.chdir(tmp_path)
    words = [str(recipe(tmp_path)), "method.name=[lora,lora-null-v1]", "budget={at_most: 0.05, then: repair}", *WORDS]
    words += ["training.learning_rate=2e-2", "calibration.path=t/facts.jsonl"]
    assert main(words) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    raw = json.loads((out / "results.json").read_text())
    by_name = {row["method"]: row for row in raw["rows"]}
    assert list(by_name) == ["base", "lora", "lora-repaired", "lora-null-v1", "lora-null-v1-repaired"]
    for name in ("lora", "lora-null-v1"):
        trained, repaired = by_name[name], by_name[f"{name}-repaired"]
        held = repaired["budget"]
        assert "budget" not in trained and trained["metrics"]["facts kl"]["value"] > 0.05
        assert held["kept"] and held["value"] + held["stderr"] <= 0.05 and held["n"] == 28 and held["weight"] > 0
        assert f"{name}-repaired: facts KL" in said and f"repaired at weight {held['weight']:.3g}" in said
        model = PeftModel.from_pretrained(base(tmp_path), out / f"{name}-repaired" / "adapter")
        facts = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()][:40]
        pairs = [(f"Question: {fact['question']}\nAnswer:", f" {fact['answer'][0]}") for fact in facts]
        task = AnswerTask("facts", pairs, kl=True, role="retention")
        again = evaluate(model, tiny_tokenizer(), [task], reference_dir=out / "base").metrics["facts kl"].value
        assert again == pytest.approx(repaired["metrics"]["facts kl"]["value"], rel=1e-3)
        assert repaired["magnitude"]["total"] > 0 and repaired["adapter_params"] == trained["adapter_params"]
        told = f"Repaired without training from the adapter {name}, at weight {held['weight']:.3g}, to leave "
        with safe_open(out / f"{name}-repaired" / "adapter" / "adapter_model.safetensors", "pt") as file:
            assert file.metadata()["repair"].startswith(told)
    page = (out / "report.md").read_text()
    assert "| LoRA, repaired |" in page and "LoRA-Null-v1, repaired: facts KL" in page
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/adapter/*.safetensors")}
    saved = {path: path.read_bytes() for path in out.glob("*/adapter/adapter_*")}
    for name in ("lora-repaired/row.json", "lora-null-v1/row.json", "results.json"):
        (out / name).unlink()
    assert [row.method for row in results_so_far(out).rows] == ["base", "lora", *[*by_name][3:]]
    assert main([str(out / "recipe.yaml"), "--resume"]) == 0
    assert len(saved) == 8 and not [str(path) for path, data in saved.items() if path.read_bytes() != data]
    changed = {path.parents[1].name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {
        "lora-repaired",
        "lora-null-v1",
        "lora-null-v1-repaired",
    }  # of what is trained anew its repair too
    again = json.loads((out / "results.json").read_text())["rows"]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in raw["rows"]]


def test_where_nothing_is_left_the_metric_that_is_beyond_the_budget_is_told():
    class Noisy(Fake):
        def evaluate(self, tasks):
            found = super().evaluate(tasks)
            for name in found.samples if self.value == 0 else ():
                found.samples[name] = [1e-7 * (name == "notes kl")] * len(found.samples[name])
            return found

    plan, zeros = plan_of(notes=0.1, facts=0.1)
    model = Noisy(1e9, 1e-9)
    held = scale_to_budget(Measurement(model.evaluate, plan, *zeros), model)
    assert held.strength == 0 and held.measure == "facts kl" and held.first_check > 0.1


def test_bounds_on_the_command_line_take_the_place_of_the_recipes(tmp_path):
    path = str(recipe(tmp_path, budget={"measure": "facts kl", "at_most": 0.1}))
    by_name = load_recipe(path, max_forgetting="facts nll=0.02, facts kl=0.03").budget
    assert (by_name.measure, by_name.at_most) == (None, {"facts nll": 0.02, "facts kl": 0.03})
    path = str(recipe(tmp_path, budget={"at_most": {"facts kl": 0.1, "facts nll": 0.2}}))
    assert load_recipe(path, max_forgetting="0.03").budget.at_most == {"facts kl": 0.03, "facts nll": 0.03}
    assert BudgetSection(at_most=0.01).share(1, 3).at_most == 0.01 * 1 / 3  # as runs of before have it


def test_what_keeps_the_budget_as_it_is_is_not_repaired(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_null.recipes.repairs.repair", lambda *_, **__: pytest.fail("it was repaired"))
    words = [str(recipe(tmp_path)), "budget={at_most: 4, then: repair}", "training.max_steps=2"]
    assert main([*words, "--dry-run"]) == 0
    assert "lora-null-v1-repaired/adapter/" in capsys.readouterr().out
    for more in ([], ["--resume"]):
        assert main([*words, *more]) == 0
        assert (row(tmp_path / "out")["budget"]["weight"], row(tmp_path / "out")["budget"]["kept"]) == (0, True)
        assert "lora-null-v1: facts KL" in capsys.readouterr().out or more
        assert not (tmp_path / "out" / "lora-null-v1-repaired").exists()
        (tmp_path / "out" / "results.json").unlink()
    assert "(nothing had to be given up)" in (tmp_path / "out" / "lora-null-v1" / "README.md").read_text()

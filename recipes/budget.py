"""A budget of forgetting: a training that ends, goes back or is scaled so that what is saved keeps it.

What counts as forgotten is the KL from the base, the rise of an NLL, or the fall of an accuracy, question by question
against the base. A budget is kept where the estimate plus its standard error is at most what the recipe allows. Probes
decide while the model trains and when its strength is chosen; the final check is on the rest of the retention set, the
rows that no probe has used.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from lora_null.adapters.strength import Strength, beyond_scaling
from lora_null.eval_harness import AnswerTask, Evaluation, LmEvalTask, Task
from lora_null.eval_harness.probe import Point, Probe, rows_of
from lora_null.eval_harness.statistics import DISCORDANT, is_mean_of_samples
from lora_null.recipes.comparisons import paired_gain
from lora_null.recipes.config.schema import ALL_ENTRIES, BudgetSection, Recipe
from lora_null.recipes.probes import ProbePlan
from lora_null.recipes.results import MIN_ROWS, Bound, Budget, Estimate, GivenUp, kind_of
from lora_null.utils.distributed import is_first_process, on_first_process
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.files import read_safetensors, write_safetensors
from lora_null.utils.sharding import whole_parameters

STATE_FILE = "budget.safetensors"
MIN_STRENGTH = 2**-10  # strength: after a training that went far a thousandth of it may be all that is within
HALVINGS = 9  # of the interval of its logarithm: the strength is found to 1.4%


@dataclass(frozen=True)
class PlannedBound:
    """How much of one metric may be forgotten, with the tasks that measure it.

    Attributes:
        measure: name of the metric.
        at_most: what may be forgotten of it, in its unit.
        task: the task of the whole evaluation that gives it.
        probe_task: the same task on the probed rows.
        probed_rows: numbers of the whole task's rows that the probes use.
    """

    measure: str
    at_most: float
    task: Task
    probe_task: Task
    probed_rows: frozenset[int]

    def rows_left(self, rows: int) -> int:
        """Return how many of the whole task's rows no probe uses."""
        return len(set(range(rows)) - self.probed_rows)


@dataclass(frozen=True)
class BudgetPlan:
    """The recipe's budget: what bounds each of its metrics, and what is done to keep them, see `BudgetSection.then`."""

    then: str
    bounds: list[PlannedBound]

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the whole evaluation that measure it, each once."""
        return list({bound.task.key: bound.task for bound in self.bounds}.values())

    @property
    def probe_tasks(self) -> list[Task]:
        """The same tasks on the probed rows."""
        return list({bound.task.key: bound.probe_task for bound in self.bounds}.values())


def plan_budget(recipe: Recipe, tasks: Sequence[Task], probe: ProbePlan | None) -> BudgetPlan | None:
    """Return the budget of a recipe, checked against what the run measures; None where it sets none.

    Raises:
        UserError: a measure that the run does not have, too few rows to probe and to check, or an
            accuracy that these rows cannot see so finely.
    """
    section = recipe.budget
    if section is None or probe is None:
        return None
    bounds = []
    for measure, (task, allowed) in bounded_metrics(section, tasks).items():
        if isinstance(task, LmEvalTask) and task.is_of_group(measure):
            raise UserError(
                f"budget.measure: {measure!r} is a group's mean, without a value for each question; list its members instead"
            )
        probe_task = next((own for own in probe.tasks if own.role == "retention" and own.key == task.key), None)
        if probe_task is None:
            raise UserError(
                f"budget.measure: {measure!r} is not measured by eval.probe.retention, which has to follow it"
            )
        bound = PlannedBound(measure, allowed, task, probe_task, frozenset(probe.rows.get(task.key, ())))
        rows, probed = rows_of(task, recipe.eval.limit), rows_of(probe_task)
        if rows is not None:  # how many documents there are else is known when the base has been evaluated
            _check_rows(bound, len(rows), len(probed or ()))
        bounds.append(bound)
    return BudgetPlan(section.then, bounds)


def bounded_metrics(section: BudgetSection, tasks: Sequence[Task]) -> dict[str, tuple[Task, float]]:
    """Return each metric that a budget bounds, with the task that measures it and what may be forgotten.

    Raises:
        UserError: nothing is to be kept, or a metric that is not measured.
    """
    most = section.at_most
    if isinstance(most, dict):
        found = _find_measures(list(most), tasks, "budget.at_most")
        return {name: (task, most[name]) for name, task in found.items()}
    found = _find_measures(section.measure, tasks, "budget.measure")
    return {name: (task, most) for name, task in found.items()}


def _find_measures(wanted: str | Sequence[str] | None, tasks: Sequence[Task], where: str) -> dict[str, Task]:
    kept = [task for task in tasks if task.role == "retention"]
    if not kept:
        raise UserError("budget: eval.retention is empty, nothing says what may not be forgotten")
    if wanted is None:
        task = next((task for task in kept if isinstance(task, AnswerTask)), kept[0])
        return {task.all_metric_names[0]: task}
    if wanted == ALL_ENTRIES:
        return {task.all_metric_names[0]: task for task in kept}
    by_name = {name: task for task in reversed(kept) for name in task.all_metric_names}
    if isinstance(wanted, str):
        wanted = [wanted] if wanted in by_name else [name.strip() for name in wanted.split(",")]
    for name in wanted:
        if name == ALL_ENTRIES:
            raise UserError(f"{where}: {ALL_ENTRIES} is every entry of eval.retention and stands alone")
        if name not in by_name:
            raise UserError(f"{where}: the run has no {name!r} in eval.retention{nearest(name, by_name)}")
        if wanted.count(name) > 1:
            raise UserError(f"{where}: names {name!r} twice")
    return {name: by_name[name] for name in wanted}


def _check_rows(bound: PlannedBound, total: int, probed: int) -> None:
    """Raise a UserError where too few rows are probed, or too few of all are left for the check."""
    left = bound.rows_left(total)
    if probed < MIN_ROWS or left < MIN_ROWS:
        raise UserError(
            f"budget: {bound.task.label} has {total} rows, {total - left} of them probed; at least {MIN_ROWS} are needed for "
            f"the probe (eval.probe.retention) and {MIN_ROWS} others for the check"
        )


def check_budget(budget: BudgetPlan, probed: Evaluation, whole: Evaluation) -> None:
    """Refuse, before any training, a budget that the base itself does not keep or that its rows cannot see.

    Args:
        budget: the budget.
        probed, whole: the base's evaluations, of the probed rows with its noise, and of everything.

    Raises:
        UserError: the budget is not above the base's own noise, is finer than these rows can tell, is so large that nothing
            could break it, counts a metric without a value for each question, or there are too few of these.
    """
    for bound in budget.bounds:
        _check_bound(bound, probed, whole)


def _check_bound(bound: PlannedBound, probed: Evaluation, whole: Evaluation) -> None:
    at_most, measure = bound.at_most, bound.measure
    if measure not in whole.metrics or measure not in probed.metrics:
        raise UserError(f"budget.measure: the run has no {measure!r}{nearest(measure, whole.metrics)}")
    directed = [name for name, metric in whole.metrics.items() if metric.higher_is_better is not None]
    usable = [name for name in directed if is_mean_of_samples(whole, name)]
    if measure not in usable or not is_mean_of_samples(probed, measure):
        raise UserError(
            f"budget.measure: {measure!r} is no mean of a value for each question, or has no known direction"
            + nearest(measure, usable)
        )
    noise = probed.noise.get(measure, 0.0)
    if noise >= at_most:
        raise UserError(
            f"budget.at_most: {at_most:g} is not above the base's own noise: measured twice, {measure} of the same "
            f"weights differs by {noise:.2g}"
        )
    _check_rows(bound, len(whole.samples[measure]), len(probed.samples[measure]))
    base_nll = whole.metrics.get(f"{bound.task.name} nll") if kind_of(measure) == "kl" else None
    if base_nll and at_most >= base_nll.value:
        raise UserError(
            f"budget.at_most: {at_most:g} nats per token is not below the {base_nll.value:.2g} that the base's own answers cost, "
            "so that nothing could break it; 0.01 to 0.1 is usual, or name an accuracy, of which a fraction may be lost"
        )
    if whole.metrics[measure].unit != "fraction":
        return
    rows = bound.rows_left(len(whole.samples[measure]))
    finest = forgotten(measure, whole, whole, bound.probed_rows).upper
    if at_most < finest:
        raise UserError(
            f"budget.at_most: {at_most:g} (a fraction) is finer than the {rows} answers that {measure} is checked on can "
            f"tell ({finest:.2g}); give more rows, or a KL"
        )
    right = np.mean([answer for i, answer in enumerate(whole.samples[measure]) if i not in bound.probed_rows])
    if whole.metrics[measure].higher_is_better and at_most >= right:
        raise UserError(
            f"budget.at_most: {at_most:g} (a fraction) is not below the {right:.2g} that the base has of {measure} on the "
            f"{rows} rows of the check, so that nothing could break it; give less, or a KL"
        )


def within(estimate: Estimate, at_most: float) -> bool:
    """Return whether the estimate keeps a bound, its standard error included; a NaN does not."""
    return estimate.upper <= at_most


def forgotten(
    measure: str,
    found: Evaluation | Point,
    base: Evaluation,
    leave_out: frozenset[int] = frozenset(),
    discordant: float = DISCORDANT,
) -> Estimate:
    """Return by how much `found` is worse than the base, see `paired_gain`: the KL, an NLL's rise, an accuracy's fall."""
    return paired_gain(measure, base, found, leave_out, discordant)


def keeps(budget: BudgetPlan, found: Evaluation | Point, base: Evaluation) -> bool:
    """Return whether every bound is kept on the probed rows, which are too few to be counted strictly: the others are."""
    return all(within(forgotten(bound.measure, found, base, discordant=0), bound.at_most) for bound in budget.bounds)


class BudgetProbe(Probe):
    """A probe that ends the training where a budget is reached, and remembers the last state within it.

    Args:
        trainer, tasks, options: as for `Probe`; the tasks with that of the budget among them.
        budget: the budget.
        base: the base's evaluation of the tasks.
    """

    def __init__(
        self, trainer: Any, tasks: Sequence[Task], budget: BudgetPlan, base: Evaluation, **options: Any
    ) -> None:
        super().__init__(trainer, tasks, **options)
        self.budget, self.base = budget, base
        self.reached = False
        self.last_within: int | None = None
        self.kept: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self.reached, self.last_within, self.kept = False, None, {}
        super().on_train_begin(args, state, control, **kwargs)
        if self.reached:
            control.should_training_stop = True

    def on_probe(self, point: Point, control: Any) -> None:
        """End the training at a point beyond the budget; remember the weights at one within it."""
        if self.budget.then == "scale":
            return
        if not keeps(self.budget, point, self.base):
            self.reached = control.should_training_stop = True
        elif self.budget.then == "rewind":
            self.last_within = point.step
            with whole_parameters(*_owners(self.model)):
                if is_first_process():
                    self.kept = {name: p.detach().cpu().clone() for name, p in _trained(self.model)}

    def rewind(self) -> bool:
        """Put the model back to its last state within the budget; return whether it moved."""
        if not self.reached or self.last_within is None:
            return False
        kept = on_first_process(lambda: self.kept)
        with torch.no_grad(), whole_parameters(*_owners(self.model), write=True):
            for name, parameter in _trained(self.model):
                parameter.copy_(kept[name])
        return True

    def has_ended(self, checkpoint: Path) -> bool:
        """Return whether the run of a checkpoint, whose state was loaded, took no further step."""
        return self.reached

    def save_state(self, checkpoint: Path) -> None:
        super().save_state(checkpoint)
        last = "" if self.last_within is None else str(self.last_within)
        facts = {"reached": str(int(self.reached)), "last_within": last}
        write_safetensors(checkpoint / STATE_FILE, self.kept, facts)

    def load_state(self, checkpoint: Path) -> None:
        super().load_state(checkpoint)
        if not (checkpoint / STATE_FILE).is_file():
            return
        self.kept, facts = read_safetensors(checkpoint / STATE_FILE)
        self.reached = facts["reached"] == "1"
        self.last_within = int(facts["last_within"]) if facts["last_within"] else None


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _owners(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold what trains, and as little else as can be."""
    return [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


@dataclass
class Measurement:
    """What `scale_to_budget` measures with: a live model and the base's evaluations.

    Attributes:
        evaluate: returns the evaluation of tasks by the live model as it is.
        budget: the budget.
        probed, whole: the base's evaluations, of the probed rows and of everything.
        learning: the probed tasks of role "task".
    """

    evaluate: Callable[[Sequence[Task]], Evaluation]
    budget: BudgetPlan
    probed: Evaluation
    whole: Evaluation
    learning: list[Task] = field(default_factory=list)

    def keeps_on_probe(self) -> bool:
        """Return whether the probed rows keep the budget."""
        return keeps(self.budget, self.evaluate(self.budget.probe_tasks), self.probed)

    def check_rest(self) -> list[Bound]:
        """Return what is forgotten on the rows that no probe has used, the metric furthest beyond its bound first."""
        found, checked = self.evaluate(self.budget.tasks), []
        for bound in self.budget.bounds:
            measure, at_most = bound.measure, bound.at_most
            lost = forgotten(measure, found, self.whole, bound.probed_rows)
            checked.append(
                Bound(
                    measure=measure,
                    unit=self.whole.metrics[measure].unit,
                    at_most=at_most,
                    value=lost.value,
                    stderr=lost.stderr,
                    n=bound.rows_left(len(found.samples[measure])),
                    kept=within(lost, at_most),
                )
            )
        return sorted(checked, key=lambda bound: (bound.kept, -bound.used))

    def learned_on_probe(self) -> Evaluation | None:
        """Return what is learned on the probed rows; None where no task is probed."""
        return self.evaluate(self.learning) if self.learning else None


def largest_strength(keeps: Callable[[float], bool]) -> float:
    """Return the largest strength up to 1 found by bisection that keeps a budget; 0 where not even the smallest does.

    It bisects the logarithm of the strength, so that a small one is found with the same relative error as a large.

    Args:
        keeps: strength → whether it keeps the budget.
    """
    if keeps(1.0):
        return 1.0
    if not keeps(MIN_STRENGTH):
        return 0.0
    low, top = MIN_STRENGTH, 1.0
    for _ in range(HALVINGS):
        middle = math.sqrt(low * top)
        low, top = (middle, top) if keeps(middle) else (low, middle)
    return low


def scale_to_budget(measured: Measurement, strength: Strength, learned: Evaluation | None = None) -> Budget:
    """Set the largest strength at which a budget is kept: by bisection on the probed rows, then on all others.

    Args:
        measured: what is measured, and by what.
        strength: of the model.
        learned: what was learned before anything was given up for the budget; None measures it now.

    Returns:
        What became of the budget; `step` and `steps` are 0, `apply_budget` sets them.
    """
    before = learned or measured.learned_on_probe()

    def keeps_at(value: float) -> bool:
        with strength.at(value):
            return measured.keeps_on_probe()

    checks = []
    strength.set(largest_strength(keeps_at))
    if not strength.value:  # which metric left nothing is seen where there is still something
        with strength.at(MIN_STRENGTH):
            checks.append(measured.check_rest())
    checks.append(measured.check_rest())
    while not checks[-1][0].kept and strength.value:
        # Forgetting grows about as the square of a small change: aim just below, and check again.
        used = checks[-1][0].used
        factor = 0.98 / math.sqrt(used) if used > 0 else 0.5
        lower = strength.value * min(0.95, max(0.5, factor))
        strength.set(lower if lower >= MIN_STRENGTH else 0.0)
        checks.append(measured.check_rest())
    if not strength.value:  # what is left is the base, and the metric to be told is the one that left nothing
        order = [bound.measure for bound in checks[0]]
        checks[-1].sort(key=lambda bound: order.index(bound.measure))
    return _held(measured, before, checks).model_copy(update={"strength": strength.value})


def repair_to_budget(measured: Measurement, weights: Sequence[float], apply: Callable[[float], None]) -> Budget:
    """Apply the smallest weight of a repair at which a budget is kept, or the largest of all where none keeps it.

    Args:
        measured: what is measured, and by what.
        weights: ascending; the more, the less is forgotten.
        apply: puts the adapter that is repaired at a weight into the live model, which has the one that was trained.

    Returns:
        What became of the budget, with the weight.
    """
    before = measured.learned_on_probe()

    def keeps_at(weight: float) -> bool:
        apply(weight)
        return measured.keeps_on_probe()

    place = min(bisect.bisect_left(weights, True, key=keeps_at), len(weights) - 1)
    apply(weights[place])
    checks = [measured.check_rest()]
    while not checks[-1][0].kept and place + 1 < len(weights):
        place += 1
        apply(weights[place])
        checks.append(measured.check_rest())
    return _held(measured, before, checks).model_copy(update={"weight": weights[place]})


def _held(measured: Measurement, before: Evaluation | None, checks: list[list[Bound]]) -> Budget:
    """Return what became of a budget, at strength 1.

    Args:
        measured: what is measured, and by what.
        before: what was learned before anything was given up.
        checks: every check on the rows that no probe used, the last one of what is saved.
    """
    after = measured.learned_on_probe()
    beyond = {bound.measure: bound.value for bound in checks[0] if not bound.kept} if len(checks) > 1 else {}
    tightest, *others = (bound.model_copy(update={"first_check": beyond.get(bound.measure)}) for bound in checks[-1])
    return Budget(
        **tightest.model_dump(),
        others=others,
        then=measured.budget.then,
        strength=1.0,
        step=0,
        steps=0,
        learned=_given_up(measured, before, after) if before and after else {},
    )


def apply_budget(measured: Measurement, callback: BudgetProbe, model: Any) -> Budget:
    """Make a trained model keep its budget, in place; return what became of it, and of what was learned."""
    trained_to, planned = callback.trainer.state.global_step, callback.trainer.state.max_steps
    learned = measured.learned_on_probe()
    rewound = callback.rewind()
    held = scale_to_budget(measured, Strength(model), learned)
    of_training = {
        "step": callback.last_within if rewound else trained_to,
        "reached": trained_to if callback.reached else None,
        "steps": planned,
    }
    return held.model_copy(update=of_training)


def _given_up(measured: Measurement, before: Evaluation, after: Evaluation) -> dict[str, GivenUp]:
    """Return by metric what the budget cost of what had been learned, paired by the probed questions."""
    found = {}
    for task in measured.learning:
        for name in (name for name in after.metrics if task.measures(name)):
            better, unit = after.metrics[name].higher_is_better, after.metrics[name].unit
            if better is None or not all(is_mean_of_samples(one, name) for one in (before, after)):
                continue
            lost = paired_gain(name, before, after)
            metrics = (measured.probed.metrics.get(name), before.metrics[name], after.metrics[name])
            base, full, kept = (metric.value if metric else None for metric in metrics)
            found[name] = GivenUp(base=base, full=full, kept=kept, lost=lost.value, stderr=lost.stderr, unit=unit)
    return found


def check_strength(name: str, config: Any) -> None:
    """Refuse a method whose result has no strength: whole weights, or an adapter that is no plain LoRA.

    Raises:
        UserError: naming it.
    """
    if not isinstance(config, LoraConfig) or beyond_scaling(config):
        raise UserError(
            f"method: {name} leaves no plain LoRA, which budget and eval.strengths need; leave it out of method.name"
        )

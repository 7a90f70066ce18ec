"""Tasks one after the other: each goes on with the model so far and leaves the knowledge and the earlier tasks alone.

    lora-null train a.yaml b.yaml c.yaml --sequence
    lora-null train sequence

Each task is an ordinary run in `tasks/1-NAME`, `tasks/2-NAME`, …, whose METHOD/adapter holds all tasks so far as one plain
LoRA for the original base. A method that starts from Gram matrices starts in the null space of the knowledge and of the
earlier tasks; their Grams are kept in METHOD/grams, their rows are not needed again. Every task's evaluation is measured
after every task.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_null.adapters.saved import read_adapter
from lora_null.earlier_tasks import COMPLETE, Earlier, keep_grams
from lora_null.eval_harness import Evaluation, MTBenchTask, Task
from lora_null.eval_harness.lm_eval.vllm import max_lora_rank
from lora_null.eval_harness.statistics import is_mean_of_samples
from lora_null.recipes import output
from lora_null.recipes.card import write_run_card
from lora_null.recipes.comparisons import paired_gain
from lora_null.recipes.config.load import merge
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.job import Job, check_asked_alike, check_run, check_same_everywhere, inputs_of
from lora_null.recipes.models.bases import load_base_after
from lora_null.recipes.models.plan import MethodPlan, recipe_method
from lora_null.recipes.report import print_table, write_report
from lora_null.recipes.results import (
    EVAL_FILE,
    Estimate,
    Results,
    Row,
    Seconds,
    SequenceResults,
    Transfer,
    load_results,
    mean,
    read_row,
    shared_and_differing,
    write_results,
)
from lora_null.recipes.run import run_job
from lora_null.recipes.trained import weights_in
from lora_null.recipes.training import trained_ids
from lora_null.start import DEFAULTS
from lora_null.trainer.calibration_data import padded_batches
from lora_null.utils.distributed import get_logger, is_first_process, on_first_process, together
from lora_null.utils.errors import UserError
from lora_null.utils.files import link

logger = get_logger(__name__)

GRAMS = "grams"


def run_sequence(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, allow_code_execution: bool | str = False
) -> Path:
    """Run the tasks that are not finished, one after the other, and return the folder.

    Raises:
        UserError: a mistake in any task, found before a model loads.
    """
    root = Path(recipe.output_dir)
    output.check_output_folder(recipe, resume=resume, overwrite=overwrite)

    def check() -> list[Job]:
        options = {"base": root / "base", "allow_code_execution": allow_code_execution}
        jobs = [_check_task(stage, options) for stage in stage_recipes(recipe)]
        check_stages(recipe, jobs)
        return jobs

    jobs = together(check)
    for job in jobs:
        check_same_everywhere(job)

    def inputs() -> dict[str, str]:
        return {f"{job.recipe.name}: {name}": found for job in jobs for name, found in inputs_of(job).items()}

    with output.hold_output_folder(
        recipe, space_of_sequence(recipe, jobs), inputs, resume=resume, overwrite=overwrite
    ):
        for number, job in enumerate(jobs):
            job = jobs[number] = with_earlier(recipe, job, jobs[:number])
            if not on_first_process(lambda job=job: output.is_finished(job.folder)):
                on_first_process(lambda job=job: output.claim(job.recipe, resume=True, overwrite=False))
                run_job(job)
            for plan in job.plans if number + 1 < len(jobs) else ():
                _keep_grams(recipe, job, plan)
        if is_first_process():
            _write_results(recipe, root, jobs)
    return root


def _check_task(recipe: Recipe, options: dict[str, Any]) -> Job:
    """Return the job of a task; a UserError names it."""
    try:
        return check_run(recipe, **options)
    except UserError as error:
        raise UserError(f"sequence.tasks, {recipe.name}: {error}") from None


def space_of_sequence(recipe: Recipe, jobs: Sequence[Job]) -> int:
    """Return the bytes that the sequence may write: each task's run, the ranks and the Grams of the tasks before among them."""
    size = jobs[0].reference_bytes
    for number, plan in ((number, plan) for number, job in enumerate(jobs) for plan in job.plans):
        size += plan.written_bytes + 4 * plan.saved * number
        if number + 1 < len(jobs) and _uses_grams(recipe, plan.name):
            sketch = recipe.sequence.sketch  # float32; of the Gram a triangle in float64
            size += sum(4 * width * (min(width, sketch) if sketch else width + 1) for width in plan.input_widths)
    return size


def check_stages(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """Check that each task can go on from the one before, and that all are evaluated alike.

    Raises:
        UserError: a method upon which no task can go on, or a task whose evaluations would be asked otherwise after another
            task, or that nothing follows.
    """
    section = recipe.sequence
    weights = section.weights(len(jobs) - 1)
    weighted = section.knowledge != 1 or any(weight not in (0, 1) for weight in weights)
    of_grams = [_uses_grams(recipe, plan.name) for plan in jobs[0].plans]
    of_texts = [recipe_method(recipe, plan.name).rereads_texts for plan in jobs[0].plans]
    given = {"sketch": section.sketch is not None, "knowledge": section.knowledge != 1, "earlier": set(weights) != {1}}
    idle = next((key for key, is_given in given.items() if is_given), None)
    if idle and not any(of_grams) and (idle == "sketch" or not any(of_texts)) and is_first_process():
        names = ", ".join(plan.name for plan in jobs[0].plans)
        logger.warning(f"sequence.{idle}: changes nothing for {names}; methods that start from Gram matrices read it")
    for plan in jobs[0].plans:
        method = recipe_method(recipe, plan.name)
        if weighted and method.rereads_texts:
            raise UserError(
                f"sequence.knowledge, sequence.earlier: {plan.name} reads texts, the knowledge's and those of earlier tasks "
                "with a weight of 1 or not at all; leave it out, or give 1, and 0 or 1"
            )
        if plan.saves == "adapter" and not method.saves_plain_lora:
            raise UserError(
                f"method: {plan.name} leaves no plain LoRA, upon which a later task could go on; leave it out"
            )
        ranks = [own.saved_rank for job in jobs for own in job.plans if own.name == plan.name and own.saved_rank]
        if recipe.eval.backend == "vllm" and ranks:
            max_lora_rank(sum(ranks), plan.name)  # they add up
    if recipe.model.dtype != "float32" and is_first_process():
        logger.warning(
            f"sequence: in {recipe.model.dtype} the weights that a later task goes on from round small changes of earlier tasks "
            "away, which METHOD/adapter keeps; model.dtype=float32 measures what is saved"
        )
    for job in jobs[1:]:
        check_asked_alike(job, jobs[0], f"sequence.tasks, {job.recipe.name}")
    for job, tasks in zip(jobs, _tasks_by_stage(recipe, jobs[-1])):
        if tasks and all(isinstance(task, MTBenchTask) and task.judge is None for task in tasks):
            raise UserError(
                f"sequence.tasks: {job.recipe.name} is measured by MT-Bench alone, which nobody grades; set eval.judge, or "
                "give it another eval.task"
            )


def with_earlier(recipe: Recipe, job: Job, before: Sequence[Job]) -> Job:
    """Return a task's job that goes on from the tasks before it."""
    if not before:
        return job
    weights = recipe.sequence.weights(len(before))
    previous = {plan.name: before[-1].folder / plan.name for plan in job.plans}
    alive = [name for name, folder in previous.items() if _goes_on(folder)]
    if not alive:
        raise UserError(
            f"sequence: no method is left after {before[-1].recipe.name}, all have diverged; lower the rate"
        )
    method = job.recipe.method.model_copy(update={"name": [n for n in job.recipe.method.name if n in alive]})
    weighted = [(other, weight) for other, weight in zip(before, weights) if weight]
    earlier = {
        plan.name: [Earlier(other.folder / plan.name / GRAMS, weight) for other, weight in weighted]
        for plan in job.plans
        if _uses_grams(recipe, plan.name)
    }
    rows = [ids for other, _ in weighted for ids in training_ids(other)]
    own = job.recipe.model_copy(update={"method": method})
    knowledge = recipe.sequence.knowledge
    of_earlier = {"previous": previous, "earlier": earlier, "knowledge": knowledge, "earlier_rows": rows}
    return dataclasses.replace(job, recipe=own, **of_earlier)


def _goes_on(folder: Path) -> bool:
    """Return whether a later task can go on from METHOD: it diverged neither in training nor evaluation."""
    row = on_first_process(lambda: read_row(folder))  # whose file system has it first
    return row is None or row.diverged is None


def _uses_grams(recipe: Recipe, name: str) -> bool:
    """Return whether a method's start is computed from Grams."""
    rule = recipe_method(recipe, name).rule_for(DEFAULTS)
    return rule is not None and rule.needs_gram


def training_ids(job: Job) -> list[list[int]]:
    """Return the token ids of a task's first training rows, as many as there are calibration windows."""
    examples = job.data.examples[: job.recipe.calibration.samples]
    return trained_ids(job.recipe, examples, job.tokenizer)


def _keep_grams(recipe: Recipe, job: Job, plan: MethodPlan) -> None:
    """Measure what a task's rows look like to the model after it, for the tasks to come."""
    folder = job.folder / plan.name
    if not _uses_grams(recipe, plan.name) or on_first_process(lambda: (folder / GRAMS / COMPLETE).is_file()):
        return
    if not _goes_on(folder):
        return
    rows = training_ids(job)
    model = load_base_after(job.model, folder).to(PartialState().device).eval()
    names = read_adapter(folder / "adapter").pairs()
    keep_grams(folder / GRAMS, model, names, padded_batches(rows, 0), sketch=recipe.sequence.sketch)


def _write_results(recipe: Recipe, root: Path, jobs: Sequence[Job]) -> None:
    """Write the results of the whole, with the last task's adapter of each method in RUN/METHOD."""
    results = collect(recipe, jobs)
    for plan in jobs[-1].plans:
        if trained := weights_in(jobs[-1].folder / plan.name):
            shutil.copytree(trained, root / plan.name / trained.name, dirs_exist_ok=True, copy_function=link)
        rows = [row for row in results.rows if row.method in ("base", plan.name)]
        write_run_card(root / plan.name, recipe, plan, results.model_copy(update={"rows": rows}))
    write_results(root, results)
    write_report(root)
    print_table(results)
    print(f"report: {root / output.PAGE_FILE}")


def collect(recipe: Recipe, jobs: Sequence[Job]) -> Results:
    """Return the results of a sequence: the rows after the last task, and every task after every task."""
    found = [load_results(job.folder) for job in jobs]
    last = found[-1]
    base = Evaluation.read(jobs[0].base / EVAL_FILE)
    by_task = _tasks_by_stage(recipe, jobs[-1])
    names = [job.recipe.name for job in jobs]
    reached = [row.method for row in last.rows[1:]]
    whole = [name for name in reached if all(of_method(stage, name).diverged is None for stage in found)]
    after = {name: [Evaluation.read(job.folder / name / EVAL_FILE) for job in jobs] for name in whole}
    # Each task is followed by the first metric of its first evaluation that has a direction and a value a question.
    every = [base, *(found for evaluations in after.values() for found in evaluations)]
    directed = [name for name, metric in base.metrics.items() if metric.higher_is_better is not None]
    paired = [name for name in directed if all(is_mean_of_samples(found, name) for found in every)]
    followed = [next((n for task in tasks for n in paired if task.measures(n)), None) for tasks in by_task]
    metrics = [name for name in followed if name is not None]
    transfers = []
    if len(metrics) == len(names):
        transfers = [transfer(method, base, evaluations, metrics) for method, evaluations in after.items()]
    else:
        lacking = ", ".join(name for name, metric in zip(names, followed) if metric is None)
        logger.warning(
            f"sequence: no metric of {lacking} has a value for each question after every task; no transfers"
        )
    rows = [last.rows[0], *(_whole_row(row.method, found) for row in last.rows[1:])]
    gone = [name for name in recipe.method.name if name not in reached]  # diverged before the last task
    rows += [_whole_row(name, found) for name in gone]
    kept = [name for name, metric in base.metrics.items() if metric.role == "retention"]
    knowledge = {
        row.method: {name: [of_method(stage, row.method).metrics.get(name) for stage in found] for name in kept}
        for row in last.rows[1:]
    }
    of_base = {metric: base.metrics[metric] for metric in metrics}
    settings, differing = shared_and_differing(results.settings for results in found)
    for key in differing:
        each = [results.settings.get(key) for results in found]
        settings[key] = "; ".join("none" if value is None else str(value) for value in each)
    sequence = SequenceResults(tasks=names, metrics=metrics, transfers=transfers, knowledge=knowledge, base=of_base)
    return last.model_copy(update={"recipe": recipe.name, "settings": settings, "rows": rows, "sequence": sequence})


def _tasks_by_stage(recipe: Recipe, job: Job) -> list[list[Task]]:
    """Return the evaluations of each task, in the order of the tasks."""
    counts = [len(merge(recipe.model_dump(mode="json"), task)["eval"]["task"]) for task in recipe.sequence.tasks]
    learned = iter([task for task in job.tasks if task.role == "task"])
    return [list(itertools.islice(learned, count)) for count in counts]


def of_method(results: Results, method: str) -> Row:
    """Return the row of a method."""
    return next(row for row in results.rows if row.method == method)


def _whole_row(method: str, found: Sequence[Results]) -> Row:
    """Return a method's row after the last task that it was trained on, with the time of all.

    It names that task where the method diverged there, or where it is not the last one.
    """
    stages = [stage for stage in found if any(row.method == method for row in stage.rows)]
    rows = [of_method(stage, method) for stage in stages]
    where = f"{'after' if rows[-1].diverged is None else 'in'} {stages[-1].recipe}"
    named = {} if rows[-1].diverged is None and stages[-1] is found[-1] else {"variant": where}
    seconds = {key: sum(getattr(row.seconds, key) or 0 for row in rows) for key in Seconds.model_fields}
    peaks = [row.peak_memory_bytes for row in rows if row.peak_memory_bytes is not None]
    whole: dict[str, Any] = {"seconds": Seconds(**seconds), "peak_memory_bytes": max(peaks, default=None)}
    whole |= {"drift": None, "tokens_per_second": None}  # those of the last task alone are none of all tasks
    return rows[-1].model_copy(update=whole | named)


def transfer(method: str, base: Evaluation, after: Sequence[Evaluation], metrics: Sequence[str]) -> Transfer:
    """Return the matrix R of task × after which task, and what follows from it.

    With R_ij the performance on task j after task i, counted so that higher is better, and b_j the base's
    (Lopez-Paz and Ranzato 2017): average Σ_j R_Tj / T, backward transfer Σ_{j<T} (R_Tj − R_jj) / (T − 1), forward transfer
    Σ_{j>1} (R_{j−1,j} − b_j) / (T − 1). Differences are paired by question. Means are over tasks of one unit alone.
    """
    stages, count = range(len(after)), len(metrics)
    matrix = [[after[i].metrics[metric] for i in stages] for metric in metrics]

    backward = [paired_gain(metrics[j], after[-1], after[j]) for j in range(count - 1)]
    forward = [paired_gain(metrics[j], after[j - 1], base) for j in range(1, count)]
    same = len({base.metrics[metric].unit for metric in metrics}) == 1
    return Transfer(
        method=method,
        matrix=matrix,
        lost=[Estimate(-e.value, e.stderr) for e in backward],
        ahead=forward,
        backward=mean(backward) if same else None,
        forward=mean(forward) if same else None,
        average=sum(row[-1].value for row in matrix) / count if same else None,
    )

"""`--dry-run`: the plan of a run, and everything that a run checks before it loads weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl import DPOConfig, SFTConfig

from lora_null.eval_harness.probe import rows_of
from lora_null.recipes import output
from lora_null.recipes.checks import is_rehearsed
from lora_null.recipes.config.run_folder import CELLS_FOLDER, RECIPE_FILE
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.rows import documents_of
from lora_null.recipes.grid import check_grid, grid_cells, space_of_grid
from lora_null.recipes.job import Job, check_run, space_of_run
from lora_null.recipes.models.plan import GIB, MethodPlan, activation_bytes
from lora_null.recipes.models.quantization import weight_bytes
from lora_null.recipes.results import EVAL_FILE, LOG_FILE, REPAIRED, RESULTS_FILE
from lora_null.recipes.training import optimizer_steps, total_batch, training_arguments
from lora_null.trainer.methods import METHODS
from lora_null.utils.distributed import is_first_process, together

FIRST_ROWS = 2000  # what a dry run reads of the training rows: a tokenizer takes about a millisecond for each


def dry_run(recipe: Recipe, *, allow_code_execution: bool | str = False) -> Job:
    """Check what the run would check but its output folder, in the same words, and print its plan.

    No weights are loaded, nothing is written.

    Returns:
        The job, incomplete where the hub did not answer.

    Raises:
        UserError: the mistake that the run would end with.
    """
    rows = _count_rows(recipe)
    seen = recipe.model_copy(deep=True)
    seen.data.limit = min(recipe.data.limit or FIRST_ROWS, FIRST_ROWS)
    options = {"allow_code_execution": allow_code_execution, "may_be_unreached": True}
    cells = grid_cells(seen) if recipe.grid else []
    check = functools.partial(check_grid, seen, cells) if cells else functools.partial(check_run, seen)
    job = together(functools.partial(check, **options))
    size = space_of_grid(recipe, cells, job) if cells else space_of_run(job)
    output.check_cache(recipe, dry=True)
    free = output.check_space(Path(recipe.output_dir), size)
    if is_first_process():
        training = training_arguments(recipe, Path(recipe.output_dir))
        all_read = job.data is not None and rows is not None and rows <= FIRST_ROWS
        _print_plan(recipe, job, training, len(job.data.rows) if all_read else rows)
        if cells:
            _print_grid(recipe, sum(len(cell.methods) for cell in cells))
        if not job.unreached:
            _print_measures(job)
        _print_checks(job, rows, size, free)
    return job


def _count_rows(recipe: Recipe) -> int | None:
    """Return the number of training rows in a local file; None for a folder or a hub id."""
    data = recipe.data
    if not Path(data.path).is_file():
        return None
    found = documents_of(data, "data", keep_bad=True)
    return min(max(0, len(found.rows) - data.offset), data.limit or len(found.rows))


def _files_of(recipe: Recipe) -> list[str]:
    """Return what the run, or each run of a grid, will leave in its output folder."""
    files = [RECIPE_FILE, *([f"base/{EVAL_FILE}"] if recipe.eval.before else [])]
    cell = f"{CELLS_FOLDER}/…/" if recipe.grid else ""
    for name in recipe.method.name:
        saved = [f"{METHODS[name].saves}/"] if recipe.grid.keep_weights else []
        files += [f"{cell}{name}/{path}" for path in ("init/", *saved, EVAL_FILE, LOG_FILE)]
        files += [f"{REPAIRED.format(name)}/{path}" for path in ("adapter/", EVAL_FILE) if recipe.repairs]
    return [*files, RESULTS_FILE, "report.md", "report.html", "forgetting.png"]


def _print_plan(recipe: Recipe, job: Job, training: SFTConfig | DPOConfig, rows: int | None) -> None:
    """Print the plan of a run: counts, tokens, steps, memory, files."""
    console = Console(soft_wrap=True)
    empty = job.model.empty
    size = sum(p.numel() for p in empty.parameters())
    weights, stored = weight_bytes(empty, recipe.model), recipe.model.dtype
    if recipe.model.quantization:
        stored = f"linears in {recipe.model.quantization}, computed in {stored}"
    console.print(f"model       {recipe.model.name_or_path}, {size / 1e6:,.0f}M parameters, {stored}")
    _print_training(console, recipe, training, rows)
    cut = " or ".join(
        {"packed": "joined and cut", "separate": "each alone"}[mode] for mode in recipe.calibration.modes
    )
    console.print(
        f"calibrate   {recipe.calibration.title}, {_windows_of(recipe, job)} of at most {recipe.calibration.max_length} "
        f"tokens, {cut}"
    )
    console.print(_table(job.plans, weights, activation_bytes(job.model.config, training)))
    for plan in job.plans:
        if plan.costs:
            console.print(f"{plan.name}: {plan.costs}")
        if plan.start_bytes:
            console.print(f"{plan.name}: {plan.start_bytes / GIB:.2f} GiB of gradients while its start is computed")
    for plan in (plan for plan in job.plans if plan.kept_bytes):
        share = plan.kept_bytes / weights
        console.print(
            f"{plan.name}: of it {plan.kept_bytes / GIB:.2f} GiB for what the method keeps beside the adapter, {share:.1%} of the weights"
        )
    console.print(f"files in {recipe.output_dir}: {', '.join(_files_of(recipe))}")


def _windows_of(recipe: Recipe, job: Job) -> str:
    """Return how many windows are calibrated on: fewer than asked where the texts, if they were read, hold no more."""
    asked = recipe.calibration.samples
    if job.windows is None or len(job.windows.ids) >= asked:
        return f"{asked} windows"
    return f"{len(job.windows.ids)} of {asked} windows (the texts hold no more)"


def _print_training(console: Console, recipe: Recipe, training: SFTConfig | DPOConfig, rows: int | None) -> None:
    rows = rows or recipe.data.limit
    console.print(
        f"learn       {recipe.data.path}, {f'{rows:,}' if rows else 'all'} rows, template {recipe.data.template}"
    )
    steps, batch = optimizer_steps(training, rows), total_batch(training)
    if steps is None:
        console.print(f"train       batches of {batch}, learning rate {training.learning_rate:g}")
        return
    tokens = steps * batch * (training.max_length or 1024)
    console.print(
        f"train       {steps:,} optimizer steps of {batch} sequences, at most {tokens:,} tokens, "
        f"learning rate {training.learning_rate:g} ({training.lr_scheduler_type.value})"
    )


def _table(plans: list[MethodPlan], weights: int, activations: int) -> Table:
    table = Table(title="estimated memory of each process in GiB", title_justify="left", box=None, pad_edge=False)
    for column in ("method", "rank", "trains", "saved", "weights", "Grams", "activ.", "trained\n+ AdamW", "peak"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for plan in plans:
        sizes = (weights, plan.gram_bytes, activations, plan.extra_bytes, plan.peak_bytes(weights, activations))
        counts = (f"{plan.trainable / 1e6:,.0f}M", f"{plan.saved / 1e6:,.0f}M")
        table.add_row(plan.name, str(plan.rank or "–"), *counts, *(f"{size / GIB:.1f}" for size in sizes))
    return table


def _print_grid(recipe: Recipe, runs: int) -> None:
    seeds = ", ".join(map(str, recipe.grid.seeds or [recipe.seed]))
    print(f"grid: {runs} runs, each method for seeds {seeds}; {_values(recipe.grid.sweep) or 'nothing swept'}")
    for name, sweep in recipe.grid.per_method.items():
        print(f"      {name}: {_values(sweep)}")


def _values(sweep: dict[str, list[Any]]) -> str:
    return "; ".join(f"{key} = {', '.join(map(str, values))}" for key, values in sweep.items())


def _print_measures(job: Job) -> None:
    """Print what is measured before and after training, what while it lasts, and the budget."""
    print(f"measure     {', '.join(dict.fromkeys(task.label for task in job.tasks)) or 'nothing'}")
    if job.probe is not None:
        section, labels = job.probe.section, dict.fromkeys(task.label for task in job.probe.tasks)
        often = (
            f"at most {section.share:.0%} of the time" if section.every == "auto" else f"every {section.every} steps"
        )
        print(f"probe       {', '.join(labels)}, {often}")
    if job.budget is not None:
        for bound in job.budget.bounds:
            rows = rows_of(bound.task, job.recipe.eval.limit)
            on = f"{bound.rows_left(len(rows))} rows" if rows is not None else "the rows"
            print(
                f"budget      {bound.measure} at most {bound.at_most:g} on {on} that no probe uses, then {job.budget.then}"
            )


def _print_checks(job: Job, rows: int | None, size: int, free: int) -> None:
    """Print what was looked at, and what could not be."""
    looked_at = []
    if job.data is not None:
        seen = len(job.data.examples) + len(job.data.bad)
        more = seen >= FIRST_ROWS and rows != seen
        looked_at.append(f"the first {seen:,} training rows" if more else f"{seen:,} training rows")
    if job.windows:
        for line in job.windows.covered:
            print(f"covers      {line}")
        looked_at.append(f"{len(job.windows.ids)} calibration windows of {sum(map(len, job.windows.ids)):,} tokens")
    looked_at += [f"{len(job.tasks)} evaluation tasks", f"{size / 1e9:.1f} GB of {free / 1e9:.1f} free on the disk"]
    if job.tokenizer is None:
        looked_at = ["the counts, and the names of the evaluation tasks", looked_at[-1]]
    elif not job.unreached and is_rehearsed(job.recipe):
        looked_at.append("one training step of a stand-in")
    print(f"checked: {', '.join(looked_at)}")
    if not is_rehearsed(job.recipe):
        print("not checked: one training step of a stand-in, with preflight=off or several processes")
    for line in job.unreached:
        print(f"not checked, the hub does not answer: {line}")

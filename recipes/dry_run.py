"""`--dry-run`: the plan of a run, and everything that a run checks before it loads weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lora_null.eval_harness.probe import rows_of
from lora_null.recipes import output
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.rows import load_documents
from lora_null.recipes.grid import check_grid, grid_cells, space_of_grid
from lora_null.recipes.job import Job, check_run, space_of_run
from lora_null.recipes.models.plan import print_plan
from lora_null.recipes.training import training_arguments
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
    free = output.check_space(Path(recipe.output_dir), size)
    if is_first_process():
        training = training_arguments(recipe, Path(recipe.output_dir))
        print_plan(recipe, job.config, job.plans, training, rows)
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
    found = load_documents(data.path, subset=data.subset, split=data.split, where="data", keep_bad=True)
    return min(max(0, len(found.rows) - data.offset), data.limit or len(found.rows))


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
        section, rows = job.budget.section, rows_of(job.budget.task, job.recipe.eval.limit)
        on = f"{job.budget.rows_left(len(rows))} rows" if rows is not None else "the rows"
        print(
            f"budget      {job.budget.measure} at most {section.at_most:g} on {on} that no probe uses, then {section.then}"
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
    elif not job.unreached:
        looked_at.append("one training step of a stand-in")
    print(f"checked: {', '.join(looked_at)}")
    for line in job.unreached:
        print(f"not checked, the hub does not answer: {line}")

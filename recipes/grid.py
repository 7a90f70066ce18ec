"""A grid: the same recipe for several seeds and settings, each an ordinary run, the base evaluated once for all.

    accelerate launch -m lora_null.recipes quickstart --seeds 0,1,2 --sweep training.learning_rate=1e-4,3e-4,1e-3

Runs go seed by seed, so that an early end leaves a smaller grid. Whatever finished is never done again: `--resume`
goes on after a kill. On several processes each takes runs of its own (`recipes/processes.py`). Data order, windows and random
starts depend on the seed alone, so they are the same for every method and setting of a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_null.recipes import output, processes
from lora_null.recipes.checks import rehearse
from lora_null.recipes.comparisons import compare, noise_of, read_evaluations, set_errors
from lora_null.recipes.config.load import apply_overrides, set_key
from lora_null.recipes.config.run_folder import CELLS_FOLDER
from lora_null.recipes.config.schema import GridSection, Recipe, parse_recipe
from lora_null.recipes.environment import environment
from lora_null.recipes.job import (
    Job,
    check_asked_alike,
    check_run,
    check_same_everywhere,
    inputs_beside_the_base,
    inputs_of,
    inspect_recipe,
)
from lora_null.recipes.measure import evaluate_base
from lora_null.recipes.models.plan import plan_methods
from lora_null.recipes.report import print_table, write_report
from lora_null.recipes.report.table import time_text
from lora_null.recipes.results import (
    RESULTS_FILE,
    Answers,
    Drift,
    Grid,
    Magnitude,
    Results,
    Row,
    Run,
    Seconds,
    distinct,
    load_results,
    read_row,
    settings_text,
    shared_and_differing,
    variant_of,
    write_results,
)
from lora_null.recipes.run import run_job
from lora_null.recipes.training import training_arguments
from lora_null.utils.distributed import is_first_process, on_first_process, together
from lora_null.utils.errors import UserError
from lora_null.utils.files import hash_of

# Keys that change how it trains and nothing before the first step: runs that differ in these share their starts.
STEPS_ONLY = {
    f"training.{key}"
    for key in (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "total_batch_size", "gradient_accumulation_steps",
    )
}  # fmt: skip
# Keys of which any valid value trains: no rehearsal for them.
OF_ROWS = {f"training.{key}" for key in ("max_length", "truncation_mode", "packing", "packing_strategy")}
NUMBERS = STEPS_ONLY - {"training.lr_scheduler_type"}


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a seed, a value for every swept key, and the methods that take these values."""

    seed: int
    point: tuple[tuple[str, Any], ...]
    methods: tuple[str, ...]

    @property
    def title(self) -> str:
        """Such as "learning_rate 0.0003, seed 1"."""
        return ", ".join(filter(None, [settings_text(dict(self.point)), f"seed {self.seed}"]))

    @property
    def folder(self) -> str:
        """Path below the grid's folder, such as "cells/learning_rate=0.0003/seed=1"."""
        values = settings_text(dict(self.point), join="=").replace(", ", ",").replace("/", "_")
        if len(values.encode()) > 200:  # file systems take 255 bytes
            values = f"{values[:60]}-{hash_of(values)[:12]}"
        return "/".join(filter(None, [CELLS_FOLDER, values, f"seed={self.seed}"]))

    def recipe(self, grid: Recipe, root: Path) -> Recipe:
        """Return the ordinary recipe of this run."""
        raw = grid.model_dump(mode="json") | {"seed": self.seed, "grid": {}, "output_dir": str(root / self.folder)}
        set_key(raw, "method.name", list(self.methods), "grid")
        return parse_recipe(apply_overrides(raw, dict(self.point), "grid: "), self.title)


def grid_cells(recipe: Recipe) -> list[Cell]:
    """Return the runs of a recipe's grid, seed by seed, the methods of equal settings together."""
    cells = []
    for seed in recipe.grid.seeds or [recipe.seed]:
        methods: dict[tuple, list[str]] = {}
        for name in recipe.method.name:
            own = recipe.grid.sweep | recipe.grid.per_method.get(name, {})
            for values in itertools.product(*own.values()):
                methods.setdefault(tuple(zip(own, values)), []).append(name)
        cells += [Cell(seed, point, tuple(names)) for point, names in methods.items()]
    return cells


def written_otherwise(recipe: Recipe) -> dict[str, Recipe]:
    """Return the runs of a grid that may write the rows in different ways, one of each, by the settings that do so."""
    found: dict[str, Recipe] = {}
    for cell in grid_cells(recipe):
        of_rows = {k: v for k, v in cell.point if k.startswith(("data.", "model.")) or k in OF_ROWS}
        if (told := settings_text(of_rows)) not in found:
            found[told] = cell.recipe(recipe, Path(recipe.output_dir))
    return found


def run_grid(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, allow_code_execution: bool | str = False
) -> Path:
    """Run every cell that is not finished, and return the grid's folder.

    Raises:
        UserError: a mistake in the recipe, its data or its output folder, found before a model loads.
    """
    root = Path(recipe.output_dir)
    cells = grid_cells(recipe)
    first = is_first_process() and processes.is_first_worker()
    if first:
        output.check_output_folder(recipe, resume=resume, overwrite=overwrite)
    job = together(lambda: check_grid(recipe, cells, allow_code_execution=allow_code_execution))
    check_same_everywhere(job)
    size = space_of_grid(recipe, cells, job)
    inputs = functools.partial(inputs_of, job)
    lock = output.hold_output_folder(recipe, size, inputs, resume=resume, overwrite=overwrite)
    with processes.hold_grid_folder(root, lock):
        results = _run_cells(recipe, cells, job, allow_code_execution=allow_code_execution)
        if first:
            write_results(root, results)
            write_report(root)
    if first:
        print_table(results, evaluations=read_evaluations(root, results))
        ended = [run for run in results.grid.cells if run.metrics and not run.diverged]
        if lacking := sorted({name for run in ended for name in results.base.metrics.keys() - run.metrics.keys()}):
            print(f"missing in some of the runs, and left out of their means: {', '.join(lacking)}")
        print(f"report: {root / output.PAGE_FILE}")
    PartialState().wait_for_everyone()
    return root


def _run_cells(recipe: Recipe, cells: Sequence[Cell], of_grid: Job, *, allow_code_execution: bool | str) -> Results:
    """Run what is not finished, write the results after each run; return the results.

    Of several workers, the first comes back for what the others hold until all is finished.
    """
    root = Path(recipe.output_dir)
    with processes.hold_run_folder(root / "base", wait=True):
        base = evaluate_base(of_grid)
    before, last = _finished(root, cells), time.perf_counter()
    job: Job | None = None
    passes = (False, True) if processes.workers() > 1 and processes.is_first_worker() else (False,)
    for wait, cell in itertools.product(passes, cells):
        with processes.hold_run_folder(root / cell.folder, wait=wait) as held:
            if not held or on_first_process(lambda cell=cell: output.is_reported(root / cell.folder)):
                continue
            own = cell.recipe(recipe, root)
            on_first_process(lambda own=own: output.claim(own, resume=True, overwrite=False))
            if job is None or job.recipe.seed != cell.seed or not starts_alike(recipe.grid):
                job = _checked_job(recipe, own, root / "base", allow_code_execution)
            alike = functools.partial(_started_alike, recipe, root, cell)
            job = dataclasses.replace(
                job,  # with the windows that a run of the seed has had the model write
                recipe=own,
                folder=Path(own.output_dir),
                shared_init=on_first_process(alike) if starts_alike(recipe.grid) else {},
                keep_weights=recipe.grid.keep_weights,
            )

            def row_done(row: Row, cell: Cell = cell) -> None:
                nonlocal before, last
                done, now = _finished(root, cells), time.perf_counter()
                if is_first_process():
                    if (cell, row.method) not in before:
                        processes.print_line(_progress(done, cells, cell, row, now - last))
                    write_results(root, collect(recipe, cells, of_grid.model.name, base))
                before, last = done, now

            run_job(job, row_done)
    return collect(recipe, cells, of_grid.model.name, base)


def space_of_grid(recipe: Recipe, cells: Sequence[Cell], job: Job) -> int:
    """Return the bytes that the grid may write: of every run, or, where no weights are kept, of the largest at a time."""
    sizes = {plan.name: plan.written_bytes for plan in job.plans}
    runs = [sizes[name] for cell in cells for name in cell.methods]
    return job.reference_bytes + (sum(runs) if recipe.grid.keep_weights else sum(sorted(runs)[-processes.workers() :]))


def check_grid(
    recipe: Recipe, cells: Sequence[Cell], *, allow_code_execution: bool | str = False, may_be_unreached: bool = False
) -> Job:
    """Check all runs before the first; return the job of the grid's own recipe, which the base's evaluation belongs to.

    See `lora_null.recipes.job.inspect_recipe` for the arguments.
    """
    if recipe.eval.backend == "vllm" and not recipe.grid.keep_weights:
        raise UserError("eval.backend: vllm runs what is saved, and grid.keep_weights is false; use hf")
    root = Path(recipe.output_dir)
    first = cells[0].seed
    options = {"allow_code_execution": allow_code_execution, "may_be_unreached": may_be_unreached}
    job = check_run(recipe, **options)
    planned = set()
    for cell in cells:
        own = cell.recipe(recipe, root)
        training_arguments(own, root)
        if cell.seed == first and not starts_alike(recipe.grid):
            checked = inspect_recipe(own, **options)
            check_asked_alike(checked, job, f"grid.sweep, {cell.title}")
            job.unreached += [line for line in checked.unreached if line not in job.unreached]
            if not may_be_unreached:
                job.swept_inputs |= _inputs_of_cell(cell, checked)
        decays = cell.methods, dict(cell.point).get("training.weight_decay")
        if starts_alike(recipe.grid) and decays[1] is not None and decays not in planned:
            plan_methods(own, job.model.config)  # which ask where decay pulls to
            planned.add(decays)
        if cell.seed == first and not job.unreached and any(key not in NUMBERS for key, _ in cell.point):
            rehearse(own, job.tokenizer, job.data)
    return job


def _inputs_of_cell(cell: Cell, checked: Job) -> dict[str, str]:
    """Return the hashes of what a run reads in the sections of which keys are swept, named by their values."""
    swept, settings = {key.partition(".")[0] for key, _ in cell.point}, settings_text(dict(cell.point))
    found = inputs_beside_the_base(checked).items()
    return {f"{name} ({settings})": value for name, value in found if name.partition(".")[0] in swept}


def starts_alike(grid: GridSection) -> bool:
    """Whether the swept keys leave data, windows and every method's start as they are, so that a seed's runs share them."""
    return all(key in STEPS_ONLY for key in grid.sweep)


def _checked_job(recipe: Recipe, own: Recipe, base: Path, allow_code_execution: bool | str) -> Job:
    """Return the job of a run's `own` recipe, which a seed's runs share where they start alike."""
    unswept = {"method": recipe.method, "training": recipe.training}  # as the grid's recipe has them
    every = own.model_copy(update=unswept if starts_alike(recipe.grid) else {})
    return together(lambda: inspect_recipe(every, base=base, allow_code_execution=allow_code_execution))


def _started_alike(recipe: Recipe, root: Path, cell: Cell) -> dict[str, Path]:
    """Return, by method, a finished run of the same seed, whose initial factors and probes are the same."""
    found = {}
    for other in grid_cells(recipe):
        if other.seed == cell.seed and other != cell:
            folders = {name: root / other.folder / name for name in other.methods}
            found |= {name: folder for name, folder in folders.items() if read_row(folder) is not None}
    return found


def _finished(root: Path, cells: Sequence[Cell]) -> dict[tuple[Cell, str], Row]:
    """Return the row of each run and method that is finished on disk, whichever process did it."""
    each = ((cell, name) for cell in cells for name in cell.methods)
    return {(cell, name): row for cell, name in each if (row := read_row(root / cell.folder / name))}


def _progress(done: Mapping[tuple[Cell, str], Row], cells: Sequence[Cell], cell: Cell, row: Row, spent: float) -> str:
    """Return the line of a method just done: where the grid stands, what came out, the time left by what took how long.

    Of probes, saves and loading, which no row's seconds hold, the others are taken to have as large a share as this one.
    """
    seconds: dict[str, list[float]] = {}
    for (_, name), other in done.items():
        seconds.setdefault(name, []).append(other.seconds.total)
    every = [value for values in seconds.values() for value in values]
    planned = [(other, name) for other in cells for name in other.methods]
    waiting = [statistics.mean(seconds.get(name, every)) for other, name in planned if (other, name) not in done]
    metrics = ", ".join(f"{name} {metric.value:.4g}" for name, metric in row.metrics.items())
    beside = max(1.0, spent / (row.seconds.total or spent))
    outcome = f"diverged at step {row.diverged}" if row.diverged else metrics or "not evaluated"
    return (
        f"[{len(done)}/{len(planned)}] {row.method}, {cell.title}: {outcome}; {time_text(spent)}, "
        f"about {time_text(beside * sum(waiting) / processes.workers())} left"
    )


def collect(recipe: Recipe, cells: Sequence[Cell], model_name: str, base: Row) -> Results:
    """Return the results of what is finished: a row for each method and setting, means over the seeds."""
    root = Path(recipe.output_dir)
    rows = [(cell, row) for (cell, _), row in _finished(root, cells).items()]
    seeds = sorted({cell.seed for cell in cells})
    groups: dict[tuple[str, tuple], list[Row]] = {}
    for name in recipe.method.name:  # the settings of a method beside each other
        for cell, row in rows:
            if row.method == name:
                groups.setdefault((name, cell.point), []).append(row)
    finished = [root / cell.folder for cell in cells if (root / cell.folder / RESULTS_FILE).is_file()]
    same, differing = shared_and_differing(load_results(folder).settings for folder in finished)
    _, swept = shared_and_differing(dict(cell.point) for cell in cells)
    unsaid = {key: values for key, values in swept.items() if key.rpartition(".")[2] not in differing}
    no_layers = {"magnitude": {"layers"}}  # a figure a layer, which hundreds of runs leave to their own results
    figures = [(cell, row.model_dump(exclude_unset=True, exclude=no_layers)) for cell, row in rows]
    results = Results(
        recipe=recipe.name,
        model=model_name,
        seed=seeds[0] if len(seeds) == 1 else None,
        environment=environment(),
        settings=same,
        rows=[base, *(mean_row(group, variant_of(dict(point))) for (_, point), group in groups.items())],
        grid=Grid(
            seeds=seeds,
            sweep={key: distinct(dict(cell.point)[key] for cell in cells) for key in recipe.grid.sweep},
            planned=sum(len(cell.methods) for cell in cells),
            differing=differing | unsaid,
            cells=[Run(folder=c.folder, seed=c.seed, point=dict(c.point), **row) for c, row in figures],
        ),
    )
    found = read_evaluations(root, results)
    set_errors(results, found)
    results.paired, results.noise = compare(results, found), noise_of(found)
    results.answers = _answers(root, cells)
    return results


def _answers(root: Path, cells: Sequence[Cell]) -> Answers | None:
    """Return the answers of the first seed's run at the middle setting, of those that have any."""
    folders = [cell.folder for cell in cells if cell.seed == cells[0].seed]
    done = [(name, load_results(root / name).answers) for name in folders if (root / name / RESULTS_FILE).is_file()]
    asked = [(name, answers) for name, answers in done if answers is not None]
    if not asked:
        return None
    name, answers = asked[len(asked) // 2]
    return answers.model_copy(update={"run": name})


def mean_row(rows: Sequence[Row], variant: str | None) -> Row:
    """Return the means over the seeds, undefined where a run diverged; runs that ended as the base again are counted.

    `stderr` adds in squares the seeds' error, s/√n, and the mean error over questions, as if each seed had the same ones;
    `set_errors` does it question by question where these are known.
    """
    first, bad = rows[0], [row.diverged for row in rows if row.diverged]
    metrics = {}
    for name, metric in (first.metrics if not bad else {}).items():
        if not all(name in row.metrics for row in rows):  # grades that a judge did not give
            continue
        values = [row.metrics[name].value for row in rows]
        own = [row.metrics[name].stderr or 0.0 for row in rows]
        stderr = metric.stderr
        if len(values) > 1:
            stderr = math.sqrt(statistics.variance(values) / len(values) + statistics.mean(e * e for e in own))
        metrics[name] = dataclasses.replace(metric, value=statistics.mean(values), stderr=stderr)
    drifts = [row.drift for row in rows if row.drift and not bad]
    sizes = [row.magnitude for row in rows if row.magnitude and not bad]
    return Row(
        method=first.method,
        variant=variant,
        rank=first.rank,
        trainable_params=first.trainable_params,
        adapter_params=first.adapter_params,
        runs=len(rows),
        base_again=sum(row.is_base_again for row in rows) or None,
        diverged=min(bad) if bad else None,
        metrics=metrics,
        drift=Drift(mean=_mean(d.mean for d in drifts), max=_mean(d.max for d in drifts)) if drifts else None,
        magnitude=Magnitude(total=_mean(m.total for m in sizes), max=_mean(m.max for m in sizes)) if sizes else None,
        seconds=Seconds(**{key: _mean(getattr(row.seconds, key) for row in rows) for key in Seconds.model_fields}),
        tokens_per_second=_mean(row.tokens_per_second for row in rows),
        peak_memory_bytes=max((row.peak_memory_bytes for row in rows if row.peak_memory_bytes), default=None),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None

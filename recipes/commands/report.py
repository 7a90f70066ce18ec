"""`lora-null report DIR`: write a run's report again, of one that goes on what is known of it; of several also one page for all."""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_null.eval_harness import Evaluation
from lora_null.recipes.config.load import read_yaml
from lora_null.recipes.config.run_folder import RECIPE_FILE, whole_of
from lora_null.recipes.config.stages import stage_folder
from lora_null.recipes.output import PAGE_FILE, check_place, remove_left
from lora_null.recipes.report import write_report
from lora_null.recipes.results import (
    EVAL_FILE,
    LOG_FILE,
    REPAIRED,
    RESULTS_FILE,
    Results,
    Row,
    load_log,
    load_results,
    read_row,
    shared_and_differing,
    write_results,
)
from lora_null.utils.errors import UserError
from lora_null.utils.files import link

# What two evaluations of a task of one name must have in common, by its name in eval.json.
MUST_MATCH = {"pairs_sha256": "rows", "texts_sha256": "texts", "questions_sha256": "questions", "beta": "beta"}
MUST_MATCH |= {
    "path_sha256": "rows",
    "documents_sha256": "rows",
    "rules_sha256": "rules",
    "num_fewshot": "num_fewshot",
}
UNFINISHED = "unfinished"  # report.html stands for a finished run


def run(arguments: argparse.Namespace) -> None:
    """Write the reports and print where they are.

    Raises:
        UserError: a folder holds no results that this version reads, or runs that cannot be compared.
    """
    folders = list(map(Path, arguments.words))
    for folder in (folder for folder in folders if not folder.exists()):
        raise UserError(f"{folder}: no such folder; give the folders of runs")
    page = compare_runs(folders, arguments.out) if len(folders) > 1 else None  # what cannot be compared is told first
    for folder in folders:
        print(report(folder))
    if page is not None:
        print(page)


def report(folder: Path) -> Path:
    """Write the report of a run again, or of one that is not finished what is known of it; return the page.

    For a sequence that goes on stands the page of one of its tasks, see `_folder_with_results`.

    Raises:
        UserError: the folder holds no run, or results that this version does not read.
    """
    folder = _folder_with_results(folder)
    remove_left(folder)
    if (folder / RESULTS_FILE).is_file() or not (folder / RECIPE_FILE).is_file():
        write_report(folder)
        return folder / PAGE_FILE
    write_report(folder, results_so_far(folder), UNFINISHED)
    return folder / f"{UNFINISHED}.html"


def _folder_with_results(folder: Path) -> Path:
    """Return the folder whose results stand for a run: of a sequence that goes on its last finished task, else its first."""
    if (folder / RESULTS_FILE).is_file() or not (folder / RECIPE_FILE).is_file():
        return folder
    named = (read_yaml(folder / RECIPE_FILE).get("sequence") or {}).get("tasks", [])
    tasks = [stage_folder(folder, number, task["name"]) for number, task in enumerate(named, 1)]
    begun = [task for task in tasks[:1] if (task / RECIPE_FILE).is_file()]
    return [folder, *begun, *(task for task in tasks if (task / RESULTS_FILE).is_file())][-1]


def results_so_far(folder: Path) -> Results:
    """Return the results of a run by what it has left until now: rows of finished methods, and of the others their logs.

    A grid's runs are folders of their own, in `cells`.

    Raises:
        UserError: a damaged file.
    """
    raw = read_yaml(folder / RECIPE_FILE)
    evaluated = whole_of(folder) / "base" / EVAL_FILE
    base = Evaluation.read(evaluated).metrics if evaluated.is_file() else {}
    rows = [Row(method="base", metrics=base)]
    named, done = raw.get("method", {}).get("name", []), 0
    for name in named:
        found = read_row(folder / name)
        done += found is not None
        if found is None and (folder / name / LOG_FILE).is_file():
            step = max((entry["step"] for entry in load_log(folder / name / LOG_FILE).entries), default=0)
            found = Row(method=name, variant=f"not finished, at step {step:g}")
        rows += [row for row in (found, read_row(folder / REPAIRED.format(name))) if row is not None]
    settings = raw.get("training", {}) | {"training_data": raw.get("data", {}).get("path")}
    return Results(
        recipe=raw.get("name") or folder.name,
        model=raw.get("model", {}).get("name_or_path", ""),
        seed=raw.get("seed"),
        settings=settings,
        rows=rows,
        state=f"Not finished: {done} of {len(named)} method{'s' * (len(named) != 1)}.",
    )


def compare_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write one page of several runs of the same base and evaluation, each row named by its run; return the page.

    Args:
        folders: of runs, finished or not.
        out: gets results.json, the pages and the picture, and links to the logs.

    Raises:
        UserError: runs of different bases, measured differently, or `out` holds something else.
    """
    names, folders = _names(folders), list(map(_folder_with_results, folders))
    found = [load_results(f) if (f / RESULTS_FILE).is_file() else results_so_far(f) for f in folders]
    for (one, first), (other, results) in itertools.combinations(zip(folders, found), 2):
        _check_alike(one, first, other, results)
    check_place(out, "--out")
    ours = (out / RESULTS_FILE).is_file() and load_results(out).of_several_runs
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"--out: {out} holds other files; choose an empty folder")
    if ours:
        remove_left(out)
        shutil.rmtree(out / "logs", ignore_errors=True)  # of rows that had other numbers
    base = next((results.base for results in found if results.base.metrics), found[0].base)
    rows, of_base = [], {}
    for name, folder, results in zip(names, folders, found):
        of_base |= results.base.metrics
        for row in results.rows[1:]:
            variant = ", ".join(filter(None, [name, row.variant]))
            own = out / "logs" / f"{len(rows) + 1}" / LOG_FILE
            if not results.grid and (folder / row.method / LOG_FILE).is_file():
                link(folder / row.method / LOG_FILE, own)
            rows.append(row.model_copy(update={"variant": variant}))
    settings, unfinished = _settings_of(found), [name for name, each in zip(names, found) if _goes_on(each)]
    same, differing = shared_and_differing(settings)
    results = Results(
        recipe="comparison",
        model=found[0].model,
        environment={"runs": ", ".join(names)},
        settings=same | {f"differs: {k}": "; ".join(str(each.get(k)) for each in settings) for k in differing},
        rows=[base.model_copy(update={"metrics": of_base}), *rows],
        state=f"Not finished: {', '.join(unfinished)}." if unfinished else "",
    )
    write_results(out, results)
    write_report(out)
    return out / PAGE_FILE


def _goes_on(results: Results) -> bool:
    """Whether a run is not finished, or a grid has runs that are not."""
    return bool(results.state) or (results.grid is not None and not results.grid.is_finished)


def _settings_of(found: Sequence[Results]) -> list[dict[str, Any]]:
    """Return each run's settings with its seeds; beside a run that is not finished only those that all have."""
    settings = [results.settings | {"seed": results.grid.seeds if results.grid else results.seed} for results in found]
    known = set.intersection(*map(set, settings)) if any(results.state for results in found) else None
    return [{key: value for key, value in each.items() if known is None or key in known} for each in settings]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a short name of each run: its folder's, with as much of the path before as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report: {folders[0]} is named twice")


def _base_of(folder: Path) -> str | None:
    """Return the base's name in a run's recipe; results have the folder that it was loaded from. None without a recipe."""
    recipe = folder / RECIPE_FILE
    return read_yaml(recipe).get("model", {}).get("name_or_path") if recipe.is_file() else None


def _tasks_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return how a run's evaluation describes its tasks: the base's, else that of a method; nothing where none is there."""
    files = (whole_of(folder) / "base" / EVAL_FILE, *sorted(folder.rglob(EVAL_FILE)))
    file = next((file for file in files if file.is_file()), None)
    return {} if file is None else Evaluation.read(file).settings.get("tasks", {})


def _check_alike(one: Path, first: Results, other: Path, results: Results) -> None:
    """Compare two runs' bases: a number of the base that differs was measured on other rows or of another model.

    What is counted from the base has the same number on any rows, so how it was measured is compared too.
    """
    ours, theirs = _base_of(one) or first.model, _base_of(other) or results.model
    if ours != theirs:
        raise UserError(f"report: {one} and {other} have different bases ({ours}, {theirs})")
    for name, metric in first.base.metrics.items():
        other_metric = results.base.metrics.get(name)
        if other_metric is None:
            continue
        far = abs(other_metric.value - metric.value) > 1e-3 * max(1.0, abs(metric.value))
        if other_metric.n != metric.n or far:
            raise UserError(
                f"report: {one} and {other} measured {name} differently (the base has {metric.value:.4g} on {metric.n}, "
                f"{other_metric.value:.4g} on {other_metric.n})"
            )
    ours, theirs = _tasks_of(one), _tasks_of(other)
    for name in ours.keys() & theirs.keys():
        for key, what in MUST_MATCH.items():
            if key in ours[name] and key in theirs[name] and ours[name][key] != theirs[name][key]:
                values = f" ({ours[name][key]}, {theirs[name][key]})" if key == what else ""
                raise UserError(f"report: {one} and {other} measured {name} differently, with other {what}{values}")

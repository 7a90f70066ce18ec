"""From several recipes, or one with a `sequence`, to the ordinary recipe of every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_null.recipes.config.load import merge
from lora_null.recipes.config.run_folder import TASKS_FOLDER
from lora_null.recipes.config.schema import AnswersEntry, PreferencesEntry, Recipe, parse_recipe
from lora_null.utils.errors import UserError

OVERLAID = ("data", "training", "eval", "trainer")  # what a task may set for itself
FROM_FIRST = ("model", "method", "calibration", "seed", "preflight")  # what all recipes of a sequence share


def stage_folder(run: Path, number: int, name: str) -> Path:
    """Return the folder of a sequence's task, counted from 1, in the folder of the whole."""
    return run / TASKS_FOLDER / f"{number}-{name}"


def join_recipes(recipes: Sequence[Recipe]) -> Recipe:
    """Return the recipe of a sequence from the recipes of its tasks; what is kept is what the first one keeps.

    It goes to the folder that all of them name, as the command line lets them, or to one that is called after them.

    Raises:
        UserError: a grid, one task alone, two of the same name, or a recipe that changes base, method or calibration.
    """
    first, names = recipes[0], [recipe.name for recipe in recipes]
    if len(recipes) < 2:
        raise UserError("--sequence: takes two recipes or more, one per task")
    if inner := next((recipe for recipe in recipes if recipe.sequence), None):
        raise UserError(f"--sequence: {inner.name} is a sequence itself; give the recipes of its tasks")
    for recipe in recipes[1:]:
        for key in FROM_FIRST:
            if getattr(recipe, key) != getattr(first, key):
                names_of_both = f"{first.model.name_or_path!r}, then {recipe.model.name_or_path!r}"
                told = names_of_both if key == "model" else "the first's"
                raise UserError(f"--sequence: {recipe.name} changes {key} ({told}); all tasks share one")
        _check_dropped(first, recipe)
    dumped = [recipe.model_dump(mode="json") for recipe in recipes]
    own = [{key: raw[key] for key in ("name", "data", "training", "trainer")} for raw in dumped]
    tasks = [keys | {"eval": {"task": raw["eval"]["task"]}} for keys, raw in zip(own, dumped)]
    # No `training` beside the tasks': a key of the first recipe's would hold for a task that does not set it.
    raw = dumped[0] | {"name": "-".join(names), "sequence": {"tasks": tasks}, "quick": {}, "training": {}}
    given = {recipe.output_dir for recipe in recipes}
    raw["output_dir"] = given.pop() if len(given) == 1 else f"runs/{'-'.join(names)}"
    return parse_recipe(raw, "--sequence")


def _check_dropped(first: Recipe, recipe: Recipe) -> None:
    """Raise a UserError for what a later recipe sets and a sequence takes from the first recipe alone."""
    of_eval = sorted(type(recipe.eval).model_fields.keys() - {"task"})
    for section, own, shared, keys in (
        ("", recipe, first, ("budget", "grid")),
        ("eval.", recipe.eval, first.eval, of_eval),
    ):
        for key in keys:
            default = type(own).model_fields[key].get_default(call_default_factory=True)
            if getattr(own, key) not in (default, getattr(shared, key)):
                raise UserError(
                    f"--sequence: {recipe.name} sets {section}{key}, which holds for all tasks; set it in {first.name} alone"
                )


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the ordinary recipe of every task; all evaluate every task.

    What a budget allows is counted from the original base: it grows by the same share from task to task, to all of it.

    Raises:
        UserError: a grid, names that collide, a quantized base, or what a task may not set.
    """
    section, raw = recipe.sequence, recipe.model_dump(mode="json")
    if recipe.grid:
        raise UserError("sequence: takes no grid; run it once for each seed")
    if recipe.model.quantization:
        raise UserError(
            "sequence: a task goes on in the weights of those before, which a quantized base does not take"
        )
    if recipe.method.init is not None:
        raise UserError("sequence: method.init is one start, and each task computes its own; leave it out")
    if not recipe.eval.before:
        raise UserError("eval.before: what a sequence carries over is counted from the base; leave it at true")
    if recipe.eval.strengths:
        raise UserError(
            "eval.strengths: strength 0 of a later task is not the base but the tasks before it; leave it out, and dial "
            "RUN/METHOD at the end"
        )
    names = [task["name"] for task in section.tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"sequence.tasks: two tasks are called {twice!r}; give one of them another name")
    stages, every = [], []
    for number, task in enumerate(section.tasks, 1):
        _check_overlay(task)
        own = merge(raw, {key: value for key, value in task.items() if key != "name"})
        own |= {"sequence": None, "quick": {}, "name": task["name"]}
        if recipe.budget is not None:
            own["budget"] = recipe.budget.share(number, len(section.tasks)).model_dump()
        own["output_dir"] = str(stage_folder(Path(recipe.output_dir), number, task["name"]))
        every.append(own["eval"]["task"])
        stages.append(own)
    for own in stages:
        own["eval"]["task"] = [entry for entries in every for entry in entries]
    parsed = [parse_recipe(own, f"sequence.tasks: {own['name']}") for own in stages]
    owners = [own for own, entries in zip(parsed, every) for _ in entries]
    for stage in parsed:
        for entry, own in zip(stage.eval.task, owners):
            _measure_as_in(own, entry)
    if any(not entries for entries in every):
        raise UserError(
            f"sequence.tasks: {names[every.index([])]} has no eval.task, nothing would tell whether it is kept"
        )
    return parsed


def _measure_as_in(task: Recipe, entry: Any) -> None:
    """Put into an entry of `eval`, in place, what its own task's recipe says of it, which holds after other tasks too."""
    if isinstance(entry, AnswersEntry | PreferencesEntry):
        entry.on_bad_row = entry.on_bad_row or task.data.on_bad_row
    if isinstance(entry, PreferencesEntry) and entry.beta is None:
        from trl import DPOConfig  # which takes seconds, and hardly a recipe measures preferences

        entry.beta = task.training.get("beta", DPOConfig.beta)


def _check_overlay(task: dict[str, Any]) -> None:
    """Raise a UserError where a task sets what all tasks share."""
    wrong = next((key for key in task if key not in ("name", *OVERLAID)), None)
    if wrong is not None:
        shared = "changes what all tasks share" if wrong in FROM_FIRST else "has no such key for a task"
        raise UserError(
            f"sequence.tasks: {task['name']} sets {wrong!r}, it {shared}; a task sets {', '.join(OVERLAID)}"
        )
    evaluation = task.get("eval", {})
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("task", []), list):
        raise UserError(f"sequence.tasks: {task['name']}: eval is a mapping, and its task a list of entries")
    inner = next((key for key in evaluation if key != "task"), None)
    if inner is not None:
        raise UserError(f"sequence.tasks: {task['name']} sets eval.{inner}; a task sets eval.task, the rest is shared")

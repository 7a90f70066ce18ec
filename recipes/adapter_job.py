"""What measures a trained adapter: the evaluation of its run's recipe, or files of questions, and a budget by options."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_null.eval_harness import Evaluation
from lora_null.eval_harness.evaluation import package_versions
from lora_null.recipes.config.run_folder import CELLS_FOLDER, RECIPE_FILE, whole_of
from lora_null.recipes.config.schema import BudgetSection, parse_recipe, parse_section
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.job import Job, evaluation_job
from lora_null.recipes.measure import differing_settings
from lora_null.recipes.results import EVAL_FILE, MIN_ROWS
from lora_null.recipes.trained import Trained
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError

logger = get_logger(__name__)

QUESTIONS = ("prompt", "response", "template")  # options that say how files of questions are read


def job_for(source: Trained, arguments: argparse.Namespace, out: Path, budget: dict[str, Any] | None = None) -> Job:
    """Return what evaluates an adapter: by its run's recipe, or by files of questions.

    Args:
        source: the adapter.
        arguments: --keep, --learn, --prompt, --response, --template, --limit and --allow-code-execution, as `dial` and
            `export` take them.
        out: where the base's evaluation goes that is not a run's own.
        budget: of a recipe.

    Raises:
        UserError: nothing to measure, or what a recipe may not hold.
    """
    files = arguments.keep is not None or arguments.learn is not None
    lost = next((name for name in QUESTIONS if getattr(arguments, name) is not None), None)
    if lost and not files:
        raise UserError(f"--{lost}: says how the rows of --keep and --learn are read; give one of them too")
    own = files or arguments.limit is not None
    raw = _questions(source, arguments)
    if arguments.limit is not None:
        raw["eval"] = {**raw["eval"], "limit": arguments.limit}
    raw["model"] = source.base.section.model_dump(mode="json")
    base = _base_of_run(source, arguments, own)
    # The run's evaluation of the base has the rows of its own probe alone.
    probe = source.recipe.get("eval", {}).get("probe") if base else None
    rows = probe.get("retention") if probe else None
    if budget and probe and not (isinstance(rows, int) and rows >= MIN_ROWS):
        base, probe = None, None  # No budget can be kept on so few rows: the base is probed anew.
    engine = {"backend": "hf", "vllm": None, "strengths": [], "before": True, "probe": probe}
    raw |= {"method": {"name": "lora"}, "grid": {}, "budget": budget, "eval": {**raw.get("eval", {}), **engine}}
    recipe = parse_recipe(raw, str(source.folder))
    if not recipe.eval.retention and not recipe.eval.task:
        raise UserError(f"{source.folder}: its recipe measures nothing; --keep and --learn name files of questions")
    try:
        return evaluation_job(recipe, base or out / "base", allow_code_execution=arguments.allow_code_execution)
    except UserError as error:
        named = {"eval.retention.path": "--keep", "eval.task.path": "--learn"} if own else {}
        raise UserError(functools.reduce(lambda text, pair: text.replace(*pair), named.items(), str(error))) from None


def _base_of_run(source: Trained, arguments: argparse.Namespace, own_questions: bool) -> Path | None:
    """Return the folder of the run's evaluation of the base; None where it was asked or computed otherwise."""
    of_run = whole_of(source.run) if CELLS_FOLDER in source.run.parts else source.run  # a grid's runs share one base
    folder = of_run / "base"
    by_engine = source.recipe.get("eval", {}).get("backend", "hf") != "hf"
    if own_questions or by_engine or arguments.base or not (folder / EVAL_FILE).is_file():
        return None
    here = {"versions": package_versions(), "device": PartialState().device.type}
    if other := differing_settings(Evaluation.read(folder / EVAL_FILE).settings, here, ("device",)):
        logger.warning(f"the run's base was measured under other settings ({other}): it is measured anew")
        return None
    return folder


def _of_run(source: Trained) -> dict[str, Any]:
    """Return the recipe of the adapter's run; of a sequence that of its last task, which measures all of them."""
    if not source.recipe.get("sequence"):
        return dict(source.recipe)
    return stage_recipes(parse_recipe(source.recipe, str(source.run / RECIPE_FILE)))[-1].model_dump(mode="json")


def _questions(source: Trained, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a recipe that measures files of questions; a run's own recipe where none is given."""
    if arguments.keep is None and arguments.learn is None:
        if not source.recipe:
            raise UserError(
                f"{source.folder}: not an adapter of a run, so nothing says what to measure; --keep names a file of "
                "questions with known answers"
            )
        return _of_run(source)
    fields = {key: value for key in QUESTIONS if (value := getattr(arguments, key)) is not None}
    stems = [Path(path).stem for path in (arguments.keep, arguments.learn) if path is not None]

    def entry(path: str | None, what: str) -> list[dict[str, Any]]:
        if path is None:
            return []
        name = Path(path).stem if len(set(stems)) == len(stems) else f"{what} {Path(path).stem}"
        return [{"answers": name, "path": path, **fields}]

    used = {"path": arguments.keep or arguments.learn}
    evaluation = {"retention": entry(arguments.keep, "kept"), "task": entry(arguments.learn, "learned")}
    return {
        "name": "dial",
        "model": {},
        "method": {"name": "lora"},
        "calibration": used,
        "data": used | {"template": "qa"} | fields,
        "eval": evaluation | {"batch_size": 8},
    }


def budget_job(source: Trained, arguments: argparse.Namespace, scratch: Path) -> Job:
    """Return what measures an adapter against --max-forgetting and --measure, else its run's; otherwise as `job_for`."""
    return job_for(source, arguments, scratch, budget_asked(source, arguments).model_dump())


def budget_asked(source: Trained, arguments: argparse.Namespace) -> BudgetSection:
    budget = {"at_most": arguments.max_forgetting, "measure": _measure_asked(source, arguments)}
    return parse_section(BudgetSection, "budget", budget)


def _measure_asked(source: Trained, arguments: argparse.Namespace) -> str | list[str] | None:
    """Return the metrics that --measure names, else those of the run's own budget; None where nothing names them."""
    if arguments.measure:
        return arguments.measure if len(arguments.measure) > 1 else arguments.measure[0]
    if isinstance(arguments.max_forgetting, dict) or arguments.keep or arguments.learn:
        return None
    own = source.recipe.get("budget") or {}
    return list(own["at_most"]) if isinstance(own.get("at_most"), dict) else own.get("measure")


def check_budget_options(arguments: argparse.Namespace, *names: str) -> None:
    """Raise a UserError where one of these options is given, but not the --max-forgetting that it is for."""
    idle = next((name for name in names if getattr(arguments, name) not in (None, False)), None)
    if idle and arguments.max_forgetting is None:
        raise UserError(f"--{idle.replace('_', '-')}: is for what --max-forgetting measures; give that too")

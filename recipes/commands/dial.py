"""`lora-null dial`: one adapter at many strengths, the whole frontier of learning and forgetting without retraining."""

from __future__ import annotations

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from rich.console import Console

from lora_null.adapters.strength import Strength
from lora_null.eval_harness import Evaluation
from lora_null.eval_harness.evaluation import package_versions
from lora_null.recipes.budget import bounded_metrics, scale_to_budget
from lora_null.recipes.commands.arguments import QUESTIONS
from lora_null.recipes.config.load import read_yaml
from lora_null.recipes.config.run_folder import CELLS_FOLDER, RECIPE_FILE, is_of_run, whole_of
from lora_null.recipes.config.schema import BudgetSection, parse_recipe, parse_section
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.environment import prepare_cpu
from lora_null.recipes.job import Job, evaluation_job
from lora_null.recipes.measure import budget_measurement, differing_settings, evaluate_base, measure_strengths
from lora_null.recipes.output import check_place
from lora_null.recipes.processes import join_processes
from lora_null.recipes.report.dial import DIAL_FOLDER, dial_summary, dial_table, read_dial
from lora_null.recipes.report.render import print_columns
from lora_null.recipes.results import EVAL_FILE, MIN_ROWS
from lora_null.recipes.trained import Trained, check_adapter_fits, find_trained
from lora_null.utils.distributed import get_logger, is_first_process, on_first_process, together
from lora_null.utils.errors import UserError

logger = get_logger(__name__)

MARK_FILE = ".dial"  # in a folder that a dial may replace


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write dial.json, dial.md and dial.png, print the table.

    Raises:
        UserError: not an adapter, an adapter for another base, nothing to measure.
    """
    prepare_cpu()
    join_processes(_timeout_of_run(arguments.source.resolve()))

    def check() -> tuple[Trained, Job, dict[str, float]]:
        source = find_trained(arguments.source, arguments.base, trust=arguments.trust_remote_code)
        check_adapter_fits(source)
        _check_kept(source, arguments)
        check_place(folder_for(source, arguments), "--out")
        job = job_for(source, arguments, folder_for(source, arguments))
        return source, job, _allowed(source, arguments, job)

    source, job, allowed = together(check)
    out = folder_for(source, arguments)
    if job.base.parent == out:
        on_first_process(lambda: _make_anew(job.base))
    evaluate_base(job)
    model = load_adapted(source)
    found = measure_strengths(job, source.method, model, out, arguments.strengths)
    if not is_first_process():
        return
    print_columns(dial_table(found), "Strength", Console())
    print(dial_summary(found, allowed))
    print(f"written: {out}")


def _timeout_of_run(source: Path) -> float | None:
    """Return `training.ddp_timeout` of the run that RUN/METHOD, or a folder in it, belongs to."""
    recipes = (folder / RECIPE_FILE for folder in source.parents[:2])
    training = next((read_yaml(recipe).get("training") for recipe in recipes if is_of_run(recipe)), None)
    return (training or {}).get("ddp_timeout")


def folder_for(source: Trained, arguments: argparse.Namespace) -> Path:
    """Return the folder called `dial` that is written: in --out, or in RUN/METHOD."""
    out = arguments.out or source.home
    return out if out.name == DIAL_FOLDER else out / DIAL_FOLDER


def _check_kept(source: Trained, arguments: argparse.Namespace) -> None:
    """Raise a UserError where --keep, --learn or --limit would overwrite a dial of the run's own questions."""
    own = next((name for name in ("keep", "learn", "limit") if getattr(arguments, name) is not None), None)
    base, found = whole_of(source.run) / "base" / EVAL_FILE, read_dial(source.home)
    if own is None or arguments.out is not None or found is None or not base.is_file():
        return
    if found.points[0].metrics == Evaluation.read(base).metrics:
        raise UserError(
            f"--{own}: {source.home / DIAL_FOLDER} holds the dial of the run's own questions; --out names a folder"
        )


def _make_anew(folder: Path) -> None:
    """Make the folder of the base's evaluation; an earlier dial's, of other questions or broken off, gives way.

    Raises:
        UserError: it holds something else.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not any((folder / name).is_file() for name in (MARK_FILE, EVAL_FILE)):
            raise UserError(f"--out: {folder} holds other files; choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK_FILE).touch()


def load_adapted(source: Trained) -> Any:
    """Return the base with the adapter, on the device, in eval mode."""
    return PeftModel.from_pretrained(source.base.load(), source.folder).eval()


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
    return job_for(source, arguments, scratch, _budget_asked(source, arguments).model_dump())


def _allowed(source: Trained, arguments: argparse.Namespace, job: Job) -> dict[str, float]:
    """Return metric → how much of it may be forgotten by --max-forgetting; nothing where that is not given."""
    if arguments.max_forgetting is None:
        if arguments.measure:
            raise UserError("--measure: is for what --max-forgetting measures; give that too")
        return {}
    return {name: most for name, (_, most) in bounded_metrics(_budget_asked(source, arguments), job.tasks).items()}


def _budget_asked(source: Trained, arguments: argparse.Namespace) -> BudgetSection:
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


def strength_within(source: Trained, arguments: argparse.Namespace, scratch: Path) -> tuple[float, str]:
    """Return the largest strength that forgets no more than --max-forgetting, and a sentence about it.

    As in a run's budget: sought on the probed rows, checked on the others.
    """
    job = together(lambda: budget_job(source, arguments, scratch))
    evaluate_base(job)
    model = load_adapted(source)
    held = scale_to_budget(budget_measurement(job, model), Strength(model))
    if held.strength == 0:
        raise UserError(
            f"--max-forgetting: {held.at_most:g} leaves nothing of the adapter; at the smallest strength "
            f"{held.measure} is beyond it"
        )
    return held.strength, held.sentence()

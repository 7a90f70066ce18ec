"""`lora-null dial`: one adapter at many strengths, the whole frontier of learning and forgetting without retraining."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from peft import PeftModel
from rich.console import Console

from lora_null.eval_harness import Evaluation
from lora_null.recipes.adapter_job import budget_asked, check_budget_options, job_for
from lora_null.recipes.budget import bounded_metrics
from lora_null.recipes.config.load import read_yaml
from lora_null.recipes.config.run_folder import RECIPE_FILE, is_of_run, whole_of
from lora_null.recipes.environment import prepare_cpu
from lora_null.recipes.job import Job
from lora_null.recipes.measure import evaluate_base, measure_strengths
from lora_null.recipes.output import check_place
from lora_null.recipes.processes import join_processes
from lora_null.recipes.report.dial import DIAL_FOLDER, dial_summary, dial_table, read_dial
from lora_null.recipes.report.render import print_columns
from lora_null.recipes.results import EVAL_FILE
from lora_null.recipes.trained import Trained, check_adapter_fits, find_trained
from lora_null.utils.distributed import is_first_process, on_first_process, together
from lora_null.utils.errors import UserError

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
    model = PeftModel.from_pretrained(source.base.load(), source.folder).eval()
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


def _allowed(source: Trained, arguments: argparse.Namespace, job: Job) -> dict[str, float]:
    """Return metric → how much of it may be forgotten by --max-forgetting; nothing where that is not given."""
    check_budget_options(arguments, "measure")
    if arguments.max_forgetting is None:
        return {}
    return {name: most for name, (_, most) in bounded_metrics(budget_asked(source, arguments), job.tasks).items()}

"""`lora-null repair`: take out of a trained adapter what it does to the texts to keep, without training it again."""

from __future__ import annotations

import argparse
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

from lora_null.adapters.repair import Repair, repair
from lora_null.adapters.saved import SavedAdapter
from lora_null.recipes import caches
from lora_null.recipes.adapter_job import QUESTIONS, budget_job, check_budget_options
from lora_null.recipes.config.load import read_yaml
from lora_null.recipes.config.run_folder import RECIPE_FILE, TASKS_FOLDER, whole_of
from lora_null.recipes.config.schema import CalibrationSection, Recipe, calibration_entry, parse_recipe, parse_section
from lora_null.recipes.config.stages import stage_recipes
from lora_null.recipes.data.calibration import calibration_sources, window_args
from lora_null.recipes.data.examples import Example, read_examples
from lora_null.recipes.environment import choose_device
from lora_null.recipes.job import Job
from lora_null.recipes.measure import evaluate_base
from lora_null.recipes.models.bases import load_tokenizer
from lora_null.recipes.output import check_place
from lora_null.recipes.repairs import (
    Batches,
    repair_within,
    rows_of_task,
    titles_of,
    what_is_left_alone,
    write_repaired,
)
from lora_null.recipes.results import REPAIRED
from lora_null.recipes.trained import Trained, check_adapter_fits, copy_tokenizer, find_trained
from lora_null.recipes.training import read_training_data
from lora_null.trainer.calibration_data import padded_batches
from lora_null.utils.errors import UserError
from lora_null.utils.files import check_free, replacing_folder
from lora_null.utils.startup import starts_several

WEIGHT = 1.0  # where neither --weight nor --max-forgetting says another


def run(arguments: argparse.Namespace) -> None:
    """Measure both sets of texts, compute the new factors, write DIR/adapter.

    Raises:
        UserError: not an adapter, an adapter for another base, no texts to keep, a folder in use, several processes, or a
            --max-forgetting that nothing measures or no weight keeps.
    """
    if starts_several():
        raise UserError("repair works in one process; start it without torchrun or accelerate launch")
    choose_device()
    source = find_trained(arguments.source, arguments.base, trust=arguments.trust_remote_code)
    check_adapter_fits(source)
    _check_layers(source)
    out = _folder_for(source, arguments)
    recipes, adapter = _recipes_of(source), source.adapter
    with tempfile.TemporaryDirectory() as scratch:
        job = _budget_job(source, arguments, Path(scratch))
        batches, purpose = _batches(source, recipes, arguments)
        if job is None:
            (found,) = repair(source.base.load(), adapter, *batches, weights=[arguments.weight or WEIGHT])
        else:
            found = _within_budget(job, source, adapter, batches)
    with replacing_folder(out / "adapter") as made:
        write_repaired(made, adapter, found, source.method, purpose)
        copy_tokenizer(source.folder, made)
    told = f"repaired at weight {found.weight:.3g}: {found.kept:.2%} of the square of its change is left on the texts to keep"
    told += "" if found.learned is None else f", {found.learned:.1%} on the task"
    print(told if found.weight else "nothing is repaired: the adapter keeps the budget as it is")
    print(f"written: {out / 'adapter'}")
    of_run = recipes and out.resolve().parent == source.run
    asked = f"{out} --strengths 1" if of_run else f"{out / 'adapter'} --keep QUESTIONS"
    print(f"measure it: lora-null dial {asked}")


def _budget_job(source: Trained, arguments: argparse.Namespace, scratch: Path) -> Job | None:
    """Return what measures --max-forgetting, by the questions of the adapter's run; None where it is not given."""
    check_budget_options(arguments, "measure", "allow_code_execution")
    if arguments.max_forgetting is None:
        return None
    if arguments.weight is not None:
        raise UserError("--weight: --max-forgetting chooses the weight itself, give one of the two")
    if not source.recipe:
        raise UserError(
            "--max-forgetting: is measured by a run's questions, and no run left this adapter; repair it at several "
            "--weight, and `lora-null dial DIR/adapter --keep QUESTIONS` measures each"
        )
    no_questions = dict.fromkeys(("keep", "learn", "limit", *QUESTIONS))  # here --keep names texts
    return budget_job(source, argparse.Namespace(**vars(arguments) | no_questions), scratch)


def _within_budget(job: Job, source: Trained, adapter: SavedAdapter, batches: list[Batches]) -> Repair:
    """Return the adapter repaired at the smallest weight that forgets no more than --max-forgetting; say what it gave up."""
    evaluate_base(job)
    found, held, _ = repair_within(job, source.base.load(), adapter, *batches)
    if not held.kept:
        raise UserError(
            f"--max-forgetting: no weight keeps {held.at_most:g}; at the largest, {held.weight:g}, {held.measure} is "
            f"{held.value:.2g}"
        )
    print(f"measured: {held.sentence()}")
    return found


def _check_layers(source: Trained) -> None:
    """Raise a UserError for an adapter of the output layer, which no walk through the decoder layers reaches."""
    model = source.base.empty
    changed, output = source.adapter.factors(), model.get_output_embeddings()
    if head := next((name for name in changed if model.get_submodule(name) is output), None):
        raise UserError(
            f"{source.folder}: changes {head}, whose inputs are not measured; it can be scaled (export --strength)"
        )


def _batches(source: Trained, recipes: list[Recipe], arguments: argparse.Namespace) -> tuple[list[Batches], str]:
    """Return the texts to keep, and what was learned (empty where nothing names it), and half a sentence about them."""
    tokenizer = load_tokenizer(source.base)
    rows = functools.cache(lambda: [_training_rows(recipe, tokenizer) for recipe in recipes])
    if arguments.keep is not None:
        section = _named(arguments.keep, "--keep")
        keep = _windows(section, source, tokenizer, "keep", option="--keep")
    else:
        section = _calibration(source, recipes)
        beside = (rows()[0], recipes[0].data.template) if any(entry.self == "data" for entry in section.each) else ()
        keep = _windows(section, source, tokenizer, "keep", *beside)
    told = what_is_left_alone(section)
    if arguments.data is not None:
        section = _named(arguments.data, "--data")
        task = _windows(section, source, tokenizer, "task", option="--data")
        told += f" and do what it does on {titles_of(section)}"
    else:
        task = [ids for recipe, examples in zip(recipes, rows()) for ids in rows_of_task(recipe, examples, tokenizer)]
        total = sum(map(len, rows()))
        spread = f"{len(task)} training rows" + (f", evenly spread over {total:,}" if len(task) < total else "")
        lacks = "none, all directions count alike; --data names what it was trained on, and more of that is left"
        print(f"task: {spread if task else lacks}")
        told += " and do what it does on its training rows" if task else ""
    return [padded_batches(ids, tokenizer.pad_token_id) for ids in (keep, task)], told


def _folder_for(source: Trained, arguments: argparse.Namespace) -> Path:
    """Return the folder to write; raise a UserError where there is none, or an adapter in it."""
    if arguments.out is None and source.elsewhere:
        raise UserError("--out: is needed for an adapter that no run left")
    out = arguments.out or source.run / REPAIRED.format(source.method)
    check_place(out, "--out")
    check_free(out / "adapter")
    return out


def _recipes_of(source: Trained) -> list[Recipe]:
    """Return the recipe of the adapter's run, of a sequence those of its tasks so far; none for an adapter made elsewhere."""
    if not source.recipe:
        return []
    in_sequence = source.run.parent.name == TASKS_FOLDER
    place = (whole_of(source.run) if in_sequence else source.run) / RECIPE_FILE
    # What trained it may be a method of the user's own.
    plain = {"method": {"name": "lora"}, "grid": {}, "budget": None}
    recipe = parse_recipe(read_yaml(place) | plain, str(place))
    if not recipe.sequence:
        return [recipe]
    return stage_recipes(recipe)[: int(source.run.name.partition("-")[0]) if in_sequence else None]


def _named(path: str, option: str) -> CalibrationSection:
    return parse_section(CalibrationSection, option, calibration_entry(path) | {"mode": "separate"})


def _calibration(source: Trained, recipes: list[Recipe]) -> CalibrationSection:
    """Return which texts to keep: those of the run."""
    if not recipes:
        raise UserError(f"{source.folder}: not an adapter of a run; --keep names the texts to keep")
    section = recipes[0].calibration
    return section if section.seed is not None else section.model_copy(update={"seed": recipes[0].seed})


def _windows(
    section: CalibrationSection,
    source: Trained,
    tokenizer: Any,
    label: str,
    *of_data: Any,
    option: str | None = None,
) -> list[list[int]]:
    """Return windows of texts, told by what they cover.

    `of_data` holds the training rows and their template, where the model writes after their prompts; `option` names the
    texts, where no recipe does.
    """
    base, cut = source.base, window_args(section, 0, source.base.config)
    try:
        sources = calibration_sources(section, tokenizer, *of_data)
    except UserError as error:
        if option is None:
            raise
        raise type(error)(re.sub(r"^calibration(\.path)?:", f"{option}:", str(error))) from None
    windows = caches.written_windows(base, tokenizer, sources, cut, section.cache)
    print(f"{label}: {'; '.join(windows.covered)}")
    windows.check_tokens()
    return windows.ids


def _training_rows(recipe: Recipe, tokenizer: Any) -> list[Example]:
    """Return the rows of a recipe: those that were trained on where the model wrote after them, else all, not tokenized."""
    if any(entry.self == "data" for entry in recipe.calibration.each):
        return read_training_data(recipe, tokenizer).examples
    return read_examples(recipe.data, tokenizer, preferences=recipe.trainer == "dpo")[0]

"""`lora-null train RECIPE`: fine-tune with a recipe, measure what was learned and what was kept, write a report."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lora_null.eval_harness.code.jails import UNSAFE
from lora_null.recipes.commands.arguments import ALLOW
from lora_null.recipes.config.load import dump, load_recipe, shipped
from lora_null.recipes.config.run_folder import RECIPE_FILE, resume_command
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.config.stages import join_recipes, stage_recipes
from lora_null.utils.errors import UserError
from lora_null.utils.startup import WORKERS, end_with_launcher, stdout_is_whole, uncollected

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def run(arguments: argparse.Namespace) -> int | None:
    """List, print, plan or run; return 1 for a printed recipe that a full disk has cut.

    Raises:
        UserError: a mistake in the recipe, its data or the output folder.
    """
    if arguments.list:
        for name in shipped():
            recipe = load_recipe(name)
            print(f"{name:13} {recipe.description} [{recipe.model.name_or_path}]")
        return None
    words = [word for word in (arguments.recipe, *arguments.words) if word is not None]
    if not words:
        raise UserError("give a recipe, or --list to see them")
    options = {key: getattr(arguments, key) for key in ("output_dir", "seeds", "quick", "max_forgetting")}
    options |= {"methods": arguments.method, "preset": arguments.model_preset, "sweeps": arguments.sweep}
    if arguments.sequence:
        names = [word for word in words if "=" not in word or os.path.isfile(word)]
        recipes = [load_recipe(name, [word for word in words if word not in names], **options) for name in names]
        recipe = join_recipes(recipes)
    else:
        name = next((word for word in words if "=" not in word or os.path.isfile(word)), words[0])
        recipe = load_recipe(name, [word for word in words if word is not name], **options)
    if arguments.print_config:
        print(dump(recipe), end="")
        return 0 if stdout_is_whole() else 1
    if arguments.show_samples is not None:
        from lora_null.recipes.grid import written_otherwise
        from lora_null.recipes.preview import show_samples
        from lora_null.utils.distributed import print_once

        stages = stage_recipes(recipe) if recipe.sequence else []
        settings = written_otherwise(recipe) if recipe.grid else {"": recipe}
        for told, setting in settings.items():
            if told:
                print_once(f"{told}:")
            for each in stages or [setting]:
                show_samples(each, arguments.show_samples)
    else:
        _start(recipe, arguments)
    return None


def _start(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Plan or run the recipe in every process that was launched."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if on_cpu and "MASTER_PORT" in os.environ and not any(name in os.environ for name in RANK_VARIABLES):
        # Without an MPI host file accelerate (1.15) starts one process on a CPU, whatever number it is asked for.
        raise UserError(
            "ACCELERATE_USE_CPU and MASTER_PORT are set, as where accelerate launch --cpu starts one of several processes; "
            "use torchrun --nproc_per_node N -m lora_null.recipes …, or unset MASTER_PORT if no launcher is meant"
        )
    with uncollected():
        from lora_null.recipes.dry_run import dry_run
        from lora_null.recipes.environment import choose_precision, prepare_cpu
        from lora_null.recipes.grid import run_grid
        from lora_null.recipes.output import check_output_folder, check_space
        from lora_null.recipes.processes import bars, check_launcher, join_processes, work_alone
        from lora_null.recipes.run import run as run_recipe
        from lora_null.recipes.sequence import check_stages, run_sequence, space_of_sequence

    check_launcher()
    prepare_cpu()
    if recipe.grid and recipe.grid.spread and not recipe.sequence:
        work_alone()
    join_processes(recipe.training.get("ddp_timeout"))
    choose_precision(recipe)
    options = {name: getattr(arguments, name) for name in ("resume", "overwrite", "allow_code_execution")}
    if arguments.dry_run:
        check_output_folder(recipe, resume=arguments.resume, overwrite=arguments.overwrite)
        consent = arguments.allow_code_execution
        planned = stage_recipes(recipe) if recipe.sequence else [recipe]
        jobs = [dry_run(each, allow_code_execution=consent) for each in planned]
        if recipe.sequence:
            check_stages(recipe, jobs)
            check_space(Path(recipe.output_dir), space_of_sequence(recipe, jobs))
        return
    run = run_sequence if recipe.sequence else run_grid if recipe.grid else run_recipe
    try:
        with bars(hidden=bool(recipe.training.get("disable_tqdm"))):
            run(recipe, **options)
    except KeyboardInterrupt:
        end_with_launcher(0)
        raise KeyboardInterrupt(*_stopped(Path(recipe.output_dir), arguments)) from None


def _stopped(folder: Path, arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the two lines that end a run after Ctrl-C: what is kept, and the command that goes on."""
    from lora_null.recipes.output import what_is_kept
    from lora_null.recipes.processes import is_launched_to_shard

    if not (folder / RECIPE_FILE).is_file():
        return "stopped before anything was begun", "the same command starts it"
    processes = os.environ.get("WORLD_SIZE", os.environ.get(WORKERS, "1"))
    launcher = "lora-null train" if processes == "1" else f"torchrun --nproc_per_node {processes} -m lora_null.recipes"
    told = "go on with"
    several_machines = os.environ.get("LOCAL_WORLD_SIZE", processes) != processes
    if is_launched_to_shard() or several_machines:  # by a configuration or addresses that are not known here
        launcher, told = "-m lora_null.recipes", "go on with the same launcher and"
    consent = {False: "", UNSAFE: f" {ALLOW}={UNSAFE}"}.get(arguments.allow_code_execution, f" {ALLOW}")
    return f"stopped; {what_is_kept(folder)}", f"{told}: {resume_command(folder, launcher)}{consent}"

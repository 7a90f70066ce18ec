"""The command: `accelerate launch -m lora_null.recipes RECIPE [options] [key.subkey=value …]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_null.recipes.launch import join_processes, start_missing_processes
from lora_null.utils.errors import UserError, exit_status
from lora_null.utils.quiet import quiet

USAGE = """%(prog)s RECIPE [options] [key.subkey=value ...]
       %(prog)s --list
       %(prog)s report DIR ..."""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; overrides and folders are collected as extra words."""
    made = argparse.ArgumentParser(
        prog="lora_null.recipes",
        usage=USAGE,
        description="Fine-tune with a recipe, measure what was learned and what was kept, write a report.",
    )
    made.add_argument("recipe", nargs="?", help="a shipped name, the path of a YAML, or 'report'")
    made.add_argument("words", nargs="*", metavar="key.subkey=value", help="overrides, read as YAML; nothing is null")
    made.add_argument("--method", help="methods to run, separated by commas")
    made.add_argument("--model-preset", metavar="NAME", help="the model: llama-2-7b, llama-3-8b, llama-3.1-8b, …")
    made.add_argument("--seeds", help="a grid: one run for each of these seeds, such as 0,1,2")
    made.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="a grid: one run for each value of a key"
    )
    made.add_argument("--quick", action="store_true", help="the recipe's own short form")
    made.add_argument("--output-dir", help="where everything goes (default: runs/RECIPE)")
    made.add_argument("--resume", action="store_true", help="continue an unfinished run")
    made.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    made.add_argument(
        "--dry-run", action="store_true", help="print the plan: counts, steps, memory, files; no weights"
    )
    made.add_argument(
        "--show-samples", type=int, metavar="N", help="print the first N training examples as the model sees them"
    )
    made.add_argument(
        "--allow-code-execution", action="store_true", help="run the code that the model writes (HumanEval, MBPP)"
    )
    made.add_argument("--print-config", action="store_true", help="print the resolved recipe")
    made.add_argument("--list", action="store_true", help="list the shipped recipes")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 2 a user's mistake, told in one line on stderr."""
    arguments = parser().parse_intermixed_args(argv)
    quiet()
    return exit_status(lambda: _start(arguments, sys.argv[1:] if argv is None else argv))


def _start(arguments: argparse.Namespace, words: Sequence[str]) -> int | None:
    status = start_missing_processes(words)
    if status is None:
        _dispatch(arguments)
    return status


def _dispatch(arguments: argparse.Namespace) -> None:
    if arguments.list:
        _list()
    elif arguments.recipe is None:
        raise UserError("give a recipe, or --list to see them")
    elif arguments.recipe == "report":
        _report(arguments.words)
    else:
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from lora_null.recipes.config.load import load_recipe
    from lora_null.recipes.output import dump

    recipe = load_recipe(
        arguments.recipe,
        arguments.words,
        methods=arguments.method,
        output_dir=arguments.output_dir,
        preset=arguments.model_preset,
        seeds=arguments.seeds,
        sweeps=arguments.sweep,
        quick=arguments.quick,
    )
    if arguments.print_config:
        print(dump(recipe), end="")
        return
    if arguments.show_samples is not None:
        from lora_null.recipes.data.preview import show_samples

        show_samples(recipe, arguments.show_samples)
        return
    from lora_null.recipes import spread
    from lora_null.recipes.environment import keep_freed_memory, use_all_cores
    from lora_null.recipes.grid import run_grid
    from lora_null.recipes.preemption import exit_on_sigterm
    from lora_null.recipes.run import dry_run, run

    use_all_cores()
    keep_freed_memory()
    if recipe.grid and recipe.grid.spread:
        spread.go_alone()
    join_processes()
    if arguments.dry_run:
        dry_run(recipe)
    else:
        exit_on_sigterm()
        start = run_grid if recipe.grid else run
        options = {"resume": arguments.resume, "overwrite": arguments.overwrite}
        start(recipe, allow_code_execution=arguments.allow_code_execution, **options)


def _list() -> None:
    from lora_null.recipes.config.load import load_recipe, shipped

    for name in shipped():
        recipe = load_recipe(name)
        print(f"{name:12} {recipe.description} [{recipe.model.name_or_path}]")


def _report(folders: Sequence[str]) -> None:
    from lora_null.recipes.report import write_report

    if not folders:
        raise UserError("report: give the folder of a run")
    for folder in folders:
        write_report(Path(folder))
        print(Path(folder) / "report.html")


if __name__ == "__main__":
    sys.exit(main())

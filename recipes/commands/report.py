"""`lora-null report DIR`: write a run's report again, from the results on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import shtab

from lora_null.utils.errors import UserError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser(
        "report",
        help="write a run's report again",
        description="Write report.md, report.html and forgetting.png from the results.json of a run or a grid.",
    )
    parser.add_argument("words", nargs="*", metavar="DIR", help="output folder of a run").complete = shtab.DIRECTORY
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the reports and print where they are.

    Raises:
        UserError: no folder is given, or one holds no results that this version reads.
    """
    if not arguments.words:
        raise UserError("report: give the folder of a run")
    from lora_null.recipes.report import write_report

    for folder in map(Path, arguments.words):
        write_report(folder)
        print(folder / "report.html")

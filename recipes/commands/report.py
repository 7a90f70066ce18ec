"""`lora-null report DIR`: write a run's report again, from the results on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_null.recipes.report import write_report


def run(arguments: argparse.Namespace) -> None:
    """Write the reports and print where they are.

    Raises:
        UserError: a folder holds no results that this version reads.
    """
    for folder in map(Path, arguments.words):
        write_report(folder)
        print(folder / "report.html")

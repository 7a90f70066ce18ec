"""`lora-null report DIR`: write a run's report again, from what is on disk; of several runs also one page for all."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_null.recipes.report.several import compare_runs, report


def run(arguments: argparse.Namespace) -> None:
    """Write the reports and print where they are.

    Raises:
        UserError: a folder holds no results that this version reads, or runs that cannot be compared.
    """
    folders = list(map(Path, arguments.words))
    for folder in folders:
        print(report(folder))
    if len(folders) > 1:
        print(compare_runs(folders, arguments.out))

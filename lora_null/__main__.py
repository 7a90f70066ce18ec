"""The command `lora-null` (or `python -m lora_null`): initialize an adapter, export what a run trained, check an adapter.

lora-null init --model M --calibration texts.jsonl --out DIR
lora-null export RUN/METHOD --form adapter|merged|gguf --out DIR
lora-null check DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lora_null.recipes.commands import check, export, init
from lora_null.utils.errors import exit_status
from lora_null.utils.quiet import quiet


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(prog="lora-null", description=__doc__.splitlines()[0])
    commands = made.add_subparsers(dest="command", required=True)
    for command in (init, export, check):
        command.add_parser(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 2 a user's mistake, told in one line on stderr.

    `check` returns 1 for an adapter that is not sound.
    """
    arguments = parser().parse_args(argv)
    quiet()
    return exit_status(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())

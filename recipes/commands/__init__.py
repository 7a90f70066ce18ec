"""The commands of `lora-null`, one file each; `python -m lora_null.recipes` and `python -m lora_null` run them too.

They stand above all other folders. What is slow to import (PyTorch, Transformers, TRL, PEFT) they import inside the
functions that need it, so that --help, --list and the line about a typo do not wait for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import shtab

from lora_null import __version__
from lora_null.recipes.commands import check, export, init, judge, report, train
from lora_null.utils.errors import UserError, exit_status, nearest
from lora_null.utils.quiet import quiet

COMMANDS = {"train": train, "report": report, "init": init, "export": export, "check": check, "judge": judge}


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as every other mistake of a user is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and the one of each command."""
    parser = Parser(
        prog="lora-null", description="Fine-tune a language model without forgetting; measured before and after."
    )
    parser.add_argument("--version", action="version", version=f"lora-null {__version__}")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    shtab.add_argument_to(
        parser, "--print-completion", preamble=train.complete_recipes(), help="print a shell's completion script"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    return parser, {name: command.add_parser(subparsers) for name, command in COMMANDS.items()}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line; options and `key.subkey=value` words may stand in any order.

    Raises:
        UserError: an unknown command or option, with the nearest there is, or a value that an option does not take.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UserError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
    parser, of_command = build_parser()
    used = of_command[argv[0]] if argv[:1] and argv[0] in of_command else parser
    known = re.findall(r"--[a-z][\w-]*", used.format_help())
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if not any(name.startswith(option) for name in known):
            raise UserError(f"{used.prog}: no option {option!r}{nearest(option, known)}")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (rest[0].startswith("-") or not hasattr(arguments, "words")):
        raise UserError(f"{used.prog}: cannot use {rest[0]!r}")
    arguments.words = [*getattr(arguments, "words", []), *rest]
    if arguments.command is None and not arguments.list:
        raise UserError(f"give a command: {', '.join(COMMANDS)}; lora-null --help says what each does")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 2 a user's mistake, told in one line on stderr.

    `check` returns 1 for an adapter that is not sound, `judge` where the endpoint fails.
    """

    def run() -> int | None:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        return COMMANDS[arguments.command or "train"].run(arguments)  # without a command: --list

    quiet()
    return exit_status(run)

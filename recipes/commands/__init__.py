"""The commands of `lora-null`, one file each; `python -m lora_null.recipes` and `python -m lora_null` run them too.

They stand above all other folders. A command's file is imported when it runs, so that --help, --list and the line about a
typo do not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from lora_null.recipes.commands.arguments import ALLOW, JAILED, KEYS_AS_OPTIONS, NAMING, build_parser
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.startup import SIGTERM_STATUS, end_with_launcher, exit_status, quiet, uncollected

RAISED_AGAIN_AFTER = 0.1  # seconds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line; options and `key.subkey=value` words may stand in any order.

    Raises:
        UserError: an unknown command or option, with the nearest there is, or a value that an option does not take.
    """
    parser, commands = build_parser()
    argv = [f"{ALLOW}={JAILED}" if word == ALLOW else word for word in argv]  # the next word is no value of it
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f"no command {argv[0]!r}{nearest(argv[0], commands)}")
    used = commands.get(argv[0], parser) if argv else parser
    known = set(re.findall(r"--[a-z][\w-]*", used.format_help()))
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if not any(name.startswith(option) for name in known):
            raise UserError(f"{used.prog}: no option {option!r}{nearest(option, known)}")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (rest[0].startswith("-") or not hasattr(arguments, "words")):
        raise UserError(f"{used.prog}: cannot use {rest[0]!r}")
    given = ((name, getattr(arguments, name, None)) for name in NAMING)
    empty = next((name for name, value in given if "" in (value if isinstance(value, list) else [value])), None)
    if empty:  # as where a variable of the shell is not set; a path "" would be this folder
        raise UserError(f"--{empty}: is empty")
    arguments.words = [*getattr(arguments, "words", []), *rest]
    if arguments.command is None and not arguments.list:
        raise UserError(f"give a command: {', '.join(commands)}; lora-null --help says what each does")
    return arguments


def _in_options(message: str, command: str) -> str:
    """Return a message in which keys of a recipe are called as the command's options are."""
    for key, option in KEYS_AS_OPTIONS.get(command, {}).items():
        message = message.replace(key, option)
    return message


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, of the status 143, so that nothing half-written is left behind.

    Python drops what is raised in a finalizer, or in the callback of a weak reference: then the signal is sent once more,
    when that is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    tell = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, SystemExit) or what.exc_value.code != SIGTERM_STATUS:
            return tell(what)
        again = threading.Timer(RAISED_AGAIN_AFTER, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_STATUS))
    sys.unraisablehook = dropped
    end_with_launcher()
    try:
        yield
    finally:
        sys.unraisablehook = tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 2 a user's mistake, told in one line on stderr.

    `check` returns 1 for an adapter that is not sound, `judge` where the endpoint fails.
    """

    def run() -> int | None:
        if sys.platform == "win32":
            raise UserError("the commands run on Linux and macOS; on Windows in WSL")
        if sys.flags.optimize > 1:
            raise UserError("python -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers reads; -O works")
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        name = arguments.command or "train"  # without a command: --list
        try:
            tempfile.gettempdir()  # which TRL asks for as it is imported
        except FileNotFoundError as error:
            raise UserError(
                f"{error.strerror}; free some space, or set TMPDIR to a folder that can be written"
            ) from None
        try:
            with _ending_on_sigterm():
                with uncollected():
                    command = importlib.import_module(f"{__name__}.{name}")
                return command.run(arguments)
        except UserError as error:
            raise type(error)(_in_options(str(error), name)) from None

    # Read once, when PyTorch loads: threads that wait for each other sleep. By default they spin, and on cores that other
    # work shares with them a training step then takes several times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a user's own backend may be none here, and end the import
    quiet()
    return exit_status(run)

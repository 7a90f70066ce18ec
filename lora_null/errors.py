"""The one exception that stands for a user's mistake, and how a command tells it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where, and the nearest valid choice.

    Commands print the message without a traceback and exit with status 2. It is a `ValueError`, so that library users
    who never heard of this class still catch it the ordinary way.
    """


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)", or the whole list of `valid` choices when none of them looks like `wrong`."""
    valid = sorted(str(choice) for choice in valid)
    close = difflib.get_close_matches(str(wrong), valid, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (choose from: {', '.join(valid)})"


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; return its status, or 2 for a user's mistake, told in one line on stderr, once over the ranks."""
    try:
        return command() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2

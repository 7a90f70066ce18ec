"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

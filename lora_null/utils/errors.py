"""The one exception that stands for a user's mistake, and what its line tells of others and of the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where, and the nearest valid choice.

    Commands print the message without a traceback and exit with status 2. It is a `ValueError`, so that library users
    who never heard of this class still catch it the ordinary way.
    """


class Unreachable(UserError):
    """What is named may be right: it lies on the hub, and that cannot be reached from here."""


def hub_error(message: str, error: BaseException) -> UserError:
    """Return the mistake behind a failed request to the hub, as `Unreachable` where nobody answered."""
    return (Unreachable if any(map(_is_unanswered, causes(error))) else UserError)(message)


def _is_unanswered(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    unanswered = names & {"ConnectError", "TimeoutException", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    return bool(unanswered) or isinstance(error, ConnectionError) or "OfflineModeIsEnabled" in str(error)


def causes(error: BaseException | None, *, suppressed: bool = True) -> Iterator[BaseException]:
    """Yield an exception and those behind it, with those that a `raise … from None` has left out or without."""
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if suppressed or not error.__suppress_context__ else None)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)", or the whole list of `valid` choices when none of them looks like `wrong`."""
    valid = sorted(str(choice) for choice in valid)
    close = difflib.get_close_matches(str(wrong), valid, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (choose from: {', '.join(valid)})"

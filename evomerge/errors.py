"""The error for everything that the user can correct, and helpers for the texts of messages.

The command line prints this error without a traceback and exits with code 2.
"""

from collections.abc import Sequence


class EvomergeError(Exception):
    """Wrong input.  The message says what is wrong, where, and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some(names: Sequence[str]) -> str:
    """The first three names, separated by commas, with `...` if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

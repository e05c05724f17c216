"""The one error that is the user's to mend, and how messages quote what they are about.

The command line prints the error without a traceback and exits with 2.
"""

from collections.abc import Sequence


class EvomergeError(Exception):
    """Wrong input: the message says what is wrong, where, and what would be right."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some(names: Sequence[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

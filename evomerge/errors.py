"""The error for everything that the user can correct, and helpers for the texts of messages.

The command line prints this error without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

NO_MEMORY = ("Cannot allocate memory", "can't start new thread", "std::bad_alloc", "can't allocate memory")
"""Words of Python, of torch and of libraries in Rust."""


class EvomergeError(Exception):
    """Wrong input.  The message says what is wrong, where, and what would be right."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Within the context, a panic of a library in Rust becomes a RuntimeError, which `except Exception` catches."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(first_line(error)) from error


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that the system gives this process no more memory, or no more threads."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some(names: Sequence[str]) -> str:
    """The first three names, separated by commas, with `...` if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint at the name that a wrong one is most like, to be put behind a message; empty if none is like it."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""

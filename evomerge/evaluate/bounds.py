"""The bounds of work on templates and tokenizers of others: so much time and so much memory for each item."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evomerge.errors import EvomergeError
from evomerge.evaluate.memory_limit import ROOM, MemoryLimit
from evomerge.evaluate.time_limit import TimeLimit, TooLong

ITEM_SECONDS = 60.0  # of processor time for the requests of one item


@contextmanager
def within_bounds(what: str) -> Iterator[Callable[[], None]]:
    """Within the context, work in Python takes at most ITEM_SECONDS of processor time, and adds at most ROOM bytes.

    what: for the error, for instance "task x: the requests of an item".

    Yields a function that is called before each further piece of work, which then has the same time and memory again.
    EvomergeError if one takes more.
    """
    memory_limit, time_limit = MemoryLimit(), TimeLimit(ITEM_SECONDS)

    def again() -> None:
        time_limit.again()
        memory_limit.again()

    try:
        with memory_limit, time_limit:
            again()
            yield again
    except TooLong as error:
        raise EvomergeError(
            f"{what} take longer than {ITEM_SECONDS:.0f} s; a loop in a template of the task, or in the chat template, "
            "has no end"
        ) from error
    except MemoryError as error:
        if not memory_limit.is_lowest:
            raise
        raise EvomergeError(
            f"{what} need more than {ROOM >> 30} GB of memory; a template of the task, or the chat template, makes a "
            "text without end"
        ) from error


@contextmanager
def only_bounds() -> Iterator[None]:
    """Within the context, a template that does not fit is no error; those of `within_bounds` stay."""
    try:
        yield
    except (TooLong, MemoryError):
        raise
    except Exception:  # each template fails in its own way
        return

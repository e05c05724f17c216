"""Load what another installed package offers by an entry point: a merge method, a sampler or an objective."""

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import TypeVar

from evomerge.errors import EvomergeError, first_line

T = TypeVar("T")


def typed_reason(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"


def load_plugin(
    point: EntryPoint, wanted: type[T], where: str, otherwise: str, reason: Callable[[Exception], str] = typed_reason
) -> T:
    """The object of an entry point.

    wanted: the class that it has to be an instance of.
    where: the beginning of an error message: the name that was asked for, and where it comes from.
    otherwise: the end of the message for an object of another class.
    reason: what the message says of an error of the package's own code.

    Raises EvomergeError if the object cannot be loaded or is of another class.
    """
    try:
        found = point.load()
    except Exception as error:  # code of another package may raise anything
        raise EvomergeError(f"{where} cannot be loaded ({reason(error)})") from error
    if not isinstance(found, wanted):
        raise EvomergeError(f"{where} {otherwise}")
    return found

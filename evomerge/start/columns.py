"""Which column of own data is the question, which the answer, and which are the choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import EvomergeError, did_you_mean

Kind = Literal["choice", "class", "answer"]
Rows = Sequence[Mapping[str, Any]]

QUESTIONS = ("question", "prompt", "input", "instruction", "query", "problem", "text", "sentence", "context")
ANSWERS = (
    "answer", "target", "label", "gold", "output", "response", "completion", "solution", "class", "result", "expected",
)  # fmt: skip
CHOICES = ("choices", "options", "candidates", "endings")
LETTERED = (("A", "B", "C", "D", "E"), ("a", "b", "c", "d", "e"))
NUMBERED = ("choice", "option", "ending", "opt")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABELS = 20  # more different answers than this are no classes


@dataclass(frozen=True)
class Columns:
    """What the columns of a file are.

    kind: choice: each item has its own choices; class: all items have the same few answers; answer: free text.
    choices: one column of lists, or several columns; empty unless the kind is `choice`.
    labels: the answers of a `class`, in order of their first row.
    """

    kind: Kind
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def find_columns(
    rows: Rows, question: str | None = None, answer: str | None = None, choices: Sequence[str] = ()
) -> Columns:
    """Find out what the columns are; what is given is taken.

    EvomergeError if a given column is not there, or none can be told: the message lists the columns.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    for option, name in [("question", question), ("answer", answer), *(("choices", c) for c in choices)]:
        if name is not None and name not in names:
            raise EvomergeError(
                f"--{option}: the data have no column {name!r}{did_you_mean(name, names)}; they have {', '.join(names)}"
            )
    asked = question or first_of(QUESTIONS, [n for n in names if n != answer], rows, is_text)
    wanted = answer or first_of(ANSWERS, [n for n in names if n != asked], rows, is_plain)
    if asked is None and wanted is not None:
        asked = first_of((), [n for n in names if n != wanted], rows, is_text)
    if asked is None:
        raise EvomergeError(f"which column is the question? Say it with --question; there are {', '.join(names)}")
    if wanted is None:
        raise EvomergeError(f"which column is the answer? Say it with --answer; there are {', '.join(names)}")
    listed = tuple(choices) or choice_columns([n for n in names if n not in (asked, wanted)], rows)
    for name in (asked, wanted, *listed):
        if not name.isidentifier():
            raise EvomergeError(
                f"column {name!r}: a template can name only columns of letters, digits and _; rename it"
            )
    if listed:
        return Columns("choice", asked, wanted, listed)
    labels = tuple(dict.fromkeys(text_of(row[wanted]) for row in rows if row.get(wanted) is not None))
    few = 2 <= len(labels) <= min(LABELS, len(rows) // 10)
    return Columns("class" if few else "answer", asked, wanted, labels=labels if few else ())


def first_of(known: Sequence[str], names: Sequence[str], rows: Rows, fits: Any) -> str | None:
    """The first known name that a column has, in any case, whose cells fit; else the only column that fits."""
    by_lower = {name.lower(): name for name in reversed(names)}
    for name in known:
        if name in by_lower and all(fits(row[by_lower[name]]) for row in rows if row.get(by_lower[name]) is not None):
            return by_lower[name]
    fitting = [name for name in names if all(fits(row.get(name)) for row in rows)]
    return fitting[0] if len(fitting) == 1 else None


def choice_columns(names: Sequence[str], rows: Rows) -> tuple[str, ...]:
    """The column of lists, or the columns, that hold the choices; empty if there are none."""
    lists = [n for n in names if all(isinstance(row.get(n), list) and len(row[n]) > 1 for row in rows)]
    named = [n for n in lists if n.lower() in CHOICES]
    if named or len(lists) == 1:
        return ((named or lists)[0],)
    for letters in LETTERED:
        found = tuple(letter for letter in letters if letter in names)
        if len(found) > 1:
            return found
    for word in NUMBERED:
        found = tuple(n for n in names if n.lower().rstrip("0123456789abcde").rstrip("_-") == word)
        if len(found) > 1:
            return found
    return ()


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and text_of(value) != ""


def text_of(value: Any) -> str:
    """A cell as the text that a template renders of it, without spaces around it."""
    return str(value).strip()

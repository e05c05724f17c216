"""Text from files, models and databases of others, made safe for a terminal, a log, and a model card."""

import re
import sys

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters: cursor, colours, titles, links, the clipboard; a line's start
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # separators of lines; what reverses the order of the text after it
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of characters; characters that nobody sees
)


def printable(text: str) -> str:
    """A text in which characters that act on a terminal are written as Python writes them: `\\x1b`.

    Tabs and ends of lines stay.
    """
    return UNSAFE.sub(lambda found: repr(found[0])[1:-1], text)


def in_markdown(text: str) -> str:
    """A text as one line of Markdown that shows it as it is: it begins no link, HTML, code or cell of a table."""
    return re.sub(r"[\\`*|<>&~]|(?<=\])[(\[:]|^\[", r"\\\g<0>", printable(" ".join(text.split())))


def in_code(text: str) -> str:
    """A text as code within a line of Markdown."""
    return "`" + printable(" ".join(text.split())).replace("`", "'") + "`"


def fenced(text: str, language: str) -> str:
    """A text as a block of code in Markdown, which none of its lines can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def say(text: str, error: bool = False) -> None:
    """Print a line, or several, on standard output at once; on standard error if it is an error or a note."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)

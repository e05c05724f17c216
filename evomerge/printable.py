"""Text from files, models and databases of others, made safe for a terminal and for a log."""

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


def say(text: str, error: bool = False) -> None:
    """Print a line, or several, on standard output at once; on standard error if it is an error or a note."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)

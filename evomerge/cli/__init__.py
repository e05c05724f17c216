"""The command line: parses arguments, calls evomerge's public functions, prints.

    options.py    the options that several commands share
    starting.py   commands before the first search
    searching.py  commands on a search
    playing.py    the playground
    models.py     commands on models

A wrong input ends with one message and exit code 2, a bug with a traceback.
"""

import sys

from evomerge.cli import starting, searching, playing, models  # commands are listed in this order  # isort: skip
from evomerge.cli.options import app
from evomerge.errors import EvomergeError, lacks_memory

__all__ = ["app", "main", "models", "playing", "searching", "starting"]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except EvomergeError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if message := system_message(error):
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        raise


def printable(text: str) -> str:
    """A message without characters that move a terminal's cursor or change its colours; it may quote any file."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


NOTHING_LOST = "nothing that was finished is lost. Mend that and run the command again"
DISK_ERRORS = {  # words of an operating system or a library -> what they mean
    "disk is full": "the disk is full",
    "No space left on device": "the disk is full",
    "os error 28": "the disk is full",
    "readonly database": "the disk has become read-only",
    "Read-only file system": "the disk has become read-only",
    "Input/output error": "the disk cannot be read or written",
    "disk I/O error": "the disk cannot be read or written",
    "File too large": "a file would be larger than this shell's limit (ulimit -f)",
}


def system_message(error: BaseException) -> str | None:
    """The message for an error of the disk or the memory, also where a library has wrapped it; None for others."""
    if lacks_memory(error):
        return f"there is not enough memory, or this shell limits it (ulimit -v); {NOTHING_LOST}"
    seen: BaseException | None = error
    while seen is not None:
        for words, meaning in DISK_ERRORS.items():
            if words in str(seen):
                return f"{meaning}; {NOTHING_LOST}"
        seen = seen.__cause__ or seen.__context__
    return None

"""The command line: parses arguments, calls evomerge's public functions, prints.

    options.py    the options that several commands share
    starting.py   commands before the first search
    searching.py  search, resume
    runs.py       commands on a run
    playing.py    the playground
    models.py     commands on models

A wrong input ends with one message and exit code 2, a bug with a traceback.
"""

import sys

from evomerge.cli import starting, searching, runs, playing, models  # commands are listed in this order  # isort: skip
from evomerge.cli.options import app
from evomerge.errors import EvomergeError, first_line, lacks_memory
from evomerge.printable import say

__all__ = ["app", "main", "models", "playing", "runs", "searching", "starting"]


def main() -> None:
    """Run the command line."""
    try:
        app()
    except EvomergeError as error:
        say(f"error: {error}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped", error=True)
        sys.exit(130)
    except Exception as error:
        if message := memory_message(error) or disk_message(error):
            say(f"error: {message}", error=True)
            sys.exit(2)
        raise


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


def memory_message(error: BaseException) -> str | None:
    """The message for an error of the memory; None for other errors."""
    if not lacks_memory(error):
        return None
    return (
        f"this process gets no more memory ({first_line(error)}); nothing that was finished is lost. Raise its limit "
        "(`ulimit -v`, a container, a job of the cluster) or use a larger machine, and run the command again"
    )


def disk_message(error: BaseException) -> str | None:
    """The message for an error of the disk, also where a library has wrapped it in its own; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        for words, meaning in DISK_ERRORS.items():
            if words in str(seen):
                return f"{meaning}; nothing that was finished is lost. Mend that and run the command again"
        seen = seen.__cause__ or seen.__context__
    return None

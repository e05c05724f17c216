"""The command line: parse, call, print.  A wrong input is one message and exit code 2; a bug is a traceback."""

import sys

from evomerge.cli import searching, models  # commands are listed in this order  # isort: skip
from evomerge.cli.options import app
from evomerge.errors import EvomergeError

__all__ = ["app", "main", "models", "searching"]


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
        if message := disk_trouble(error):
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        raise


def printable(text: str) -> str:
    """A message that may quote a file, without what would move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


TROUBLES = {
    "disk is full": "the disk is full",
    "No space left on device": "the disk is full",
    "os error 28": "the disk is full",
    "readonly database": "the disk has become read-only",
    "Read-only file system": "the disk has become read-only",
    "disk I/O error": "the disk cannot be read or written",
}


def disk_trouble(error: BaseException) -> str | None:
    """Libraries wrap what a disk says each in their own error; the person needs one message."""
    seen: BaseException | None = error
    while seen is not None:
        for sign, trouble in TROUBLES.items():
            if sign in str(seen):
                return f"{trouble}; nothing that was finished is lost. Mend that and run the command again"
        seen = seen.__cause__ or seen.__context__
    return None

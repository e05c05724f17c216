"""Write docs/reference/cli.md, the reference of the command line: python docs/reference.py

It is made of the commands' signatures and help texts alone, so it does not depend on the terminal or on how Typer shows
a help page.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from evomerge.cli import app

PAGE = Path(__file__).parent / "reference" / "cli.md"
WIDTH = 100
VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}

HEAD = """\
# The command line

`python docs/reference.py` writes this page from the help texts of the commands; edit those.
Every command shows the same with `--help`; `evomerge --version` prints the version.

Exit codes: 0 done; 1 what was compared differs (`reproduce`, `repeat`), or a bug, with its
traceback; 2 a wrong input or a full disk, told in one message, or models that cannot be merged
(`inspect`); 130 stopped by Ctrl-C, 143 by SIGTERM.
"""


def reference() -> str:
    """The whole page."""
    commands = [(c.name or c.callback.__name__, c.callback, c.epilog) for c in app.registered_commands if c.callback]
    rows = [f"| [`{name}`](#{name}) | {summary(callback)} |" for name, callback, _ in commands]
    index = "\n".join(["| command | what it does |", "|---|---|", *rows])
    sections = [section(*command) for command in commands]
    return "\n".join([HEAD, index + "\n", *sections])


def section(name: str, command: Callable[..., Any], epilog: str | None) -> str:
    """One command: what it does, its usage, its example, a table of its arguments and options.

    LookupError if there is no example, or an argument or option without help.
    """
    kind, _, example = (epilog or "").partition(": ")
    if kind != "Example" or not example.startswith(f"evomerge {name} "):
        raise LookupError(f"the command {name} has no epilog `Example: evomerge {name} ...`")
    rows = list(parameters(name, command))
    usage = [f"evomerge {name}", *(word for word, needed, _ in rows if needed)]
    usage += ["[OPTIONS]"] * any(not needed for _, needed, _ in rows)
    table = ["| argument or option | meaning | default |", "|---|---|---|", *(row for _, _, row in rows)]
    shown = ["```", " ".join(usage), example, "```"]
    return "\n".join([f"## `{name}`\n", fill(summary(command), WIDTH) + "\n", *shown, "", *table, ""])


def summary(command: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(command) or "").split())


def parameters(name: str, command: Callable[..., Any]) -> Iterator[tuple[str, bool, str]]:
    """Every parameter: its word in the usage line, whether it is required, its row of the table."""
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        hint, *extras = get_args(hints[parameter.name])
        info = next(extra for extra in extras if isinstance(extra, ArgumentInfo | OptionInfo))
        if not info.help:
            raise LookupError(f"{parameter.name} of the command {name} has no help text")
        kinds = get_args(hint) if isinstance(hint, UnionType) else [hint]
        several = any(get_origin(kind) is list for kind in kinds)
        (plain,) = (t for kind in kinds for t in get_args(kind) or [kind] if t in VALUES)
        meaning = info.help
        if info.min is not None:
            meaning += f" At least {info.min}."
        if isinstance(info, ArgumentInfo):
            word = parameter.name.upper() + ("..." if several else "")
            usage, shown = word, f"`{word}`"
        else:
            # In `Annotated`, Typer's first argument is not a default but the first name.
            names = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
            word = "/".join(names or [f"--{parameter.name.replace('_', '-')}"])
            shown = ", ".join(f"`{part} {VALUES[plain]}".strip() + "`" for part in word.split("/"))
            usage = f"{word} {VALUES[plain]}"
            meaning += " May be given more than once." if several else ""
        default = default_of(parameter, word)
        yield usage, default == "required", f"| {shown} | {meaning} | {default} |"


def default_of(parameter: inspect.Parameter, word: str) -> str:
    match parameter.default:
        case inspect.Parameter.empty:
            return "required"
        case None:
            return ""
        case True:
            return f"`{word.split('/')[0]}`"
        case False:
            return "off"
        case value:
            return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")

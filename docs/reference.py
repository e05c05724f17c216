"""Write the generated pages of docs/reference, cli.md and keys.md: python docs/reference.py

cli.md is made of the commands' signatures and help texts alone, so it does not depend on the terminal or on how Typer
shows a help page; keys.md is made of the schemas of configuration and recipe.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from evomerge.cli import app
from evomerge.config.schema import SearchConfig
from evomerge.merge.recipe.recipe import Recipe

FOLDER = Path(__file__).parent / "reference"
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

KEYS = """\
# Every key

`python docs/reference.py` writes this page from the schemas; [the configuration](configuration.md)
explains the keys. `[]` is each entry of a list, `NAME` a name of your own. A time is a number of
seconds, or a text such as `8h`, `90m` or `1h30m`.
"""
NUMBERS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
PLURAL = {"a mapping": "mappings", "a number": "numbers", "a whole number": "whole numbers", "text": "texts"}
TIMES = ("budget.timeout", "workers.stuck", "workers.trial")


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    return {"cli.md": cli_page(), "keys.md": keys_page()}


def keys_page() -> str:
    """Every key of a configuration and of a recipe: its values and its default."""
    parts = [KEYS]
    for title, model in (("The configuration", SearchConfig), ("The recipe", Recipe)):
        schema = model.model_json_schema()
        rows = [f"| `{key}` | {values} | {default} |" for key, values, default in key_rows(schema, schema)]
        parts.append("\n".join([f"## {title}\n", "| key | values | default |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def key_rows(schema: dict[str, Any], part: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, values and default of every key of an object in a JSON schema, and of the objects in it.

    schema: the whole one.  part: the object.  above: its key with a dot.
    """
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
    for name, field in part.get("properties", {}).items():
        key = above + name
        default = "required" if name in part.get("required", ()) else shown_default(field)
        yield key, "a time" if key in TIMES else " or ".join(dict.fromkeys(values_of(schema, field))), default
        for inner, mark in objects_in(schema, field):
            if inner["title"] != "Recipe":  # its keys have a table of their own
                yield from key_rows(schema, inner, f"{key}{mark}.")


def values_of(schema: dict[str, Any], field: dict[str, Any]) -> Iterator[str]:
    """What a key may be, each kind in words."""
    for kind in field.get("anyOf", field.get("oneOf", [field])):
        while "$ref" in kind:
            kind = schema["$defs"][kind["$ref"].rsplit("/", 1)[1]]
        bounds = " and ".join(f"{sign} {kind[bound]}" for bound, sign in NUMBERS.items() if bound in kind)
        if "enum" in kind or "const" in kind:
            yield ", ".join(f"`{value}`" for value in kind.get("enum", [kind.get("const")]))
        elif kind.get("type") in ("integer", "number"):
            yield " ".join(filter(None, ["a whole number" if kind["type"] == "integer" else "a number", bounds]))
        elif kind.get("type") == "array":
            inner = " or ".join(values_of(schema, kind.get("items") or kind["prefixItems"][-1]))
            yield f"{'a list' if 'items' in kind else 'a pair'} of {PLURAL.get(inner, inner)}"
        elif kind.get("type") == "object":
            yield "a mapping"
        elif kind.get("type") == "boolean":
            yield "`true`, `false`"
        elif kind.get("type") == "string":
            yield "text"


def objects_in(schema: dict[str, Any], field: dict[str, Any], mark: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    """The objects with keys of their own that a key may hold, each with what follows the key on the way there."""
    for kind in field.get("anyOf", field.get("oneOf", [field])):
        while "$ref" in kind:
            kind = schema["$defs"][kind["$ref"].rsplit("/", 1)[1]]
        if "properties" in kind:
            yield kind, mark
        if "items" in kind:
            yield from objects_in(schema, kind["items"], f"{mark}[]")
        if isinstance(kind.get("additionalProperties"), dict):
            yield from objects_in(schema, kind["additionalProperties"], f"{mark}.NAME")


def shown_default(field: dict[str, Any]) -> str:
    """A default as YAML would have it; nothing for none, and for an object, whose keys have their own."""
    default = field.get("default")
    if default in (None, "", []) or isinstance(default, dict):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def cli_page() -> str:
    """The reference of the command line."""
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
    for name, content in pages().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(f"wrote {FOLDER / name}")

"""What the documentation says is there: keys, methods, commands, make targets, files, links, headings."""

import ast
import itertools
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel

from evomerge.cli import app
from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.evaluate.metrics import METRICS
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knob
from evomerge.merge.methods.method import Method
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.sources.locate import looks_like_hub_id

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FOLDERS = ("benchmarks", "configs", "docs", "evals", "evomerge", "examples", "tests")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def spans(token: Token) -> list[str]:
    """The code between backquotes in a line of text."""
    return [child.content for child in token.children or [] if child.type == "code_inline"]


def words(code: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", code))


# --- The command line ---


def test_the_generated_pages_are_what_commands_and_schemas_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()
    for name, content in made.items():
        page = ROOT / "docs" / "reference" / name
        assert page.read_text(encoding="utf-8") == content, f"{name} is stale; run: python docs/reference.py"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of shell lines or Makefile lines, without assignments before them and comments after them."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"\b(evomerge|make|python)\b", line):
            continue
        lexer = shlex.shlex(line.replace("$(BIN)/", "").lstrip("\t @"), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def shown_commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The commands that a page shows, and whether each is only mentioned in a sentence."""
    for token in tokens(page):
        if token.type == "code_block" or (token.type == "fence" and token.info in ("", "sh", "bash")):
            yield from ((command, False) for command in commands(token.content))
        if token.type == "fence" and token.info == "console":  # commands after $, and their output
            typed = re.findall(r"^\$ ((?:\\\n|.)*)", token.content, re.MULTILINE)
            yield from ((command, False) for text in typed for command in commands(text))
        for span in spans(token):
            if re.match(r"(evomerge|make|python) ", span):
                yield from ((command, True) for command in commands(span))


NUMBERS = ("N", "INTEGER", "NUMBER")
"""Words that stand for a number on a page; those that stand for a path or a text are taken as one."""


def problem_of(command: list[str], is_mention: bool) -> str | None:
    """Why the command line does not take these words; None if it does.  A mention need not be complete."""
    program, first, *rest = command
    root = typer.main.get_command(app)
    if first.endswith("-completion"):  # taken at once, this would change the files of a shell
        return None if any(first in p.opts for p in root.params) else f"{program} has no option {first}"
    if first.startswith("-"):
        parser, arguments = root, [first, *rest]
    elif first in root.commands:  # type: ignore[attr-defined]
        parser, arguments = root.commands[first], rest  # type: ignore[attr-defined]
    else:
        return f"{program} has no command {first}"
    if is_mention or "..." in arguments:
        for parameter in parser.params:
            parameter.required = False
    given = ["1" if word in NUMBERS else word for word in arguments if word not in ("...", "[OPTIONS]")]
    try:
        parser.make_context(first, given)
    except typer.Exit:  # of --help
        return None
    except Exception as error:  # Typer has had several classes of its own and Click's for this
        return f"{shlex.join(command)}: {error}"
    return None


def test_a_wrong_command_line_is_noticed() -> None:
    assert problem_of(["evomerge", "serach", "x.yaml"], False) == "evomerge has no command serach"
    for wrong in ("search", "search x.yaml --trails 3", "search x.yaml --trials 0", "status a b"):
        assert problem_of(["evomerge", *wrong.split()], False), wrong
    assert problem_of("evomerge search --trials 0".split(), True)
    assert problem_of("evomerge search --trials 1".split(), True) is None
    makefile = "\tA=1 test -e x || $(BIN)/evomerge search \\\n x.yaml  # it's a search"
    assert list(commands(makefile)) == [["test", "-e", "x"], ["evomerge", "search", "x.yaml"]]


@every_page
def test_commands_that_a_page_shows_are_taken(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    problems = []
    for command, is_mention in shown_commands(page):
        if command[0] == "evomerge" and len(command) > 1:
            problems.append(problem_of(command, is_mention))
        elif command[0] == "make":
            target = next((word for word in command[1:] if "=" not in word and not word.startswith("-")), None)
            problems.append(f"make has no target {target}" if target and target not in targets else None)
        elif command[0] == "python" and command[1:] and command[1].endswith(".py"):
            problems.append(None if (ROOT / command[1]).is_file() else f"{command[1]}: no such file")
    assert [problem for problem in problems if problem] == []


def test_commands_of_the_makefile_are_taken() -> None:
    found = [c for c in commands((ROOT / "Makefile").read_text(encoding="utf-8")) if c[0] == "evomerge"]
    assert found
    assert [problem for c in found if (problem := problem_of(c, False))] == []


# --- Keys and methods ---


def keys(
    model: type[BaseModel], above: tuple[str, ...] = (), inside: tuple[type, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The path of every key of a pydantic model and of the models in it: `budget`, `budget.trials`."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for inner in models_in(field.annotation):
            if inner not in (*inside, model, Recipe):  # a recipe's keys have a chapter of their own
                yield from keys(inner, (*above, name), (*inside, model))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def explained(chapter: str) -> tuple[set[str], dict[str, set[str]]]:
    """What docs/reference/configuration.md explains under a heading of the first level.

    Returns the keys that have a row of its tables, and for each key the words of the code in its row and in the section
    that is named after it.
    """
    rows: set[str] = set()
    found: dict[str, set[str]] = {}
    here, section, row = False, [""], None
    page = tokens(ROOT / "docs" / "reference" / "configuration.md")
    for before, token in zip([None, *page], page, strict=False):
        if before is not None and before.type == "heading_open":
            here = token.content == chapter if before.tag == "h1" else here
            section = spans(token)
        elif token.type in ("tr_open", "tr_close"):
            row = None
        if not here:
            continue
        if token.type == "inline" and before is not None and before.type == "td_open" and row is None:
            row = spans(token)
            rows |= set(row)
        code = [token.content] if token.type in ("fence", "code_block") else spans(token)
        for owner in row if row is not None else section:
            found.setdefault(owner, set()).update(*map(words, code))
    return rows, found


def test_every_metric_with_a_formula_is_explained() -> None:
    _, found = explained("The search configuration")
    assert {metric.name for metric in METRICS.values() if metric.formula} <= found["objective"]


@pytest.mark.parametrize(("chapter", "model"), [("The search configuration", SearchConfig), ("The recipe", Recipe)])
def test_every_key_is_explained_and_no_other(chapter: str, model: type[BaseModel]) -> None:
    rows, found = explained(chapter)
    assert rows == set(model.model_fields)
    nested = [path for path in keys(model) if len(path) > 1]
    silent = [path for path in nested if not any(path[-1] in found.get(owner, ()) for owner in path[:-1])]
    assert nested
    assert [".".join(path) for path in silent] == []


def shown_knob(name: str, knob: Knob) -> str:
    """A coefficient as the table of methods shows it."""
    default = "required" if knob.default is None else f"{knob.default:g}"
    if knob.switch:
        default = "true" if knob.default else "false"
    elif knob.choices:
        default = f"{' / '.join(knob.choices)}; {next(k for k, v in knob.choices.items() if v == knob.default)}"
    elif knob.high < float("inf"):
        default += f" in [{knob.low:g}, {knob.high:g}]"
    elif knob.low > -float("inf"):
        default += f" ≥ {knob.low:g}"
    return f"`{name}`{'*' if knob.each else ''} ({default})"


def shown_sources(method: Method) -> str:
    least, most = method.sources
    return f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"


def test_the_table_of_methods_is_what_the_methods_are() -> None:
    lines = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8").splitlines()
    table = {line.split("`")[1]: line.split(" | ")[2:] for line in lines if line.startswith("| [`")}
    assert table == {
        name: [shown_sources(method), (", ".join(shown_knob(*k) for k in method.knobs.items()) or "none") + " |"]
        for name, method in METHODS.items()
    }


# --- Configurations and recipes on pages ---


def make_what_it_names(content: dict[str, Any], folder: Path) -> None:
    """Empty models, tasks and checkpoints at the paths of a configuration or a recipe."""
    for source in content["sources"]:
        for number in range(source.get("last", 0)):
            checkpoint = folder / source["checkpoints"].replace("*", str(number))
            checkpoint.mkdir(parents=True)
            (checkpoint / "config.json").touch()
        if "recipe" in source:
            make_what_it_names(source["recipe"], folder)
        elif "path" in source and not looks_like_hub_id(source["path"]):
            (folder / source["path"]).mkdir(parents=True)
    if (base := content["base"]) and isinstance(base, str) and not looks_like_hub_id(base):
        (folder / base).mkdir(parents=True, exist_ok=True)
    for task in [*content.get("tasks", []), *content.get("guards", [])]:
        if task["task"].endswith(".yaml"):
            (folder / task["task"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / task["task"]).touch()


@every_page
def test_configurations_and_recipes_on_a_page_load(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(token for token in tokens(page) if token.type == "fence" and token.info == "yaml"):
        content = yaml.safe_load(block.content)
        if not {"base", "sources", "method"} <= content.keys():
            continue  # a part of one
        file = tmp_path / str(number) / "here" / "file.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(block.content)
        make_what_it_names(content, file.parent)
        _ = load_config(file) if "tasks" in content else load_recipe(file)


# --- Links, headings, lines ---


def test_every_page_has_a_place_in_the_site() -> None:
    site = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8"))
    shown = re.findall(r"[\w./-]+\.md", str(site["project"]["nav"]))
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(shown) == sorted(pages)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    before = None
    for token in tokens(page):
        if before is not None and before.type == "heading_open":
            text = "".join(child.content for child in token.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(slug if (count := found.count(slug)) == 0 else f"{slug}-{count}")
        before = token
    return set(found)


@every_page
def test_links_point_at_files_and_headings_that_are_there(page: Path) -> None:
    problems = []
    for child in (child for token in tokens(page) for child in token.children or []):
        link = str(child.attrs.get("href") or child.attrs.get("src") or "")
        if not link or re.match(r"\w+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            problems.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            problems.append(f"{link}: no such heading")
    assert problems == []


def problem_of_place(place: str) -> str | None:
    """What is wrong with a file, or a `file:function` in it, that a page names; None if it is there.

    place: from the root or from evomerge/; a bare name of a file may be in any folder.
    """
    path, _, name = place.partition(":")
    if "/" in path:
        files = [*ROOT.glob(path.rstrip("/")), *(ROOT / "evomerge").glob(path.rstrip("/"))]
    else:
        files = [file for folder in FOLDERS for file in (ROOT / folder).rglob(path)]
    if not files:
        return f"{place}: no such file"
    return None if not name or name in defined(files[0]) else f"{place}: no such function or class"


def defined(file: Path) -> set[str]:
    """The functions, classes and methods (`Class.method`) of a module."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, FUNCTIONS)}
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            found.add(node.name)
    return found


def in_tree(text: str) -> Iterator[str]:
    """The paths of a tree of folders, one entry a line, each indented below its folder."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [(d, folder) for d, folder in above if d < depth]
        yield "".join(folder for _, folder in above) + name
        if name.endswith("/"):
            above.append((depth, name))


@every_page
def test_files_of_the_project_that_a_page_names_are_there(page: Path) -> None:
    named = [word for token in tokens(page) for span in spans(token) for word in span.split()]
    pattern = rf"({'|'.join(FOLDERS)})/\S*|([a-z]\w*/)*[a-z]\w*\.(py|cpp)(:[\w.]+)?"
    ours = [word for word in named if re.fullmatch(pattern, word)]
    assert [problem for place in ours if (problem := problem_of_place(place))] == []


def test_a_wrong_file_or_function_is_noticed() -> None:
    assert problem_of_place("evomerge/searching/loop.py") == "evomerge/searching/loop.py: no such file"
    assert problem_of_place("merge/live.py:no_such") == "merge/live.py:no_such: no such function or class"
    assert problem_of_place("search/workers/pool.py:Pool.no_such")
    assert problem_of_place("search/workers/pool.py:Pool.run") is None


def test_the_tree_has_every_package_and_only_what_is_there() -> None:
    blocks = [token for token in tokens(ROOT / "docs" / "explanation" / "architecture.md") if token.type == "fence"]
    (tree,) = [block.content for block in blocks if block.content.startswith("evomerge/\n")]
    paths = [path.rstrip("/") for path in in_tree(tree)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    packages = {str(init.parent.relative_to(ROOT)) for init in ROOT.glob("evomerge/**/__init__.py")}
    assert packages - set(paths) == set()


@every_page
def test_lines_are_at_most_100_characters(page: Path) -> None:
    """Tables are exempt, what a link or an address adds to a line, and what commands print."""
    text = page.read_text(encoding="utf-8")
    lines = re.sub(r"^```console$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    rest = [re.sub(r"\]\([^)]*\)|https?://\S+", "", line) for line in lines if not line.startswith("|")]
    assert [line for line in rest if len(line) > 100] == []


# --- Messages ---


def texts_of_the_code() -> str:
    """Every text of the package's code but docstrings, one a line."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "evomerge").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return "\n".join(text.value.replace("\n", " ") for text in texts if isinstance(text.value, str))


def test_troubleshooting_quotes_messages_that_the_program_has() -> None:
    """Words in capitals stand for what the program fills in."""
    page = tokens(ROOT / "docs" / "how-to" / "troubleshooting.md")
    quoted = [
        message
        for before, token in itertools.pairwise(page)
        if before.type == "heading_open" and before.tag == "h3"
        for message in spans(token)
    ]
    known = texts_of_the_code()
    parts = [part.strip(" :") for message in quoted for part in re.split(r"\b[A-Z][A-Z_]*\b", message)]
    assert len(quoted) >= 25
    assert [part for part in parts if part and part not in known] == []


def test_the_citation_file_names_this_version() -> None:
    """Its keys are those that the schema asks for: https://github.com/citation-file-format/citation-file-format."""
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= content.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (content["title"], content["version"]) == (project["name"], project["version"])
    assert (content["license"], content["abstract"]) == (project["license"], project["description"] + ".")

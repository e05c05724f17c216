"""Commands before a search: a task file for own data, a configuration, and a look at it."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import Ray, Timeout, Trials, Until, Workers, app, json_alone
from evomerge.printable import say

TYPED = {"n": "\n", "t": "\t", "\\": "\\"}  # what a shell passes on as two characters


@app.command(epilog="Example: evomerge init --base models/base --source models/math --source models/code --task m.yaml")
def init(
    base: Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="A fine-tune or LoRA adapter of it, or NAME=PATH.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="A task file or an lm-eval task.")] = None,
    timeout: Annotated[str | None, typer.Option(help="How long the search may take: 8h, 90m.")] = None,
    out: Annotated[Path | None, typer.Option(help="The configuration to write; it must be new.")] = None,
) -> None:
    """Write the configuration of a first search; asks for what is not given."""
    from evomerge.start.init import init_config

    base = base or typer.prompt("Base model (a folder or a hub id)")
    source = source or several("Fine-tune or LoRA adapter of it")
    task = task or several("Task (a task file, or a name of lm-eval's; own data: evomerge new-task)")
    timeout = timeout or typer.prompt("How long may the search take", default="8h")
    out = out or Path(typer.prompt("File to write", default="search.yaml"))
    for line in init_config(out, base, source, task, timeout):
        say(line)


def several(question: str) -> list[str]:
    """The answers to a question that is asked until an answer is empty."""
    found = [typer.prompt(question)]
    while more := typer.prompt("Another one (Enter: no more)", default="", show_default=False):
        found.append(more)
    return found


@app.command(epilog="Example: evomerge migrate genome.yml --out search.yaml")
def migrate(
    config: Annotated[Path, typer.Argument(help="A file of mergekit-evolve or mergenetic.")],
    out: Annotated[Path, typer.Option(help="The configuration to write; it must be new.")] = Path("search.yaml"),
    task_search_path: Annotated[
        list[Path] | None, typer.Option(help="A folder with the files of tasks that lm-eval does not have itself.")
    ] = None,
) -> None:
    """Write a configuration for a search of mergekit-evolve or mergenetic; comments tell every difference."""
    from evomerge.start.migrate.migrate import migrate as write

    for line in write(config, out, task_search_path or ()):
        say(line)


@app.command(name="new-task", epilog="Example: evomerge new-task questions.jsonl --question text --answer label")
def new_task(
    data: Annotated[Path, typer.Argument(help="Own data: .jsonl, .json (a list of objects) or .csv.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default beside the data.")] = None,
    question: Annotated[str | None, typer.Option(help="The column of the question; by default guessed.")] = None,
    answer: Annotated[str | None, typer.Option(help="The column of the right answer; by default guessed.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="The column of a list of choices, or several columns: A,B,C,D.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=r"A Jinja template of the prompt, by default the question: 'Q: {{question}}\nA:'. \n is a line break, "
            r"\t a tab, and a doubled backslash a backslash."
        ),
    ] = None,
    filter: Annotated[
        str | None, typer.Option(help="What counts of a written answer: strip, first_line, number (the last) or none.")
    ] = None,
) -> None:
    """Write an lm-eval task file for own data: multiple choice, classification or written answers."""
    from evomerge.start.new_task import new_task as write_task

    names = tuple(name.strip() for name in (choices or "").split(",") if name.strip())
    text = None if prompt is None else re.sub(r"\\([\\nt])", lambda typed: TYPED[typed[1]], prompt)
    done = write_task(data, out, question=question, answer=answer, choices=names, prompt=text, taken=filter)
    for line in done.lines():
        say(line)


@app.command(epilog="Example: evomerge check search.yaml --timeout 8h")
def check(
    config: Annotated[Path, typer.Argument(help="The configuration of a search.")],
    items: Annotated[int, typer.Option(min=2, help="How many items of each task base and sources answer.")] = 16,
    trials: Trials = None,
    timeout: Timeout = None,
    until: Until = None,
    workers: Workers = None,
    ray: Ray = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Look at a search before the night: prompts and answers, what may be wrong, and how long it will take.

    Limits and workers are those that the search will get, for the forecast.
    """
    from evomerge.api.check import check as look

    show = not as_json
    with json_alone(as_json):
        found = look(config, items, show, trials=trials, timeout=timeout, until=until, workers=workers, ray=ray)
    if as_json:
        say(json.dumps(found.as_dict(), indent=2))

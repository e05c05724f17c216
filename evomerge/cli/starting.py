"""Commands before the first search: a task file for own data."""

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import app


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
        str | None, typer.Option(help="A Jinja template of the prompt, by default the question: 'Q: {{question}} A:'.")
    ] = None,
    filter: Annotated[
        str | None, typer.Option(help="What counts of a written answer: strip, first_line, number (the last) or none.")
    ] = None,
) -> None:
    """Write an lm-eval task file for own data: multiple choice, classification or written answers."""
    from evomerge.start.new_task import new_task as write_task

    names = tuple(name.strip() for name in (choices or "").split(",") if name.strip())
    done = write_task(data, out, question=question, answer=answer, choices=names, prompt=prompt, taken=filter)
    for line in done.lines():
        print(line)

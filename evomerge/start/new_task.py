"""Write an lm-eval task file for own data: `new_task`; task_content.py has what the file says."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import gold_of
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.files.read import read_text
from evomerge.files.write import write_text
from evomerge.parse import parse_json
from evomerge.start.columns import Columns, Rows, find_columns, text_of
from evomerge.start.task_content import Filter, is_number, task_of, written_answers

DATA_BYTES = 1 << 30


@dataclass(frozen=True)
class NewTask:
    """A task file that was written.

    file: its path.
    columns: what the columns of the data were taken for.
    rows: how many there are.
    repeated: how many have a question that an earlier row has.
    filter: what is taken of an answer; None where the model chooses.
    prompt, gold: of the first row, as a model sees them.
    """

    file: Path
    columns: Columns
    rows: int
    repeated: int
    filter: str | None
    prompt: str
    gold: str

    def lines(self) -> list[str]:
        """What was written, for the terminal."""
        c = self.columns
        how = {
            "choice": f"multiple choice among {' and '.join(c.choices)} of each row",
            "class": f"classification: {', '.join(c.labels)}",
            "answer": f"free text, of which `{self.filter}` is compared",
        }[c.kind]
        same = f"; {self.repeated} repeat a question, and always get into one split" if self.repeated else ""
        return [
            f"wrote {self.file}: {self.rows} rows{same}",
            f"question: {c.question}    answer: {c.answer}    {how}",
            f"first prompt: {self.prompt!r}",
            f"its answer:   {self.gold!r}",
            f"try it: evomerge evaluate MODEL --tasks {self.file} --limit 20",
        ]


def new_task(
    data: Path,
    out: Path | None = None,
    *,
    question: str | None = None,
    answer: str | None = None,
    choices: tuple[str, ...] = (),
    prompt: str | None = None,
    taken: str | None = None,
) -> NewTask:
    """Write an lm-eval task file for a file of data.

    data: JSON Lines, a JSON list of objects, or CSV with a header.
    out: the file to write; by default beside the data, with the suffix .yaml.
    question, answer: names of columns.  choices: a column of lists, or several columns.  What is not given is guessed.
    prompt: a Jinja template of the prompt; by default the question alone.
    taken: what is compared of a written answer; by default a number if all answers are numbers, else all of it
        without spaces around it.

    EvomergeError if the file exists, the data cannot be read, or the columns cannot be told.
    """
    file = out or data.with_suffix(".yaml")
    if file.exists():
        raise EvomergeError(f"{file}: exists already; choose another name with --out")
    if taken is not None and taken not in get_args(Filter):
        raise EvomergeError(f"--filter: {taken!r} is not one of {', '.join(get_args(Filter))}")
    rows = read_rows(data)
    columns = find_columns(rows, question, answer, choices)
    complete(rows, columns, data)
    content = task_of(data, file, rows, columns, prompt)
    used: str | None = None
    if columns.kind == "answer":
        used = taken or ("number" if all(is_number(row[columns.answer]) for row in rows) else "strip")
        content |= written_answers([text_of(row[columns.answer]) for row in rows], used)
    elif taken is not None:
        raise EvomergeError("--filter: is for free text; here the model chooses among answers")
    content["metadata"] = {"version": 1.0}
    write_text(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))
    try:
        (task,) = open_tasks([TaskConfig(task=str(file))])
        first = items_of(task, task.docs)[0]
        shown, gold = str(task.lm.doc_to_text(first.doc)), gold_of(task, first)
    except Exception:
        file.unlink()
        raise
    seen = [str(row[columns.question]).strip() for row in rows]
    return NewTask(file, columns, len(rows), len(seen) - len(set(seen)), used, shown, gold)


def read_rows(data: Path) -> Rows:
    """The rows of a file.  EvomergeError with the line if it cannot be read."""
    text = read_text(data, DATA_BYTES)
    kind = data.suffix.lower()
    if kind == ".csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
    elif kind == ".json":
        rows = parse_json(text, str(data))
    elif kind == ".jsonl":
        rows = [parse_json(line, f"{data}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        raise EvomergeError(f"{data}: expected a file named .jsonl, .json or .csv")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvomergeError(f"{data}: expected a JSON object in each row")
    if not rows:
        raise EvomergeError(f"{data}: has no rows")
    return rows


def complete(rows: Rows, columns: Columns, data: Path) -> None:
    """EvomergeError with the row if one lacks question, answer or choices."""
    for n, row in enumerate(rows, 1):
        for name in (columns.question, columns.answer, *columns.choices):
            if row.get(name) is None or row[name] == "":
                raise EvomergeError(f"{data}, row {n}: has no {name!r}")

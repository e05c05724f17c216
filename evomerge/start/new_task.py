"""Write an lm-eval task file for own data: `new_task`.

choice    one row, several choices of its own: multiple choice, the likelihoods of the choices are compared
class     all rows have the same few answers: multiple choice among these
answer    free text: the model writes an answer, a filter takes what counts of it, and it must be the same text
"""

import csv
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import gold_of
from evomerge.evaluate.open_tasks import NAME_LENGTH, open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.files import read_text, write_text
from evomerge.parse import parse_json
from evomerge.start.columns import LETTERS, Columns, Rows, find_columns, text_of

Filter = Literal["strip", "first_line", "number", "none"]

DATA_BYTES = 1 << 30
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
FILTERS: dict[str, list[dict[str, Any]]] = {
    "strip": [{"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"}],
    "first_line": [{"function": "regex", "regex_pattern": r"^\s*(.*?)[ \t]*(?:\n|$)"}],
    "number": [{"function": "regex", "regex_pattern": f"({NUMBER})", "group_select": -1}],
}
LONGEST = 1024  # tokens of an answer
SPARE = 16  # tokens that an answer may have more than the longest gold answer has characters


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


def task_of(data: Path, file: Path, rows: Rows, columns: Columns, prompt: str | None) -> dict[str, Any]:
    """The content of the task file, without what a written answer needs."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", file.stem)[:NAME_LENGTH]
    where = os.path.relpath(data.resolve(), file.resolve().parent)
    text = prompt or "{{" + columns.question + "}}"
    ends_open = all(str(row[columns.question])[-1:].isspace() for row in rows) and prompt is None
    content: dict[str, Any] = {
        "task": name,
        "dataset_path": "csv" if data.suffix.lower() == ".csv" else "json",
        "dataset_kwargs": {"data_files": {"test": where}},
        "test_split": "test",
        "output_type": "generate_until" if columns.kind == "answer" else "multiple_choice",
        "doc_to_text": text,
        "target_delimiter": "" if ends_open or text[-1:].isspace() else " ",
    }
    if columns.kind == "answer":
        return content | {"doc_to_target": "{{" + columns.answer + "|string|trim}}"}
    if columns.kind == "class":
        content |= {
            "doc_to_choice": list(columns.labels),
            "doc_to_target": "{{" + f"{list(columns.labels)!r}.index({columns.answer}|string|trim)" + "}}",
        }
    else:
        content |= {"doc_to_choice": choices_of(columns), "doc_to_target": target_of(rows, columns)}
    return content | {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}


def written_answers(answers: list[str], used: str) -> dict[str, Any]:
    """The part of a task file about answers that a model writes."""
    until = [] if any("\n\n" in a for a in answers) else ["\n\n"] if any("\n" in a for a in answers) else ["\n"]
    content: dict[str, Any] = {
        "generation_kwargs": {
            "until": until,
            "do_sample": False,
            "max_gen_toks": min(LONGEST, max(map(len, answers)) + SPARE),
        }
    }
    if used != "none":
        content["filter_list"] = [{"name": used, "filter": [*FILTERS[used], {"function": "take_first"}]}]
    metric: dict[str, Any] = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    if used == "number":
        metric["regexes_to_ignore"] = [","]  # 1,000 is 1000
    return content | {"metric_list": [metric]}


def choices_of(columns: Columns) -> str:
    """The column of lists, or a template of a list of several columns."""
    return columns.choices[0] if len(columns.choices) == 1 else "{{[" + ", ".join(columns.choices) + "]}}"


def target_of(rows: Rows, columns: Columns) -> str:
    """A template of the right choice's number, from 0.

    The answer's column may hold that number, from 0 or from 1, its letter, the name of its column, or its text.
    EvomergeError with the row if none of these fits all rows.
    """
    given = [text_of(row[columns.answer]) for row in rows]
    counts = [len(row[columns.choices[0]]) if len(columns.choices) == 1 else len(columns.choices) for row in rows]
    name = columns.answer
    if all(a.isdecimal() and int(a) < n for a, n in zip(given, counts, strict=True)):
        return "{{" + f"{name}|int" + "}}"
    if all(a.isdecimal() and 1 <= int(a) <= n for a, n in zip(given, counts, strict=True)):
        return "{{" + f"({name}|int) - 1" + "}}"
    if all(a in LETTERS[:n] and a for a, n in zip((a.upper() for a in given), counts, strict=True)):
        return "{{" + f"'{LETTERS}'.index({name}|trim|upper)" + "}}"
    if all(a in columns.choices for a in given):
        return "{{" + f"{list(columns.choices)!r}.index({name}|trim)" + "}}"
    for n, (row, answer) in enumerate(zip(rows, given, strict=True), 1):
        if answer not in choice_texts(row, columns):
            raise EvomergeError(
                f"row {n}: the answer {answer!r} is none of the choices {choice_texts(row, columns)}, nor the number "
                "or letter of one"
            )
    return text_target(columns)


def text_target(columns: Columns) -> str:
    """A template of the number of the choice whose text is the answer."""
    listed = columns.choices[0] if len(columns.choices) == 1 else f"[{', '.join(columns.choices)}]"
    return "{{(" + f"{listed}|map('string')|map('trim')|list).index({columns.answer}|string|trim)" + "}}"


def choice_texts(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """The choices of a row."""
    found = row[columns.choices[0]] if len(columns.choices) == 1 else [row[name] for name in columns.choices]
    return [text_of(choice) for choice in found]


def is_number(value: Any) -> bool:
    return re.fullmatch(NUMBER, text_of(value)) is not None

"""The content of an lm-eval task file for own data.

choice    one row, several choices of its own: multiple choice, the likelihoods of the choices are compared
class     all rows have the same few answers: multiple choice among these
answer    free text: the model writes an answer, a filter takes what counts of it, and it must be the same text
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.evaluate.open_tasks import NAME_LENGTH
from evomerge.start.columns import LETTERS, Columns, Rows, text_of

Filter = Literal["strip", "first_line", "number", "none"]

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
FILTERS: dict[str, list[dict[str, Any]]] = {
    "strip": [{"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"}],
    "first_line": [{"function": "regex", "regex_pattern": r"^\s*(.*?)[ \t]*(?:\n|$)"}],
    "number": [{"function": "regex", "regex_pattern": f"({NUMBER})", "group_select": -1}],
}
LONGEST = 1024  # tokens of an answer
SPARE = 16  # tokens that an answer may have more than the longest gold answer has characters


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

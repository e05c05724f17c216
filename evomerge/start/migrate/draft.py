"""The configuration while it is written: its lines, the differences as comments, what is wrong with the old file."""

import os
import re
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from evomerge.config.schema import RESERVED
from evomerge.errors import EvomergeError, did_you_mean
from evomerge.files.read import read_text
from evomerge.merge.mergekit.parse_mergekit import YamlReader, read_scalar, short_repr
from evomerge.parse import TaskLoader, parse_yaml
from evomerge.start.yaml_text import plain, relative

WIDTH = 100  # of a line with comments


class Draft(YamlReader):
    """Reads the old file and collects the lines of the new one.

    old: the file that is read.  new: the file to write, whose folder relative paths will count from.
    program: whose file it is.
    task_folders: where task files may lie.
    lines: of the new file.
    left_out: what is not carried over, a line each.
    count: the number of comments that tell a difference.
    """

    def __init__(self, old: Path, new: Path, program: str, task_folders: Iterable[Path]) -> None:
        super().__init__(old.parent)
        self.old, self.new, self.program, self.task_folders = old, new, program, list(task_folders)
        self.lines = [
            f"# Made by `evomerge migrate` from {one_line(old.name)}, a file of {program}.  Comments say what differs."
        ]
        self.left_out: list[str] = []
        self.count = 0

    def add(self, line: str, *differences: str) -> None:
        """Add a line, with its differences as comments: behind it if that is short, else before it."""
        self.count += len(differences)
        differences = tuple(map(one_line, differences))
        indent = line[: len(line) - len(line.lstrip())]
        if len(differences) == 1 and len(behind := f"{line}  # {differences[0]}") <= WIDTH and "\n" not in line:
            self.lines.append(behind)
            return
        for text in differences:
            self.lines += textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        self.lines.append(line)

    def leave_out(self, key: str, why: str) -> None:
        """Note that a key of the old file has no counterpart."""
        self.left_out.append(one_line(f"{key}: {why}"))

    def text_of_file(self) -> str:
        """The new file.  EvomergeError lists everything that is wrong with the old one."""
        if self.problems:
            raise EvomergeError(f"{self.old}: {len(self.problems)} problem(s):\n  " + "\n  ".join(self.problems))
        end = []
        if self.left_out:
            end = ["", "# Not carried over:"]
            for text in self.left_out:
                end += textwrap.wrap(text, WIDTH, initial_indent="# - ", subsequent_indent="#   ")
        return "\n".join([*self.lines, *end, ""])

    def handle_unknown_key(self, where: str, key: str, known: Collection[str]) -> None:
        """A key like a known one is a problem; any other one has no effect in the old program either."""
        if hint := did_you_mean(key, known):
            self.add_problem(where, f"unknown key{hint}")
        else:
            self.leave_out(where, f"{self.program} has no key of that name")

    def path(self, where: str, value: Any) -> str | None:
        """A model as the new file names it.  A path counts from the old file's folder or else from the working one."""
        found = super().path(where, value)
        if found is None or not os.path.isabs(found):
            return found
        from_here = Path.cwd() / os.path.relpath(found, self.folder.resolve())
        is_here = os.path.isdir(from_here) and not os.path.isdir(found)
        return relative(str(from_here) if is_here else found, self.new)

    def whole(self, where: str, value: Any, least: int = 1) -> int | None:
        """A whole number that is not below `least`."""
        number = read_scalar(value, "integer")
        if number is None or isinstance(value, bool) or number < least:
            self.add_problem(where, f"expected a whole number of {least} or more, found {short_repr(value)}")
            return None
        return int(number)

    def switch(self, where: str, value: Any, default: bool) -> bool:
        """True or false; a missing value is the default."""
        found = default if value is None else read_scalar(value, "boolean")
        if not isinstance(found, bool):
            self.add_problem(where, f"expected true or false, found {short_repr(value)}")
            return default
        return found

    def task(self, name: str, **options: Any) -> tuple[str, list[str]]:
        """The entry of a task and its differences: the file of that name in the task folders, or a name of lm-eval's.

        options: further keys of the entry; None and what is the default is left out.
        """
        differences = []
        if (file := task_file(name, self.task_folders)) is not None:
            if "!function" in read_text(file):
                differences.append(
                    f"{file.name} runs Python code of its own: read it, then add allow_task_code: true to the task"
                )
            name = relative(str(file), self.new)
        elif self.task_folders:
            differences.append(f"{name}: no file of the task folder has it, so it must be one of lm-eval's own tasks")
        given = {k: v for k, v in options.items() if v is not None}
        return f"- {{task: {plain(name)}{''.join(f', {k}: {scalar(v)}' for k, v in given.items())}}}", differences


def one_line(text: str) -> str:
    """A text that stays within its comment, whatever an old file has in it."""
    return "".join(c if c.isprintable() else " " for c in text)


def scalar(value: Any) -> str:
    """A number, a switch or a text as a YAML scalar."""
    if isinstance(value, bool):
        return str(value).lower()
    return plain(value) if isinstance(value, str) else f"{value:g}"


def task_file(name: str, folders: Iterable[Path]) -> Path | None:
    """The file in these folders that describes the task of this name; None if there is none."""
    for folder in folders:
        for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            try:
                content = parse_yaml(read_text(file), str(file), TaskLoader)
            except EvomergeError:  # some other file
                continue
            if isinstance(content, dict) and content.get("task") == name:
                return file
    return None


def source_names(paths: Iterable[str]) -> list[str]:
    """A name for each model: the last part of its path, with a number if that name is taken."""
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.split("@")[0].rstrip("/").split("/")[-1]).strip("-") or "source"
        name, number = stem, 2
        while name in (*names, *RESERVED):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def study_name(text: str) -> str:
    """A text as the name of a study."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "search"

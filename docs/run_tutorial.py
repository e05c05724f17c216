"""Run the commands of docs/tutorial/first-merge.md and write their output into it: python docs/run_tutorial.py

A block of the page marked `console` has commands, each after `$`, and what they print.  They run one after the other in
a fresh folder with the models and data that the page has made before.  A block stays as it is if only times and sizes
differ, so that the page changes when the program does.  `<!-- shorten: trial judging; until: report -->` before a
block: of neighbouring lines that begin with the same of these words the first and the last are shown, and nothing after
the line that begins with the last word.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial" / "first-merge.md"
NOTE = r"<!-- shorten: (?P<words>[\w ]+); until: (?P<end>\w+) -->\n"
BLOCK = re.compile(rf"(?:{NOTE})?```console\n(?P<body>.*?)```\n", re.DOTALL)
COMMAND = re.compile(r"^\$ (?:\\\n|.)*", re.MULTILINE)
COLUMNS = 92


def output_of(command: str, folder: Path) -> str:
    """What a shell command prints, both streams.  RuntimeError if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def shortened(lines: list[str], block: re.Match[str]) -> list[str]:
    """The lines that the block shows."""
    if block["words"] is None:
        return lines
    end = next((n for n, line in enumerate(lines) if line.startswith(block["end"])), len(lines))
    shown: list[str] = []
    for word, group in groupby(lines[: end + 1], lambda line: first_of(block["words"].split(), line)):
        found = list(group)
        shown += [found[0], "...", found[-1]] if word and len(found) > 2 else found
    return shown


def first_of(words: list[str], line: str) -> str | None:
    """The word that a line begins with."""
    return next((word for word in words if line.startswith(word)), None)


def without_times(text: str) -> str:
    """A text in which only times, rates and sizes may differ between two runs on one machine."""
    unit = r"(?:/min|min|ms|s|m|h|kB|MB|GB|%)\b"
    text = re.sub(rf"~?\d[\d.,]*\s?{unit}(?:\s?\d+{unit})?", "#", text)
    text = re.sub(r"^.*: \d+ of \d+ [a-z ]+\n", "", text, flags=re.M)  # of steps that take long on a slow machine
    text = re.sub(r"\bat \d\d:\d\d\b|\d+%(?= of (?:it computing|the run's))", "#", text)
    return re.sub(
        r"\d[\d.,]*(?= (?:trials|points) ?(?:per|a|/)| candidates$|k? tokens|k? forwards)", "#", text, flags=re.M
    )


def prepare(folder: Path, models: Path) -> None:
    """What the page makes before its first block of output."""
    shutil.copytree(models, folder / "models")
    for name in ("sort", "add"):
        shutil.copyfile(ROOT / "evals" / "tiny" / f"{name}.jsonl", folder / f"{name}.jsonl")


def written(page: str, models: Path, folder: Path, output_of: Callable[[str, Path], str] = output_of) -> str:
    """The page with what its commands print now.

    models: what examples/tiny/make.py made.  folder: a new one to work in.  output_of: see above.
    """
    prepare(folder, models)

    def run(block: re.Match[str]) -> str:
        shown = []
        for command in COMMAND.findall(block["body"]):
            lines = [line.rstrip() for line in output_of(command.removeprefix("$ "), folder).splitlines()]
            shown.append("\n".join([command, *shortened(lines, block)]) + "\n")
        body = "\n".join(shown)
        same = without_times(body) == without_times(block["body"])
        return block[0] if same else block[0].replace(block["body"], body)

    return BLOCK.sub(run, page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the output of the tutorial's commands into its page.")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "tiny", help="what examples/tiny/make.py made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), arguments.models, Path(folder)), encoding="utf-8")
    print(f"wrote {PAGE}")

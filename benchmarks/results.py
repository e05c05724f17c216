"""Results of a long benchmark in a file, so that it can be measured in parts, and its command line."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


class Results:
    """A JSON file of results by key, written after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def once(self, key: str, work: Callable[[], Any]) -> None:
        """Do the work whose result is not there yet."""
        if key in self.found:
            return
        started = time.perf_counter()
        result = work()
        latest = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.found = latest | {key: result}  # another process may have written meanwhile
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{key}: {time.perf_counter() - started:.0f} s", flush=True)


def command_line(
    doc: str | None,
    name: str,
    seeds: int,
    run: Callable[[argparse.Namespace], None],
    table: Callable[[dict[str, Any]], None],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The commands `run` and `table FILE` of a benchmark.

    doc: of its module.
    name: of the file in runs/.
    seeds: how many, if the command line does not say.
    run: measures; it gets the arguments.
    table: prints; it gets the results by key.
    Returns the parser, and that of `run`, which has `--seeds`, `--first` and `--out`.  `function` of the arguments does
    what they say.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="measure what the file does not have yet")
    running.add_argument("--seeds", type=int, default=seeds)
    running.add_argument("--first", type=int, default=0, help="first seed")
    running.add_argument("--out", type=Path, default=Path("runs", f"{name}.json"))
    running.set_defaults(function=run)
    printing = commands.add_parser("table", help="print what was measured, as Markdown")
    printing.add_argument("file", type=Path)
    printing.set_defaults(function=lambda arguments: table(json.loads(arguments.file.read_text(encoding="utf-8"))))
    return parser, running


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95% interval over seeds, of Student's t."""
    from scipy.stats import t as student

    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean} ±{half:.{digits}f}"

"""Read, check and write the configuration file.  All its problems are reported together, before anything is loaded."""

from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from evomerge.config.database_url import has_password
from evomerge.config.error_lines import error_line
from evomerge.config.method_problems import method_problems
from evomerge.config.paths import absolute_paths, path_problems
from evomerge.config.problems import problems_of
from evomerge.config.schema import SearchConfig
from evomerge.config.start_from import with_start
from evomerge.errors import EvomergeError
from evomerge.files.read import read_yaml
from evomerge.files.write import write_text


class Problems(Protocol):
    """Finds problems of a configuration.  others: whether there are others, so that guesses are welcome."""

    def __call__(self, config: SearchConfig, others: bool) -> list[str]: ...


def no_more(config: SearchConfig, others: bool) -> list[str]:
    """No problems."""
    return []


def parse_config(content: Any, origin: Path, more: Problems = no_more, files: bool = True) -> SearchConfig:
    """Check parsed YAML as a search configuration.

    origin: the file, named in the error; relative paths are relative to its folder.
    more: finds problems that this package knows nothing of; `others` says whether there are others.
    files: whether the models and files that it names must be there; to read about a finished search they need not.

    EvomergeError lists all problems, each with its YAML path.
    """
    if not isinstance(content, dict):
        raise EvomergeError(f"{origin}: expected a mapping of keys to values, found {type(content).__name__}")
    content = with_start(absolute_paths(content, origin.parent.resolve()), parse_config)
    try:
        config = SearchConfig.model_validate(content)
        problems = problems_of(config, files)
        problems += more(config, bool(problems))
    except ValidationError as error:
        wrong = {e["loc"][0] for e in error.errors() if e["loc"]}
        problems = [error_line(dict(e)) for e in error.errors()]
        problems += problems_of_the_rest(content, wrong, origin.parent, more, files)
    if problems:
        raise EvomergeError(f"{origin}: {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return config


def problems_of_the_rest(
    content: dict[str, Any], wrong: Set[int | str], folder: Path, more: Problems, files: bool
) -> list[str]:
    """The problems of the keys that are right by themselves, so that one run of a command shows all problems.

    wrong: the keys that are not.  folder: one that exists.  The others: see `parse_config`.
    """
    stand_ins = {"name": "x", "base": str(folder), "method": "", "tasks": [{"task": "x"}]}
    stand_ins["sources"] = [{"name": "x", "path": str(folder)}]
    try:
        partial = SearchConfig.model_validate({**stand_ins, **{k: v for k, v in content.items() if k not in wrong}})
    except ValidationError:
        return []
    problems = [] if wrong & {"method", "sources", "space"} else method_problems(partial)
    return problems + (path_problems(partial) if files else []) + more(partial, True)


def load_config(path: Path, more: Problems = no_more, files: bool = True) -> SearchConfig:
    """Read a search configuration from a file.

    more, files: as in `parse_config`.

    EvomergeError lists all problems, each with its YAML path.
    """
    return parse_config(read_yaml(path), path, more, files)


def dump_config(config: SearchConfig) -> str:
    """The configuration as YAML that `load_config` reads back, with absolute paths."""
    text: str = yaml.safe_dump(config.model_dump(by_alias=True, exclude_none=True), sort_keys=False, width=110)
    return text


def write_config(path: Path, config: SearchConfig) -> None:
    """Write the configuration to a file, which only its owner can read if it may contain a password."""
    write_text(path, dump_config(config), private=has_password(config.storage) or config.on_finish is not None)

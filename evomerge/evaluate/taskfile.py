"""Read lm-eval's task files, and check them before lm-eval does: Python code runs only if the user allows it."""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, did_you_mean, first_line
from evomerge.evaluate.bounds import within_bounds
from evomerge.files.read import read_text
from evomerge.parse import Tagged, TaskLoader, parse_yaml

ALLOW = "read it; if it may run, set `allow_task_code: true` beside the task (on the command line --allow-task-code)"
BLANK = 4096  # bytes of a data file that may hold nothing but spaces
INCLUDES = 16  # the greatest number of files of one task
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Options of `load_dataset` that need the user's permission: where to write, whose code to run, how many processes.
DATA_OPTIONS = ("trust_remote_code", "cache_dir", "download_config", "storage_options", "num_proc")


def prepare_libraries() -> None:
    """Change three settings of lm-eval and datasets for this process.

    - Templates of task files run in Jinja's sandbox: in lm-eval's own environment a template reaches every object of
      Python.
    - A compiled template is kept: lm-eval compiles one for each document whenever the document is scored, which takes a
      millisecond, more than the document's forward on a small model.
    - Their progress bars and log lines are off; evomerge shows one progress bar.
    """
    import datasets
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        before = utils.env
        utils.env = SandboxedEnvironment(
            loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
        )
        utils.env.filters.update(before.filters)
        utils.env.from_string = lru_cache(maxsize=1024)(utils.env.from_string)

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def bounded_templates(task: str) -> Iterator[None]:
    """Within the context, every template that lm-eval renders has bounds.  It renders those of the first item itself.

    task: for the error.
    """
    from lm_eval import utils

    plain = utils.apply_template

    def bounded(template: str, doc: dict[str, Any]) -> str:
        with within_bounds(f"{task}: the templates of an item"):
            return str(plain(template, doc))

    utils.apply_template = bounded
    try:
        yield
    finally:
        utils.apply_template = plain


def load_file(path: Path, allow_code: bool = False) -> tuple[list[Any], bool]:
    """The tasks of a YAML file, and whether the file runs Python code.

    path: the file; the data files that it names are relative to its folder.
    allow_code: whether the file may name Python functions (in files beside it) and scripts of metrics.

    EvomergeError if the file or its data are missing or broken, or if it needs code that is not allowed.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    prepare_libraries()
    if not path.is_file():
        raise EvomergeError(f"{path}: no such task file")
    code = code_in(path, path.resolve().parent, seen=set())
    if code and not allow_code:
        where, what = code[0]
        raise EvomergeError(f"{where}: runs Python code (`{what}`); {ALLOW}")
    try:
        content = load_yaml(path, resolve_func=allow_code)
    except Exception as error:  # a file that may run code can raise anything
        raise EvomergeError(f"{path}: not a task file ({reason(error)})") from error
    if not isinstance(content.get("task"), str):
        several = content.get("group") is not None or isinstance(content.get("task"), list)
        what = "is a group or a list of tasks; give the files of its tasks, or their folder" if several else ""
        raise EvomergeError(f"{path}: {what or 'has no `task:` name'}")
    content.pop("group", None)  # beside `task`, the old name of `tag`; lm-eval now takes the file for a group
    if not allow_code:
        refuse_metric_scripts(content, path)
    kwargs = content.get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise EvomergeError(f"{path}: dataset_kwargs must be a mapping, found {kwargs!r:.60}")
    if kwargs.get("data_files") is not None:
        content["dataset_kwargs"] = {**kwargs, "data_files": local_data(kwargs["data_files"], path)}
    refuse_whole_folders(content.get("dataset_path"), kwargs, path)
    try:
        with bounded_templates(str(path)):
            tasks = list(TaskManager(include_defaults=False).load(content)["tasks"].values())
        for make in [make for task in tasks for ensemble in task._filters for make in ensemble.filters]:
            make()  # fails here on wrong arguments; lm-eval calls it only after the first answer
        return tasks, bool(code)
    except EvomergeError:
        raise
    except Exception as error:  # lm-eval and datasets raise many types
        why = missing_split(content, error) or missing_column(content, error)
        why = why or f"lm-eval cannot open this task ({reason(error)})"
        raise EvomergeError(f"{path}: {why}") from error


def missing_split(content: dict[str, Any], error: Exception) -> str | None:
    """The message for an error about a split that the task names and the data lack; None for other errors.

    content: the task file.
    """
    wanted = error.args[0] if isinstance(error, KeyError) and error.args else None
    key = next((k for k in SPLIT_KEYS if wanted is not None and content.get(k) == wanted), None)
    if key is None:
        return None
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    listed = f"; it has {', '.join(map(str, files))}" if isinstance(files, dict) else ""
    return f"{key}: the data set has no split {wanted!r}{listed}"


def missing_column(content: dict[str, Any], error: Exception) -> str | None:
    """The message for a template that names a column which the data lack; None for other errors.

    content: the task file.
    """
    found = re.fullmatch(r"'(\w+)' is undefined", reason(error))
    if found is None:
        return None
    name = found[1]
    key = next((k for k, v in content.items() if k.startswith("doc_to_") and name in re.findall(r"\w+", str(v))), None)
    columns = first_columns((content.get("dataset_kwargs") or {}).get("data_files"))
    listed = f"; they have {', '.join(columns)}" if columns else ""
    return f"{key or 'a template'}: the data have no column {name!r}{did_you_mean(name, columns)}{listed}"


def first_columns(data_files: Any) -> list[str]:
    """The keys of the first row of JSON Lines, of files as `local_data` gives them; empty for other files."""
    while isinstance(data_files, (dict, list)):
        data_files = next(iter(data_files.values() if isinstance(data_files, dict) else data_files), None)
    if not str(data_files).endswith(".jsonl") or not os.path.isfile(str(data_files)):
        return []
    with open(str(data_files), encoding="utf-8", errors="replace") as file:
        row = json.loads(next((line for line in file if line.strip()), "null"))
    return list(row) if isinstance(row, dict) else []


def code_in(path: Path, root: Path, seen: set[Path]) -> list[tuple[Path, str]]:
    """Where a task file, or a file that it includes, names Python code: pairs of the file and the key or tag.

    root: the folder of the task file.  The task file may include any file; an included file may include only files of
        this folder and of its own.
    seen: the files read so far; this one is added.

    EvomergeError if a file cannot be read or includes itself, or there are more than INCLUDES files.
    """
    if path in seen:
        raise EvomergeError(f"{path}: includes itself, or is included twice")
    seen.add(path)
    if len(seen) > INCLUDES:
        raise EvomergeError(f"{path}: is one of more than {INCLUDES} files that include each other")
    content = parse_yaml(read_text(path), str(path), TaskLoader)
    if not isinstance(content, dict):
        raise EvomergeError(f"{path}: expected a mapping, found {type(content).__name__}")
    found = [(path, "!function")] if is_tagged(content) else []
    found += [(path, key) for key in ("class", "use_prompt") if content.get(key)]
    kwargs = content.get("dataset_kwargs")
    found += [(path, f"dataset_kwargs.{key}") for key in DATA_OPTIONS if isinstance(kwargs, dict) and kwargs.get(key)]
    if content.get("dataset_path") == "pandas":  # reads pickles
        found.append((path, "dataset_path: pandas"))
    includes = content.get("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            raise EvomergeError(f"{path}: include: expected the name of a file, found {name!r:.60}")
        try:
            other = (path.parent / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise EvomergeError(f"{path}: include: {name!r:.200} is no path ({error})") from error
        if len(seen) > 1 and not any(other.is_relative_to(folder) for folder in (root, path.parent)):
            raise EvomergeError(f"{path}: is included itself, and includes {other}, which is not in its folder")
        found += code_in(other, root, seen)
    return found


def is_tagged(content: Any) -> bool:
    """Whether any text in YAML content had lm-eval's tag `!function`."""
    if isinstance(content, dict):
        return any(is_tagged(x) for pair in content.items() for x in pair)
    return any(map(is_tagged, content)) if isinstance(content, list) else isinstance(content, Tagged)


def refuse_metric_scripts(content: dict[str, Any], path: Path) -> None:
    """EvomergeError if a task names a metric that lm-eval does not have.

    lm-eval would run it as a script of Hugging Face's `evaluate`, also a local one.
    """
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import metric_registry

    wanted = content.get("metric_list") or []
    for entry in wanted if isinstance(wanted, list) else [wanted]:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        scripted = isinstance(entry, dict) and entry.get("hf_evaluate")
        if not isinstance(name, str) or name not in metric_registry or scripted:
            raise EvomergeError(
                f"{path}: {name!r:.60} is not one of lm-eval's own metrics; "
                "scripts of the `evaluate` library are not run"
            )


def refuse_whole_folders(dataset: Any, kwargs: dict[str, Any], path: Path) -> None:
    """EvomergeError if `datasets` would read all files below the current folder.

    It does so when it gets a format without files, or the name of a folder that contains the current one.

    dataset, kwargs: the task's `dataset_path` and `dataset_kwargs`.  path: the task file, named in the error.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    if isinstance(dataset, str) and dataset in FORMATS and not (kwargs.get("data_files") or kwargs.get("data_dir")):
        raise EvomergeError(f"{path}: dataset_path is {dataset}, a format; name the files in dataset_kwargs.data_files")
    for key, folder in (("dataset_path", dataset), ("dataset_kwargs.data_dir", kwargs.get("data_dir"))):
        here = Path.cwd()
        if isinstance(folder, str) and os.path.isdir(folder) and here.is_relative_to(os.path.realpath(folder)):
            raise EvomergeError(
                f"{path}: {key} is {folder!r}, which contains the current folder; name a folder of data"
            )


def local_data(data_files: Any, task_file: Path) -> Any:
    """`data_files` of a task file with absolute paths.

    data_files: a name, a list of names, or a mapping of splits to them; URLs are returned unchanged.

    EvomergeError if a file is missing, or a .jsonl file has a line that is not JSON.
    """
    if isinstance(data_files, dict):
        return {split: local_data(files, task_file) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [local_data(file, task_file) for file in data_files]
    if "://" in str(data_files):
        return data_files
    path = task_file.parent / str(data_files)
    if not os.path.isfile(path):
        raise EvomergeError(f"{task_file}: its data file is missing: {path}")
    if os.path.getsize(path) <= BLANK and path.read_bytes().strip() in (b"", b"[]"):
        raise EvomergeError(f"{task_file}: its data file is empty: {path}; give it one item a line")
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            try:
                _ = not line or json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvomergeError(f"{path}: line {number} is not JSON ({error})") from error
    return str(path.resolve())


def load_named(name: str) -> list[Any]:
    """The tasks of one of lm-eval's own tasks or groups.  EvomergeError with similar names if there is none."""
    from lm_eval.tasks import TaskManager

    prepare_libraries()
    manager = TaskManager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.task_index, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise EvomergeError(
            f"task {name!r}: lm-eval has no task of that name{hint}. A task of your own is a path ending in .yaml"
        )
    try:
        with bounded_templates(f"task {name!r}"):
            return list(manager.load(name)["tasks"].values())
    except EvomergeError:
        raise
    except Exception as error:  # lm-eval and datasets raise many types
        raise EvomergeError(f"task {name!r}: lm-eval cannot open it ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line of an exception's first cause; `datasets` wraps causes in errors that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

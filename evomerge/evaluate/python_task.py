"""Tasks that are a Python function of the user's: `score(model, items)` gives one number for each item.

`PythonSource` stands where another task has lm-eval's own task object, and has the same methods as far as they are
used.  So splits, duplicates, races, verdict and report need not know what kind of task they deal with.

The function's file is the user's own code, which the configuration names.  It is run as a module of its own, and its
SHA-256 is recorded with the run.
"""

import copy
import hashlib
import inspect
import json
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np

from evomerge.config.tasks import PythonTask
from evomerge.errors import EvomergeError, did_you_mean, first_line
from evomerge.evaluate.metrics import CHOSEN, METRICS
from evomerge.files.read import opened, read_text
from evomerge.parse import parse_json

PYTHON = "python"  # the kind of these tasks, beside lm-eval's `output_type`
Helper = Literal["tokenizer", "processor"]
HELPERS: tuple[Helper, ...] = ("tokenizer", "processor")
SHARES = ("acc", "exact_match")  # metrics of lm-eval whose names a task may use for the same: from 0 to 1
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
FRAMES = 3  # lines of the user's file that an error shows
ITEMS_BYTES = 1 << 30
SHOWN = 80  # characters of a value in a message


class TaskCodeFailed(EvomergeError):
    """The function of a Python task raised an error, or did not give one finite number for each item.

    is_value: whether the only problem is a number that is not finite, which a broken model may cause.
    """

    def __init__(self, message: str, is_value: bool = False) -> None:
        super().__init__(message)
        self.is_value = is_value


class PythonSource:
    """The items and the function of a Python task, in the place of lm-eval's task object.

    given: the task as the configuration gives it, with absolute paths.

    EvomergeError if the file of the function or of the items is missing or broken, or a name is wrong.
    """

    OUTPUT_TYPE = PYTHON
    _filters: tuple[Any, ...] = ()
    multiple_input = False

    def __init__(self, given: PythonTask) -> None:
        self.given = given
        self.file, _, self.name = given.python.rpartition(":")
        check_metric(given)
        self.config = SimpleNamespace(task=given.name or self.name, num_fewshot=0, target_delimiter="")
        self._metric_fn_list = {given.metric: None}
        self.module, self.sha256 = load_module(Path(self.file))
        self.function, self.helper = find_function(self.module, self.file, self.name)
        self.eval_docs = read_docs(Path(given.items))

    @cached_property
    def where(self) -> str:
        """How messages call the function."""
        return f"task {self.config.task}: {self.name} of {Path(self.file).name}"

    @property
    def described(self) -> str:
        """The function as a verdict and a model card name it."""
        return f"{self.name} of {Path(self.file).name}, SHA-256 {self.sha256}"

    # --- What lm-eval's task object has ---

    def higher_is_better(self) -> dict[str, bool]:
        return {self.given.metric: self.given.higher_is_better}

    def aggregation(self) -> dict[str, Any]:
        """None: the mean is taken."""
        return {}

    def set_fewshot_seed(self, seed: int) -> None:
        """There are no examples."""

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        """What tells items of the same question: the item's longest text; without texts all of it."""
        texts = [value for value in doc.values() if isinstance(value, str)]
        return max(texts, key=len) if texts else json.dumps(doc, sort_keys=True)

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        """The gold answer is the function's own business."""
        return ""

    def training_docs(self) -> None:
        """There is one list of items, which is dealt by counts or shares."""

    validation_docs = test_docs = training_docs

    # --- Scoring ---

    def blocks(self, count: int) -> list[range]:
        """The places of the items that each call gets.  count: of all items."""
        return [range(start, min(start + self.given.block, count)) for start in range(0, count, self.given.block)]

    def score(
        self, model: Any, docs: Sequence[dict[str, Any]], helper: Callable[[Helper], Any], which: str
    ) -> list[float]:
        """Call the function for a block of items.

        model: in evaluation mode; no gradient is recorded.
        docs: of the items; the function gets copies.
        helper: gives the tokenizer or the processor, if the function has a third parameter.
        which: the items, for messages.

        Random numbers of Python, NumPy and PyTorch are seeded before the call, so that a model's scores do not depend
        on what was scored before.  TaskCodeFailed if the function raises an error or its numbers are wrong;
        EvomergeError if it changed the model's weights.
        """
        import torch  # status and refused configurations import this file, and need no torch

        given = [model, copy.deepcopy(list(docs)), *([helper(self.helper)] if self.helper else [])]
        before = weights_state(model.eval())
        with torch.no_grad(), seeded(model), chdir("."):  # the working folder is the same afterwards
            try:
                found = self.function(*given)
                values = found.tolist() if hasattr(found, "tolist") else found
            except (Exception, SystemExit) as error:
                raise TaskCodeFailed(f"{self.where} failed on {which}: {told(error, self.file)}") from error
            finally:
                model.eval()
        if weights_state(model) != before:  # no trial fails: all later ones would be wrong
            raise EvomergeError(
                f"{self.where} changed the model's weights, or their type or device, which would stay so for the "
                "candidates after this one; let it work on a copy"
            )
        return self.checked(values, docs, which)

    def checked(self, values: Any, docs: Sequence[dict[str, Any]], which: str) -> list[float]:
        """What the function returned, as one finite number for each item."""
        if not isinstance(values, (list, tuple)):
            raise TaskCodeFailed(
                f"{self.where} returned {shown(values)}; it must return a list with a number for each item"
            )
        if len(values) != len(docs):
            raise TaskCodeFailed(f"{self.where} returned {len(values)} values for {len(docs)} items ({which})")
        numbers = []
        for value, doc in zip(values, docs, strict=True):
            number = number_of(value)
            if number is None:
                raise TaskCodeFailed(
                    f"{self.where} returned {shown(value)} for the item {shown(doc)}; a number is needed"
                )
            if not math.isfinite(number):
                raise TaskCodeFailed(f"{self.where} returned {number} for the item {shown(doc)}", is_value=True)
            if self.given.metric in SHARES and not 0 <= number <= 1:
                raise TaskCodeFailed(f"{self.where} returned {number}; {self.given.metric} lies between 0 and 1")
            numbers.append(number)
        return numbers


def number_of(value: Any) -> float | None:
    """A number of Python, NumPy or PyTorch; None for anything else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        return float(plain) if isinstance(plain, (bool, int, float)) else None
    except (ValueError, RuntimeError, OverflowError):  # several numbers in one; more than a float can hold
        return None


def check_metric(given: PythonTask) -> None:
    """EvomergeError if a task's metric has the name of one that means something else."""
    if given.metric in (*METRICS, *CHOSEN, "metric") and not (given.metric in SHARES and given.higher_is_better):
        raise EvomergeError(f"{given.python}: metric: {given.metric!r} has a meaning of its own; choose another name")


def load_module(file: Path) -> tuple[ModuleType, str]:
    """Run a Python file as a module, once in a process, and the SHA-256 of its bytes.  EvomergeError if it fails."""
    with opened(file) as source:
        content = source.read()
    digest = hashlib.sha256(content).hexdigest()
    name = f"evomerge_task_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name], digest
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # data classes look their module up while it is run
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise EvomergeError(f"{file}: cannot be imported: {told(error, str(file))}") from error
    return module, digest


def find_function(module: ModuleType, file: str, name: str) -> tuple[Callable[..., Any], Helper | None]:
    """The function of a module, and what it wants beside model and items.  EvomergeError if it does not fit."""
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        listed = f"; it has {', '.join(names)}" if names else ""
        raise EvomergeError(f"{file}: has no function {name!r}{did_you_mean(name, names) or listed}")
    try:
        taken = [p for p in inspect.signature(function).parameters.values() if p.kind in POSITIONAL]
    except ValueError:  # a function of a compiled module does not tell
        taken = []
    names = [p.name for p in taken]
    helper = next((h for h in HELPERS if names[2:3] == [h]), None)
    if len(names) < 2 or any(p.default is p.empty and p.name != helper for p in taken[2:]):
        raise EvomergeError(
            f"{file}: {name}({', '.join(names)}) must take (model, items), (model, items, tokenizer) or "
            "(model, items, processor)"
        )
    return function, helper


def read_docs(file: Path) -> list[dict[str, Any]]:
    """The items of a file of JSON lines.  EvomergeError if a line is no JSON object, or there is none."""
    docs = []
    text = read_text(file, ITEMS_BYTES).removeprefix("\ufeff")  # which editors on Windows put in front
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            doc = parse_json(line, f"{file}: line {number}")
            if not isinstance(doc, dict):
                raise EvomergeError(f"{file}: line {number} is {shown(doc)}; each line must be a JSON object")
            docs.append(doc)
    if not docs:
        raise EvomergeError(f"{file}: has no items; give it one JSON object a line")
    return docs


def weights_state(model: Any) -> list[tuple[Any, ...]]:
    """What changes when a parameter is written in place, or replaced by one of another type or on another device."""
    return [(p.data_ptr(), p.dtype, p._version) for p in model.parameters()]


@contextmanager
def seeded(model: Any) -> Iterator[None]:
    """Within the context, the generators of random numbers start from the same state; afterwards they are as before."""
    import torch

    states = random.getstate(), np.random.get_state()
    device = getattr(model, "device", torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def told(error: BaseException, file: str) -> str:
    """An error of the user's code: its type and message, and the last lines of the user's file that led to it."""
    name = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{name}: {error.msg} (line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file][-FRAMES:]
    lines = [f"\n  {Path(file).name}, line {f.lineno}, in {f.name}: {f.line}" for f in frames]
    return f"{name}: {first_line(error)}{''.join(lines)}"


def shown(value: Any) -> str:
    """A value as short text."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."

"""Score a model on tasks."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ValidationError

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Dtype
from evomerge.printable import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evomerge.evaluate.standalone import TaskResult


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model.

    tasks: task -> its result: `items`, how many were scored; `metrics`, metric -> its mean over the items, by lm-eval's
        own aggregation; `raw`, metric -> one value per item; `answers`, prompt, gold answer and answer of each item.
    compute_dtype: the type in which the model computed.
    seconds: part of the work -> wall-clock seconds.
    """

    tasks: "dict[str, TaskResult]"
    compute_dtype: str
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON has them: task -> items, metrics, compute_dtype, per_item, answers."""
        return {
            name: {
                "items": r.items,
                "metrics": r.metrics,
                "compute_dtype": self.compute_dtype,
                "per_item": r.raw,
                "answers": [asdict(answer) for answer in r.answers],
            }
            for name, r in self.tasks.items()
        }


def evaluate(
    model: "str | Path | PreTrainedModel",
    tasks: str | Path | Sequence[str | Path],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    base: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    allow_task_code: bool = False,
    dtype: str = "float32",
    compute_dtype: str = "auto",
    batch_tokens: int | None = None,
    device: str = "auto",
    show: bool = True,
) -> Evaluation:
    """Score one model with the search's own engine, as `evomerge evaluate` does; the numbers are lm-eval's.

    model: a model or a LoRA adapter, by folder or hub id, or a transformers model in memory, which is scored where it
        lies and as it is: `base`, `dtype`, `compute_dtype` and `device` have no meaning for it.
    tasks: task files, folders of them, or names of lm-eval's tasks; or one of these.
    tokenizer: of a model in memory.
    base: the base model, if `model` is an adapter.
    limit: score only the first items of each task.
    num_fewshot: examples in the prompt; by default as many as the task says.
    apply_chat_template: put the prompts into the tokenizer's chat template.
    fewshot_as_multiturn: with a chat template, examples as turns of their own.
    allow_task_code: let the task files run Python code of their own.
    dtype: the type of the weights: float32, bfloat16 or float16.
    compute_dtype: the type to compute in: auto, float32, or the same as `dtype`.
    batch_tokens: padded tokens per forward; by default what the device holds.
    device: where to compute: auto, cpu, cuda, cuda:1, ...
    show: whether to print progress and the table of scores.

    Raises EvomergeError if the model or a task cannot be opened, or a task cannot be scored.
    """
    from evomerge.device import resolve_device, use
    from evomerge.evaluate.clock import Clock
    from evomerge.evaluate.open_tasks import open_tasks
    from evomerge.evaluate.standalone import evaluate_model
    from evomerge.merge.live import locate_live_model, open_live_model
    from evomerge.report.progress import Steps
    from evomerge.report.terminal import print_results
    from evomerge.sources.tokenizer import open_processor

    values, computing = types_of(dtype, compute_dtype)
    for name, number, least in (("limit", limit, 1), ("batch_tokens", batch_tokens, 64)):
        if number is not None and number < least:
            raise EvomergeError(f"{name}: must be at least {least}, found {number}")
    names = [tasks] if isinstance(tasks, (str, Path)) else tasks
    configs = task_configs(names, num_fewshot, apply_chat_template, fewshot_as_multiturn, allow_task_code)
    if isinstance(model, (str, Path)):
        where = resolve_device(device)
        use(where)
        opened = open_tasks(configs)
        language = any(not task.is_python for task in opened)
        path, folder = locate_live_model(str(model), str(base) if base else None, language)
        live, tokenizer = open_live_model(path, folder, values, where, computing, language)
        weights, processor = str(values), partial(open_processor, path)
    else:
        opened, live, where = open_tasks(configs), model, model.device
        if tokenizer is None and any(not task.is_python for task in opened):
            raise EvomergeError("tokenizer: a model in memory needs its tokenizer beside it")
        weights, processor = str(live.dtype).removeprefix("torch."), None
    computed = str(live.dtype).removeprefix("torch.")
    if show:
        say(f"weights in {weights}, computed in {computed}")
    clock, steps = Clock(device=where), Steps("scoring") if show else None
    progress = steps.step if steps else lambda done, total: None
    with in_evaluation_mode(live), closing(steps) if steps else nullcontext():
        results = evaluate_model(live, tokenizer, opened, batch_tokens or "auto", limit, clock, progress, processor)
    if show:
        print_results(results, clock)
    return Evaluation({r.task: r for r in results}, computed, dict(clock.seconds))


def types_of(dtype: str, compute_dtype: str) -> "tuple[Dtype, Dtype | Literal['auto']]":
    """The types of the weights and of the forwards.  EvomergeError if there are no such types, or they do not fit."""
    from evomerge.device import TORCH_DTYPES

    values = next((k for k in get_args(Dtype) if k == dtype), None)
    if values is None:
        raise EvomergeError(f"dtype: {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    computing = next((k for k in ("auto", "float32", values) if k == compute_dtype), None)
    if computing is None:
        raise EvomergeError(f"compute_dtype: {compute_dtype!r} is not one of auto, float32, {values}")
    return values, computing


@contextmanager
def in_evaluation_mode(model: "PreTrainedModel") -> Iterator[None]:
    """Within the context, no module of a model is in training mode; afterwards each is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def task_configs(
    names: Sequence[str | Path], fewshot: int | None, chat: bool, multiturn: bool, code: bool
) -> list[TaskConfig]:
    """The tasks of the given names, as a configuration would say them.  A folder stands for the task files in it."""
    from evomerge.evaluate.open_tasks import task_files

    options = {"num_fewshot": fewshot, "apply_chat_template": chat, "fewshot_as_multiturn": multiturn}
    files = [file for name in names for file in task_files(str(name))]
    try:
        return [TaskConfig.model_validate({**options, "task": file, "allow_task_code": code}) for file in files]
    except ValidationError as error:
        first = error.errors()[0]
        raise EvomergeError(f"{first['loc'][0]}: {first['msg']} (found {first['input']!r})") from error

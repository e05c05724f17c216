"""What a model was asked and what it answered, item by item, in words."""

import json
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.answer_metrics import choices_of
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.requests import gold_choice
from evomerge.evaluate.tasks import Item, Task
from evomerge.evaluate.workload import ItemRequests, Workload


@dataclass(frozen=True)
class Answer:
    """One item as a model answered it.

    prompt: as the model sees it, with examples and chat template.
    gold: the answer that the metric compares with.
    text: what the model wrote, or the choice that it took; empty where a task only scores texts.
    taken: what the task's first filter took of it.
    cut: whether the text has as many tokens as the task allows.
    """

    prompt: str
    gold: str
    text: str
    taken: str
    cut: bool


def answers_of(engine: Engine, work: Workload) -> list[Answer]:
    """The answers to one task's workload, after `Engine.score` with all metrics; of a Python task the items alone."""
    task = work.task
    if task.is_python:
        return [Answer(json.dumps(asked.item.doc, ensure_ascii=False), "", "", "", False) for asked in work.items]
    return [
        Answer(str(asked.instances[0].args[0]), gold_of(task, asked.item), *text_of(engine, task, asked))
        for asked in work.items
    ]


def text_of(engine: Engine, task: Task, asked: ItemRequests) -> tuple[str, str, bool]:
    """What was answered, what the first filter took of it, and whether it was cut."""
    if task.kind == "generate_until":
        text = str(asked.instances[0].resps[0])
        taken = asked.instances[0].filtered_resps[task.filters[0]]
        length = len(engine.lm.tok_encode(text, add_special_tokens=False))
        return text, str(taken[0] if isinstance(taken, list) and taken else taken), length >= asked.prompts[0].limit
    if task.kind == "multiple_choice":
        numbers, _ = choices_of(task, asked)
        logprobs = [asked.instances[k].resps[0][0] for k in range(len(numbers))]
        text = asked.instances[int(np.argmax(logprobs))].args[1].removeprefix(task.lm.config.target_delimiter)
        return text, text, False
    return "", "", False


def gold_of(task: Task, item: Item) -> str:
    """The gold answer as text: what the metric compares with."""
    if task.kind == "multiple_choice":
        return str(task.lm.doc_to_choice(item.doc)[gold_choice(task, item.doc)])
    target = task.lm.doc_to_target(item.doc)
    return "" if task.kind == "loglikelihood_rolling" else str(target[0] if isinstance(target, list) else target)

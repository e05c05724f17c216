"""From what the forwards gave, the scores of rows and the texts of prompts, to the metrics of a task.

lm-eval's requests get their answers, from which its own filters and metrics are computed; metrics with a formula get an
`Answer`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from evomerge.evaluate.formulas import Answer
from evomerge.evaluate.item_values import ItemMetrics, formula_values, lm_eval_values
from evomerge.evaluate.loglikelihood import RowScore
from evomerge.evaluate.metrics import Metric
from evomerge.evaluate.tasks import Task
from evomerge.evaluate.workload import ItemRequests, Workload

Owner = TypeVar("Owner", ItemRequests, Workload)


def task_metrics(work: Workload, lls: Sequence[RowScore], texts: Sequence[str]) -> ItemMetrics:
    """The metrics of one task.

    lls: the score of each of the task's rows.  texts: the generated text of each of its prompts.
    """
    task = work.task
    by_item = list(shared_out(work.items, lls, texts))
    answers = [answer_of(task, work.complete, *each) for each in by_item]
    found: ItemMetrics = {}
    if work.complete:
        for each in by_item:
            respond(*each)
        found = lm_eval_values(task, [asked.item for asked in work.items], [asked.instances for asked in work.items])
    answered = {
        "gold": all(asked.gold is not None for asked in work.items),
        "choices": work.complete,
        "generation": work.complete,
    }
    return found | formula_values(task, [m for m in computed(task) if answered[m.needs]], answers)


def computed(task: Task) -> list[Metric]:
    """The metrics of a task that evomerge computes: without those that cost more, unless the task is compared by it."""
    compared = {name.partition(",")[0] for name in (task.objective, task.metric)}
    return [metric for metric in task.own.values() if metric.extra is None or metric.name in compared]


def shared_out(
    owners: Iterable[Owner], lls: Sequence[RowScore], texts: Sequence[str]
) -> Iterator[tuple[Owner, Sequence[RowScore], Sequence[str]]]:
    """Each item, or each task's workload, with the log-likelihoods of its rows and the texts of its prompts.

    lls, texts: of all of them, one owner after another.
    """
    row = prompt = 0
    for owner in owners:
        last_row, last_prompt = row + len(owner.rows), prompt + len(owner.prompts)
        yield owner, lls[row:last_row], texts[prompt:last_prompt]
        row, prompt = last_row, last_prompt


def respond(asked: ItemRequests, lls: Sequence[RowScore], texts: Sequence[str]) -> None:
    """Set the answers of an item's lm-eval requests (`resps`) as lm-eval's own model would set them."""
    left = iter(texts)
    for k, instance in enumerate(asked.instances):
        if instance.request_type == "generate_until":
            instance.resps = [next(left)]
        elif instance.request_type == "loglikelihood_rolling":
            instance.resps = [sum(lls[r][0] for r in asked.spans[k])]
        else:
            instance.resps = [lls[asked.spans[k].start][:2]]


def answer_of(task: Task, complete: bool, asked: ItemRequests, lls: Sequence[RowScore], texts: Sequence[str]) -> Answer:
    """What the formulas of metrics read.  complete: whether all requests were answered, or only the gold answer's."""
    logprobs: list[float] = []
    lengths: list[int] = []
    gold = 0
    if complete and task.kind == "multiple_choice" and asked.gold is not None:
        numbers, lengths = choices_of(task, asked)
        logprobs = [lls[number].logprob for number in numbers]
        gold = numbers.index(asked.gold)
    if asked.gold is None:
        return Answer(asked.item.doc, text="".join(texts))
    row = lls[asked.gold]
    return Answer(
        asked.item.doc,
        gold_logprob=row.logprob,
        gold_bytes=asked.gold_bytes,
        logprobs=logprobs,
        gold=gold,
        text="".join(texts),
        token_logprobs=row.token_logprobs,
        token_margins=row.token_margins,
        token_entropies=row.token_entropies,
        lengths=lengths,
    )


def choices_of(task: Task, asked: ItemRequests) -> tuple[list[int], list[int]]:
    """For each choice of a multiple-choice item, which of its rows it is, and the number of its characters.

    All requests of the item are needed, not only the gold answer's.
    """
    # Behind the choices, `acc_mutual_info` asks for each of them again, without the prompt.
    count = len(asked.spans) // (2 if "acc_mutual_info" in task.metrics else 1)
    delimiter = task.lm.config.target_delimiter
    lengths = [len(instance.args[1].removeprefix(delimiter)) for instance in asked.instances[:count]]
    return [span.start for span in asked.spans[:count]], lengths

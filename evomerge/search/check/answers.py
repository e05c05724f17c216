"""What the answers to a task's items warn of: scores that tell no models apart, answers that differ in form alone."""

import math
import re
from collections.abc import Iterator

import numpy as np

from evomerge.search.check.concerns import Concern
from evomerge.search.check.probe import Answered, ProbedItem, ProbedTask
from evomerge.search.evaluation.settled_scale import UNWRITTEN

SOME, SHARE = 2, 0.15  # of a model's answers, of a kind that makes a concern
ENOUGH = 8  # items that allow a comparison of objective and metric
ANSWERS = ("answer_weakest", "answer_logprob")  # objectives that follow the gold answer token by token
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def task_concerns(task: ProbedTask) -> Iterator[Concern]:
    """What the answers to a task's items say about the task."""
    yield from same_prompts(task)
    if task.kind == "generate_until" and task.right is not None:
        yield from cut_answers(task)
        yield from nearly_right(task)
    yield from same_scores(task)
    found = list(unwritten(task))
    yield from found
    yield from (Concern(c.what, "the warning above has the cause") if found else c for c in unlike_ranking(task))


def same_prompts(task: ProbedTask) -> Iterator[Concern]:
    """Every item asks the same, although the answers differ."""
    prompts = {item.prompt for item in task.items}
    if len(prompts) == 1 and len({item.gold for item in task.items}) > 1:
        what = f"task {task.name}: every item has the same prompt, {min(prompts)[-60:]!r}"
        yield Concern(what, "name the column of the question in `doc_to_text`, in braces: {{question}}")


def same_scores(task: ProbedTask) -> Iterator[Concern]:
    """Every model is right or wrong everywhere."""
    every = [tuple(task.scores("metric", model)) for model in task.models]
    if any(scores != every[0] for scores in every) or (len(set(every[0])) > 1 and task.right is not None):
        return
    if task.right is None:
        what = f"task {task.name}: base and sources have the same {task.metric} on every item"
        yield Concern(what, "nothing tells the models apart; compare answers and gold above, or take another metric")
    elif every[0][0] == 0.0:
        what = f"task {task.name}: base and sources answer none of {len(task.items)} items right"
        yield Concern(what, "compare answers and gold above: prompt, filter or `max_gen_toks` may not fit the models")
    else:
        what = f"task {task.name}: base and sources answer all of {len(task.items)} items right"
        yield Concern(what, "nothing can become better here; use it as a guard, or take harder items")


def cut_answers(task: ProbedTask) -> Iterator[Concern]:
    """Answers that end where `max_gen_toks` ends them."""
    cut = {model: [a for a in wrong_answers(task, model) if a[1].cut] for model in task.models}
    model = max(cut, key=lambda name: len(cut[name]))
    if many(len(cut[model]), task):
        what = f"task {task.name}: {len(cut[model])} of {len(task.items)} answers of {model} were cut by `max_gen_toks`"
        yield Concern(what, "raise it in the task's `generation_kwargs`, or give a stop text in `until`")


def nearly_right(task: ProbedTask) -> Iterator[Concern]:
    """Wrong answers that differ from the gold answer only in form."""
    found: dict[tuple[str, str], list[str]] = {}
    for model in task.models:
        for item, answer in wrong_answers(task, model):
            if why := form(item, answer.taken):
                found.setdefault(why, []).append(model)
    for (what, mend), models in found.items():
        model = max(models, key=models.count)
        if many(models.count(model), task):
            count = f"{models.count(model)} of {len(task.items)}"
            yield Concern(f"task {task.name}: {count} answers of {model} are wrong only by {what}", mend)


def unwritten(task: ProbedTask) -> Iterator[Concern]:
    """A gold answer that models do not write where they answer right."""
    right = [a for item in task.items for a in item.answers.values() if a.metric >= 1.0]
    if task.kind != "generate_until" or task.objective not in ANSWERS or len(right) < SOME:
        return
    if not float(np.mean([a.written for a in right])) < UNWRITTEN:
        return
    what = f"task {task.name}: where models answer right they do not write its gold answer"
    spaced = [a.text[:1].isspace() for a in right]
    if task.delimiter == " " and not any(spaced):
        mend = "set `target_delimiter: ''` in the task file: they write no space before the answer"
    elif task.delimiter == "" and all(spaced):
        mend = "set `target_delimiter: ' '` in the task file: they write a space before the answer"
    else:
        mend = "give `gold` beside the task in the configuration: the answer as they write it"
    yield Concern(what, mend)


def wrong_answers(task: ProbedTask, model: str) -> list[tuple[ProbedItem, Answered]]:
    """The items that a model answers wrongly, with its answers."""
    each = [(item, item.answers[model]) for item in task.items]
    return [(item, answer) for item, answer in each if answer.metric < 1.0]


def form(item: ProbedItem, taken: str) -> tuple[str, str] | None:
    """What alone makes an answer differ from the gold answer, and the mend; None if it is more than its form."""
    gold = item.gold
    if taken == gold:
        return None
    if taken.strip() == gold.strip():
        return (
            "spaces",
            'strip both: `doc_to_target: "{{...|trim}}"`, and a filter that takes the answer without spaces',
        )
    if taken.strip().lower() == gold.strip().lower():
        return "upper and lower case", "give `ignore_case: true` beside the metric"
    short, long = bare(gold), bare(taken)
    if not short:
        return None
    if long == short:
        return "quotes or punctuation", "give `ignore_punctuation: true` beside the metric, or a filter"
    if number_of(long) is not None and number_of(long) == number_of(short):
        return "how the number is written", "give `regexes_to_ignore: [',', '\\$']`, or a filter that takes the number"
    if re.match(rf"{re.escape(short)}(?!\w)", long):
        return "text that follows it", "cut it: a text in `until`, or a filter that takes the first line or the number"
    if re.search(rf"(?<!\w){re.escape(short)}$", long):
        return "text that precedes it", "give a filter that takes what follows it, such as the last number"
    return None


def bare(text: str) -> str:
    """A text without quotes, punctuation at its ends, and case."""
    return text.strip().strip("\"'`“”‘’.,;:!?*()[] \n").lower()


def number_of(text: str) -> float | None:
    """The number that a text consists of, but for a currency or a unit sign; None if it is none."""
    found = NUMBER.fullmatch(text.strip("$€£% "))
    value = float(found.group().replace(",", "")) if found else math.inf
    return value if math.isfinite(value) else None


def unlike_ranking(task: ProbedTask) -> Iterator[Concern]:
    """The objective's best model is far from the best by the metric."""
    if task.objective == task.metric or len(task.items) < ENOUGH:
        return
    by = {which: max(task.models, key=lambda m: task.mean(which, m)) for which in ("objective", "metric")}
    gaps = np.subtract(task.scores("metric", by["metric"]), task.scores("metric", by["objective"]))
    if by["objective"] != by["metric"] and gaps.mean() > 2 * gaps.std(ddof=1) / len(gaps) ** 0.5:
        what = (
            f"task {task.name}: {by['objective']} is best by {task.objective} and {by['metric']} by {task.metric}, "
            "so the search may climb away from what it is for"
        )
        yield Concern(what, "give `gold`, the answer as models write it, or `objective: metric`")


def many(count: int, task: ProbedTask) -> bool:
    """Whether so many of a model's answers are no accident."""
    return count >= SOME and count >= SHARE * len(task.items)

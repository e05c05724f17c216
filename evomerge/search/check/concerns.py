"""What a probe, the splits and the limits of a search warn of, each with its mend."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.tasks import Split
from evomerge.search.check.forecast import Forecast
from evomerge.search.check.probe import BASE, Answered, ProbedItem, ProbedTask
from evomerge.search.evaluation.settled_scale import UNWRITTEN
from evomerge.search.verdict.intervals import STANDARD_ERRORS

FEW = 20  # candidates; with fewer a search is hardly one
GAINS = (0.02, 0.05, 0.10)  # of the mean metric, that a user may want to see
SOME, SHARE = 2, 0.15  # of a model's answers, of a kind that makes a concern
ENOUGH = 8  # items that allow a comparison of objective and metric


@dataclass(frozen=True)
class Concern:
    """A warning.

    what: one sentence.
    mend: what to do about it.
    """

    what: str
    mend: str


def task_concerns(task: ProbedTask) -> Iterator[Concern]:
    """What the answers to a task's items say about the task."""
    yield from same_scores(task)
    if task.kind == "generate_until" and task.right is not None:
        yield from cut_answers(task)
        yield from nearly_right(task)
        yield from unwritten(task)
    yield from unlike_ranking(task)


def same_scores(task: ProbedTask) -> Iterator[Concern]:
    """Every model is right or wrong everywhere."""
    means = [task.mean("metric", model) for model in task.models]
    if task.right is None or min(means) != max(means) or means[0] not in (0.0, task.right):
        return
    if means[0] == 0.0:
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
    right = [a.objective for item in task.items for a in item.answers.values() if a.metric >= 1.0]
    if task.objective == "answer_logprob" and len(right) >= SOME and float(np.mean(right)) < UNWRITTEN:
        what = f"task {task.name}: where models answer right they do not write its gold answer"
        yield Concern(what, "give `gold`, the answer as they write it; else only the metric counts")


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
    if bare(taken) == bare(gold) and bare(gold):
        return "quotes or punctuation", "give `ignore_punctuation: true` beside the metric, or a filter"
    if bare(gold) and re.match(rf"{re.escape(bare(gold))}\b", bare(taken)):
        return "text that follows it", "cut it: a text in `until`, or a filter that takes the first line or the number"
    return None


def bare(text: str) -> str:
    """A text without quotes, punctuation at its ends, and case."""
    return text.strip().strip("\"'`“”‘’.,;:!?*()[] \n").lower()


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


def split_concerns(questions: Mapping[str, Mapping[Split, Sequence[str]]]) -> Iterator[Concern]:
    """Items that are in two splits but for spaces, case and punctuation.

    questions: task -> split -> the question of every item.
    """
    for task, splits in questions.items():
        seen = {split: {plain(text) for text in texts} - {""} for split, texts in splits.items()}
        pairs: tuple[tuple[Split, Split], ...] = (
            ("search", "holdout"),
            ("search", "selection"),
            ("selection", "holdout"),
        )
        for first, second in pairs:
            if both := seen[first] & seen[second]:
                what = f"task {task}: {len(both)} items of {first} are in {second} too, but for spaces, case or signs"
                yield Concern(what, "take them out of the data; else the verdict is about items that were searched")


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def stranger_concerns(strangers: Sequence[str]) -> Iterator[Concern]:
    """Sources that are no fine-tunes of the base."""
    for name in strangers:
        what = (
            f"{name} is another model rather than a fine-tune of this base: its weights have hardly anything in common"
        )
        yield Concern(
            what, "leave it out, or find the base that it was made from; `evomerge inspect` has the distances"
        )


def chat_concerns(templates: Sequence[str], asked_plainly: Sequence[str]) -> Iterator[Concern]:
    """Chat models that are asked without their template.

    templates: the models whose tokenizer has a chat template.  asked_plainly: the tasks without one.
    """
    if templates and asked_plainly:
        what = f"{', '.join(templates)}: made for chats, and {', '.join(asked_plainly)} asks without the chat template"
        yield Concern(what, "set `apply_chat_template: true` if these models were trained on chats")


def holdout_concern(
    tasks: Sequence[ProbedTask], holdout: Mapping[str, int], weights: Mapping[str, float]
) -> Iterator[Concern]:
    """Which gains the holdout items cannot show, by how much the sources differ on the probed items.

    holdout: how many items each task has there.  weights: of the goals.
    """
    goals = [task for task in tasks if task.name in weights]
    if any(task.right is None for task in goals) or min((len(t.items) for t in goals), default=0) < ENOUGH:
        return
    variance, whole = 0.0, sum(weights.values())
    for task in goals:
        ranked = sorted((m for m in task.models if m != BASE), key=lambda m: -task.mean("metric", m))
        pair = [*ranked, BASE][:2]
        gaps = np.subtract(task.scores("metric", pair[0]), task.scores("metric", pair[1]))
        spread = max(float(np.var(gaps)), 0.1)  # of a good candidate and the best source at least a tenth change
        variance += (weights[task.name] / whole) ** 2 * spread / holdout[task.name]
    least = STANDARD_ERRORS * variance**0.5
    unseen = [gain for gain in GAINS if gain < least]
    if unseen and max(unseen) >= GAINS[1]:
        what = f"the holdout items can show a gain of {least:.2f} of the mean metric, not one of {max(unseen):.2f}"
        yield Concern(what, "give `splits` more holdout items, or be content with large gains")


def forecast_concerns(forecast: Forecast) -> Iterator[Concern]:
    """Limits and memory that do not suffice."""
    if forecast.candidates is not None and forecast.candidates < FEW:
        what = f"the time limit leaves room for about {forecast.candidates} candidates"
        yield Concern(what, f"give it {duration(forecast.needed(FEW))} or more, or fewer search items")
    if forecast.disk > forecast.disk_left:
        what = f"an export needs {forecast.disk / 1e9:.1f} GB of disk, {forecast.disk_left / 1e9:.1f} GB are free"
        yield Concern(what, "make room before the morning, or give --out on another disk")


def many(count: int, task: ProbedTask) -> bool:
    """Whether so many of a model's answers are no accident."""
    return count >= SOME and count >= SHARE * len(task.items)


def duration(seconds: float) -> str:
    """A time that a user can give as a limit."""
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"

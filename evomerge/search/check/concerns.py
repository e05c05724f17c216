"""What splits, sources and limits of a search warn of, each with its mend; answers are in answers.py."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.tasks import Split
from evomerge.search.check.forecast import Forecast
from evomerge.search.check.near_duplicates import Text, near_duplicates
from evomerge.search.check.probe import BASE, ProbedTask
from evomerge.search.evaluation.guards import Guard
from evomerge.search.verdict.intervals import ONE_SIDED, STANDARD_ERRORS
from evomerge.search.verdict.verdict import ENOUGH_SEARCHED

GAINS = (0.02, 0.05, 0.10)  # of the mean metric, that a user may want to see
ENOUGH = 8  # items of a task from which a variance is estimated
LEAST_CHANGED = 0.1  # share of right or wrong answers in which a good candidate differs from a source, at least
SHOWN = 60  # characters of a question in a message
MEND_SPLITS = "take them out of the data; else the verdict is about items that were searched"


@dataclass(frozen=True)
class Concern:
    """A warning.

    what: one sentence.
    mend: what to do about it.
    """

    what: str
    mend: str


def split_concerns(questions: Mapping[str, Mapping[Split, Sequence[Text]]]) -> Iterator[Concern]:
    """Items that are in two splits but for spaces, case and punctuation, or nearly.

    questions: task -> split -> question and answer of every item.
    """
    pairs: tuple[tuple[Split, Split], ...] = (("search", "holdout"), ("search", "selection"), ("selection", "holdout"))
    for task, splits in questions.items():
        seen = {split: {plain(t.question): t.question for t in texts} for split, texts in splits.items()}
        near = near_duplicates(splits)
        for first, second in pairs:
            both = (seen[first].keys() & seen[second].keys()) - {""}
            if both:
                example = shortened(seen[first][min(both)])
                what = f"task {task}: {len(both)} items of {first} are in {second} too, but for spaces, case or signs"
                yield Concern(f"{what}, such as {example!r}", MEND_SPLITS)
            found = [(a, b) for a, b in near.get((first, second), []) if plain(a.question) != plain(b.question)]
            if found:
                one, other = (shortened(text.question) for text in found[0])
                what = f"task {task}: {len(found)} items of {first} nearly repeat one of {second}"
                yield Concern(f"{what}, such as {one!r} and {other!r}", MEND_SPLITS)


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def stranger_concerns(strangers: Sequence[str]) -> Iterator[Concern]:
    """Sources that are no fine-tunes of the base."""
    for name in strangers:
        what = (
            f"{name} is another model rather than a fine-tune of this base: its weights have hardly anything in common"
        )
        yield Concern(
            what, "leave it out, or find the base that it was made from; `evomerge inspect` has the distances"
        )


def doubt_concerns(doubts: Sequence[str]) -> Iterator[Concern]:
    """Adapters that were perhaps trained on another base.  doubts: see `Compatibility`."""
    for doubt in doubts:
        yield Concern(doubt, "compare with `evomerge evaluate`: on the right base the adapter is better than the base")


def chat_concerns(templates: Sequence[str], asked_plainly: Sequence[str]) -> Iterator[Concern]:
    """Chat models that are asked without their template.

    templates: the models whose tokenizer has a chat template.  asked_plainly: the tasks without one.
    """
    if templates and asked_plainly:
        what = f"{', '.join(templates)}: made for chats, and {', '.join(asked_plainly)} asks without the chat template"
        yield Concern(what, "set `apply_chat_template: true` if these models were trained on chats")


def least_gain(tasks: Sequence[ProbedTask], holdout: Mapping[str, int], weights: Mapping[str, float]) -> float | None:
    """The gain of the mean metric that the holdout items show four times in five, by how much the best two models
    differ on the probed items; None where the metrics are not right or wrong, or too few items were probed.

    holdout: how many items each task has there.  weights: of the goals.
    """
    goals = [task for task in tasks if task.name in weights]
    if any(task.right is None for task in goals) or min((len(t.items) for t in goals), default=0) < ENOUGH:
        return None
    variance, whole = 0.0, sum(weights.values())
    for task in goals:
        ranked = sorted((m for m in task.models if m != BASE), key=lambda m: -task.mean("metric", m))
        pair = [*ranked, BASE][:2]
        gaps = np.subtract(task.scores("metric", pair[0]), task.scores("metric", pair[1]))
        spread = max(float(np.var(gaps)), LEAST_CHANGED)
        variance += (weights[task.name] / whole) ** 2 * spread / holdout[task.name]
    return float(STANDARD_ERRORS * variance**0.5)


def holdout_concern(least: float | None) -> Iterator[Concern]:
    """Which gains the holdout items cannot show.  least: see `least_gain`."""
    if least is None or least <= GAINS[1]:
        return
    unseen = [f"{100 * gain:.0f}" for gain in GAINS if gain < least]
    what = f"the holdout items can show a gain of {100 * least:.1f} points or more, not one of {' or '.join(unseen)}"
    yield Concern(what, "give `splits` more holdout items, or be content with large gains")


def guard_concerns(
    guards: Sequence[Guard], tasks: Sequence[ProbedTask], holdout: Mapping[str, int]
) -> Iterator[Concern]:
    """Guards that the holdout items cannot show to be kept, not even by a candidate that loses nothing.

    holdout: how many items each task has there.
    """
    probed = {task.name: task for task in tasks}
    for guard in guards:
        own = [probed[name] for name in guard.metrics]
        counts = [holdout[task.name] for task in own]
        if min(len(task.items) for task in own) < ENOUGH:
            continue
        doubt = drop_doubt(own, guard.of, counts)
        if doubt <= guard.max_drop:
            continue
        allowed = 10.0 ** (math.floor(math.log10(doubt)) - 1)  # two digits
        mend = f"give the guard a `max_drop` of {math.ceil(doubt / allowed) * allowed:.2g}"
        if guard.max_drop > 0:
            times = 1.1
            while drop_doubt(own, guard.of, [times * n for n in counts]) > guard.max_drop:
                times *= 1.1
            mend = f"give `splits` {math.ceil(times * min(counts))} holdout items, or {mend}"
        what = (
            f"guard {guard.name}: {sum(counts)} holdout items show a drop to within {doubt:.2g}, and "
            f"{guard.max_drop:g} is allowed, so a candidate that loses nothing is not shown to keep it"
        )
        yield Concern(what, mend)


def drop_doubt(tasks: Sequence[ProbedTask], reference: str, items: Sequence[float]) -> float:
    """How far the upper end of a guard's interval is above the drop.

    tasks: the guard's; the model that differs least from the reference says how much its items vary.
    items: how many holdout items each task has.
    """
    variance, extreme = 0.0, 0.0
    for task, count in zip(tasks, items, strict=True):
        before = task.scores("metric", reference)
        others = [np.subtract(before, task.scores("metric", m)) for m in task.models if m != reference]
        least = min(float(np.var(gaps)) for gaps in others)
        variance += (least if task.right is None else max(least, LEAST_CHANGED)) / count / len(tasks) ** 2
        every = [score for m in task.models for score in task.scores("metric", m)]
        width = 1.0 if task.right is not None else max(every) - min(every)
        extreme = max(extreme, width / count / len(tasks))  # the pseudo-item of `verdict/intervals.py`
    return float(ONE_SIDED * variance**0.5) + extreme


def forecast_concerns(forecast: Forecast) -> Iterator[Concern]:
    """Limits and memory that do not suffice."""
    if forecast.candidates is not None and forecast.candidates < ENOUGH_SEARCHED:
        what = f"the time limit leaves room for about {forecast.candidates} candidates"
        yield Concern(what, f"give it {duration(forecast.needed(ENOUGH_SEARCHED))} or more, or fewer search items")
    elif forecast.trials is not None and not forecast.steps and forecast.trials - forecast.baselines < ENOUGH_SEARCHED:
        left = max(0, forecast.trials - forecast.baselines)
        what = f"of {forecast.trials} trials {forecast.trials - left} are baselines, so {left} are left for candidates"
        yield Concern(what, f"give `trials` {ENOUGH_SEARCHED + forecast.baselines} or more")
    if forecast.disk > forecast.disk_left:
        what = f"an export needs {forecast.disk / 1e9:.1f} GB of disk, {forecast.disk_left / 1e9:.1f} GB are free"
        yield Concern(what, "make room before the morning, or give --out on another disk")


def duration(seconds: float) -> str:
    """A time that a user can give as a limit."""
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"

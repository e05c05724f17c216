"""The incumbent in numbers, for those who watch: its scores by task beside the best parent's, and its coefficients."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.search.evaluation.scale import Scale
from evomerge.search.monitor.snapshot import Coefficients, TaskScore
from evomerge.search.space.space import Space
from evomerge.search.storage.compact import Packed
from evomerge.search.storage.item_scores import evaluation_records, unpack
from evomerge.search.storage.trial_record import record_of

Means = dict[tuple[str, str], float]
"""(Task, metric) -> the mean over the items of the search split."""


def task_scores(
    trial: FrozenTrial, attributes: Mapping[str, Any], scale: Scale, base: str, parents: Sequence[str]
) -> tuple[TaskScore, ...]:
    """A trial's mean scores beside those of the best parent and the base, as far as they are known.

    trial: scored on all items.
    attributes: the study's.
    scale: it names objectives, metrics and guards.
    base, parents: the names of their evaluations.

    First all tasks by the objective, then those with another metric by that, then the guards.
    """
    known: dict[str, Means] = {}
    for record in evaluation_records(attributes, ["search"]).values():
        if record.name is not None and record.partial is None:
            known.setdefault(record.name, {}).update(means(record.scores))
    own = means(record_of(trial).scores) | known.get(str(trial.user_attrs.get("baseline", f"trial {trial.number}")), {})
    asked = [(name, task.objective.name) for name, task in scale.tasks.items()]
    asked += [(name, task.metric.name) for name, task in scale.tasks.items()]
    asked += [pair for guard in scale.guards.values() for pair in guard.guard.metrics.items()]
    found = []
    for task, metric in dict.fromkeys(asked):
        if (value := own.get((task, metric))) is None:
            continue
        scored = {name: known[name][task, metric] for name in parents if (task, metric) in known.get(name, {})}
        best = max(scored, key=scored.__getitem__, default=None)
        parent = None if best is None else scored[best]
        found.append(TaskScore(task, metric, value, parent, best, known.get(base, {}).get((task, metric))))
    return tuple(found)


def means(scores: Packed) -> Means:
    """The mean of the items of each task and metric.  scores: of all items."""
    return {(task, metric): float(np.mean(unpack(text))) for task, by in scores.items() for metric, text in by.items()}


def coefficients_of(point: Mapping[str, Any], space: Space) -> tuple[Coefficients, ...]:
    """What a point gives each source: of every searched knob the mean, the least and the greatest of its values.

    Where whole layers are chosen: how many layers each source gives.
    """
    if space.assembly is not None:
        given = Counter(point[slot.name] for slot in space.assembly.slots if slot.name in point)
        return tuple(Coefficients("layers", source, *[float(given[source])] * 3) for source in space.assembly.sources)
    return tuple(searched_coefficients(point, space))


def searched_coefficients(point: Mapping[str, Any], space: Space) -> Iterator[Coefficients]:
    """The coefficients of every knob that is searched for at least one source, fixed sources included."""
    searched = {group.knob for group in space.groups if not group.fixed}
    values: dict[tuple[str, str | None], list[float]] = {}
    for group in space.groups:
        there = group.fixed or all(axis in point for axis in group.axes)  # a trial of before may lack an axis
        if group.knob in searched and not group.idle and there:
            each = [group.low] if group.fixed else [float(point[axis]) for axis in group.axes]
            values.setdefault((group.knob, group.source), []).extend(each)
    for (knob, source), each in values.items():
        yield Coefficients(knob, source, float(np.mean(each)), min(each), max(each))

"""The gradient steps of a search's learned start: how many there were, what they gained and cost.

A step's value is that of its own mini-batch, so it varies from step to step; the mean over SMOOTHED steps shows where
the steps lead.
"""

from collections.abc import Sequence

from evomerge.report.progress import seconds_text
from evomerge.search.budget.usage import Usage
from evomerge.search.storage.step_record import StepRecord

SMOOTHED = 10  # steps whose mean is one point of the curve


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, of SMOOTHED at most."""
    windows = [values[max(0, end - SMOOTHED) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def curves(climbs: Sequence[Sequence[StepRecord]]) -> list[tuple[list[int], list[float]]]:
    """For each climb the numbers of its steps, from 1 and on from climb to climb, and their values."""
    found, begun = [], 0
    for climb in climbs:
        found.append((list(range(begun + 1, begun + len(climb) + 1)), [step.value for step in climb]))
        begun += len(climb)
    return found


def steps_text(climbs: Sequence[Sequence[StepRecord]], used: Usage) -> str:
    """The learned start in words.

    climbs: the steps of each, the one by the search's own task weights first.
    used: by the whole run.
    """
    steps = [step for climb in climbs for step in climb]
    values = [step.value for step in climbs[0]]
    few = min(SMOOTHED, len(values))
    first, last = sum(values[:few]) / few, sum(values[-few:]) / few
    several = f" in {len(climbs)} climbs by different task weights" if len(climbs) > 1 else ""
    text = (
        f"learned start: {len(steps)} gradient steps{several}; mean value of the mini-batches "
        f"{first:.3f} in the first {few} steps, {last:.3f} in the last {few}"
    )
    own = sum((step.used for step in steps if step.used is not None), Usage())
    if not own.worker_seconds:
        return text
    share = f" ({own.worker_seconds / used.worker_seconds:.0%} of the run's)" if used.worker_seconds else ""
    return f"{text}; they took {seconds_text(own.worker_seconds)} of computing{share}"

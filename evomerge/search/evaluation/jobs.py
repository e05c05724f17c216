"""What the driver asks a worker to do (`Job`) and what comes back (`Result`).  Plain data, sent between processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.evaluate.answers import Answer
from evomerge.evaluate.canary import Broken
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Estimate, Race
from evomerge.evaluate.signs import Signs
from evomerge.evaluate.tasks import Split
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.budget.usage import Usage
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.task_set import Scores
from evomerge.search.space.space import KnobGradient


@dataclass(frozen=True)
class TrialJob:
    """Score a candidate on the search split by what trials are scored by (`TaskSet.wanted`).

    recipe: of the candidate.
    normal: what the canary found in healthy models; None accepts every candidate with finite logits.
    race_setup, race: stop the trial when it is surely worse than the incumbent; None scores it on all items.
    """

    recipe: Recipe
    normal: Signs | None
    race_setup: RaceSetup | None = None
    race: Race | None = None


@dataclass(frozen=True)
class EvaluationJob:
    """Score a model on a split: by what trials are scored by on the search split, by every metric on the others.

    only: the ids of the items by task; None for all items.
    everything: by every metric also on the search split.
    canary: also measure the signs of a healthy model (`evaluate/canary.py`).
    """

    recipe: Recipe
    split: Split
    only: Mapping[str, Sequence[str]] | None = None
    everything: bool = False
    canary: bool = False


@dataclass(frozen=True)
class RaceLooksJob:
    """Find out after which items races should look at a candidate."""

    race_setup: RaceSetup


@dataclass(frozen=True)
class GradientJob:
    """Compute the derivative of a mini-batch's objective by every coefficient of a recipe.

    items: the ids of the items by task, all of the search split.
    weights: what the raw objective of one item counts, by task.
    """

    recipe: Recipe
    items: Mapping[str, Sequence[str]]
    weights: Mapping[str, float]


Job = TrialJob | EvaluationJob | RaceLooksJob | GradientJob

NOTHING = Usage()


@dataclass(frozen=True)
class Outcome:
    """The result of a job that was done.

    scores: item scores; NaN for items that were not scored.
    seconds: by part of the work.
    signs: what the canary found; None if it was not asked.
    estimate: the estimated value, of a candidate that a race stopped.
    looks: of a `RaceLooksJob`.
    gradient: of a `GradientJob`; what is derived rises with the objectives.
    answers: task -> what the model answered to its items, of an `EvaluationJob` on the holdout split.
    used: time, tokens and memory that the job took.
    """

    scores: Scores
    seconds: dict[str, float]
    signs: Signs | None = None
    estimate: Estimate | None = None
    looks: Looks | None = None
    gradient: KnobGradient = field(default_factory=dict)
    answers: Mapping[str, Sequence[Answer]] = field(default_factory=dict)
    used: Usage = NOTHING


@dataclass(frozen=True)
class Failure:
    """The result of a job that failed.

    reason: in one line.
    broken: whether the candidate is the cause: its weights or scores are not finite, or the canary rejected it.
    """

    reason: str
    broken: bool = False
    traceback: str = ""
    used: Usage = NOTHING

    def error(self) -> Exception:
        """The failure as an exception."""
        return Broken(self.reason) if self.broken else RuntimeError(f"{self.reason}\n{self.traceback}")


Result = Outcome | Failure

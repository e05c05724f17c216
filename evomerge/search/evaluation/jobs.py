"""What driver and workers say to each other: a recipe and what to score there, item scores back.  Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluate.canary import Broken, Signs
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Estimate, Race
from evomerge.evaluate.tasks import Split
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.budget.usage import Usage
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.task_set import Scores


@dataclass(frozen=True)
class TrialJob:
    """A trial: is the candidate healthy, and what is its objective on the search split?

    normal: the signs of healthy models.  race_setup, race: to stop the trial when it is surely worse than the
    incumbent; without a race it is scored on all items.
    """

    recipe: Recipe
    normal: Signs | None
    race_setup: RaceSetup | None = None
    race: Race | None = None


@dataclass(frozen=True)
class FullEvaluation:
    """A recipe on a split: its objective on the search split, every metric on the others.

    only: the ids of the items by task, if not all of them.
    """

    recipe: Recipe
    split: Split
    only: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class RaceLooksJob:
    """Where should races of a race setup look?"""

    race_setup: RaceSetup


Job = TrialJob | FullEvaluation | RaceLooksJob

NOTHING = Usage()


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    scores: NaN for items that were not evaluated.  seconds: by part of the work.  signs: what the canary saw.
    estimate: of a candidate that was stopped.  looks: where races should look, of a `RaceLooksJob`.  used: what
    it took.
    """

    scores: Scores
    seconds: dict[str, float]
    signs: Signs | None = None
    estimate: Estimate | None = None
    looks: Looks | None = None
    used: Usage = NOTHING


@dataclass(frozen=True)
class Failure:
    """Why there is no outcome, in one line.  broken: it is the candidate's fault: its weights or scores are not finite,
    or it is not worth scoring."""

    reason: str
    broken: bool = False
    traceback: str = ""
    used: Usage = NOTHING

    def error(self) -> Exception:
        """The failure as an exception."""
        return Broken(self.reason) if self.broken else RuntimeError(f"{self.reason}\n{self.traceback}")


Result = Outcome | Failure

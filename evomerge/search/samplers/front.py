"""With `goals: pareto` a search for several models: of a sampler that is told one value a task, then by turns.

    several   the first trials after a learned start, if `auto` says so, and all those of a sampler for several goals:
              the sampler is told the value of each task, minus the guards' penalties
    turns     sets of task weights, those that a learned start climbs by (learned/climbs.py); the first are the search's
    turn      of a trial: its number modulo how many there are
    value     of a trial, as a turn sees it: the mean over the tasks by the turn's weights, minus the guards' penalties

A turn is a search of its own.  Its sampler sees all trials of the study with their values by the turn's weights; those
of other turns look to it like trials whose points were given.  A trial that a race stopped has a value for its own turn
alone.  A trial of a sampler for several goals does not race: no weights say what it has to be better at.

Where nothing has been learned, the first trials of a study all go by the search's weights.  Up to there every task gets
better together, and that finds the larger hypervolume (benchmarks/pareto.py).

Nothing is kept outside the study: what a sampler sees follows from the trials' numbers, attributes and records.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.search.evaluation.scale import Scale
from evomerge.search.learned.climbs import Weights, climbs
from evomerge.search.samplers.auto import MOST_GOALS
from evomerge.search.samplers.cmaes import is_enqueued
from evomerge.search.samplers.registry import made, sampler_kind
from evomerge.search.samplers.sampler_kind import SamplerSetup, SamplerWithMean, WholePointSampler
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.optuna_private import (
    FIXED_PARAMETERS,
    MemoryStorage,
    key_of_study,
    set_system_attribute,
)
from evomerge.search.storage.trial_record import LEARNED, WEIGHTS, record_of

FIRST = 60  # trials by the search's weights, where nothing has been learned
SEVERAL = -1  # the turn of trials whose sampler is told one value a task; their WEIGHTS are empty


class FrontSampler(WholePointSampler):
    """Lets other samplers look for the front of several tasks.

    axes: the bounds of each parameter by name, in order.
    scale: of the study; it has the weights of the search.
    make: makes the sampler of a turn for one trial, by the trial's number.
    kept: whether a turn's sampler is made once a process.
    several: makes the sampler that is told one value a task, for one trial, by the trial's number.
    until: the trials before this number are its.
    """

    axes: Mapping[str, FloatDistribution]

    def __init__(
        self,
        axes: Mapping[str, FloatDistribution],
        scale: Scale,
        make: Callable[[int], BaseSampler],
        kept: bool,
        several: Callable[[int], BaseSampler],
        until: float,
    ) -> None:
        self.axes = axes
        self.scales = [scale.weighted(weights) for weights in turns_of(scale.weights)]
        self.make = make
        self.kept = kept
        self.several = several
        self.until = until
        self.samplers: dict[int, BaseSampler] = {}
        self.known: dict[tuple[int, int], list[float] | None] = {}  # (turn, trial number) -> `values`

    def turn(self, number: int, trials: Sequence[FrozenTrial]) -> int:
        """The turn of a trial.  trials: of the study."""
        if number < self.until:
            return SEVERAL
        early = number < FIRST and not any(LEARNED in trial.user_attrs for trial in trials)
        return 0 if early else number % len(self.scales)

    def weights(self, number: int, trials: Sequence[FrozenTrial]) -> Weights | None:
        """The task weights of a trial; None: the search's; empty: its sampler is told one value a task.

        trials: of the study.
        """
        turn = self.turn(number, trials)
        if turn == SEVERAL:
            return {}
        return self.scales[turn].weights if turn else None

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a trial, as the sampler of its turn proposes them."""
        if is_enqueued(trial):
            return {}  # its parameters are given
        view = self.view(study, self.turn(trial.number, study.get_trials(deepcopy=False)), trial.number)
        asked = view.ask()
        assert asked.number == trial.number, "the trial is the only one that waits"
        point = {name: asked.suggest_float(name, axis.low, axis.high) for name, axis in self.axes.items()}
        for key, value in view.get_trials(deepcopy=False)[trial.number].system_attrs.items():
            set_system_attribute(study, trial, key, value)
        return point

    def distribution_mean(self, study: Study) -> dict[str, float] | None:
        """The mean of the distribution of the search's own weights, None if there is none."""
        view = self.view(study, 0, None)
        return view.sampler.distribution_mean(view) if isinstance(view.sampler, SamplerWithMean) else None

    def view(self, study: Study, turn: int, waiting: int | None) -> Study:
        """The study as a turn sees it, with the turn's sampler.  waiting: the trial that is to be proposed."""
        trials = study.get_trials(deepcopy=False)
        storage = MemoryStorage()
        sampler = self.sampler(turn, len(trials) if waiting is None else waiting)
        goals = len(self.scales[0].tasks) if turn == SEVERAL else 1
        view = optuna.create_study(storage=storage, directions=["maximize"] * goals, sampler=sampler)
        worst = self.worst(trials) if turn == SEVERAL else None
        for trial in trials:
            seen = create_trial(state=TrialState.WAITING) if trial.number == waiting else self.seen(trial, turn, worst)
            storage.create_new_trial(key_of_study(view), seen)
        return view

    def sampler(self, turn: int, number: int) -> BaseSampler:
        """The sampler of a turn for a trial."""
        if turn == SEVERAL:
            return self.several(number)
        if not self.kept:
            return self.make(number)
        if turn not in self.samplers:
            self.samplers[turn] = self.make(number)
        return self.samplers[turn]

    def seen(self, trial: FrozenTrial, turn: int, worst: list[float] | None) -> FrozenTrial:
        """A trial as a turn sees it.  worst: what a broken candidate has for SEVERAL; None: nothing yet."""
        if trial.state == TrialState.WAITING:
            return create_trial(state=TrialState.RUNNING)
        found = copy(trial)
        own = self.turn_of(trial) == turn
        if not own:
            found.system_attrs = {FIXED_PARAMETERS: trial.params}
        if trial.state != TrialState.COMPLETE:
            return found
        values: list[float] | None = [trial.value or 0.0]  # as told; of a stopped trial by its own weights
        if record_of(trial).broken is not None:
            values = worst if turn == SEVERAL else values
        elif record_of(trial).partial is None:
            values = self.values(trial, turn)
        elif not own:
            values = None
        found.values, found.state = values, TrialState.FAIL if values is None else TrialState.COMPLETE
        return found

    def turn_of(self, trial: FrozenTrial) -> int | None:
        """The turn that proposed a trial, None if its point was given."""
        if is_enqueued(trial) or LEARNED in trial.user_attrs:
            return None
        weights = trial.user_attrs.get(WEIGHTS)
        if weights is None:
            return 0
        if not weights:
            return SEVERAL
        return next((k for k, scale in enumerate(self.scales) if k and scale.weights == weights), None)

    def values(self, trial: FrozenTrial, turn: int) -> list[float] | None:
        """What a trial that was scored in full has for a turn; None if the tasks have changed since."""
        if turn == 0:
            return [trial.value or 0.0]
        key = turn, trial.number
        if key not in self.known:
            scores = trial_scores(trial)
            covered = self.scales[0].covers(scores)
            if turn == SEVERAL:
                self.known[key] = self.each(scores) if covered else None
            else:
                self.known[key] = [self.scales[turn].value(scores) if covered else trial.value or 0.0]
        return self.known[key]

    def each(self, scores: Mapping[str, Mapping[str, Any]]) -> list[float]:
        """The value of each task, minus the guards' penalties."""
        scale = self.scales[0]
        penalty, found = scale.penalty(scores), scale.item_values(scores)
        return [float(found[task].mean()) - penalty for task in scale.tasks]

    def worst(self, trials: Sequence[FrozenTrial]) -> list[float] | None:
        """The lowest value of each task so far, None before there is one."""
        full = [t for t in trials if t.state == TrialState.COMPLETE and record_of(t).in_full]
        found = [values for trial in full if (values := self.values(trial, SEVERAL)) is not None]
        return [min(column) for column in zip(*found, strict=True)] or None


def turns_of(weights: Weights) -> Sequence[Weights]:
    """The task weights of all turns.  weights: of the search."""
    return [climb.weights for climb in climbs(weights, 1, pareto=True)]


def make_front_sampler(
    axes: Mapping[str, FloatDistribution], scale: Scale, name: str, setup: Callable[[int], SamplerSetup], until: int
) -> FrontSampler:
    """The sampler of a study with `goals: pareto`.

    axes, scale: as in `FrontSampler`.
    name: of the sampler in the user's configuration.
    setup: what the sampler of the turns is made from, by the number of the trial.
    until: the trials before this number are of a Gaussian process that is told one value a task; all are if the user
        has named it.
    """
    several, named = sampler_kind("gp").several, sampler_kind(name).several
    assert several is not None, "a Gaussian process can be told several values"
    kind = sampler_kind(setup(0).config.name)
    return FrontSampler(
        axes,
        scale,
        lambda number: made(kind.make, setup(number)),
        kind.serves_all_trials,
        lambda number: made(named or several, setup(number)),
        math.inf if named and len(scale.tasks) <= MOST_GOALS else until,
    )

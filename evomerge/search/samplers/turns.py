"""With `goals: pareto` a search for several models: the sampler's trials go by several task weights in turn.

    turns     sets of task weights, those that a learned start climbs by (learned/climbs.py); the first are the search's
    turn      of a trial: its number modulo how many there are
    value     of a trial, as a turn sees it: the mean over the tasks by the turn's weights, minus the guards' penalties

A turn is a search of its own.  Its sampler sees all trials of the study with their values by the turn's weights; those
of other turns look to it like trials whose points were given.  A trial that a race stopped has a value for its own turn
alone.

Where nothing has been learned, the first trials of a study all go by the search's weights.  Up to there every task gets
better together, and that finds the larger hypervolume (benchmarks/pareto.py).

Nothing is kept outside the study: what a sampler sees follows from the trials' numbers, attributes and records.
"""

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
from evomerge.search.samplers.cmaes import is_enqueued
from evomerge.search.samplers.sampler_kind import SamplerWithMean, WholePointSampler
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.optuna_private import (
    FIXED_PARAMETERS,
    MemoryStorage,
    key_of_study,
    set_system_attribute,
)
from evomerge.search.storage.trial_record import LEARNED, WEIGHTS, record_of

FIRST = 60  # trials by the search's weights, where nothing has been learned


class TurnsSampler(WholePointSampler):
    """Lets a sampler for one value look for the front of several tasks.

    axes: the bounds of each parameter by name, in order.
    scale: of the study; it has the weights of the search.
    make: makes the sampler of a turn for one trial, by the trial's number.
    kept: whether a turn's sampler is made once a process.
    """

    axes: Mapping[str, FloatDistribution]

    def __init__(
        self,
        axes: Mapping[str, FloatDistribution],
        scale: Scale,
        make: Callable[[int], BaseSampler],
        kept: bool,
    ) -> None:
        self.axes = axes
        self.scales = [scale.weighted(weights) for weights in turns_of(scale.weights)]
        self.make = make
        self.kept = kept
        self.samplers: dict[int, BaseSampler] = {}
        self.values: dict[tuple[int, int], float] = {}  # (turn, trial number) -> its value

    def turn(self, number: int, trials: Sequence[FrozenTrial]) -> int:
        """The turn of a trial.  trials: of the study."""
        early = number < FIRST and not any(LEARNED in trial.user_attrs for trial in trials)
        return 0 if early else number % len(self.scales)

    def weights(self, number: int, trials: Sequence[FrozenTrial]) -> Weights | None:
        """The task weights of a trial; None if they are the search's.  trials: of the study."""
        turn = self.turn(number, trials)
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
        view = optuna.create_study(storage=storage, direction="maximize", sampler=sampler)
        for trial in trials:
            seen = create_trial(state=TrialState.WAITING) if trial.number == waiting else self.seen(trial, turn)
            storage.create_new_trial(key_of_study(view), seen)
        return view

    def sampler(self, turn: int, number: int) -> BaseSampler:
        """The sampler of a turn for a trial."""
        if not self.kept:
            return self.make(number)
        if turn not in self.samplers:
            self.samplers[turn] = self.make(number)
        return self.samplers[turn]

    def seen(self, trial: FrozenTrial, turn: int) -> FrozenTrial:
        """A trial as a turn sees it."""
        if trial.state == TrialState.WAITING:
            return create_trial(state=TrialState.RUNNING)
        found = copy(trial)
        own = self.turn_of(trial) == turn
        if not own:
            found.system_attrs = {FIXED_PARAMETERS: trial.params}
        if trial.state == TrialState.COMPLETE and record_of(trial).broken is None:
            if record_of(trial).partial is None:
                found.values = [self.value(trial, turn)]
            elif not own:
                found.values, found.state = None, TrialState.FAIL
        return found

    def turn_of(self, trial: FrozenTrial) -> int | None:
        """The turn that proposed a trial, None if its point was given."""
        if is_enqueued(trial) or LEARNED in trial.user_attrs:
            return None
        weights = trial.user_attrs.get(WEIGHTS)
        return next(
            (k for k, scale in enumerate(self.scales) if k and scale.weights == weights), None if weights else 0
        )

    def value(self, trial: FrozenTrial, turn: int) -> float:
        """The value that a trial that was scored in full has for a turn."""
        if turn == 0:
            return trial.value or 0.0
        key = turn, trial.number
        if key not in self.values:
            scale, scores = self.scales[turn], trial_scores(trial)
            self.values[key] = scale.value(scores) if scale.covers(scores) else trial.value or 0.0
        return self.values[key]


def turns_of(weights: Weights) -> Sequence[Weights]:
    """The task weights of all turns.  weights: of the search."""
    return [climb.weights for climb in climbs(weights, 1, pareto=True)]

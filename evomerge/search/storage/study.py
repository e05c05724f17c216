"""A search's study: who samples, what is in hand and what is finished, and how a trial is begun so that a crash costs
nothing."""

import bisect
import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.config.schema import SamplerConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Dtype
from evomerge.search.samplers.cmaes import CmaEsSampler, trial_seed
from evomerge.search.space.space import Point, Space
from evomerge.search.storage.database import storage_of

COMPUTE = "evomerge:compute"  # study attribute: the type of forwards, and what was measured to choose it
FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


class NumberedQMCSampler(optuna.samplers.QMCSampler):
    """Optuna's QMC sampler with the trial's number as the place in the sequence.

    Optuna counts places in the study's attributes, where a crash would skip or repeat one.
    """

    number = 0

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self.number


def make_sampler(config: SamplerConfig, space: Space, seed: int, number: int, workers: int = 1) -> BaseSampler:
    """A sampler for one trial, seeded by (study seed, trial number) and nothing else.

    CMA-ES reads the trial's number itself, so one object may serve all trials.
    """
    if config.name == "cma-es":
        return CmaEsSampler(space.axes, seed, config.sigma0, config.population, workers)
    once = trial_seed(seed, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.name == "tpe":
            return optuna.samplers.TPESampler(seed=once)
        if config.name == "nsga-ii":
            return optuna.samplers.NSGAIISampler(seed=once)
        if config.name == "gp":
            return optuna.samplers.GPSampler(seed=once, deterministic_objective=True)
        if config.name == "qmc":
            sampler = NumberedQMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
            sampler.number = number
            return sampler
        return optuna.samplers.RandomSampler(seed=once)


def record_of(trial: FrozenTrial) -> dict[str, Any]:
    """What `SearchStudy.finish` stored with a trial."""
    found: dict[str, Any] = trial.user_attrs.get("record", {})
    return found


def recorded_type(attributes: Mapping[str, Any]) -> Dtype | None:
    """The type that a study recorded, None if it has none.  attributes: the study's."""
    found: Dtype | None = attributes.get(COMPUTE, {}).get("dtype")
    return found


def in_full(trial: FrozenTrial) -> bool:
    """Whether a trial's value is that of all items: not stopped by the race, not broken."""
    return trial.state == TrialState.COMPLETE and is_whole(record_of(trial))


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record with a value is that of a trial evaluated in full."""
    return "partial" not in record and "broken" not in record


def rank(trial: FrozenTrial) -> tuple[float, int]:
    """What the better of two trials evaluated in full has more of; of equal ones the first is the better."""
    return trial.value or 0.0, -trial.number


def trial_seconds(trial: FrozenTrial) -> float:
    """Seconds of work in a finished trial."""
    return float(record_of(trial).get("seconds", {}).get("total", 0.0))


@dataclass(frozen=True)
class Begun:
    """A trial in hand.  trial_id: the database's key.  baseline: its name, if the trial is one."""

    trial_id: int
    number: int
    params: Point
    baseline: str | None


class Mirror(InMemoryStorage):
    """Optuna's storage in memory, which takes trials without copying all that is in them."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id)
        if template_trial is not None:
            trial = copy.copy(template_trial)
            trial.number, trial._trial_id = self.get_trial_number_from_id(trial_id), trial_id
            self._set_trial(trial_id, trial)
            self._update_cache(trial_id, study_id)
        return trial_id

    def set_trial_params(self, trial_id: int, params: dict[str, Any], axes: dict[str, BaseDistribution]) -> None:
        """Give a trial all its parameters at once."""
        trial = copy.copy(self.get_trial(trial_id))
        trial.params = {name: axis.to_external_repr(axis.to_internal_repr(params[name])) for name, axis in axes.items()}
        trial._distributions = dict(axes)
        self._set_trial(trial_id, trial)


class SearchStudy:
    """The study in its database, and a mirror of it in memory that the sampler works on.

    The sampler asks and suggests in the mirror, in milliseconds; the database gets a trial, whole, in one transaction
    before its work begins, and its result in one when it ends.  Any number of trials may be in hand, and they end in
    any order.  Those that a process left behind when it died are handed out first by the next.

    finished: in the order in which their results came.  complete: those evaluated in full, by number.  best: the best
    of these.  penalty: the value of a broken candidate, no better than any other; None before there is one.  seconds:
    of work in all finished trials.
    """

    def __init__(self, stored: optuna.Study, space: Space, workers: int = 1) -> None:
        self.stored = stored
        self.space = space
        self.axes = space.distributions
        self.storage = storage_of(stored)
        self.mirror_storage = Mirror()
        self.mirror = optuna.create_study(
            storage=self.mirror_storage, direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)
        )
        self.finished: list[FrozenTrial] = []
        self.complete: list[FrozenTrial] = []
        self.best: FrozenTrial | None = None
        self.penalty: float | None = None
        self.seconds = 0.0
        self.size = 0
        self.baselines: dict[str, int] = {}
        self.interrupted: list[FrozenTrial] = []
        self.cma: BaseSampler | None = None
        self.workers = workers  # how many trials may run at once; CMA-ES sizes its population by it
        there = sorted(stored.get_trials(deepcopy=False), key=lambda t: t.number)
        if [t.number for t in there] != list(range(len(there))):
            raise EvomergeError(f"study {stored.study_name!r}: its trial numbers have gaps; was it edited by hand?")
        for trial in there:
            self.take(trial)
        ended = [t for t in self.trials if t.state in FINISHED]
        for trial in sorted(ended, key=lambda t: (record_of(t).get("order", t.number), t.number)):
            self.count_in(trial)

    def take(self, trial: FrozenTrial) -> None:
        """Mirror a stored trial; one that lacks parameters waits there for its sampler."""
        axes = self.axes.keys()
        if trial.state not in FINISHED:
            if not axes <= trial.params.keys():
                given = axes <= trial.system_attrs.get("fixed_params", {}).keys()
                trial = FrozenTrial(
                    trial.number,
                    TrialState.WAITING,
                    None,
                    trial.datetime_start,
                    None,
                    {},
                    {},
                    trial.user_attrs if given else {},
                    trial.system_attrs if given else {},
                    {},
                    trial._trial_id,
                )
            self.interrupted.append(trial)
        self.add(trial)
        if "baseline" in trial.user_attrs:
            self.baselines[trial.user_attrs["baseline"]] = trial.number

    def count_in(self, trial: FrozenTrial) -> None:
        """Take a finished trial into all that is kept of them."""
        self.finished.append(trial)
        self.seconds += trial_seconds(trial)
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            self.penalty = trial.value if self.penalty is None else min(self.penalty, trial.value)
        if in_full(trial):
            bisect.insort(self.complete, trial, key=lambda t: t.number)
            self.best = max(filter(None, (self.best, trial)), key=rank)

    @property
    def trials(self) -> Sequence[FrozenTrial]:
        """All trials by number, those in hand and the interrupted included."""
        return self.mirror.get_trials(deepcopy=False)

    @property
    def count(self) -> int:
        """How many trials were begun; interrupted ones count when they are begun again."""
        return self.size - len(self.interrupted)

    def add(self, trial: FrozenTrial) -> FrozenTrial:
        """A new trial in the mirror, whose key there is its number."""
        number = self.mirror_storage.create_new_trial(self.mirror._study_id, trial)
        assert number == self.size, "the mirror holds one study"
        self.size += 1
        return self.mirror_storage.get_trial(number)

    def of_baseline(self, name: str) -> FrozenTrial | None:
        """The finished trial of a baseline, None if it has none (yet)."""
        number = self.baselines.get(name)
        trial = None if number is None else self.mirror_storage.get_trial(number)
        return trial if trial is not None and trial.state in FINISHED else None

    def sampler(self, number: int) -> BaseSampler:
        """The sampler for one trial; CMA-ES keeps one object, as it reads the trial's number itself."""
        config = self.space.config
        if config.sampler.name == "cma-es":
            self.cma = self.cma or make_sampler(config.sampler, self.space, config.seed, number, self.workers)
            return self.cma
        return make_sampler(config.sampler, self.space, config.seed, number)

    def propose(self, number: int) -> FrozenTrial:
        """The sampler's trial: the one that waits in the mirror, or a new one."""
        self.mirror.sampler = self.sampler(number)
        asked = self.mirror.ask()
        assert asked.number == number, "trials are proposed in order"
        self.size = max(self.size, number + 1)
        given = "fixed_params" in self.mirror_storage.get_trial(number).system_attrs
        if not given and self.axes.keys() <= asked.relative_params.keys():
            self.mirror_storage.set_trial_params(number, asked.relative_params, self.axes)  # one by one takes long
        else:
            for name, axis in self.axes.items():
                asked._suggest(name, axis)
        return self.mirror_storage.get_trial(number)

    def begin(self, baseline: tuple[str, Point] | None) -> Begun:
        """A trial to run: an interrupted one with its number and parameters, or `baseline`, or the sampler's.

        The trial is in the database before it is returned.
        """
        study_id = self.stored._study_id
        if self.interrupted:
            trial = self.interrupted.pop(0)
            key = trial._trial_id
            if trial.state == TrialState.WAITING:
                trial = self.propose(trial.number)
                self.storage.describe_trial(study_id, key, trial)
        else:
            if baseline is None:
                trial = self.propose(self.size)
            else:
                name, point = baseline
                trial = self.add(
                    create_trial(
                        state=TrialState.RUNNING,
                        params=point,
                        distributions=self.axes,
                        user_attrs={"baseline": name},
                        system_attrs={"fixed_params": point},
                    )
                )
                self.baselines[name] = trial.number
            key = self.storage.begin_trial(study_id, trial)
        return Begun(key, trial.number, dict(trial.params), trial.user_attrs.get("baseline"))

    def finish(self, trial: Begun, value: float | None, record: dict[str, Any]) -> TrialState:
        """Store a trial's result; without a value it has failed.

        The record gets an `order`: how many trials were finished before this one.
        """
        record = {**record, "order": len(self.finished)}
        self.storage.finish_trial(self.stored._study_id, trial.trial_id, value, {"record": record})
        self.mirror_storage.set_trial_user_attr(trial.number, "record", record)
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        twin, values = self.mirror_storage.get_trial(trial.number), None if value is None else [value]
        self.mirror.sampler.after_trial(self.mirror, twin, state, values)  # with the next line, what `tell` does
        self.mirror_storage.set_trial_state_values(trial.number, state, values)
        self.count_in(self.mirror_storage.get_trial(trial.number))
        return state

"""The study of a search: its trials, from their parameters to their results, and the sampler that proposes them.

A trial that was running when its process was killed is *interrupted*: it is begun again before all others.

The highest of the three layers of a write: here is decided what is stored, `database.py` opens the transaction, and the
functions of `sql_statements.py` write the rows.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Dtype
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.samplers.auto import UNTIL, settled
from evomerge.search.samplers.front import FrontSampler, make_front_sampler
from evomerge.search.samplers.registry import make_sampler, sampler_kind
from evomerge.search.samplers.sampler_kind import SamplerSetup, SamplerWithMean
from evomerge.search.space.space import Point, Space
from evomerge.search.storage.compact import compact_scores, numbers_of
from evomerge.search.storage.database import storage_of
from evomerge.search.storage.optuna_private import FIXED_PARAMETERS, MemoryStorage, key_of_study, key_of_trial
from evomerge.search.storage.sql_statements import without_collector
from evomerge.search.storage.trial_record import LEARNED, RECORD, WEIGHTS, TrialRecord, place_in_order, record_of

COMPUTE = "evomerge:compute"  # study attribute: the type of forwards, and what was measured to choose it
FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


def recorded_type(attributes: Mapping[str, Any]) -> Dtype | None:
    """The type that a study recorded for its forwards, None if it has none.  attributes: the study's."""
    found: Dtype | None = attributes.get(COMPUTE, {}).get("dtype")
    return found


def in_full(trial: FrozenTrial) -> bool:
    """Whether a trial's value is that of all items: not stopped by a race, not broken."""
    return trial.state == TrialState.COMPLETE and record_of(trial).in_full


def rank(trial: FrozenTrial) -> tuple[float, int]:
    """A key that sorts trials evaluated in full from worse to better; of equal values the first trial is better."""
    return trial.value or 0.0, -trial.number


def trial_seconds(trial: FrozenTrial) -> float:
    """Seconds that a finished trial took."""
    return record_of(trial).seconds.total or 0.0


@dataclass(frozen=True)
class Begun:
    """A trial that runs.

    trial_id: the database's key of it.
    number: its number in the study, from 0.
    params: the value of each parameter.
    baseline: the baseline's name, None if it is none.
    learned: after how many gradient steps its parameters were reached, None if they were not learned.
    weights: the task weights that its parameters were chosen by; None: the search's; empty: by every task for itself.
    """

    trial_id: int
    number: int
    params: Point
    baseline: str | None
    learned: int | None = None
    weights: dict[str, float] | None = None


@dataclass(frozen=True)
class LearnedPoint:
    """A point that gradient steps led to.

    steps: how many.
    weights: the task weights that they were taken with; None: the search's.
    """

    steps: int
    point: Point
    weights: dict[str, float] | None = None


class SearchStudy:
    """The study in its database, and a copy of it in memory that the sampler works on.

    The sampler proposes in memory, in milliseconds.  The database gets a trial with all its parameters in one
    transaction before its work begins, and its result in another one when it ends.  Any number of trials may run, and
    they end in any order.  Those that were running when a process died are begun first by the next process.

    finished: all finished trials, in the order in which their results came.
    complete: those of them that were evaluated in full, by number.
    best: the best of these.
    penalty: the value that a broken candidate gets, the lowest of all so far; None before there is one.
    seconds: that all finished trials took together.
    """

    @without_collector()
    def __init__(
        self,
        stored: optuna.Study,
        space: Space,
        workers: int = 1,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """stored: the study in its database, of `open_study`.  workers: how many trials may run at once; CMA-ES
        sizes its population by it at its first proposal.  say: shows one line to the user.

        EvomergeError if the study is damaged.
        """
        self.stored = stored
        self.space = space
        self.axes = space.distributions
        self.axes_of_trials: dict[str, BaseDistribution] = {**self.axes}  # one for all that end
        self.storage = storage_of(stored)
        self.memory = MemoryStorage()
        self.mirror = optuna.create_study(storage=self.memory, direction="maximize", sampler=RandomSampler(seed=0))
        self.finished: list[FrozenTrial] = []
        self.complete: list[FrozenTrial] = []
        self.best: FrozenTrial | None = None
        self.penalty: float | None = None
        self.seconds = 0.0
        self.size = 0
        self.baselines: dict[str, int] = {}
        self.interrupted: list[FrozenTrial] = []
        self.kept_sampler: BaseSampler | None = None
        self.workers = workers
        self.say = say
        there = sorted(self.storage.trials_of(key_of_study(stored)), key=lambda t: t.number)
        if [t.number for t in there] != list(range(len(there))):
            raise EvomergeError(f"study {stored.study_name!r}: its trial numbers have gaps; was it edited by hand?")
        for trial in there:
            self.take(trial)
        ended = (t for t in self.trials if t.state in FINISHED)
        for trial in sorted(ended, key=lambda t: (place_in_order(t), t.number)):
            self.count_in(trial)

    def take(self, trial: FrozenTrial) -> None:
        """Add a stored trial to the study in memory; one that lacks parameters waits there for its sampler."""
        if trial.state not in FINISHED:
            trial = trial if self.axes.keys() <= trial.params.keys() else self.waiting(trial)
            self.interrupted.append(trial)
        self.add(trial)
        if "baseline" in trial.user_attrs:
            self.baselines[trial.user_attrs["baseline"]] = trial.number

    def waiting(self, trial: FrozenTrial) -> FrozenTrial:
        """An interrupted trial without its parameters; attributes are kept if they give it parameters."""
        given = self.axes.keys() <= trial.system_attrs.get(FIXED_PARAMETERS, {}).keys()
        return FrozenTrial(
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
            key_of_trial(trial),
        )

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
        """All trials by number, those that run and the interrupted ones included."""
        return self.mirror.get_trials(deepcopy=False)

    @property
    def count(self) -> int:
        """How many trials were begun; interrupted ones count when they are begun again."""
        return self.size - len(self.interrupted)

    def add(self, trial: FrozenTrial) -> FrozenTrial:
        """Add a trial to the study in memory, where its key is its number."""
        number = self.memory.create_new_trial(key_of_study(self.mirror), trial)
        assert number == self.size, "the storage in memory holds one study"
        self.size += 1
        return self.memory.get_trial(number)

    def of_baseline(self, name: str) -> FrozenTrial | None:
        """The finished trial of a baseline, None if it has none (yet)."""
        number = self.baselines.get(name)
        trial = None if number is None else self.memory.get_trial(number)
        return trial if trial is not None and trial.state in FINISHED else None

    def at(self, params: Point) -> FrozenTrial | None:
        """The first trial with these parameters that was evaluated in full, None if there is none."""
        return next((t for t in self.complete if t.params == params), None)

    def of_learned(self, steps: int, weights: dict[str, float] | None = None) -> FrozenTrial | None:
        """The finished trial at the point that was reached after so many gradient steps, None if there is none.

        weights: as in `LearnedPoint`.
        """
        wanted = (steps, weights)
        found = (t for t in self.finished if (t.user_attrs.get(LEARNED), t.user_attrs.get(WEIGHTS)) == wanted)
        return next(found, None)

    def sampler(self, number: int) -> BaseSampler:
        """The sampler for one trial."""
        if self.kept_sampler is not None:
            return self.kept_sampler
        chosen = settled(self.stored.user_attrs, self.space.config.sampler)
        kind = sampler_kind(chosen.name)

        def setup(number: int) -> SamplerSetup:
            space = self.space
            seed = space.config.seed
            return SamplerSetup(chosen, self.axes, seed, number, self.workers, space.ties, space.pairs, self.say)

        if (
            self.space.config.goals == "pareto"
            and kind.turns
            and SCALE in self.stored.user_attrs
            and not self.space.assembly
        ):
            scale = Scale.from_json(self.stored.user_attrs[SCALE])
            until = self.stored.user_attrs.get(UNTIL, 0)
            self.kept_sampler = make_front_sampler(self.space.axes, scale, self.space.config.sampler.name, setup, until)
            return self.kept_sampler
        sampler = make_sampler(setup(number))
        if kind.serves_all_trials:
            self.kept_sampler = sampler
        return sampler

    def distribution_mean(self) -> Point | None:
        """The mean of the sampler's distribution after all results, None if the sampler has no distribution."""
        sampler = self.sampler(self.size)
        return sampler.distribution_mean(self.mirror) if isinstance(sampler, SamplerWithMean) else None

    def propose(self, number: int) -> FrozenTrial:
        """Let the sampler choose the parameters of a trial: of the one that waits in memory, or of a new one."""
        self.mirror.sampler = self.sampler(number)
        asked = self.mirror.ask()
        assert asked.number == number, "trials are proposed in order"
        self.size = max(self.size, number + 1)
        for name, axis in self.axes.items():
            if isinstance(axis, CategoricalDistribution):
                asked.suggest_categorical(name, axis.choices)
            else:
                asked.suggest_float(name, axis.low, axis.high)
        sampler = self.mirror.sampler
        if isinstance(sampler, FrontSampler) and (weights := sampler.weights(number, self.trials)) is not None:
            self.memory.set_trial_user_attr(number, WEIGHTS, weights)
        return self.memory.get_trial(number)

    def begin(self, baseline: tuple[str, Point] | None, learned: LearnedPoint | None = None) -> Begun:
        """Begin a trial: an interrupted one if there is any, else one that is given, else a proposed one.

        baseline: its name and its parameters.

        The trial is in the database before it is returned.
        """
        if self.interrupted:
            return self.begin_interrupted()
        if baseline is not None:
            name, point = baseline
            begun = self.begin_given(point, {"baseline": name})
            self.baselines[name] = begun.number
            return begun
        if learned is not None:
            weights = {} if learned.weights is None else {WEIGHTS: learned.weights}
            return self.begin_given(learned.point, {LEARNED: learned.steps, **weights})
        return self.begin_proposed()

    def begin_interrupted(self) -> Begun:
        """Begin the first interrupted trial again, with its number; the sampler chooses parameters that it lacks."""
        trial = self.interrupted.pop(0)
        key = key_of_trial(trial)
        if trial.state == TrialState.WAITING:
            trial = self.propose(trial.number)
            self.storage.describe_trial(key_of_study(self.stored), key, trial)
        return begun_of(key, trial)

    def begin_given(self, point: Point, attributes: dict[str, Any]) -> Begun:
        """Begin a new trial with parameters that no sampler chose; its attributes say where they come from."""
        trial = self.add(
            create_trial(
                state=TrialState.RUNNING,
                params=point,
                distributions=dict(self.axes),
                user_attrs=attributes,
                system_attrs={FIXED_PARAMETERS: point},
            )
        )
        return begun_of(self.storage.begin_trial(key_of_study(self.stored), trial), trial)

    def begin_proposed(self) -> Begun:
        """Begin a new trial with the parameters that the sampler chooses."""
        trial = self.propose(self.size)
        return begun_of(self.storage.begin_trial(key_of_study(self.stored), trial), trial)

    def finish(self, trial: Begun, value: float | None, record: TrialRecord) -> TrialState:
        """Store a trial's result and return the state that it has now; without a value it has failed.

        The stored record says also how many trials were finished before this one (`order`).
        """
        record = replace(record, order=len(self.finished), scores=compact_scores(record.scores))
        self.storage.finish_trial(key_of_study(self.stored), trial.trial_id, value, {RECORD: record.to_json()})
        self.memory.set_trial_user_attr(trial.number, RECORD, record)
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        twin, values = self.memory.get_trial(trial.number), None if value is None else [value]
        self.mirror.sampler.after_trial(self.mirror, twin, state, values)  # with the next line, what `tell` does
        self.memory.set_trial_state_values(trial.number, state, values)
        ended = self.memory.get_trial(trial.number)
        if ended.distributions == self.axes:
            ended.distributions = self.axes_of_trials
            ended.params = numbers_of(self.axes, map(ended.params.__getitem__, self.axes)) or ended.params
        self.count_in(ended)
        return state


def begun_of(key: int, trial: FrozenTrial) -> Begun:
    """What the search needs to know of a trial that runs.  key: the database's."""
    attributes = trial.user_attrs
    known = (attributes.get(name) for name in ("baseline", LEARNED, WEIGHTS))
    return Begun(key, trial.number, dict(trial.params), *known)

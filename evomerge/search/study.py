"""The Optuna study: where it is stored, who samples, and how a trial is begun so that a crash costs nothing."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.config.schema import SamplerConfig
from evomerge.errors import EvomergeError
from evomerge.search.cma import CmaEsSampler, trial_seed
from evomerge.search.space import Point, Space

POINT = "evomerge:point"  # the trial attribute that holds all parameters from the first moment
FINISHED = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)


def open_storage(url: str) -> RDBStorage:
    """Any database that Optuna takes; SQLite in WAL mode.  EvomergeError if it cannot be opened.

    A commit of SQLite survives the death of the process at once, and a power cut after `checkpoint`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        storage = RDBStorage(url, engine_kwargs=options)
        if url.startswith("sqlite"):
            sqlalchemy.event.listen(storage.engine, "connect", write_ahead)
            storage.engine.dispose()  # connections made before the listener
        return storage
    except (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.OptunaError,
        RuntimeError,
        ImportError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvomergeError(f"storage {masked(url)}: cannot be opened ({reason})") from error


def masked(url: str) -> str:
    """A database URL without its password."""
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url.split("://")[0] + "://..."


def write_ahead(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def rdb_of(study: optuna.Study) -> RDBStorage:
    """The database behind a study; Optuna puts a cache in front of it."""
    backend = getattr(study._storage, "_backend", study._storage)
    assert isinstance(backend, RDBStorage), "studies are kept in databases only"
    return backend


def checkpoint(study: optuna.Study) -> None:
    """Bring what is committed to the disk itself, once per trial (SQLite; others do it at each commit)."""
    engine = rdb_of(study).engine
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")


def open_study(url: str, name: str, create: bool) -> optuna.Study:
    """The study `name` at `url`.  EvomergeError if it should be there and is not."""
    storage = open_storage(url)
    if create:
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        raise EvomergeError(f"storage {masked(url)}: holds no study {name!r}") from None


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path.resolve()}"


class NumberedQMCSampler(optuna.samplers.QMCSampler):
    """Optuna's QMC sampler with the trial's number as the place in the sequence.

    Optuna counts places in the study's attributes, where a crash would skip or repeat one.
    """

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return len(study.get_trials(deepcopy=False)) - 1


def make_sampler(config: SamplerConfig, space: Space, seed: int, number: int) -> BaseSampler:
    """A sampler for one trial, seeded by (study seed, trial number) and nothing else.

    CMA-ES reads the trial's number itself, so one object may serve all trials.
    """
    if config.name == "cma-es":
        return CmaEsSampler(space.axes, seed, config.sigma0, config.population)
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
            return NumberedQMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=once)


def record_of(trial: FrozenTrial) -> dict[str, Any]:
    """What `SearchStudy.finish` stored with a trial."""
    found: dict[str, Any] = trial.user_attrs.get("record", {})
    return found


def in_full(trial: FrozenTrial) -> bool:
    """Whether a trial's value is that of all items: not stopped by the race, not broken."""
    record = record_of(trial)
    return trial.state == TrialState.COMPLETE and "partial" not in record and "broken" not in record


@dataclass(frozen=True)
class Begun:
    """A trial in hand.  trial_id: the database's key.  baseline: its name, if the trial is one."""

    trial_id: int
    number: int
    params: Point
    baseline: str | None


class SearchStudy:
    """The study in its database, and a mirror of it in memory that the sampler works on.

    The sampler asks and suggests in the mirror, in milliseconds; the database gets a trial, its whole point in an
    attribute, in one transaction before the work begins, then its parameters, and its result when it ends.  A
    process that dies leaves at most one trial running, and its point is known.
    """

    def __init__(self, stored: optuna.Study, space: Space) -> None:
        self.stored = stored
        self.space = space
        self.mirror = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        self.interrupted: list[FrozenTrial] = []
        for trial in sorted(stored.get_trials(deepcopy=False), key=lambda t: t.number):
            if trial.state in FINISHED:
                self.mirror.add_trial(trial)
            else:
                self.interrupted.append(trial)
        self.cma: BaseSampler | None = None

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, the one in hand included."""
        return self.mirror.get_trials(deepcopy=False)

    @property
    def complete(self) -> list[FrozenTrial]:
        """Those that were evaluated in full."""
        return [t for t in self.trials if in_full(t)]

    def of_baseline(self, name: str) -> FrozenTrial | None:
        """The trial of a baseline, if it has one."""
        return next((t for t in self.trials if t.user_attrs.get("baseline") == name), None)

    @property
    def penalty(self) -> float | None:
        """The value of a broken candidate: no better than any other; None before there is one."""
        told = self.mirror.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return min((t.value for t in told if t.value is not None), default=None)

    def sampler(self, number: int) -> BaseSampler:
        """The sampler for one trial; CMA-ES keeps one object, as it reads the trial's number itself."""
        config = self.space.config
        if config.sampler.name == "cma-es":
            self.cma = self.cma or make_sampler(config.sampler, self.space, config.seed, number)
            return self.cma
        return make_sampler(config.sampler, self.space, config.seed, number)

    def begin(self, baseline: tuple[str, Point] | None) -> Begun:
        """A trial to run: the interrupted one with its number and parameters, or `baseline`, or the sampler's.

        The trial is in the database before it is returned.
        """
        axes = self.space.distributions
        if self.interrupted:
            trial = self.interrupted.pop(0)
            point = trial.system_attrs.get(POINT, trial.params)
            self.store_parameters(trial._trial_id, {k: v for k, v in point.items() if k not in trial.params})
            whole = create_trial(
                state=TrialState.RUNNING,
                params=point,
                distributions=axes,
                user_attrs=trial.user_attrs,
                system_attrs=trial.system_attrs,
            )
            self.mirror._storage.create_new_trial(self.mirror._study_id, whole)
            return Begun(trial._trial_id, trial.number, point, trial.user_attrs.get("baseline"))
        notes: dict[str, Any] = {}
        if baseline is not None:
            notes["baseline"], point = baseline
            system: dict[str, Any] = {"fixed_params": point}
            new = create_trial(
                state=TrialState.RUNNING, params=point, distributions=axes, user_attrs=notes, system_attrs=system
            )
            self.mirror._storage.create_new_trial(self.mirror._study_id, new)
        else:
            self.mirror.sampler = self.sampler(len(self.trials))
            asked = self.mirror.ask(axes)
            point, system = asked.params, self.mirror._storage.get_trial_system_attrs(asked._trial_id)
        template = create_trial(state=TrialState.RUNNING, user_attrs=notes, system_attrs={**system, POINT: point})
        trial_id = self.stored._storage.create_new_trial(self.stored._study_id, template)
        self.store_parameters(trial_id, point)
        return Begun(trial_id, len(self.trials) - 1, point, notes.get("baseline"))

    def store_parameters(self, trial_id: int, point: Point) -> None:
        """Write a trial's parameters in one statement.

        Optuna's storage runs several queries per parameter; with dozens of them that costs more than a small
        model's merge.  The table is Optuna's own, so its tools read the study as any other.
        """
        rows = [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": axis.to_internal_repr(point[name]),
                "distribution_json": distribution_to_json(axis),
            }
            for name, axis in self.space.axes.items()
            if name in point
        ]
        if rows:
            with rdb_of(self.stored).engine.begin() as connection:
                connection.execute(TrialParamModel.__table__.insert(), rows)

    def finish(self, trial: Begun, value: float | None, record: dict[str, Any]) -> TrialState:
        """Store a trial's result; without a value it has failed."""
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        storage = self.stored._storage
        storage.set_trial_user_attr(trial.trial_id, "record", record)
        storage.set_trial_state_values(trial.trial_id, state, None if value is None else [value])
        checkpoint(self.stored)
        twin = self.trials[trial.number]
        self.mirror._storage.set_trial_user_attr(twin._trial_id, "record", record)
        self.mirror.tell(trial.number, value, state=state)
        return state

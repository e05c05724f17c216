"""The Optuna study: where it is stored, who samples, and how a trial is begun so that a crash costs nothing."""

import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from evomerge.config import SamplerConfig
from evomerge.errors import EvomergeError
from evomerge.search.cma import CmaEsSampler, trial_seed
from evomerge.search.space import Point, Space

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


def checkpoint(study: optuna.Study) -> None:
    """Bring what is committed to the disk itself, once per trial (SQLite; others do it at each commit)."""
    storage = study._storage
    backend = getattr(storage, "_backend", storage)
    if isinstance(backend, RDBStorage) and backend.engine.dialect.name == "sqlite":
        with backend.engine.connect() as connection:
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
            # A quasi-random sequence is one sequence: all trials share its scrambling.
            return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=once)


class Proposer:
    """Begins trials: the interrupted one first, then the enqueued ones, then the sampler's."""

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self.study = study
        self.space = space
        self.config = space.config.sampler
        self.cma: BaseSampler | None = None

    def sampler(self, number: int) -> BaseSampler:
        if self.config.name == "cma-es":
            self.cma = self.cma or make_sampler(self.config, self.space, self.space.config.seed, number)
            return self.cma
        return make_sampler(self.config, self.space, self.space.config.seed, number)

    def next(self) -> tuple[FrozenTrial, Point]:
        """A running trial and its point, stored before it is returned.

        A trial that a dead process left running keeps its number and its parameters.  The point is computed
        as a whole before its first parameter is stored, so a crash between two parameters changes nothing.
        """
        trials = self.study.get_trials(deepcopy=False)
        unfinished = [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
        unfinished.sort(key=lambda t: (t.state != TrialState.RUNNING, t.number))
        self.study.sampler = self.sampler(unfinished[0].number if unfinished else len(trials))
        if unfinished and unfinished[0].state == TrialState.RUNNING:
            trial_id = unfinished[0]._trial_id
        else:
            trial_id = self.study.ask()._trial_id
        storage = self.study._storage
        trial = storage.get_trial(trial_id)
        point = self.propose(trial)
        for name, distribution in self.space.axes.items():
            if name not in trial.params:
                storage.set_trial_param(trial_id, name, distribution.to_internal_repr(point[name]), distribution)
        return storage.get_trial(trial_id), point

    def propose(self, trial: FrozenTrial) -> Point:
        """What is enqueued, stored already, or the sampler says, in this order."""
        sampler = self.study.sampler
        known = {**trial.params, **trial.system_attrs.get("fixed_params", {})}
        if self.space.axes.keys() <= known.keys():
            return {name: float(known[name]) for name in self.space.axes}
        sampler.before_trial(self.study, trial)
        inferred = sampler.infer_relative_search_space(self.study, trial)
        relative = sampler.sample_relative(self.study, trial, inferred)
        sampled = {
            name: relative[name]
            if name in relative
            else sampler.sample_independent(self.study, trial, name, distribution)
            for name, distribution in self.space.axes.items()
        }
        return {name: float(known.get(name, value)) for name, value in sampled.items()}

"""Every part of Optuna that is not public and that evomerge uses, with the reason why the public way does not do.

Nothing outside this file names a private part of Optuna; a test exercises each of these against the installed version.
"""

import logging
from abc import abstractmethod
from collections.abc import Container, Iterable
from copy import copy
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler, QMCSampler, RandomSampler
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Table

# The tables: Optuna writes one parameter or attribute a transaction; a search stores a trial whole in one.
STUDIES: Table = models.StudyModel.__table__
STUDY_ATTRIBUTES: Table = models.StudyUserAttributeModel.__table__
TRIALS: Table = models.TrialModel.__table__
PARAMETERS: Table = models.TrialParamModel.__table__
VALUES: Table = models.TrialValueModel.__table__
USER_ATTRIBUTES: Table = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRIBUTES: Table = models.TrialSystemAttributeModel.__table__


def value_to_columns(value: float) -> tuple[float | None, Any]:
    """A trial's value as the columns `value` and `value_type`; how an infinite one is stored is known only there."""
    number, kind = models.TrialValueModel.value_to_stored_repr(value)
    return number, kind


def columns_to_value(number: float | None, kind: Any) -> float:
    """What `value_to_columns` was given."""
    return float(models.TrialValueModel.stored_repr_to_value(number, kind))


def key_of_study(study: Study) -> int:
    """The key of a study in its storage: a `Study` tells its name only, and every statement needs the key."""
    return int(study._study_id)


def key_of_trial(trial: FrozenTrial) -> int:
    """The key of a trial in its storage: a trial tells its number only, which other studies have too."""
    return int(trial._trial_id)


def storage_behind(study: Study) -> Any:
    """The storage object that a study was opened with: a `Study` does not tell it, and Optuna wraps it in a cache."""
    return getattr(study._storage, "_backend", study._storage)


def set_system_attribute(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set an attribute of a trial that is being sampled: samplers get a `FrozenTrial`, which cannot be written to."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


FIXED_PARAMETERS = "fixed_params"
"""The system attribute of a trial whose parameters were given; no public function tells such a trial from others."""


class MemoryStorage(InMemoryStorage):
    """Optuna's storage in memory, which adds a trial without copying all that is in it.

    Optuna's own copies deeply: seconds at the opening of a study with thousands of trials.
    """

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial, which gets the next number; returns its key."""
        trial_id = super().create_new_trial(study_id)
        if template_trial is not None:
            trial = copy(template_trial)
            trial.number, trial._trial_id = self.get_trial_number_from_id(trial_id), trial_id
            self._set_trial(trial_id, trial)
            self._update_cache(trial_id, study_id)
        return trial_id


class NumberedQMCSampler(QMCSampler):
    """Optuna's QMC sampler, which takes the point of a given place in the sequence.

    Optuna counts places in the study's attributes, where a crash would skip or repeat one.
    """

    def __init__(self, seed: int, number: int, trial_seed: int) -> None:
        """seed: of the sequence, the same for all trials of a study.  number: the place, from 0.
        trial_seed: of the choices, which are random."""
        own = RandomSampler(seed=trial_seed)
        super().__init__(seed=seed, scramble=True, independent_sampler=own, warn_independent_sampling=False)
        self.number = number

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self.number


# It warns once a process that a package is missing by which a proposal would be a third faster.
logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)


class QuickGPSampler(GPSampler):
    """Optuna's Gaussian process, which looks at fewer points for the best one.

    Optuna's own numbers cannot be chosen; by them a proposal for three goals takes seconds (benchmarks/pareto.py).
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed, deterministic_objective=True)
        self._n_preliminary_samples = 256  # points from which the search for the best one may begin; Optuna's: 2048
        self._n_local_search = 4  # those from which it begins; Optuna's: 10
        self._n_qmc_samples_ehvi = 32  # draws of the hypervolume at each point; Optuna's: 128


class DatabaseStorage(RDBStorage):
    """Optuna's storage in a database, which reads trials with `read_trials`.

    Optuna's own reads a trial as dozens of objects: seconds for a study with thousands of trials.
    """

    @abstractmethod
    def read_trials(self, chosen: ColumnElement[bool]) -> list[FrozenTrial]:
        """The trials of which a condition on the columns of TRIALS is true, by their keys."""

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """What Optuna's method of this name returns (without intermediate values, which a search does not have)."""
        chosen = TRIALS.c.study_id == study_id
        if trial_id_greater_than > -1:
            known = [i for i in included_trial_ids if i <= trial_id_greater_than]
            chosen &= (TRIALS.c.trial_id > trial_id_greater_than) | TRIALS.c.trial_id.in_(known)
        if states is not None:
            assert isinstance(states, Iterable)
            chosen &= TRIALS.c.state.in_(list(states))
        return self.read_trials(chosen)

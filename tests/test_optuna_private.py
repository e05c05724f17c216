"""The private parts of Optuna that evomerge uses are there, do what they are used for, and are named in one file."""

import ast
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.search.storage import optuna_private as private
from evomerge.search.storage.database import Storage, open_study, sqlite_url

AXES = {"x": FloatDistribution(0.0, 2.0), "y": FloatDistribution(-1.0, 1.0)}


def finished(value: float) -> FrozenTrial:
    return create_trial(params={"x": 1.5, "y": 0.0}, distributions=dict(AXES), value=value, user_attrs={"a": [1]})


def test_tables(tmp_path: Path) -> None:
    """Each has the columns that are written, and Optuna itself fills no others that must not be empty."""
    wanted = {
        "STUDIES": {"study_id", "study_name"},
        "STUDY_ATTRIBUTES": {"study_id", "key", "value_json"},
        "TRIALS": {"trial_id", "study_id", "number", "state", "datetime_start", "datetime_complete"},
        "PARAMETERS": {"trial_id", "param_name", "param_value", "distribution_json"},
        "VALUES": {"trial_id", "objective", "value", "value_type"},
        "USER_ATTRIBUTES": {"trial_id", "key", "value_json"},
        "SYSTEM_ATTRIBUTES": {"trial_id", "key", "value_json"},
    }
    for name, columns in wanted.items():
        table = getattr(private, name)
        assert columns <= set(table.c.keys()), f"optuna_private.{name} lacks a column"
        required = {c.name for c in table.c if not c.nullable and not c.primary_key and c.server_default is None}
        assert required <= columns, f"optuna_private.{name} requires a column that is not written"


@pytest.mark.parametrize("value", [0.25, -1e300, math.inf, -math.inf])
def test_value_to_columns_and_columns_to_value(value: float) -> None:
    number, kind = private.value_to_columns(value)
    assert private.columns_to_value(number, kind) == value
    assert number is None or math.isfinite(number)


def test_key_of_study_key_of_trial_and_storage_behind(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    open_study(url, "first", create=True).ask()
    study = open_study(url, "second", create=True)
    study.ask()
    storage = private.storage_behind(study)
    assert isinstance(storage, Storage)
    key = storage.get_study_id_from_name("second")
    assert private.key_of_study(study) == key
    (trial,) = study.get_trials()
    assert trial.number == 0
    assert private.key_of_trial(trial) == storage.get_trial_id_from_study_id_trial_number(key, 0) == 2
    in_memory = optuna.storages.InMemoryStorage()
    assert private.storage_behind(optuna.create_study(storage=in_memory)) is in_memory


def test_set_system_attribute() -> None:
    study = optuna.create_study()
    study.ask()
    private.set_system_attribute(study, study.trials[0], "k", [1])
    assert study.trials[0].system_attrs == {"k": [1]}


def test_fixed_parameters() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 0.5})
    study.ask(dict(AXES))
    study.ask(dict(AXES))
    assert [t.system_attrs.get(private.FIXED_PARAMETERS) for t in study.trials] == [{"x": 0.5}, None]


def test_memory_storage() -> None:
    """It keeps what Optuna's own would, without a copy, and the best trial is known."""
    ours, theirs = private.MemoryStorage(), optuna.storages.InMemoryStorage()
    trials = [finished(1.0), finished(3.0), finished(2.0), create_trial(state=TrialState.RUNNING)]
    for storage in (ours, theirs):
        study = optuna.create_study(storage=storage, direction="maximize")
        keys = [storage.create_new_trial(private.key_of_study(study), trial) for trial in trials]
        assert keys == [0, 1, 2, 3]
        assert study.best_trial.number == 1
        assert study.ask(dict(AXES)).number == 4
    mine, other = (s.get_all_trials(0) for s in (ours, theirs))
    assert mine[:4] == other[:4]
    assert ours.get_trial(1).params is trials[1].params
    assert [private.key_of_trial(t) for t in trials] == [-1] * 4, "the trials that were given stay as they were"


def test_numbered_qmc_sampler() -> None:
    """Place n of the sequence, whatever was asked before, is the n-th point of Optuna's own."""
    theirs = optuna.create_study(
        sampler=optuna.samplers.QMCSampler(seed=3, scramble=True, warn_independent_sampling=False)
    )
    theirs.add_trial(finished(0.0))  # the sampler learns the axes from it
    points = [dict(theirs.ask(dict(AXES)).params) for _ in range(4)]
    for number in (3, 0, 2):
        ours = optuna.create_study(sampler=private.NumberedQMCSampler(3, number, trial_seed=number))
        ours.add_trial(finished(0.0))
        assert ours.ask(dict(AXES)).params == points[number]


def test_quick_gp_sampler() -> None:
    ours, theirs = vars(private.QuickGPSampler(0)), vars(optuna.samplers.GPSampler(deterministic_objective=True))
    fewer = {name for name, number in theirs.items() if name.startswith("_n_") and ours[name] < number}
    assert fewer == {"_n_preliminary_samples", "_n_local_search", "_n_qmc_samples_ehvi"}
    assert ours.keys() == theirs.keys()


def test_database_storage(tmp_path: Path) -> None:
    """Optuna reads trials by `read_trials`: all at first, later those that may have changed."""
    study = open_study(sqlite_url(tmp_path / "s.db"), "s", create=True)
    storage = private.storage_behind(study)
    read: list[int] = []
    plain = storage.read_trials

    def counted(chosen: Any) -> list[FrozenTrial]:
        found: list[FrozenTrial] = plain(chosen)
        read.append(len(found))
        return found

    storage.read_trials = counted
    for value in (1.0, 2.0):
        study.add_trial(finished(value))
    study.ask(dict(AXES))
    assert [t.value for t in study.get_trials()] == [1.0, 2.0, None]
    read.clear()
    assert [t.value for t in study.get_trials()] == [1.0, 2.0, None]
    assert read == [1], "finished trials are read once"
    of_state = storage.get_all_trials(private.key_of_study(study), states=(TrialState.COMPLETE,))
    assert [t.value for t in of_state] == [1.0, 2.0]


def private_names() -> set[str]:
    """Every name with one leading underscore in the classes of Optuna that evomerge meets."""
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler())
    asked = study.ask()
    storages = (optuna.storages.RDBStorage, optuna.storages.InMemoryStorage, optuna.storages.get_storage("sqlite://"))
    met = (study, asked, study.trials[0], study.sampler, *storages)
    return {name for thing in met for name in dir(thing) if name.startswith("_") and not name.startswith("__")}


def uses(file: Path, known: set[str]) -> list[str]:
    """The private parts of Optuna that a file names: attributes, overridden methods, modules."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        named: list[str] = []
        if isinstance(node, (ast.Attribute, ast.FunctionDef)):
            named = [node.attr if isinstance(node, ast.Attribute) else node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = [node.value]  # getattr(study, "_storage")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "optuna":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{file.name}:{node.lineno} {p}" for p in parts if p.startswith("_")]
        found += [f"{file.name}:{getattr(node, 'lineno', 0)} {name}" for name in named if name in known]
    return found


def test_no_other_file_names_a_private_part_of_optuna() -> None:
    known, package = private_names(), Path(private.__file__).parents[2]
    assert {"_study_id", "_trial_id", "_storage", "_backend", "_get_trials", "_set_trial", "_find_sample_id"} <= known
    assert uses(Path(private.__file__), known), "the search itself finds nothing"
    others = [f for f in package.rglob("*.py") if f != Path(private.__file__)]
    assert [use for file in others for use in uses(file, known)] == []

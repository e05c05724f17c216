"""The samplers by name, and those that other packages bring."""

import sys
from pathlib import Path

import pytest
from distributions import install
from optuna.samplers import BaseSampler
from searches import run_cli, write_config
from test_storage import opened, space_of

from evomerge.config.running import SamplerConfig
from evomerge.errors import EvomergeError
from evomerge.search.samplers.auto import choose
from evomerge.search.samplers.registry import BUILT_IN, make_sampler, sampler_kind
from evomerge.search.samplers.sampler_kind import SamplerSetup, trial_seed
from evomerge.search.storage.database import sqlite_url

MODULE = """
from optuna.samplers import RandomSampler
from evomerge.search.samplers.sampler_kind import SamplerKind

class Corner(RandomSampler):
    def __init__(self, setup):
        super().__init__(seed=setup.seed)
        self.axes = setup.axes

    def infer_relative_search_space(self, study, trial):
        return dict(self.axes)

    def sample_relative(self, study, trial, search_space):
        return {name: axis.high for name, axis in self.axes.items()}

corner = SamplerKind(Corner)
needy = SamplerKind(Corner, requires=("numpy", "no_such_package"))
wrong = Corner
"""
ENTRY_POINTS = {
    "corner": "corner_sampler:corner",
    "needy": "corner_sampler:needy",
    "wrong": "corner_sampler:wrong",
    "broken": "no_such_module:kind",
    "random": "corner_sampler:corner",
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package on the path that brings samplers, as pip would have laid it there."""
    site = install(tmp_path / "site", "corner-sampler", MODULE, "evomerge.samplers", ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "corner_sampler", raising=False)
    sampler_kind.cache_clear()


def setup_of(name: str, number: int = 0) -> SamplerSetup:
    space = space_of(2)
    return SamplerSetup(SamplerConfig(name=name), space.axes, study_seed=3, number=number)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_sampler_is_made_by_its_name(name: str) -> None:
    first, second = make_sampler(setup_of(name)), make_sampler(setup_of(name))
    assert isinstance(first, BaseSampler)
    assert first is not second
    assert SamplerConfig(name=name).name == name


def test_the_seed_is_that_of_the_study_and_the_trial() -> None:
    assert setup_of("tpe", 5).seed == trial_seed(3, 5) != setup_of("tpe", 6).seed


def test_a_sampler_of_another_package_proposes(plugin: None, tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"), sampler="corner")
    assert study.begin(None).params == dict.fromkeys(study.space.axes, 1.0)
    assert sampler_kind("random") is BUILT_IN["random"], "a built-in sampler cannot be replaced"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "cmaes",
            "'cmaes' is not a sampler; give one of auto, learned, cma-es, tpe, nsga-ii, gp, qmc, random, broken, "
            "corner",
        ),
        ("needy", "'needy' needs no_such_package; pip install no_such_package"),
        ("wrong", "'wrong' is corner_sampler:wrong, which is not a SamplerKind"),
        ("broken", "'broken' is no_such_module:kind, which cannot be loaded (No module named 'no_such_module')"),
    ],
)
def test_what_is_no_sampler_is_one_message(plugin: None, name: str, said: str) -> None:
    with pytest.raises(EvomergeError) as caught:
        sampler_kind(name)
    assert str(caught.value).startswith(f"sampler.name: {said}")


def test_a_search_with_an_unknown_sampler_opens_nothing(tmp_path: Path) -> None:
    """The folders of the models are empty, which would be the next error."""
    for name in ("base", "rev", "add"):
        (tmp_path / name).mkdir()
    config = write_config(tmp_path, tmp_path, sampler={"name": "cmaes"})
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "sampler.name: 'cmaes' is not a sampler; give one of auto, learned, cma-es, tpe" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("axes", "trials", "workers", "learned", "coarser", "chosen"),
    [
        (24, 60, 1, False, False, "gp"),
        (24, 60, 1, False, True, "cma-es"),
        (24, 60, 1, True, False, "cma-es"),
        (24, 61, 1, False, False, "cma-es"),
        (101, 60, 1, False, False, "cma-es"),
        (24, 60, 2, False, False, "cma-es"),
        (24, None, 1, False, False, "cma-es"),
    ],
)
def test_auto_goes_on_with_gp_where_few_trials_start_from_a_baseline(
    axes: int, trials: int | None, workers: int, learned: bool, coarser: bool, chosen: str
) -> None:
    assert choose(axes, trials, workers, learned, coarser) == chosen

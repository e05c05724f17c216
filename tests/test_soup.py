"""The greedy soup: how its ingredients are chosen, and its place among the baselines of a real search."""

import asyncio
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from searches import ROOT, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.report.status import read_status
from evomerge.search.run import open_run
from evomerge.search.space.greedy_soup import GREEDY, greedy

# --- The choice of ingredients ---

names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)
finite = st.integers(-3, 3).map(float) | st.floats(allow_nan=False)


class Scorer:
    """A scoring function: the score of a set of sources is drawn at the first call and kept."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.scores: dict[frozenset[str], float] = {}
        self.asked: list[list[str]] = []

    async def __call__(self, chosen: list[str]) -> float:
        return self.score(chosen)

    def score(self, chosen: list[str]) -> float:
        self.asked.append(chosen)
        key = frozenset(chosen)
        if key not in self.scores:
            self.scores[key] = self.data.draw(finite)
        return self.scores[key]

    def alone(self, name: str) -> float:
        return self.scores[frozenset([name])]


@given(names, st.data())
def test_the_soup_is_never_worse_than_the_best_source(sources: list[str], data: st.DataObject) -> None:
    scorer = Scorer(data)
    soup = asyncio.run(greedy(sources, scorer))
    assert set(soup) <= set(sources)
    assert len(set(soup)) == len(soup)
    assert scorer.score(soup) >= max(scorer.alone(name) for name in sources)


@given(names, st.data())
def test_sources_are_tried_once_each_from_the_best_to_the_worst(sources: list[str], data: st.DataObject) -> None:
    scorer = Scorer(data)
    soup = asyncio.run(greedy(sources, scorer))
    ranked = sorted(sources, key=lambda name: (-scorer.alone(name), sources.index(name)))
    assert [chosen[-1] for chosen in scorer.asked if len(chosen) > 1] == ranked[1:]
    assert soup[0] == ranked[0]
    assert soup == [name for name in ranked if name in soup]


@pytest.mark.parametrize(
    ("score", "soup"),
    [
        (lambda chosen: float(len(chosen)), list("abc")),
        (lambda chosen: -float(len(chosen)), ["a"]),
        (lambda chosen: 1.0, list("abc")),
        (lambda chosen: {"b": 2.0, "c": 1.0, "bc": 1.5, "bca": 9.0, "ba": 2.0}.get("".join(chosen), 0.0), ["b", "a"]),
    ],
    ids=["every source helps", "every source harms", "a source that changes nothing stays", "one is left out"],
)
def test_a_source_stays_if_the_score_does_not_fall(score: Callable[[list[str]], float], soup: list[str]) -> None:
    async def asked(chosen: list[str]) -> float:
        return score(chosen)

    assert asyncio.run(greedy(list("abc"), asked)) == soup


# --- In a search ---


@pytest.fixture(scope="module")
def family(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base and four damaged copies of one specialist: the damage of `left` and `right` cancels, that of
    `lost` and `stray` does not."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(tiny_family / "base", folder / "base")
    weights = load_file(tiny_family / "rev" / "model.safetensors")
    for name, seed, size in (("left", 0, 0.3), ("right", 0, -0.3), ("lost", 1, 1.0), ("stray", 2, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(tiny_family / "rev", folder / name)
        damaged = {k: t + size * t.std() * torch.randn(t.shape, generator=generator) for k, t in weights.items()}
        save_file(damaged, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_soup_config(folder: Path, family: Path, sources: str = "lost right left stray", **changes: Any) -> Path:
    """A search for the specialist in its damaged copies; its greedy soup is `left` and `right`."""
    usual: dict[str, Any] = {
        "sources": [{"name": s, "path": str(family / s)} for s in sources.split()],
        "tasks": [{"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "gold_logprob"}],
        "splits": {"search": 12, "selection": 6, "holdout": 8},
        "budget": {"trials": 12},
    }
    return write_config(folder, family, **(usual | changes))


@pytest.fixture(scope="module")
def finished(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_soup_config(tmp_path_factory.mktemp("finished"), family))


def values_of(run: Path) -> dict[str, float]:
    """The value of every baseline that is a trial."""
    known = read_status(open_run(run)).baselines
    return {known[number]: value for number, _, _, value in trials_of(run) if number in known and value is not None}


def test_the_greedy_soup_is_the_last_baseline_before_the_sampler_begins(finished: Path) -> None:
    known = read_status(open_run(finished)).baselines
    assert list(known) == list(range(len(known)))
    assert [*known.values()][-1] == GREEDY
    _, state, point, value = trials_of(finished)[len(known) - 1]
    assert state == "COMPLETE"
    assert {axis for axis, weight in point.items() if weight} == {
        f"weight.{source}.depth{knot}" for source in ("left", "right") for knot in (0, 1)
    }
    assert value is not None
    assert value > max(v for name, v in values_of(finished).items() if name != GREEDY)


def test_every_soup_is_scored_once(finished: Path) -> None:
    log = (finished / "log.txt").read_text()
    scored = [line.split(" ", 1)[1] for line in log.splitlines() if line.endswith("items of search")]
    assert len(scored) == len(set(scored)) == 5 + 1 + 3  # known models, dare_ties, soups of two and three


def test_the_winner_must_beat_the_greedy_soup(finished: Path) -> None:
    verdict = verdict_of(finished)
    assert (GREEDY, "greedy") in [(c["name"], c["kind"]) for c in verdict["comparisons"]]
    sentence = verdict["greedy_soup"]
    assert sentence in ("The greedy soup took in left, right.", "The greedy soup took in right, left.")
    assert sentence in (finished / "report.html").read_text()
    assert sentence in run_cli("status", finished).stdout


def test_a_soup_that_is_a_baseline_already_is_not_scored_or_judged_again(family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_soup_config(tmp_path, family, "left right", budget={"trials": 6})
    assert run_cli("search", config, "--run", run).returncode == 0
    verdict = verdict_of(run)
    assert verdict["greedy_soup"].endswith(": the same model as the baseline uniform.")
    assert GREEDY not in {c["name"] for c in verdict["comparisons"]}
    assert (run / "log.txt").read_text().count("items of search") == 4  # base, parents, dare_ties


def test_a_soup_outside_the_bounds_is_judged_but_is_no_trial(family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_soup_config(tmp_path, family, space={"weight": [0.1, 1.6]}, budget={"trials": 4})
    assert run_cli("search", config, "--run", run).returncode == 0
    assert GREEDY not in values_of(run)
    assert GREEDY in {c["name"] for c in verdict_of(run)["comparisons"]}


def test_after_a_budget_that_ends_among_the_baselines_the_winner_meets_the_soup_all_the_same(
    finished: Path, family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = run_cli("search", write_soup_config(tmp_path, family), "--run", run, "--trials", "3")
    assert done.returncode == 0, done.stderr
    assert GREEDY in {c["name"] for c in verdict_of(run)["comparisons"]}
    assert run_cli("resume", run, "--trials", "12").returncode == 0
    assert trials_of(run) == trials_of(finished)


BREAKING_THE_FIRST_SOUP = """
import evomerge.search.evaluation.evaluator as s
from evomerge.merge.materialise import NotFinite
calls, real = [0], s.Evaluator.materialise
def sometimes(self, *a, **k):
    calls[0] += 1
    if calls[0] == 10:
        raise NotFinite("a soup with a weight that is not finite")
    return real(self, *a, **k)
s.Evaluator.materialise = sometimes
"""


def test_a_soup_that_is_not_finite_is_left_out(family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_soup_config(tmp_path, family, budget={"trials": 8})
    done = run_cli("search", config, "--run", run, prelude=BREAKING_THE_FIRST_SOUP)
    assert done.returncode == 0, done.stderr
    assert "the same model as the baseline" in verdict_of(run)["greedy_soup"]


DYING_AT_EVALUATION = """
import os, signal
import evomerge.search.evaluation.evaluator as s
calls, real = [0], s.Evaluator.materialise
def counted(self, *a, **k):
    calls[0] += 1
    if calls[0] == NUMBER:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *a, **k)
s.Evaluator.materialise = counted
"""


@pytest.mark.more
def test_a_search_killed_before_every_soup_resumes_to_the_same_trials_and_winner(
    finished: Path, family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = DYING_AT_EVALUATION.replace("NUMBER", "10")  # base, four parents, dare_ties, uniform, two more
    killed = run_cli("search", write_soup_config(tmp_path, family), "--run", run, prelude=first)
    assert killed.returncode == -signal.SIGKILL
    for _ in range(4):  # three soups, and the first trial of the sampler's own
        killed = run_cli("resume", run, prelude=DYING_AT_EVALUATION.replace("NUMBER", "2"))
        assert killed.returncode == -signal.SIGKILL
    assert run_cli("resume", run).returncode == 0
    assert trials_of(run) == trials_of(finished)
    assert verdict_of(run) == verdict_of(finished)
    begun = [(folder / "log.txt").read_text().count("items of search") for folder in (finished, run)]
    assert begun == [9, 9 + 3]  # each soup was begun twice and finished once

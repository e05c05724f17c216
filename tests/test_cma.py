"""CMA-ES with any number of workers: exact with one, reproducible with many, no result unused."""

import math
import random
import tracemalloc

import numpy as np
import optuna
import pytest
from cmaes import CMA, SepCMA
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.search.samplers import cmaes as cmaes_module
from evomerge.search.samplers.cmaes import GENERATION, START, CmaEsSampler, is_enqueued
from evomerge.search.samplers.mixed_cma import MixedCMA
from evomerge.search.samplers.sampler_kind import trial_seed
from evomerge.search.samplers.stages import stages_of
from evomerge.search.storage.optuna_private import MemoryStorage, key_of_study, key_of_trial, storage_behind
from evomerge.search.storage.trial_record import LEARNED, RECORD, TrialRecord

Point = dict[str, float]


def axes_of(dimensions: int, high: float = 2.0) -> dict[str, FloatDistribution]:
    return {f"x{k}": FloatDistribution(-1.0, high) for k in range(dimensions)}


def sphere(point: Point) -> float:
    return -sum((value - 0.1 * k) ** 2 for k, value in enumerate(point.values()))


class Bench:
    """A study in memory as a driver keeps it: trials in hand in any number, results with their order."""

    def __init__(self, sampler: CmaEsSampler) -> None:
        self.sampler = sampler
        self.study = optuna.create_study(storage=MemoryStorage(), direction="maximize", sampler=sampler)
        self.hand: list[int] = []
        self.results = 0

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> FrozenTrial:
        trial = self.study.ask({**self.sampler.axes})
        self.hand.append(trial.number)
        return self.trials[trial.number]

    def enqueue(self, point: Point) -> FrozenTrial:
        self.study.enqueue_trial(point)
        return self.ask()

    def finish(self, number: int, value: float | None) -> None:
        self.hand.remove(number)
        record = TrialRecord(order=self.results)
        storage_behind(self.study).set_trial_user_attr(key_of_trial(self.trials[number]), RECORD, record)
        self.results += 1
        self.study.tell(number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)

    def rebuilt(self, sampler: CmaEsSampler) -> "Bench":
        """What another process makes of the stored trials alone."""
        other = Bench(sampler)
        for trial in self.trials:
            copy = create_trial(
                state=trial.state,
                params=dict(trial.params),
                distributions=dict(trial.distributions),
                user_attrs=dict(trial.user_attrs),
                system_attrs=dict(trial.system_attrs),
                value=trial.value,
            )
            storage_behind(other.study).create_new_trial(key_of_study(other.study), copy)
        other.hand, other.results = list(self.hand), self.results
        return other


def step(bench: Bench, rng: random.Random, workers: int, fail: float = 0.1) -> Point | None:
    """One event: a free worker gets a trial, else any trial in hand ends.  The point that was proposed, if one was."""
    if len(bench.hand) < workers:
        return dict(bench.ask().params)
    number = rng.choice(bench.hand)
    bench.finish(number, None if rng.random() < fail else sphere(bench.trials[number].params))
    return None


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), workers=st.sampled_from([1, 2, 3, 8, 20]), baselines=st.integers(0, 4))
def test_a_rebuilt_study_proposes_the_same_points(seed: int, workers: int, baselines: int) -> None:
    """The process dies at random moments, once before any result of the sampler's trials and during the baselines."""
    rng = random.Random(seed)
    made = {"axes": axes_of(3), "seed": seed, "sigma0": 0.2, "population": rng.choice([4, 5, None])}
    bench = Bench(CmaEsSampler(**made, workers=workers))
    for _ in range(baselines):
        bench.enqueue({name: rng.uniform(-1, 2) for name in made["axes"]})
        if len(bench.hand) >= workers:
            step(bench, rng, workers)
    for _ in range(2):
        for _ in range(rng.randrange(30)):
            step(bench, rng, workers)
        other = bench.rebuilt(CmaEsSampler(**made, workers=rng.choice([1, 2, 64]) if bench.sampler.means else workers))
        state = rng.getstate()
        here = [step(bench, rng, workers) for _ in range(40)]
        rng.setstate(state)
        assert [step(other, rng, workers) for _ in range(40)] == here
        bench = rng.choice([bench, other])
    check_none_wasted(bench)


def check_none_wasted(bench: Bench) -> None:
    """Every value of a sampled trial has been told, up to one generation that is not full."""
    bench.sampler.distribution_mean(bench.study)
    values = [t for t in bench.trials if t.state == TrialState.COMPLETE and not is_enqueued(t)]
    assert bench.sampler.optimizer is not None
    assert bench.sampler.told + len(bench.sampler.group) == len(values)
    assert len(bench.sampler.group) < bench.sampler.optimizer.population_size


@pytest.mark.parametrize(("workers", "population"), [(8, 13), (64, 21)])
def test_no_result_is_wasted_and_many_workers_climb(workers: int, population: int) -> None:
    rng = random.Random(workers)
    bench = Bench(CmaEsSampler(axes_of(24), seed=3, sigma0=0.2, population=None, workers=workers))
    while bench.results < 500:
        step(bench, rng, workers, fail=0)
    check_none_wasted(bench)
    assert bench.sampler.optimizer is not None
    assert bench.sampler.optimizer.population_size == population
    mean = bench.sampler.distribution_mean(bench.study)
    assert mean is not None
    assert sphere(mean) > 0.2 * sphere(dict.fromkeys(mean, 0.5))
    late = [len(bench.sampler.means) - 1 - t.system_attrs[GENERATION] for t in bench.trials[-workers:]]
    assert max(late) <= 8


@pytest.mark.parametrize("dimensions", [1, 3, 24])
def test_one_worker_is_the_synchronous_algorithm(dimensions: int) -> None:
    """Ask a generation, tell it, ask the next, as the library's manual writes it; start at the best baseline."""
    axes = axes_of(dimensions)
    bench = Bench(CmaEsSampler(axes, seed=7, sigma0=0.2, population=None))
    start = dict.fromkeys(axes, 0.8)
    for point in (dict.fromkeys(axes, -1.0), start):
        bench.finish(bench.enqueue(point).number, sphere(point))
    bounds = np.tile([0.0, 1.0], (dimensions, 1))
    optimizer = CMA(mean=np.full(dimensions, 1.8 / 3), sigma=0.2, bounds=bounds)
    number = 2
    for _ in range(12):
        solutions = []
        for _ in range(4 + math.floor(3 * math.log(dimensions))):
            optimizer.reseed_rng(trial_seed(7, number))
            x = optimizer.ask()
            point = dict(zip(axes, (-1.0 + 3.0 * x).tolist(), strict=True))
            asked = bench.ask()
            assert asked.params == point
            bench.finish(asked.number, sphere(point))
            solutions.append((np.clip((np.array([*point.values()]) + 1.0) / 3.0, 0, 1), -sphere(point)))
            number += 1
        optimizer.tell(solutions)


def test_the_start_is_what_was_known_at_the_first_proposal() -> None:
    """A better baseline that was still running does not change the start of a resumed study."""
    made = {"axes": axes_of(2), "seed": 0, "sigma0": 1e-6, "population": 8}
    bench = Bench(CmaEsSampler(**made))
    known = bench.enqueue({"x0": 0.5, "x1": 0.5})
    running = bench.enqueue({"x0": 1.0, "x1": 1.0})
    bench.finish(known.number, 1.0)
    first = dict(bench.ask().params)
    assert first == pytest.approx({"x0": 0.5, "x1": 0.5}, abs=1e-4)
    bench.finish(running.number, 2.0)
    later = dict(bench.rebuilt(CmaEsSampler(**made)).ask().params)
    assert later == dict(bench.ask().params)
    assert later == pytest.approx(first, abs=1e-4)


def test_without_a_finished_baseline_the_start_is_the_middle() -> None:
    bench = Bench(CmaEsSampler(axes_of(2), seed=0, sigma0=1e-6, population=8))
    bench.enqueue({"x0": 1.0, "x1": 1.0})
    assert dict(bench.ask().params) == pytest.approx({"x0": 0.5, "x1": 0.5}, abs=1e-4)


def test_a_late_result_follows_the_mean_half_of_its_way() -> None:
    bench = Bench(CmaEsSampler(axes_of(2, high=0.0), seed=0, sigma0=0.1, population=4))
    late = bench.ask()
    for trial in [bench.ask() for _ in range(4)]:
        bench.finish(trial.number, sphere(trial.params))
    bench.ask()
    sampler = bench.sampler
    assert len(sampler.means) == 2
    assert sampler.caught_up(late) == pytest.approx(sampler.unit(late) + (sampler.means[1] - sampler.means[0]) / 2)


def test_after_a_collapse_the_search_starts_again_and_earlier_draws_move_nothing() -> None:
    """Twice the population, at a random point; the same in a rebuilt study."""
    made = {"axes": axes_of(3), "seed": 1, "sigma0": 0.2, "population": 4}
    rng = random.Random(0)
    bench = Bench(CmaEsSampler(**made))
    while bench.sampler.began == 0:
        step(bench, rng, 8, fail=0)
        assert bench.results < 3000
    sampler = bench.sampler
    assert sampler.optimizer is not None
    assert sampler.optimizer.population_size == 8
    collapsed = sampler.distribution_mean(bench.study)
    assert collapsed is not None
    assert collapsed != sampler.point(sampler.means[-1]), "the new start is a random point that nothing speaks for"
    assert sphere(collapsed) > 100 * sphere(sampler.point(sampler.means[-1]))
    before = [n for n in bench.hand if bench.trials[n].system_attrs[GENERATION] < sampler.began]
    assert before
    for number in before:
        bench.finish(number, 1e9)
    step(bench, rng, 8)
    assert sampler.group == []
    other = bench.rebuilt(CmaEsSampler(**made))
    assert other.sampler.distribution_mean(other.study) == sampler.distribution_mean(bench.study) == collapsed
    state = rng.getstate()
    here = [step(bench, rng, 8) for _ in range(60)]
    rng.setstate(state)
    assert [step(other, rng, 8) for _ in range(60)] == here


def test_a_proposal_does_not_look_at_all_trials_again() -> None:
    """The first proposal of a process replays all results, the next ones take what is new."""
    axes = axes_of(2)
    points = np.random.RandomState(0).uniform(-1, 2, (600, 2)).tolist()
    whole: dict[str, BaseDistribution] = {**axes}
    trials = [
        create_trial(
            params=dict(zip(axes, row, strict=True)),
            distributions=whole,
            value=-sum(row),
            system_attrs={GENERATION: k // 6},
            user_attrs={"record": {"order": k}},
        )
        for k, row in enumerate(points)
    ]
    bench = Bench(CmaEsSampler(axes, seed=0, sigma0=0.2, population=None))
    bench.study.add_trials(trials)
    bench.ask()
    assert bench.sampler.told == 600
    replayed = []
    take = bench.sampler.take
    bench.sampler.take = lambda trial: (replayed.append(trial.number), take(trial))[1]  # type: ignore[method-assign]
    for _ in range(20):
        step(bench, random.Random(0), 1, fail=0)
    assert replayed == list(range(600, 610))


# --- From coarse to fine ---


def staged(dimensions: int = 24, workers: int = 1, results: int = 30) -> CmaEsSampler:
    """Axes of two sources; those of a source are in three groups."""
    pairs = {name: f"s{k % 2}" for k, name in enumerate(axes_of(dimensions))}
    ties = {name: f"s{k % 2}.{k % 6}" for k, name in enumerate(axes_of(dimensions))}
    stages = stages_of(list(pairs), [pairs, ties], results)
    return CmaEsSampler(axes_of(dimensions), 5, 0.2, None, workers, ties, stages)


def values_of(trial: FrozenTrial, count: int) -> int:
    """How many different values the axes have of those whose numbers are equal modulo `count`."""
    values = list(trial.params.values())
    return max(len(set(values[k::count])) for k in range(count))


def test_two_coarser_searches_come_first_each_from_the_best_so_far() -> None:
    bench = Bench(staged())
    start = bench.enqueue(dict.fromkeys(axes_of(24), 0.5))
    bench.finish(start.number, sphere(start.params))
    for _ in range(120):
        number = bench.ask().number
        bench.finish(number, sphere(bench.trials[number].params))
    drawn = bench.trials[1:]
    coarse = next(k for k, t in enumerate(drawn) if values_of(t, 2) > 1)
    middle = next(k for k, t in enumerate(drawn) if values_of(t, 6) > 1) - coarse
    assert (coarse, middle) == (30, 63), "whole generations of 6 and of 9 results, 30 and 60 at least"
    for first in (coarse, coarse + middle):
        best = max(bench.trials[: 1 + first], key=lambda t: t.value or 0.0)
        mean = bench.sampler.means[drawn[first].system_attrs[GENERATION]]
        assert set(np.round(mean, 12)) == set(np.round(bench.sampler.unit(best), 12))
    check_none_wasted(bench)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), workers=st.sampled_from([1, 3, 8]))
def test_a_rebuilt_study_goes_on_in_the_same_stage(seed: int, workers: int) -> None:
    rng = random.Random(seed)
    bench = Bench(staged(workers=workers))
    start = bench.enqueue(dict.fromkeys(axes_of(24), 0.5))
    bench.finish(start.number, sphere(start.params))
    bench.ask()
    for _ in range(3):
        for _ in range(rng.randrange(160)):
            step(bench, rng, workers)
        other = bench.rebuilt(staged(workers=rng.choice([1, 64])))
        state = rng.getstate()
        here = [step(bench, rng, workers) for _ in range(40)]
        rng.setstate(state)
        assert [step(other, rng, workers) for _ in range(40)] == here
        assert other.sampler.distribution_mean(other.study) == bench.sampler.distribution_mean(bench.study)


def test_a_start_that_no_coarser_search_can_hold_begins_with_all_axes() -> None:
    axes = axes_of(24)
    for point, different in (({n: 0.01 * k for k, n in enumerate(axes)}, 24), (dict.fromkeys(axes, 0.3), 2)):
        bench = Bench(staged())
        start = bench.enqueue(point)
        bench.finish(start.number, 0.0)
        assert len(set(bench.ask().params.values())) == different


def test_a_study_from_before_the_stages_goes_on_as_it_began() -> None:
    """What a study stored at its first trial says how it goes on."""
    bench = Bench(CmaEsSampler(axes_of(24), 5, 0.2, None))
    for _ in range(20):
        number = bench.ask().number
        bench.finish(number, sphere(bench.trials[number].params))
    assert bench.rebuilt(staged()).ask().params == bench.ask().params


def test_a_stage_whose_distribution_collapses_is_over() -> None:
    bench = Bench(staged(results=10_000))
    while len(bench.sampler.left) != 1:
        number = bench.ask().number
        bench.finish(number, sphere(bench.trials[number].params))
        assert bench.results < 3000
    assert values_of(bench.ask(), 2) > 1


@pytest.mark.parametrize(
    ("pairs", "ties", "dimensions"), [(2, 6, [2, 6]), (2, 24, [2]), (13, 13, []), (12, 12, [12]), (6, 8, [8])]
)
def test_a_stage_has_clearly_fewer_coordinates_than_the_next(pairs: int, ties: int, dimensions: list[int]) -> None:
    axes = [f"x{k}" for k in range(24)]
    named = [{axis: str(k % count) for k, axis in enumerate(axes)} for count in (pairs, ties)]
    assert [stage.dimension for stage in stages_of(axes, named, 30)] == dimensions
    assert stages_of(axes, named, 0) == []
    assert stages_of(axes, [{}, {}], 30) == []


# --- Many coordinates ---


def test_many_coordinates_take_memory_for_each_and_not_for_each_pair() -> None:
    dimensions = 1000
    bench = Bench(CmaEsSampler(axes_of(dimensions), 0, 0.2, population=4))
    bench.finish(bench.ask().number, 0.0)
    tracemalloc.start()
    for value in range(5):
        bench.finish(bench.ask().number, float(value))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bench.sampler.told == 4
    assert peak < 8 * dimensions**2 / 2, "half of what one matrix of all pairs takes"


def test_the_choice_of_a_covariance_is_the_studys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse to fine in 120 axes; another threshold changes nothing in a study that has begun."""
    bench = Bench(staged(120, workers=3, results=6))
    start = bench.enqueue(dict.fromkeys(axes_of(120), 0.5))
    bench.finish(start.number, sphere(start.params))
    rng = random.Random(0)
    while bench.results < 60:
        step(bench, rng, 3)
    assert isinstance(bench.sampler.optimizer, SepCMA)
    rest = rng.getstate()
    others = [bench]
    for threshold in (10, 1000):
        monkeypatch.setattr(cmaes_module, "SEPARABLE", threshold)
        others.append(bench.rebuilt(staged(120, results=6)))
    runs = []
    for other in others:
        rng.setstate(rest)
        runs.append([step(other, rng, 3) for _ in range(30)])
    assert runs[0] == runs[1] == runs[2]


def test_a_study_from_before_the_separable_search_keeps_its_covariance() -> None:
    bench = Bench(CmaEsSampler(axes_of(101), 5, 0.2, 4))
    bench.finish(bench.ask().number, 0.0)
    del bench.trials[0].system_attrs[START]["separable"]
    other = bench.rebuilt(CmaEsSampler(axes_of(101), 5, 0.2, 4))
    other.ask()
    assert isinstance(other.sampler.optimizer, CMA)


# --- Choices beside many coefficients ---


def mixed(coefficients: int) -> CmaEsSampler:
    return CmaEsSampler({**axes_of(coefficients), "c": CategoricalDistribution(["a", "b", "c"])}, 5, 0.2, None)


def finish_mixed(bench: Bench) -> None:
    trial = bench.ask()
    value = 0.0 if trial.params["c"] == "b" else -1.0
    bench.finish(trial.number, value + sphere({k: v for k, v in trial.params.items() if k != "c"}) / 1e5)


def test_many_coefficients_beside_a_choice_have_no_covariance() -> None:
    """Matrices of 3,000 would take 72 MB each, and minutes a generation.  The choice is found all the same."""
    tracemalloc.start()
    try:
        cma = MixedCMA(np.append(np.full(3000, 0.5), 0), 0.05, [3], 28, anywhere=True, separable=True)
        for generation in range(8):
            points = []
            for number in range(28):
                cma.reseed_rng(28 * generation + number)
                points.append(cma.ask())
            cma.tell([(at, float(at[:3000].sum()) / 1e4 - float(at[3000] == 1)) for at in points])
            assert not cma.should_stop()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 3000**2 / 2
    assert cma.likely[0].argmax() == cma.mean[-1] == 1
    assert cma.mean[:3000].mean() < 0.5


def test_the_choice_of_a_covariance_beside_a_choice_is_the_studys() -> None:
    for coefficients, from_before, apart in ((101, False, True), (101, True, False), (100, False, False)):
        bench = Bench(mixed(coefficients))
        for _ in range(20):
            finish_mixed(bench)
        if from_before:
            del bench.trials[0].system_attrs[START]["separable_mixed"]
        other = bench.rebuilt(mixed(coefficients))
        asked = other.ask()
        assert isinstance(other.sampler.optimizer, MixedCMA)
        assert (other.sampler.optimizer.apart is not None) == apart
        if not from_before:
            assert asked.params == bench.ask().params


def test_a_resume_that_takes_long_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(CmaEsSampler(axes_of(101), 5, 0.2, 4))
    for _ in range(40):
        bench.finish(bench.ask().number, 0.0)
    del bench.trials[0].system_attrs[START]["separable"]
    lines: list[str] = []
    bench.rebuilt(CmaEsSampler(axes_of(101), 5, 0.2, 4, say=lines.append)).ask()
    assert lines == []
    monkeypatch.setattr(cmaes_module, "PATIENCE", 1e-6)
    bench.rebuilt(CmaEsSampler(axes_of(101), 5, 0.2, 4, say=lines.append)).ask()
    (line,) = lines
    assert line == "note: CMA-ES is told the 40 results of this study again, which takes about 1 min more"


# --- Shifts of whole groups, after a learned start in a wide space ---


def started(dimensions: int, learned: bool) -> Bench:
    """Axes in three groups; the start lies 0.3 below the top along the second group."""
    bench = Bench(sampler_of(dimensions))
    trial = bench.enqueue(dict.fromkeys(axes_of(dimensions), 0.5))
    if learned:
        storage_behind(bench.study).set_trial_user_attr(key_of_trial(trial), LEARNED, 150)
    bench.finish(trial.number, height(trial.params))
    return bench


def sampler_of(dimensions: int) -> CmaEsSampler:
    ties = {name: f"g{k % 3}" for k, name in enumerate(axes_of(dimensions))}
    return CmaEsSampler(axes_of(dimensions), 1, 0.1, None, ties=ties)


def height(point: Point) -> float:
    return -sum((value - (0.8 if k % 3 == 1 else 0.5)) ** 2 for k, value in enumerate(point.values()))


def test_a_wide_space_is_shifted_by_groups_after_a_learned_start() -> None:
    bench = started(60, learned=True)
    for _ in range(40):
        number = bench.ask().number
        bench.finish(number, height(bench.trials[number].params))
    for trial in bench.trials[1:]:
        for group in range(3):
            values = list(trial.params.values())[group::3]
            assert values == pytest.approx([values[0]] * len(values)), "axes of one group move together"
    mean = bench.sampler.distribution_mean(bench.study)
    assert mean is not None
    assert height(mean) > height(bench.trials[0].params) / 4


def test_shifts_are_the_same_in_another_process() -> None:
    bench = started(60, learned=True)
    for _ in range(11):
        number = bench.ask().number
        bench.finish(number, height(bench.trials[number].params))
    other = bench.rebuilt(sampler_of(60))
    assert other.ask().params == bench.ask().params


@pytest.mark.parametrize(("learned", "dimensions"), [(False, 60), (True, 30)])
def test_every_axis_is_searched_in_a_small_space_and_without_a_learned_start(learned: bool, dimensions: int) -> None:
    bench = started(dimensions, learned)
    assert len(set(bench.ask().params.values())) == dimensions

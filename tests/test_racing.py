"""Races stop equal candidates with a probability of at most alpha, and worse ones early, for all kinds of scores."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import create_trial

from evomerge.evaluate import racing
from evomerge.evaluate.generation import GenerationBatch
from evomerge.evaluate.loglikelihood import Batch
from evomerge.evaluate.looks import Cost, Looks, place_looks, time_of
from evomerge.evaluate.racing import (
    FEWEST,
    Order,
    Race,
    Vector,
    ceiling,
    chunks,
    informativeness,
    item_weights,
    race_order,
)
from evomerge.evaluate.workload import Workload
from evomerge.search.evaluation.race_policy import may_race
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.scale import Scale
from evomerge.search.verdict.intervals import mean_score


def every_order(weights: Vector, draws: Vector) -> Iterator[tuple[float, Order]]:
    """All orders of a small population with their probabilities under successive draws in proportion to `draws`."""
    for items in itertools.permutations(range(len(weights))):
        left = np.cumsum(draws[list(items)][::-1])[::-1]
        yield float(np.prod(draws[list(items)] / left)), Order(np.array(items), weights, draws)


def population(seed: int, size: int = 5) -> tuple[Vector, Vector, Vector, Vector]:
    """Weights, draws, and an incumbent and a candidate in [0, 1] whose values are equal."""
    rng = np.random.default_rng(seed)
    weights, draws = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size)) + 0.05
    incumbent, candidate = rng.random(size), rng.random(size)
    if weights @ candidate < weights @ incumbent:
        incumbent, candidate = candidate, incumbent
    return weights, draws, incumbent, candidate - weights @ (candidate - incumbent)


def run(race: Race, order: Order, scores: Vector, size: int) -> bool:
    return any(race.observe(scores[chunk]) for chunk in chunks(order, size))


def shuffled(size: int, seed: int = 0) -> Order:
    weights = np.full(size, 1 / size)
    return race_order([str(i) for i in range(size)], weights, seed, None, np.ones(size))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_the_capital_of_a_candidate_that_is_not_worse_grows_on_average_in_no_step(
    size: int, with_history: bool, gain: float
) -> None:
    """Exactly, over all orders: with equal values its expectation stays 1."""
    for seed in range(2):
        weights, draws, incumbent, candidate = population(seed)
        history = np.random.default_rng(seed).random((3, 5)) if with_history else None
        expected = np.zeros(5)
        for chance, order in every_order(weights, draws):
            race = Race(order, incumbent, np.ones(5), history)
            for chunk in chunks(order, size):
                race.observe(np.minimum(1.0, candidate + gain)[chunk])
                expected[len(race.d) - 1] += chance * math.exp(race.capital)
        seen = expected[expected > 0]
        if gain:
            assert (seen <= 1 + 1e-9).all()
        else:
            np.testing.assert_allclose(seen, 1)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6])
def test_equal_candidates_are_stopped_at_most_in_alpha_of_all_orders(alpha: float) -> None:
    some = 0.0
    for seed in range(12):
        weights, draws, incumbent, candidate = population(seed, size=4)
        stopped = 0.0
        for chance, order in every_order(weights, draws):
            stopped += chance * run(Race(order, incumbent, np.ones(4), alpha=alpha), order, candidate, 1)
        assert stopped <= alpha + 1e-9
        some += stopped
    assert some > 0 or alpha < 0.6  # the bound is not kept by never stopping


def test_a_few_great_gains_that_make_up_for_many_small_losses_rarely_fool_the_race() -> None:
    """The most skewed of equal candidates; a test of signs or ranks stops nearly all of them."""
    incumbent = np.full(60, 0.5)
    candidate = np.full(60, 0.5 - 0.5 / 59)
    candidate[0] = 1.0
    stopped = 0
    for seed in range(400):
        order = shuffled(60, seed)
        stopped += run(Race(order, incumbent, np.ones(60), alpha=0.1), order, candidate, 6)
    assert stopped / 400 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)


def test_an_identical_candidate_is_not_stopped_at_any_level() -> None:
    incumbent = np.where(np.arange(60) % 20 == 0, -9.0, -1.0)
    for seed in range(20):
        order = shuffled(60, seed)
        race = Race(order, incumbent, np.zeros(60), alpha=0.95)
        assert not run(race, order, incumbent, 3)


def test_how_items_are_cut_into_chunks_does_not_change_the_evidence() -> None:
    incumbent = -np.random.default_rng(0).exponential(1.0, 120)
    order = shuffled(120)
    capitals = []
    for size in (1, 4, 40):
        race = Race(order, incumbent, np.zeros(120))
        for chunk in chunks(order, size)[: 80 // size]:
            race.observe(incumbent[::-1][chunk])
        capitals.append(race.capital)
    np.testing.assert_allclose(capitals[1:], capitals[0])


def test_crediting_the_items_with_most_to_gain_beforehand_ends_races_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    incumbent = -rng.gamma(2.0, 1.0, 400)
    shares = []
    for cap in (racing.CAP, 1.0):
        monkeypatch.setattr(racing, "CAP", cap)
        fractions = []
        for seed in range(10):
            order = shuffled(400, seed)
            race = Race(order, incumbent, np.zeros(400))
            run(race, order, incumbent - 0.1, 20)
            fractions.append(race.estimate().fraction)
        shares.append(np.mean(fractions))
    assert shares[0] < 0.8 * shares[1]


def test_what_is_left_cannot_make_up_for_the_loss() -> None:
    incumbent = np.array([0.9, 0.5, 1.0])
    order = Order(np.arange(3), np.full(3, 1 / 3), np.full(3, 1 / 3))
    assert Race(order, incumbent, np.ones(3)).observe(np.array([0.35]))
    assert not Race(order, incumbent, np.ones(3)).observe(np.array([0.45]))


def test_the_estimate_is_unbiased_at_every_number_of_items() -> None:
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weights, draws, incumbent, _ = population(seed)
        candidate = rng.random(5)
        means = np.zeros(4)
        for chance, order in every_order(weights, draws):
            race = Race(order, incumbent, np.ones(5))
            for k, item in enumerate(order.items[:4]):
                race.observe(candidate[[item]])
                means[k] += chance * race.difference()[0]
        np.testing.assert_allclose(means, weights @ (candidate - incumbent))


def test_with_equal_draws_the_estimate_is_the_mean_of_the_differences_and_its_error_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    incumbent, candidate = rng.random(50), rng.random(50)
    order = shuffled(50)
    race = Race(order, incumbent, np.ones(50))
    seen = order.items[:20]
    race.observe(candidate[seen])
    delta, error = race.difference()
    d = (candidate - incumbent)[seen]
    assert delta == pytest.approx(d.mean())
    assert error == pytest.approx(d.std(ddof=1) / math.sqrt(20) * math.sqrt(1 - 20 / 50), rel=0.15)


def test_finished_candidates_make_the_estimate_of_one_like_them_sharper() -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4, 200))
    history = 0.5 + 0.05 * rng.normal(size=(12, 4)) @ directions
    incumbent, candidate = history[0], 0.5 + 0.05 * rng.normal(size=4) @ directions
    errors = []
    for known in (None, history[1:]):
        misses = []
        for seed in range(30):
            order = shuffled(200, seed)
            race = Race(order, incumbent, np.full(200, 2.0), known)
            race.observe(candidate[order.items[:40]])
            misses.append(race.difference()[0] - (candidate - incumbent).mean())
        errors.append(np.sqrt(np.mean(np.square(misses))))
    assert errors[1] < 0.3 * errors[0]


def test_shrinking_goes_from_the_estimate_towards_the_mean_of_finished_candidates() -> None:
    rng = np.random.default_rng(1)
    incumbent = rng.random(100)
    history = np.clip(incumbent - 0.05 + 0.1 * rng.normal(size=(10, 100)), 0, 1)
    candidate = np.clip(incumbent - 0.5 + 0.3 * rng.normal(size=100), 0, 1)
    order = shuffled(100)
    race = Race(order, incumbent, np.ones(100), history)
    race.observe(candidate[order.items[:10]])
    delta, error = race.difference()
    gaps = (history - incumbent).mean(axis=1)
    share = gaps.var(ddof=1) / (gaps.var(ddof=1) + error**2)
    found = race.estimate()
    assert found.value == pytest.approx(incumbent.mean() + share * delta + (1 - share) * gaps.mean())
    assert (found.fraction, found.error) == (0.1, error)


def test_no_estimate_is_above_the_incumbent() -> None:
    order = shuffled(40)
    race = Race(order, np.full(40, 0.5), np.ones(40))
    race.observe(np.full(10, 0.8))
    assert race.difference()[0] > 0
    assert race.estimate().value == pytest.approx(0.5)


def test_a_clearly_worse_candidate_is_stopped_early_and_its_estimate_is_near() -> None:
    rng = np.random.default_rng(0)
    incumbent = (rng.random(400) < 0.8).astype(float)
    candidate = (rng.random(400) < 0.4).astype(float)
    order = shuffled(400)
    race = Race(order, incumbent, np.ones(400))
    assert run(race, order, candidate, 20)
    found = race.estimate()
    assert found.fraction <= 0.25
    assert found.value == pytest.approx(candidate.mean(), abs=4 * found.error)


def test_a_perfect_incumbent_is_lost_to_at_the_first_error() -> None:
    order = shuffled(10)
    race = Race(order, np.ones(10), np.ones(10))
    scores = np.ones(10)
    scores[order.items[4]] = 0.0
    assert not race.observe(scores[order.items[:4]])
    assert race.observe(scores[order.items[4:5]])


def test_one_terrible_item_stops_a_candidate_without_overflow() -> None:
    rng = np.random.default_rng(0)
    incumbent = -rng.exponential(2.0, 100)
    order = shuffled(100)
    for worst in (-1e4, -1e8, -1e15):
        scores = incumbent.copy()
        scores[order.items[7]] = worst
        with np.errstate(all="raise"):
            race = Race(order, incumbent, np.zeros(100), np.stack([incumbent - 1, incumbent * 2]))
            assert run(race, order, scores, 5)
            assert len(race.d) == 10
            assert math.isfinite(race.estimate().value)


def test_scores_above_the_ceiling_count_as_the_ceiling() -> None:
    order = shuffled(40)
    high, low = np.full(40, 3.0), np.full(40, 1.0)
    races = [Race(order, np.full(40, 0.5), np.ones(40)) for _ in range(2)]
    for race, scores in zip(races, (high, low), strict=True):
        race.observe(scores[order.items[:10]])
    np.testing.assert_array_equal(races[0].d, races[1].d)
    races[0].observe(high[order.items[10:]])
    assert races[0].estimate().value == pytest.approx(3.0)  # a full evaluation is told as it is


@pytest.mark.parametrize("scores", [[math.nan], [math.inf], [-math.inf], [0.0] * 6])
def test_scores_that_are_not_finite_or_too_many_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="finite score"):
        Race(shuffled(5), np.zeros(5), np.ones(5)).observe(np.array(scores))


SCORES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e4, 1.0))


@st.composite
def races(draw: st.DrawFn) -> tuple[Order, Vector, Vector, Vector, int]:
    """An order over one to three tasks, scores with ties and constants, and a chunk size."""
    counts = {name: draw(st.integers(1, 12)) for name in "abc"[: draw(st.integers(1, 3))]}
    weights = {name: draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for name in counts}
    weights["a"] = 1.0
    size = sum(counts.values())
    vectors = st.one_of(
        st.lists(SCORES, min_size=size, max_size=size).map(np.array), SCORES.map(lambda x: np.full(size, x))
    )
    rows = [draw(vectors) for _ in range(4)]
    baselines = np.stack(rows[2:])
    ids = [f"{name}{i}" for name, n in counts.items() for i in range(n)]
    informed = draw(st.booleans())
    order = race_order(
        ids, item_weights(weights, counts), draw(st.integers(0, 9)), baselines if informed else None, np.ones(size)
    )
    return order, rows[0], rows[1], baselines, draw(st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(races())
def test_whatever_the_scores_the_race_keeps_its_promises(case: tuple[Order, Vector, Vector, Vector, int]) -> None:
    order, incumbent, candidate, history, size = case
    total = len(order.items)
    top = np.ones(total)
    with np.errstate(all="raise", under="ignore"):
        for scores in (incumbent, np.minimum(1.0, incumbent + 0.3), np.maximum(incumbent, candidate)):
            race = Race(order, incumbent, top, history)
            assert not run(race, order, scores, size), "a candidate that is nowhere worse was stopped"
            assert race.estimate().value == pytest.approx(order.weights @ scores, rel=1e-9, abs=1e-9)
            assert race.estimate().fraction == 1
        race = Race(order, incumbent, top, history)
        stopped = run(race, order, candidate, size)
        found = race.estimate()
    assert stopped == race.stopped == (found.fraction < 1)
    if stopped:
        assert found.value <= order.weights @ incumbent + 1e-9
        assert math.isfinite(found.value)
        assert found.error >= 0


@settings(max_examples=25, deadline=None)
@given(races())
def test_chunks_are_the_whole_order_once(case: tuple[Order, Vector, Vector, Vector, int]) -> None:
    order, *_, size = case
    pieces = chunks(order, size)
    assert sorted(np.concatenate(pieces)) == list(range(len(order.items)))
    assert {len(p) for p in pieces[:-1]} <= {size}


def test_the_order_depends_on_seed_and_ids_alone() -> None:
    ids = [f"item{i}" for i in range(30)]
    turned = ids[::-1]
    weights = np.full(30, 1 / 30)

    def names(listed: Sequence[str], seed: int) -> list[str]:
        return [listed[i] for i in race_order(listed, weights, seed, None, np.ones(30)).items]

    assert names(ids, 1) == names(turned, 1)
    assert names(ids, 1) != names(ids, 2)


def test_orders_come_as_often_as_successive_draws_would_give_them() -> None:
    draws = np.array([0.6, 0.3, 0.1])
    wanted = {tuple(order.items): chance for chance, order in every_order(draws, draws)}
    repeats = 4000
    found = dict.fromkeys(wanted, 0)
    for seed in range(repeats):
        found[tuple(race_order(["a", "b", "c"], draws, seed, None, np.ones(3)).items)] += 1
    for items, chance in wanted.items():
        assert found[items] / repeats == pytest.approx(chance, abs=4 * math.sqrt(chance / repeats))


def test_items_of_a_task_of_double_weight_come_earlier() -> None:
    counts = {"heavy": 200, "light": 200}
    weights = item_weights({"heavy": 2.0, "light": 1.0}, counts)
    order = race_order([str(i) for i in range(400)], weights, 0, None, np.ones(400))
    assert (order.items[:90] < 200).mean() == pytest.approx(2 / 3, abs=0.15)


def test_item_weights_make_the_weighted_mean_of_task_means() -> None:
    scores = {"a": [1.0, 0.0, 1.0], "b": [0.5], "c": [0.2, 0.4]}
    weights = {"a": 1.0, "b": 3.0, "c": 0.5, "other": 9.0}
    w = item_weights(weights, {task: len(items) for task, items in scores.items()})
    assert w @ np.concatenate(list(scores.values())) == pytest.approx(mean_score(scores, weights))


def test_items_on_which_the_baselines_leave_nothing_to_gain_are_drawn_less_often() -> None:
    baselines = np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 0.5]])
    u = informativeness(baselines, np.ones(3))
    assert u[0] < u[2] < u[1]
    assert u.mean() == pytest.approx(1)
    np.testing.assert_array_equal(informativeness(np.ones((2, 3)), np.ones(3)), np.ones(3))


def test_metrics_without_a_known_top_get_the_baselines_range_above_their_best() -> None:
    baselines = np.array([[-1.0, 2.0], [0.5, 3.0]])
    assert ceiling("exact_match,strict", baselines) == 1.0
    assert ceiling("gold_logprob", baselines) == 0.0
    assert ceiling("margin", baselines) == 7.0
    assert ceiling("margin", np.full((2, 2), 4.0)) == 8.0
    assert ceiling("margin", np.zeros((2, 2))) == 1.0


# --- The looks of a race ---


def work_of(tokens: list[int], prompts: int = 0) -> Workload:
    """Batches of so many tokens, and one generation of so many prompts."""
    nothing = torch.zeros(0, dtype=torch.long)
    work = Workload(None, [], complete=False)  # type: ignore[arg-type]
    work.batches = [
        Batch(torch.zeros(1, n), None, None, (), nothing, nothing, nothing, nothing, n) for n in tokens
    ]  # fmt: skip
    if prompts:
        ids = torch.zeros(prompts, 10)
        work.generations = [
            GenerationBatch(ids, ids, (), [(slice(0, prompts), 0)], [10] * prompts, list(range(prompts)), (), 50)
        ]
    return work


def pieces_of(ends: Sequence[int]) -> list[Workload]:
    """Ten tokens an item, a batch for each piece."""
    return [work_of([10 * n]) for n in np.diff([0, *ends])]


def test_cheap_forwards_are_looked_at_often_and_dear_ones_never() -> None:
    whole = work_of([8000])
    assert len(place_looks(800, whole, pieces_of, Cost(0.0, 0.0)).ends) == 40
    assert place_looks(800, whole, pieces_of, Cost(100_000.0)) == Looks((800,), (1.0,))


@pytest.mark.parametrize("look", [0.0, 20.0, 100.0, 500.0])
def test_the_dearer_a_look_the_fewer_there_are_and_what_they_cost_is_known(look: float) -> None:
    cost = Cost(90.0, look)
    looks = place_looks(800, work_of([8000]), pieces_of, cost)
    fewer = place_looks(800, work_of([8000]), pieces_of, replace(cost, look=look + 1000))
    assert len(fewer.ends) <= len(looks.ends)
    assert looks.ends[-1] == 800
    assert min(np.diff([0, *looks.ends])) >= FEWEST
    each = [90.0 + 10 * n + look for n in np.diff([0, *looks.ends])]
    np.testing.assert_allclose(looks.costs, np.cumsum(each) / 8090)


def test_few_looks_come_early() -> None:
    """Most candidates that are stopped are so at the beginning."""
    ends = place_looks(800, work_of([8000]), pieces_of, Cost(1140.0, 0.0)).ends
    assert 1 < len(ends) < 40
    assert ends[0] < 800 / len(ends)


class Past:
    """A study as `may_race` looks at it: what has finished, and how many were begun."""

    def __init__(self, records: list[dict[str, object]], in_hand: int = 0) -> None:
        self.finished = [create_trial(value=0.0, user_attrs={"record": {"items": "items", **r}}) for r in records]
        self.count = len(records) + in_hand


@given(st.lists(st.floats(0.1, 1.0), max_size=60), st.floats(0.9, 2.0), st.integers(0, 12), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_races_never_make_a_search_cost_five_percent_more(
    stops: list[float], whole: float, baselines: int, in_hand: int
) -> None:
    """Whatever share of the items the candidates are stopped after, by the costs that were measured."""
    looks = Looks((20, 50, 100), (0.2 * whole, 0.5 * whole, whole))
    order = shuffled(100)
    race_setup = RaceSetup("items", {"a": 100}, order, np.ones(100), 0.02, looks, Scale({}))
    records: list[dict[str, object]] = [{} for _ in range(baselines)]
    spent = float(baselines)
    for stop in stops:
        raced = may_race(Past(records, in_hand), race_setup)  # type: ignore[arg-type]
        records.append({"race": {"incumbent": 0}, "partial": stop} if raced else {})
        spent += stop * whole if raced else 1.0
        assert spent <= 1.05 * len(records) + 1e-9
    if whole <= 1.05 or (stops and max(stops) < 0.4 and baselines >= 10 and whole < 1.2 and not in_hand):
        assert all("race" in r for r in records[baselines:])


def test_generation_in_pieces_takes_its_steps_again() -> None:
    free, dear = Cost(0.0), Cost(1000.0)
    assert 2 * time_of(work_of([], 40), free) == time_of(work_of([], 80), free)
    steps = 50 + 1  # new tokens, and a forward over prompts
    assert 2 * time_of(work_of([], 40), dear) - time_of(work_of([], 80), dear) == 1000 * steps


def test_a_forward_is_dear_where_many_tokens_fill_a_batch() -> None:
    assert Cost.on("cpu", 256) == Cost.on("cpu", 4096)
    assert Cost.on("cuda", 65536).forward == 4096

"""The verdict: a winner beats every baseline on the same items, by more than luck."""

import json
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import beta

from evomerge.config.schema import SearchConfig
from evomerge.search.verdict import intervals as module
from evomerge.search.verdict.intervals import (
    ENOUGH,
    Interval,
    ItemScores,
    Range,
    detectable,
    intervals,
    mean_score,
    score_range,
)
from evomerge.search.verdict.next_step import next_step
from evomerge.search.verdict.verdict import ENOUGH_SEARCHED, Outcome, Rival, Verdict, judge

WEIGHTS = {"a": 1.0}
ACCURACY: Range = (0.0, 1.0)


def hits(chance: float, count: int, seed: int = 0) -> list[float]:
    """Zeros and ones, as exact match gives them."""
    return [float(x) for x in np.random.default_rng(seed).random(count) < chance]


def judged(candidate: Sequence[float], *rivals: Sequence[float], metric: str = "acc") -> Verdict:
    """A verdict over one task; the first rival was best on the selection split."""
    named = [Rival(f"rival {k}", "parent", {"a": scores}) for k, scores in enumerate(rivals)]
    return judge({"a": candidate}, named, {"a": metric}, WEIGHTS, seed=0)


def test_a_clear_winner_wins_against_every_baseline() -> None:
    verdict = judged(hits(0.9, 200, 3), hits(0.4, 200, 2), hits(0.2, 200, 1))
    assert verdict.outcome == "better"
    assert verdict.winner
    assert verdict.recommended == "winner"
    assert all(c.beaten for c in verdict.comparisons)
    assert "better than all 2 baselines, each at one-sided 5%" in verdict.sentence
    assert "rival 0, the best of them on the selection items" in verdict.sentence


def test_one_baseline_that_is_as_good_prevents_a_winner() -> None:
    winner = hits(0.9, 200, 3)
    verdict = judged(winner, hits(0.2, 200, 1), winner)
    assert not verdict.winner
    assert [c.beaten for c in verdict.comparisons] == [True, False]
    assert verdict.sentence.startswith("No difference shown")
    assert "of rival 1" in verdict.sentence


def test_what_is_recommended_was_best_on_the_selection_split_whatever_the_holdout_says() -> None:
    """The best of several on the holdout split is partly best by luck, so its score there is too high."""
    verdict = judged(hits(0.5, 200, 1), hits(0.5, 200, 2), hits(0.6, 200, 3))
    assert verdict.comparisons[1].score > verdict.comparisons[0].score
    assert verdict.recommended == "rival 0"


def test_a_candidate_that_is_surely_worse_is_called_so() -> None:
    verdict = judged(hits(0.3, 200, 1), hits(0.9, 200, 2))
    assert verdict.outcome == "worse"
    assert verdict.sentence.startswith("Worse than rival 0")
    assert verdict.recommended == "rival 0"


def test_a_search_without_a_candidate_recommends_the_best_baseline() -> None:
    rival = Rival("soup", "uniform", {"a": hits(0.3, 50, 2)})
    verdict = judge({"a": hits(0.5, 50, 1)}, [rival], {"a": "acc"}, WEIGHTS, seed=0, stand_in="one", searched=3)
    assert (verdict.outcome, verdict.winner, verdict.recommended) == ("too little searched", False, "one")
    assert "one, the best baseline" in verdict.sentence


def test_a_baseline_that_is_better_than_all_that_was_searched_takes_the_place_of_the_candidate() -> None:
    rival = Rival("soup", "uniform", {"a": hits(0.3, 200, 2)})
    verdict = judge({"a": hits(0.9, 200, 1)}, [rival], {"a": "acc"}, WEIGHTS, seed=0, stand_in="upper")
    assert (verdict.outcome, verdict.winner, verdict.recommended) == ("worse", False, "upper")
    assert "Worse than upper: on the selection items it is better than the best of the" in verdict.sentence


def test_without_a_baseline_nothing_is_shown_and_nothing_raised() -> None:
    verdict = judged(hits(0.9, 50))
    assert (verdict.outcome, verdict.winner, verdict.recommended) == ("no difference shown", False, "winner")
    assert verdict.detectable is None


def test_what_is_not_better_after_a_few_candidates_is_too_little_searched() -> None:
    scores = {"a": hits(0.5, 200, 1)}
    rival = Rival("soup", "uniform", {"a": hits(0.5, 200, 2)})
    outcomes = [
        judge(scores, [rival], {"a": "acc"}, WEIGHTS, seed=0, searched=count).outcome
        for count in (0, ENOUGH_SEARCHED - 1, ENOUGH_SEARCHED)
    ]
    assert outcomes == ["too little searched", "too little searched", "no difference shown"]
    worse = Rival("soup", "uniform", {"a": hits(0.1, 200, 2)})
    assert judge(scores, [worse], {"a": "acc"}, WEIGHTS, seed=0, searched=1).outcome == "better"


def test_no_difference_says_what_gain_could_have_been_shown() -> None:
    verdict = judged(hits(0.5, 200, 1), hits(0.5, 200, 2))
    assert verdict.detectable is not None
    assert f"enough to show a gain of {verdict.detectable:.3f}, but not less" in verdict.sentence


def test_models_that_answer_alike_are_called_so_and_can_still_show_only_five_items_of_gain() -> None:
    same = hits(0.5, 200, 1)
    verdict = judged(same, same)
    assert verdict.comparisons[0].same
    assert "the same score on every item" in verdict.sentence
    assert verdict.detectable == pytest.approx(5 / 200)
    assert judged([1.0] * 5 + same, [0.0] * 5 + same).winner
    assert not judged([1.0] * 4 + same, [0.0] * 4 + same).winner


def test_a_handful_of_items_is_said_to_show_no_gain() -> None:
    verdict = judged([1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    assert verdict.detectable is None
    assert "too few to show any gain" in verdict.sentence


@pytest.mark.parametrize(
    ("outcome", "command"),
    [
        ("better", "evomerge export RUN --out merged/"),
        ("worse", "evomerge export RUN --out merged/"),
        ("no difference shown", "evomerge resume RUN --trials 240"),
        ("too little searched", "evomerge resume RUN --trials 240"),
    ],
)
def test_each_outcome_has_its_next_command(outcome: Outcome, command: str) -> None:
    content = {
        "name": "n",
        "base": "b",
        "sources": [{"name": "s", "path": "s"}],
        "method": "linear",
        "tasks": [{"task": "t"}],
    }
    config = SearchConfig.model_validate(content)
    assert next_step(outcome, config, 120) == command


def test_a_gain_that_may_be_luck_makes_no_winner() -> None:
    better, worse = [1.0] * 11 + [0.0] * 9, [0.0] * 10 + [1.0] * 10  # 11 of 20 against 10 of 20
    verdict = judged(better, worse)
    assert verdict.comparisons[0].difference.value == pytest.approx(0.05)
    assert not verdict.winner


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_handful_of_items_makes_no_winner(count: int) -> None:
    """Not even if the candidate is right on all of them: four coins show heads once in sixteen."""
    verdict = judged([1.0] * count, [0.0] * count)
    assert not verdict.winner
    low = verdict.comparisons[0].difference.low
    assert low is not None
    assert low < 0


def test_equal_scores_are_no_certainty() -> None:
    gap = judged(hits(0.5, 50, 1), hits(0.5, 50, 1)).comparisons[0].difference
    assert gap.low is not None
    assert gap.high is not None
    assert gap.low < -0.01 < 0.01 < gap.high


def test_pairing_sees_a_small_gain_that_every_item_shares() -> None:
    """Items differ by far more than the models do; unpaired intervals would hide the gain."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 400)
    gain = 0.1 + rng.normal(0, 0.01, 400)
    paired = judged(list(base + gain), list(base), metric="gold_logprob")
    shuffled = judged(list(rng.permutation(base + gain)), list(base), metric="gold_logprob")
    assert paired.winner
    assert not shuffled.winner
    assert paired.comparisons[0].difference.value == pytest.approx(shuffled.comparisons[0].difference.value)


def test_tasks_count_by_their_weights_not_by_their_items() -> None:
    scores = {"many": [0.0] * 300, "few": [1.0] * 10}
    assert mean_score(scores, {"many": 1, "few": 1}) == pytest.approx(0.5)
    assert mean_score(scores, {"many": 1, "few": 3}) == pytest.approx(0.75)


def test_weights_decide_who_wins() -> None:
    winner = {"a": hits(0.9, 100, 1), "b": hits(0.1, 100, 2)}
    rival = Rival("base", "base", {"a": hits(0.1, 100, 3), "b": hits(0.9, 100, 4)})
    metrics = {"a": "acc", "b": "acc"}
    assert judge(winner, [rival], metrics, {"a": 9, "b": 1}, seed=0).winner
    assert not judge(winner, [rival], metrics, {"a": 1, "b": 9}, seed=0).winner


# Intervals


def interval(scores: ItemScores, weights: dict[str, float] = WEIGHTS, seed: int = 0) -> Interval:
    """The interval of one table of accuracies."""
    [found] = intervals([scores], dict.fromkeys(scores, ACCURACY), weights, seed)
    return found


@pytest.mark.parametrize(("right", "count"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20), (3, 100), (97, 100)])
def test_right_and_wrong_answers_have_the_exact_interval(right: int, count: int) -> None:
    """Clopper and Pearson 1934, from scipy's beta distribution."""
    found = interval({"a": [1.0] * right + [0.0] * (count - right)})
    low = beta.ppf(0.05, right, count - right + 1) if right else 0.0
    high = beta.ppf(0.95, right + 1, count - right) if right < count else 1.0
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_tasks_of_equal_size_and_chance_are_like_one() -> None:
    """Four tasks of fifty items whose answers are all right say as much as one of two hundred."""
    four, weights = {name: [1.0] * 50 for name in "abcd"}, dict.fromkeys("abcd", 1.0)
    assert interval(four, weights).low == pytest.approx(0.05 ** (1 / 200), abs=1e-3)


def test_tasks_that_differ_do_not_widen_the_interval() -> None:
    """Only the spread within tasks makes a mean over tasks unsure."""
    alike = {"a": hits(0.5, 200, 1), "b": hits(0.5, 200, 2)}
    differing = {"a": hits(0.98, 200, 1), "b": hits(0.02, 200, 2)}
    weights = {"a": 1.0, "b": 1.0}

    def width(scores: ItemScores) -> float:
        found = interval(scores, weights)
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(differing) < 0.4 * width(alike)


def test_the_same_seed_draws_the_same_items_for_every_table_in_any_order_of_tasks() -> None:
    scores = {"a": hits(0.5, 50, 1), "b": hits(0.3, 30, 2)}
    turned = dict(reversed(scores.items()))
    weights = {"a": 1.0, "b": 3.0}
    ranges = dict.fromkeys(scores, ACCURACY)
    first, second = intervals([scores, turned], ranges, weights, 7)
    assert first == second
    assert interval(turned, weights, 7).low == pytest.approx(first.low, abs=1e-12)
    assert interval(turned, weights, 8).low != pytest.approx(first.low, abs=1e-5)


def test_the_interval_shrinks_with_more_items() -> None:
    def width(count: int) -> float:
        found = interval({"a": [0.0, 1.0] * (count // 2)})
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(1600) == pytest.approx(width(100) / 4, rel=0.1)  # 1 / sqrt(n)


def test_scores_without_bounds_need_a_hundred_items() -> None:
    """Fewer may hold none of the rare items that a mean depends on."""
    few, enough = list(np.linspace(-9.0, -0.1, ENOUGH - 1)), list(np.linspace(-9.0, -0.1, ENOUGH))
    assert score_range("gold_logprob", [few]) is None
    assert score_range("gold_logprob", [enough, [-11.0] * ENOUGH]) == (-11.0, -0.1)
    assert score_range("acc", [[0.0, 1.0]]) == (0.0, 1.0)
    assert score_range("brier", [[-0.1] * 3]) == (-2.0, 0.0)
    verdict = judged([x + 9 for x in few], few, metric="gold_logprob")
    assert not verdict.winner
    assert verdict.score.low is None
    assert "too few items for an interval" in verdict.sentence


def test_a_rare_catastrophe_is_within_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """3% of the items lose 8 nats; a plain bootstrap puts a third of such scores wholly above the truth."""
    monkeypatch.setattr(module, "DRAWS", 1000)
    rng, repeats, above = np.random.default_rng(0), 300, 0
    for seed in range(repeats):
        scores = rng.normal(0, 0.3, 100) - 8.0 * (rng.random(100) < 0.03)
        ranges = {"a": score_range("gold_logprob", [scores.tolist()])}
        [found] = intervals([{"a": scores.tolist()}], ranges, WEIGHTS, seed)
        assert found.low is not None
        above += found.low > -0.24
    assert above / repeats <= 0.05 + 3 * (0.05 * 0.95 / repeats) ** 0.5


def test_luck_alone_wins_at_most_once_in_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 1000)
    repeats = 300
    wins = sum(judged(hits(0.5, 60, 2 * seed), hits(0.5, 60, 2 * seed + 1)).winner for seed in range(repeats))
    assert 0 < wins / repeats <= 0.05 + 3 * (0.05 * 0.95 / repeats) ** 0.5


def test_the_gain_that_is_called_detectable_is_shown_four_times_in_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 1000)
    rng, repeats, shown, gain = np.random.default_rng(0), 200, 0, 0.123
    count = 160  # two in five items differ: 2.49 * sqrt(0.4 - 0.12^2) / sqrt(160) = 0.12
    for _ in range(repeats):
        first = rng.random(count) < 0.5
        same = rng.random(count) < 0.2
        second = np.where(same, first, rng.random(count) < 0.5 + gain / 0.8)
        verdict = judged(list(second.astype(float)), list(first.astype(float)))
        shown += verdict.winner
        assert verdict.detectable == pytest.approx(gain, rel=0.15)
    assert shown / repeats == pytest.approx(0.8, abs=0.12)


def test_one_item_tells_no_spread() -> None:
    assert detectable({"a": [1.0]}, WEIGHTS) is None


def test_many_items_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAWS", 400)
    scores = {"a": hits(0.5, 14_000)}
    tracemalloc.start()
    interval(scores)
    assert tracemalloc.get_traced_memory()[1] < 100e6  # all draws at once are 45 MB here, and 1.1 GB of 10,000
    tracemalloc.stop()


def test_a_verdict_can_be_stored_as_json_and_is_repeatable() -> None:
    def verdict(seed: int) -> str:
        rivals = [Rival("base", "base", {"a": hits(0.3, 50, 1)})]
        return json.dumps(judge({"a": hits(0.6, 50, 2)}, rivals, {"a": "acc"}, WEIGHTS, seed).as_dict())

    assert verdict(3) == verdict(3) != verdict(4)

"""The verdict: a winner beats every baseline on the same items, by more than luck."""

import json

import numpy as np
import pytest

from evomerge.search import verdict as verdicts
from evomerge.search.verdict import ItemScores, judge, mean_score, resampled_means

WEIGHTS = {"a": 1.0}


def hits(chance: float, count: int, seed: int = 0) -> list[float]:
    """Zeros and ones, as exact match gives them."""
    return [float(x) for x in np.random.default_rng(seed).random(count) < chance]


def test_a_clear_winner_wins_against_every_baseline() -> None:
    baselines = {"base": ("base", {"a": hits(0.2, 200, 1)}), "soup": ("soup", {"a": hits(0.4, 200, 2)})}
    verdict = judge({"a": hits(0.9, 200, 3)}, baselines, WEIGHTS, seed=0)
    assert verdict.winner
    assert verdict.recommended == "winner"
    assert [c.name for c in verdict.comparisons] == ["base", "soup"]
    assert all(c.beaten for c in verdict.comparisons)
    assert "better than all 2 baselines" in verdict.sentence
    assert "the best of them, soup" in verdict.sentence


def test_one_baseline_that_is_as_good_takes_the_victory_and_is_recommended() -> None:
    winner = hits(0.9, 200, 3)
    baselines = {"base": ("base", {"a": hits(0.2, 200, 1)}), "twin": ("source", {"a": winner})}
    verdict = judge({"a": winner}, baselines, WEIGHTS, seed=0)
    assert not verdict.winner
    assert verdict.recommended == "twin"
    assert [c.beaten for c in verdict.comparisons] == [True, False]
    assert verdict.sentence.startswith("No significant gain")


def test_a_gain_that_may_be_luck_is_no_victory() -> None:
    better, worse = [1.0] * 11 + [0.0] * 9, [0.0] * 10 + [1.0] * 10  # 11 of 20 against 10 of 20
    verdict = judge({"a": better}, {"base": ("base", {"a": worse})}, WEIGHTS, seed=0)
    assert verdict.comparisons[0].difference.value == pytest.approx(0.05)
    assert not verdict.winner


def test_pairing_sees_a_small_gain_that_every_item_shares() -> None:
    """Items differ by far more than the models do; unpaired intervals would hide the gain."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 100)
    gain = 0.1 + rng.normal(0, 0.01, 100)
    paired = judge({"a": list(base + gain)}, {"base": ("base", {"a": list(base)})}, WEIGHTS, seed=0)
    shuffled = judge({"a": list(rng.permutation(base + gain))}, {"base": ("base", {"a": list(base)})}, WEIGHTS, seed=0)
    assert paired.winner
    assert not shuffled.winner
    assert paired.comparisons[0].difference.value == pytest.approx(shuffled.comparisons[0].difference.value)


def test_the_same_seed_draws_the_same_items_for_every_candidate() -> None:
    scores = {"a": hits(0.5, 50, 1), "b": hits(0.5, 30, 2)}
    weights = {"a": 1.0, "b": 1.0}
    shifted = {task: [x + 1 for x in items] for task, items in scores.items()}
    gap = resampled_means(shifted, weights, 7) - resampled_means(scores, weights, 7)
    np.testing.assert_allclose(gap, 1)
    assert not np.array_equal(resampled_means(scores, weights, 7), resampled_means(scores, weights, 8))


def test_the_order_in_which_tasks_are_listed_does_not_matter() -> None:
    scores = {"a": hits(0.5, 50, 1), "b": hits(0.3, 30, 2)}
    turned = dict(reversed(scores.items()))
    weights = {"a": 1.0, "b": 3.0}
    np.testing.assert_array_equal(resampled_means(scores, weights, 7), resampled_means(turned, weights, 7))


def test_intervals_hold_the_truth_about_95_times_in_100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    held = 0
    repeats = 200
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        base = rng.random(80)
        better = base + rng.normal(0.05, 0.2, 80)
        verdict = judge({"a": list(better)}, {"base": ("base", {"a": list(base)})}, WEIGHTS, seed=seed)
        interval = verdict.comparisons[0].difference
        held += interval.low <= 0.05 <= interval.high
    assert 0.90 <= held / repeats <= 0.985  # 95% give or take three standard deviations (and the bootstrap's bias)


def test_luck_alone_wins_about_once_in_forty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    wins = 0
    for seed in range(200):
        one, two = hits(0.5, 60, 2 * seed), hits(0.5, 60, 2 * seed + 1)
        wins += judge({"a": one}, {"base": ("base", {"a": two})}, WEIGHTS, seed=seed).winner
    assert wins <= 12  # 5 expected of 200


def test_tasks_count_by_their_weights_not_by_their_items() -> None:
    scores = {"many": [0.0] * 300, "few": [1.0] * 10}
    assert mean_score(scores, {"many": 1, "few": 1}) == pytest.approx(0.5)
    assert mean_score(scores, {"many": 1, "few": 3}) == pytest.approx(0.75)
    np.testing.assert_allclose(resampled_means(scores, {"many": 1, "few": 3}, 0), 0.75)


def test_weights_decide_who_wins() -> None:
    winner = {"a": hits(0.9, 100, 1), "b": hits(0.1, 100, 2)}
    base: ItemScores = {"a": hits(0.1, 100, 3), "b": hits(0.9, 100, 4)}
    assert judge(winner, {"base": ("base", base)}, {"a": 9, "b": 1}, seed=0).winner
    assert not judge(winner, {"base": ("base", base)}, {"a": 1, "b": 9}, seed=0).winner


def test_the_interval_surrounds_the_score_and_shrinks_with_more_items() -> None:
    def width(count: int) -> float:
        score = judge({"a": hits(0.5, count)}, {"base": ("base", {"a": [0.0] * count})}, WEIGHTS, seed=0).score
        assert score.low < score.value < score.high
        return score.high - score.low

    assert width(1600) == pytest.approx(width(100) / 4, rel=0.15)  # 1 / sqrt(n)


def test_a_verdict_can_be_stored_as_json_and_is_repeatable() -> None:
    def verdict(seed: int) -> str:
        baselines = {"base": ("base", {"a": hits(0.3, 50, 1)})}
        return json.dumps(judge({"a": hits(0.6, 50, 2)}, baselines, WEIGHTS, seed).as_dict())

    assert verdict(3) == verdict(3) != verdict(4)

"""The Pareto front, its hypervolume, its knee, and the task weights that a learned start climbs by."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.search.learned.climbs import climbs, distance
from evomerge.search.verdict.front import Front, FrontTrial, hypervolume, knee, non_dominated, spread_along

Point = tuple[int, ...]
POINTS = st.integers(2, 4).flatmap(lambda t: st.lists(st.tuples(*[st.integers(-1, 4)] * t), min_size=1, max_size=8))


def dominates(a: Point, b: Point) -> bool:
    """The definition: at least as good everywhere, better somewhere."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def unit_cells(points: list[Point]) -> int:
    """The hypervolume of whole numbers: how many unit cells above 0 lie below some point."""
    cells = product(range(4), repeat=len(points[0]))
    return sum(any(all(c < x for c, x in zip(cell, p, strict=True)) for p in points) for cell in cells)


def front_over(points: list[Point], relative: bool = True) -> Front:
    """The front of trials with these values."""
    tasks = tuple(f"t{k}" for k in range(len(points[0])))
    trials = [FrontTrial(i, f"trial {i}", tuple(map(float, p))) for i, p in enumerate(points)]
    return Front(tasks, tuple(trials), relative)


@given(points=POINTS)
def test_the_front_holds_what_no_point_dominates_and_the_first_of_equal_ones(points: list[Point]) -> None:
    wanted = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points) and points.index(p) == i]
    assert non_dominated(np.array(points, dtype=float)) == wanted


@given(points=POINTS)
def test_the_hypervolume_counts_every_dominated_cell_once(points: list[Point]) -> None:
    assert hypervolume(np.array(points, dtype=float)) == pytest.approx(unit_cells(points))


@given(points=POINTS)
def test_the_hypervolume_over_time_is_that_of_the_points_so_far(points: list[Point]) -> None:
    found = front_over(points).hypervolumes
    assert found == pytest.approx([unit_cells(points[: i + 1]) for i in range(len(points))])


def test_there_is_no_hypervolume_of_many_tasks_or_without_the_base_as_zero() -> None:
    many, unscaled = front_over([(1,) * 5]), front_over([(1, 2)], relative=False)
    assert many.hypervolumes is None
    assert "of more than 4 tasks" in many.sentence
    assert unscaled.hypervolumes is None
    assert "scale: none" in unscaled.sentence
    assert "Hypervolume: 2.0000" in front_over([(1, 2)]).sentence


def test_points_along_a_front_begin_with_its_ends_and_leave_no_large_gap() -> None:
    places = np.linspace(0, 1, 101)
    line = np.stack([places, 1 - places], axis=1)
    assert sorted(spread_along(line, 5)) == [0, 25, 50, 75, 100]
    assert spread_along(line[:3], 5) == [0, 1, 2]
    assert spread_along(np.empty((0, 2)), 5) == []


@given(points=POINTS, count=st.integers(1, 5))
def test_points_along_a_front_are_different_ones(points: list[Point], count: int) -> None:
    found = spread_along(np.array(points, dtype=float), count)
    assert len(set(found)) == len(found) == min(count, len(points))


def test_the_knee_gains_most_where_it_gains_least() -> None:
    points = np.array([[1.0, 0.0], [0.8, 0.7], [0.3, 0.9], [0.0, 1.0]])
    assert knee(points, np.zeros(2)) == 1
    assert knee(points * [1, 50], np.zeros(2)) == 1, "a task's unit does not count"
    assert knee(points, np.array([0.0, 0.65])) == 2, "gains begin at the base"


def test_the_knee_passes_over_tasks_in_which_nothing_gains() -> None:
    assert knee(np.array([[0.2, -1.0], [0.4, -2.0]]), np.zeros(2)) == 1
    assert knee(np.array([[-0.2, -1.0], [-0.4, -2.0]]), np.zeros(2)) == 0


@given(raw=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), steps=st.integers(1, 200))
def test_every_climb_gives_every_task_a_weight_and_the_first_one_is_the_searchs(raw: list[float], steps: int) -> None:
    weights = {f"t{k}": w for k, w in enumerate(raw)}
    found = climbs(weights, steps, pareto=True)
    assert [c.number for c in found] == list(range(len(found)))
    assert found[0] == climbs(weights, steps, pareto=False)[0]
    for climb in found:
        assert sum(climb.weights.values()) == pytest.approx(1)
        assert min(climb.weights.values()) > 0
        assert max(climb.looks) == climb.steps
    emphasised = {max(c.weights, key=lambda t: c.weights[t] - found[0].weights[t]) for c in found[1:]}
    assert len(raw) == 1 or len(emphasised) >= min(len(raw), 2)


def test_two_tasks_are_climbed_by_five_sets_of_weights() -> None:
    found = climbs({"a": 1.0, "b": 1.0}, 30, pareto=True)
    assert [c.weights["a"] for c in found] == pytest.approx([0.5, 0.75, 0.25, 0.9, 0.1])
    assert [c.steps for c in found] == [30, 10, 10, 10, 10]
    assert distance(found[3].weights, found[1].weights) < distance(found[3].weights, found[0].weights)
    assert len(climbs(dict.fromkeys("abc", 1.0), 30, pareto=True)) == 7
    assert len(climbs(dict.fromkeys("abcdef", 1.0), 30, pareto=True)) == 7

"""Learned coefficients: the optimizer, the mini-batches, the chain rule of a space, and whole searches with it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from evomerge.errors import EvomergeError
from evomerge.search.budget.usage import Elapsed, Usage
from evomerge.search.learned.adam import Adam, average
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.space.space import Group, Space, spread
from evomerge.search.storage.step_record import StepRecord, step_key, step_records

BOUNDS = {"a": FloatDistribution(0.0, 2.0), "b": FloatDistribution(-1.0, 1.0)}


def climb(rate: float, steps: int, top: dict[str, float]) -> dict[str, float]:
    """The point after climbing a paraboloid whose top is at `top`."""
    adam = Adam(BOUNDS, rate, steps)
    point = {"a": 0.3, "b": 0.0}
    for _ in range(steps):
        point = adam.step(point, {name: -2 * (point[name] - top[name]) for name in BOUNDS})
    return point


def test_adam_reaches_a_top_inside_the_bounds() -> None:
    point = climb(0.1, 200, {"a": 1.4, "b": -0.5})
    assert point == pytest.approx({"a": 1.4, "b": -0.5}, abs=1e-2)


def test_adam_stays_within_the_bounds() -> None:
    assert climb(0.1, 200, {"a": 9.0, "b": -9.0}) == pytest.approx({"a": 2.0, "b": -1.0})


def test_the_first_step_has_the_length_of_the_rate_whatever_the_size_of_the_gradient() -> None:
    for size in (1e-6, 1.0, 1e6):
        moved = Adam(BOUNDS, 0.06, 60).step({"a": 1.0, "b": 0.0}, {"a": size, "b": -size})
        assert moved == pytest.approx({"a": 1.06, "b": -0.06})


def test_a_coefficient_without_a_gradient_stays() -> None:
    moved = Adam(BOUNDS, 0.06, 60).step({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.0})
    assert moved["b"] == 0.5


def test_the_average_of_points() -> None:
    assert average([{"a": 1.0, "b": 0.0}, {"a": 2.0, "b": -1.0}]) == {"a": 1.5, "b": -0.5}


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    size=st.integers(1, 32),
)
def test_no_item_comes_again_before_all_have_come(sizes: list[int], seed: int, size: int) -> None:
    ids = {f"t{k}": [f"{k}:{i}" for i in range(n)] for k, n in enumerate(sizes)}
    each = max(1, size // len(ids))
    for task, known in ids.items():
        if each > len(known):
            continue
        drawn: list[str] = []
        while len(drawn) < len(known):
            drawn += minibatch(ids, seed, len(drawn) // each, size)[task]
        assert sorted(drawn[: len(known)]) == sorted(known)


def test_a_minibatch_depends_on_seed_and_number_alone() -> None:
    ids = {"t": [str(i) for i in range(100)]}
    assert minibatch(ids, 1, 3, 8) == minibatch(ids, 1, 3, 8)
    assert minibatch(ids, 1, 3, 8) != minibatch(ids, 1, 4, 8) != minibatch(ids, 2, 4, 8)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 9),
    granularity=st.sampled_from(["model", "depth", "group", "layer"]),
    data=st.data(),
)
def test_the_gradient_by_the_axes_is_that_of_the_spread_values(
    layers: int, granularity: str, data: st.DataObject
) -> None:
    """Against the definition: a linear function of the values at every layer and component."""
    count = {"model": 1, "depth": 3, "group": min(2, layers), "layer": layers}[granularity]
    names = {c: tuple(f"weight.s.{c}.{k}" for k in range(count)) for c in ("mlp", "default")}
    groups = tuple(Group("weight", "s", c, granularity, 0.0, 2.0, axes) for c, axes in names.items())  # type: ignore[arg-type]
    space = Space(None, layers, groups)  # type: ignore[arg-type]
    numbers = st.lists(st.floats(-3, 3), min_size=layers, max_size=layers)
    slopes = {c: data.draw(numbers) for c in ("mlp", "attention", "norm")}

    def value(point: dict[str, float]) -> float:
        total = 0.0
        for component, slope in slopes.items():
            axes = names["mlp" if component == "mlp" else "default"]
            per_layer = np.broadcast_to(spread([point[a] for a in axes], granularity, layers), layers)  # type: ignore[arg-type]
            total += float(np.dot(slope, per_layer))
        return total

    found = space.gradient({("weight", "s"): slopes})  # type: ignore[dict-item]
    zero = dict.fromkeys([a for axes in names.values() for a in axes], 0.0)
    for axis in zero:
        assert math.isclose(found[axis], value({**zero, axis: 1.0}), abs_tol=1e-9)


def test_a_step_record_comes_back_from_the_study_as_it_was() -> None:
    record = StepRecord({"a": 0.1 + 0.2}, {"a": 1e-17}, -1.25, 16, Usage(forwards=3), Elapsed(1.5, 1.5))
    other = StepRecord({"a": 1.0}, {"a": 2.0}, 0.5, 16)
    assert step_records({step_key(1): other.to_json(), step_key(0): record.to_json(), "x": 1}) == [record, other]


@pytest.mark.parametrize(
    "content", [None, {}, {"point": 1}, {"point": {"a": "x"}, "gradient": {}, "value": 1, "items": 1}]
)
def test_a_damaged_step_record_is_an_error(content: object) -> None:
    with pytest.raises(EvomergeError, match="cannot be read"):
        StepRecord.from_json(content)

"""Learned coefficients: the optimizer, the mini-batches, the chain rule of a space, and whole searches with it."""

import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from searches import ROOT, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.errors import EvomergeError
from evomerge.report.gradient_steps import curves, running_mean, steps_text
from evomerge.search.budget.usage import Elapsed, Usage
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.learned.steps import Climber, average, direction
from evomerge.search.run import open_run
from evomerge.search.space.space import Group, Space, spread
from evomerge.search.storage.step_record import StepRecord, step_key, step_records, steps_by_climb

BOUNDS = {"a": FloatDistribution(0.0, 2.0), "b": FloatDistribution(-1.0, 1.0)}


def climb(rate: float, steps: int, top: dict[str, float]) -> dict[str, float]:
    """The point after climbing a paraboloid whose top is at `top`."""
    climber = Climber(BOUNDS, rate, steps)
    point = {"a": 0.3, "b": 0.0}
    for _ in range(steps):
        point = climber.step(point, {name: -2 * (point[name] - top[name]) for name in BOUNDS})
    return point


def test_steps_reach_a_top_inside_the_bounds() -> None:
    point = climb(0.1, 200, {"a": 1.4, "b": -0.5})
    assert point == pytest.approx({"a": 1.4, "b": -0.5}, abs=1e-2)


def test_steps_stay_within_the_bounds() -> None:
    assert climb(0.1, 200, {"a": 9.0, "b": -9.0}) == pytest.approx({"a": 2.0, "b": -1.0})


gradients = st.integers(1, 6).flatmap(
    lambda d: st.lists(st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=d, max_size=d), min_size=1)
)


@given(gradients)
def test_a_direction_is_that_of_the_formula(each: list[list[float]]) -> None:
    g = np.array(each)
    here = g.any(0)
    v, c, h = np.zeros(g.shape[1]), np.zeros((g.shape[1],) * 2), np.zeros(g.shape[1])
    for row in g:  # with the usual correction for the beginning
        v = 0.97 * v + 0.03 * row**2
    root = np.where(here, np.sqrt(v / (1 - 0.97 ** len(g))), 1.0)
    for row in g / root:
        c, h = 0.97 * c + 0.03 * np.outer(row, row), 0.8 * h + 0.2 * row
    values, vectors = np.linalg.eigh(c / (1 - 0.97 ** len(g)) + 0.05 * np.eye(len(v)))
    d = vectors @ ((vectors.T @ (h / (1 - 0.8 ** len(g)))) / np.sqrt(values))
    if np.linalg.norm(d) > 1e-6:  # gradients that cancel leave a direction of rounding errors
        assert direction(g)[here] == pytest.approx(d[here] / np.sqrt(np.mean(d[here] ** 2)), abs=1e-6)
    assert not direction(g)[~here].any()


@given(gradients, st.data())
def test_a_direction_does_not_depend_on_the_unit_of_a_coefficient(each: list[list[float]], data: st.DataObject) -> None:
    g = np.array(each)
    units = data.draw(st.lists(st.sampled_from([1e-3, 1.0, 50.0]), min_size=g.shape[1], max_size=g.shape[1]))
    if np.linalg.norm(0.8 ** np.arange(len(g))[::-1] @ g) > 1e-3:
        assert direction(g * units) == pytest.approx(direction(g), abs=1e-5)


@given(gradients, st.sampled_from([1e-9, 1e-3, 1e3, 1e9]))
def test_a_direction_does_not_depend_on_the_size_of_the_gradients(each: list[list[float]], size: float) -> None:
    g = np.array(each)
    if np.linalg.norm(0.8 ** np.arange(len(g))[::-1] @ g) > 1e-3:
        assert direction(size * g) == pytest.approx(direction(g), abs=1e-6)


def test_the_rate_rises_at_first_and_falls_to_a_twentieth() -> None:
    climber, point, moves = Climber({"a": FloatDistribution(-100.0, 100.0)}, 0.1, 60), {"a": 0.0}, []
    for _ in range(60):
        after = climber.step(point, {"a": 1.0})
        moves.append(after["a"] - point["a"])
        point = after
    assert moves[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1], rel=0.02)
    assert moves[4:] == sorted(moves[4:], reverse=True)
    assert moves[-1] == pytest.approx(0.005, rel=0.05)


def test_a_coefficient_without_a_gradient_stays() -> None:
    moved = Climber(BOUNDS, 0.1, 60).step({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.0})
    assert moved == pytest.approx({"a": 1.02, "b": 0.5})
    assert moved["b"] == 0.5


def test_no_gradient_at_all_is_no_step() -> None:
    assert Climber(BOUNDS, 0.1, 60).step({"a": 1.0, "b": 0.5}, {"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 0.5}


def test_the_average_of_points() -> None:
    assert average([{"a": 1.0, "b": 0.0}, {"a": 2.0, "b": -1.0}]) == {"a": 1.5, "b": -0.5}


@given(st.floats(-2, 2), st.integers(1, 200))
def test_the_average_of_equal_points_is_that_point(value: float, count: int) -> None:
    """np.mean of 45 times 0.05 is below 0.05, which may be a bound."""
    assert average([{"a": value}] * count) == {"a": value}


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
    config = SimpleNamespace(method="task_arithmetic", space=SimpleNamespace(order=False))  # no order is searched
    space = Space(config, layers, groups)  # type: ignore[arg-type]
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


# --- Whole searches ---

SMALL: dict[str, Any] = {
    "tasks": [{"task": str(ROOT / "evals" / "tiny" / f"{skill}.yaml")} for skill in ("rev", "add")],
    "sampler": {"name": "auto", "steps": 9},
    "budget": {"trials": 14},
}
DURING_A_GRADIENT = """
import os, signal
import evomerge.search.evaluation.evaluator as e
calls, real = [0], e.backward
def counted(*a, **k):
    calls[0] += 1
    if calls[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
e.backward = counted
"""
DURING_A_LOOK = """
import os, signal
import evomerge.search.learned.learn as l
real = l.Learner.look
async def killed(self, learned, ended):
    if learned.steps == 6:
        self.trials.pool.run = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    return await real(self, learned, ended)
l.Learner.look = killed
"""


def steps_of(run: Path) -> list[StepRecord]:
    """The gradient steps of a run, without what depends on the machine."""
    return [replace(r, used=None, elapsed=None) for r in step_records(open_run(run).study().user_attrs)]


@pytest.fixture(scope="module")
def learned(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search with a learned start."""
    return finished_search(write_config(tmp_path_factory.mktemp("learned"), tiny_family, **SMALL))


def test_a_learned_start_climbs_and_the_sampler_goes_on(learned: Path) -> None:
    study = open_run(learned).study()
    steps = steps_of(learned)
    assert len(steps) in (3, 6, 9)
    tried = [t for t in study.trials if "learned" in t.user_attrs]
    assert [t.user_attrs["learned"] for t in tried] == [3, 6, 9][: len(tried)]
    started = max(t.value for t in study.trials if "baseline" in t.user_attrs)
    assert max(t.value for t in tried) > started
    assert study.user_attrs["evomerge:sampler"] in ("gp", "cma-es")
    assert any(not {"learned", "baseline"} & t.user_attrs.keys() for t in study.trials), "no trial of the sampler"
    assert re.search(r"a gradient step of 16 items takes \d+\.\d\d s of a worker", (learned / "log.txt").read_text())


def test_the_first_step_is_taken_from_the_best_baseline(learned: Path) -> None:
    study = open_run(learned).study()
    best = max((t for t in study.trials if "baseline" in t.user_attrs), key=lambda t: t.value)
    assert steps_of(learned)[0].point == best.params


def test_learned_points_are_finalists(learned: Path) -> None:
    study = open_run(learned).study()
    tried = {f"trial {t.number}" for t in study.trials if "learned" in t.user_attrs}
    assert tried <= {f["name"] for f in verdict_of(learned)["finalists"]}


def test_status_and_report_show_the_gradient_steps(learned: Path) -> None:
    steps = steps_of(learned)
    shown = " ".join(run_cli("status", learned).stdout.split())
    mean = sum(step.value for step in steps) / len(steps)  # of so few steps the first and the last are all
    assert f"learned start: {len(steps)} gradient steps; mean value of the mini-batches {mean:.3f}" in shown
    assert re.search(r"they took \d+s of computing \(\d+% of the run's\)", shown)
    report = (learned / "report.html").read_text()
    assert f"earned start: {len(steps)} gradient steps" in report
    assert all(f"<title>step {k}: {step.value:.4f}</title>" in report for k, step in enumerate(steps, 1))


def test_the_curve_of_steps_is_the_mean_of_the_last_ten() -> None:
    assert running_mean([1.0, 3.0]) == [1.0, 2.0]
    assert running_mean(list(map(float, range(30))))[-1] == pytest.approx(sum(range(20, 30)) / 10)
    climbs = [[StepRecord({}, {}, float(v), 16) for v in range(n)] for n in (12, 3)]
    attributes = {step_key(k, c): r.to_json() for c, found in enumerate(climbs) for k, r in enumerate(found)}
    assert steps_by_climb(attributes) == climbs
    assert [numbers for numbers, _ in curves(climbs)] == [list(range(1, 13)), [13, 14, 15]]
    assert "15 gradient steps in 2 climbs" in steps_text(climbs, Usage())


@pytest.mark.parametrize(
    "prelude", [pytest.param(DURING_A_GRADIENT, id="step"), pytest.param(DURING_A_LOOK, id="look")]
)
def test_a_killed_learned_start_goes_on_to_the_same_bits(
    prelude: str, learned: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed = run_cli("search", write_config(tmp_path, tiny_family, **SMALL), "--run", run, prelude=prelude)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = steps_of(run)
    assert 0 < len(before) < len(steps_of(learned)) or prelude is DURING_A_LOOK
    resumed = run_cli("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_of(run) == steps_of(learned)
    assert trials_of(run) == trials_of(learned)
    assert verdict_of(run) == verdict_of(learned)


def test_the_search_ends_after_the_learned_start_with_the_sampler_learned(tiny_family: Path, tmp_path: Path) -> None:
    sampler = {"name": "learned", "steps": 3}
    run = finished_search(write_config(tmp_path, tiny_family, **SMALL | {"sampler": sampler}))
    assert all({"learned", "baseline"} & t.user_attrs.keys() for t in open_run(run).study().trials)


def test_a_metric_without_a_derivative_is_searched_without_a_learned_start(tiny_family: Path, tmp_path: Path) -> None:
    tasks = [{"task": str(ROOT / "evals" / "tiny" / "rev.yaml"), "objective": "exact_match"}]
    run = finished_search(write_config(tmp_path, tiny_family, **SMALL | {"tasks": tasks, "budget": {"trials": 10}}))
    assert not steps_of(run)
    reason = "no learned start: task tiny_rev: its objective exact_match has no derivative"
    assert reason in open_run(run).log_file.read_text()
    asked = write_config(tmp_path, tiny_family, **SMALL | {"tasks": tasks, "sampler": {"name": "learned"}})
    done = run_cli("search", asked, "--run", tmp_path / "asked")
    assert done.returncode == 2
    assert "cannot be learned" in done.stderr


def test_two_workers_take_a_mini_batch_each(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, **SMALL | {"sampler": {"name": "learned", "steps": 3}})
    done = run_cli("search", config, "--run", tmp_path / "run", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert {r.items for r in steps_of(tmp_path / "run")} == {32}


def test_a_source_that_is_good_at_nothing_stays_where_it_is(tiny_family: Path, tmp_path: Path) -> None:
    """Its gradient is steep and leads nowhere."""
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(tiny_family / "base", bad)
    tensors = load_file(bad / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor + 3 * tensor.std() * torch.randn(tensor.shape, generator=noise)
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    sources = [{"name": n, "path": str(tiny_family / n)} for n in ("rev", "add")] + [{"name": "bad", "path": str(bad)}]
    run = finished_search(write_config(tmp_path, tiny_family, **SMALL, sources=sources))
    assert (
        "bad is better than the base in no task; the learned start leaves its coefficients"
        in (run / "log.txt").read_text()
    )
    first, *_, last = [step.point for step in steps_of(run)]
    names = [name for name in first if ".bad." in name]
    assert names
    assert [last[name] for name in names] == [first[name] for name in names] == [0.0] * len(names)
    assert any(last[name] != first[name] for name in first)

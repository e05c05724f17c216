"""Guards: tasks that must not get worse, in values, races, gradient steps, finals and reports."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from searches import KILL, ROOT, finished_search, run_cli, trials_of, verdict_of, write_config
from test_search import LOOKS_COST_NOTHING

from evomerge.config.config_file import load_config
from evomerge.errors import EvomergeError
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Order
from evomerge.search.evaluation.guards import PENALTY, Guard, GuardScale, guard_scale, unit_of
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.scale import SCALE, Line, Scale, TaskScale
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.learned.multipliers import RAISE, State, multiplier
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import evaluation_records, trial_scores, unpack
from evomerge.search.storage.step_record import step_records
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import record_of
from evomerge.search.verdict.guards import judge_guard, state_of
from evomerge.search.verdict.intervals import Interval
from evomerge.search.verdict.verdict import Rival, judge

TINY = ROOT / "evals" / "tiny"
numbers = st.floats(-20, 20).map(lambda x: round(x, 3))
items = st.lists(numbers, min_size=1, max_size=12)
allowed = st.floats(0, 5).map(lambda x: round(x, 3))


def guard(max_drop: float, **metrics: str) -> Guard:
    return Guard("general", metrics or {"t": "m"}, max_drop, "base")


def table(scores: Any) -> dict[str, dict[str, Any]]:
    return {"t": {"m": scores}}


# --- The penalty ---


@given(items, allowed, st.floats(0, 10), st.data())
def test_the_penalty_is_0_up_to_the_allowed_drop_and_then_rises_in_proportion(
    reference: list[float], drop: float, more: float, data: st.DataObject
) -> None:
    known = guard_scale(guard(drop), table(reference))
    assert known.penalty(table(reference)) == 0
    lost = data.draw(st.floats(0, drop))
    assert known.penalty(table([x - lost for x in reference])) == pytest.approx(0, abs=1e-6)
    beyond = [x - drop - more * known.unit for x in reference]
    assert known.penalty(table(beyond)) == pytest.approx(PENALTY * more, rel=1e-6, abs=1e-6)
    assert known.penalty(table([x + more for x in reference])) == 0


@given(items, items, allowed)
@example([11.078] * 3, [10.0], 0.0)  # the variance of equal scores is not 0 when it is computed
def test_the_penalty_is_that_of_the_formula(reference: list[float], scores: list[float], drop: float) -> None:
    known = guard_scale(guard(drop), table(reference))
    error = np.std(reference, ddof=1) / len(reference) ** 0.5 if len(set(reference)) > 1 else 0.0
    unit = max(drop, error) or 1 / len(reference)
    violation = max(0.0, float(np.mean(reference)) - float(np.mean(scores)) - drop)
    assert known.unit == pytest.approx(unit)
    assert known.penalty(table(scores)) == pytest.approx(PENALTY * violation / unit)


@given(items, items, allowed)
def test_a_stored_guard_gives_the_same_bits(reference: list[float], scores: list[float], drop: float) -> None:
    known = guard_scale(guard(drop), table(reference))
    scale = Scale({"goal": TaskScale(1.0, 0.0, Line("o"), Line("m"))}, {"general": known})
    again = Scale.from_json(json.loads(json.dumps(scale.to_json())))
    assert again == scale
    found = {"goal": {"o": scores}, **table(scores)}
    assert again.value(found) == scale.value(found) == scale.goals(found) - known.penalty(table(scores))


def test_the_tasks_of_a_group_count_alike() -> None:
    group = guard(0.0, a="acc", b="acc")
    assert group.mean({"a": {"acc": [1.0, 0.0]}, "b": {"acc": [1.0] * 10}}) == 0.75
    assert unit_of(0.0, [[1.0, 1.0], [1.0, 1.0]]) == 0.25


@given(st.floats(0, 3), st.integers(0, 2**16))
def test_a_race_never_stops_a_candidate_whose_value_is_above_that_of_a_penalised_incumbent(
    penalty: float, seed: int
) -> None:
    """However far the incumbent's goals are above the candidate's."""
    rng, count = np.random.default_rng(seed), 40
    weights = np.full(count, 1 / count)
    scale = Scale({"t": TaskScale(1.0, 0.0, Line("o"), Line("m"))})
    setup = RaceSetup(
        "items", {"t": count}, Order(rng.permutation(count), weights, weights), np.full(count, 4.0), 0.02,
        Looks((20, 40), (0.5, 1.0)), scale,
    )  # fmt: skip
    incumbent = rng.normal(0, 0.1, count)
    candidate = incumbent - penalty + 1e-3  # equal on no item, better by value
    race = setup.race(incumbent, [], penalty)
    assert race.value == pytest.approx(incumbent.mean() - penalty)
    assert not any(race.observe(candidate[piece]) for piece in np.split(setup.order.items, 5))


# --- The multipliers ---


def scores_of(values: list[float]) -> dict[str, float]:
    return {str(k): x for k, x in enumerate(values)}


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=30), allowed)
def test_a_multiplier_rises_while_the_guard_is_broken_and_is_never_below_0(drops: list[float], most: float) -> None:
    same = {"t": {"m": scores_of([0.0, -1.0, 2.0])}}
    known, state = multiplier(guard(most), {"t": "m"}, same, []), State()
    for drop in drops:
        after = known.after(state, drop)
        assert after.multiplier >= 0
        assert after.strength >= 0
        assert abs(after.multiplier - state.multiplier) <= RAISE + 1e-12
        assert (after.multiplier > state.multiplier) or drop <= known.allowed + 1e-9
        state = after
    assert known.weight(state, "other", 4) == 0


def test_the_drop_of_a_step_is_that_of_its_items() -> None:
    known = multiplier(guard(0.5), {"t": "m"}, {"t": {"m": scores_of([0.0, -1.0, -2.0])}}, [])
    assert known.drop({"t": [-1.0, -4.0]}, {"t": ["0", "2"]}) == pytest.approx(1.5)
    assert known.allowed == 0.5
    assert known.unit == pytest.approx(1 / 3**0.5)
    assert known.weight(State(2.0, -1.0), "t", 4) == pytest.approx(1.0 / known.unit / 4)


def test_the_allowed_drop_of_the_objective_is_that_of_other_models() -> None:
    own = {"t": {"acc": scores_of([1.0, 1.0]), "o": scores_of([0.0, 0.0])}}
    worse = {"t": {"acc": scores_of([0.0, 1.0]), "o": scores_of([-3.0, -1.0])}}
    assert multiplier(guard(0.1, t="acc"), {"t": "o"}, own, [own, worse]).allowed == pytest.approx(0.4)


@given(st.floats(0.01, 1), st.integers(2, 50))
def test_a_metric_that_is_the_same_on_all_items_gives_no_slope(value: float, items: int) -> None:
    """np.std of three times 0.1 is not 0; divided by it the guard would allow any drop."""
    own = {"t": {"o": scores_of([-float(k) for k in range(items)]), "acc": scores_of([value] * items)}}
    assert multiplier(guard(0.1, t="acc"), {"t": "o"}, own, []).allowed == pytest.approx(0.1)


# --- The verdict ---


def test_a_guard_is_kept_or_broken_only_if_the_interval_says_so() -> None:
    assert state_of(Interval(0.0, -0.01, 0.01), 0.01) == "kept"
    assert state_of(Interval(0.0, -0.01, 0.02), 0.01) == "not decidable"
    assert state_of(Interval(0.1, 0.02, 0.2), 0.01) == "broken"
    assert state_of(Interval(0.1, 0.01, 0.2), 0.01) == "not decidable"
    assert state_of(Interval(0.0, None, None), 0.01) == "not decidable"


def test_the_reference_keeps_its_own_guard() -> None:
    few = table([0.0, 1.0, 1.0])
    assert judge_guard(guard(0.0), few, few, 0).state == "not decidable"
    assert judge_guard(guard(0.0), few, few, 0, same=True).state == "kept"


@pytest.mark.parametrize("lost", [0, 25, 60])
def test_only_a_candidate_that_keeps_the_guard_wins(lost: int) -> None:
    rng = np.random.default_rng(1)
    goal = {"goal": (rng.random(300) < 0.8).astype(float).tolist()}
    base = {"goal": (rng.random(300) < 0.3).astype(float).tolist()}
    before, after = [1.0] * 300, [0.0] * lost + [1.0] * (300 - lost)
    result = judge_guard(guard(0.1), table(before), table(after), 0)
    assert result.state == {0: "kept", 25: "not decidable", 60: "broken"}[lost]
    assert result.drop.value == pytest.approx(lost / 300)
    found = judge(goal, [Rival("base", "base", base)], {"goal": "acc"}, {"goal": 1.0}, 0, guards=[result])
    assert found.guards == [result]
    assert found.winner == (lost == 0)
    outcome = {0: "better", 25: "no difference shown", 60: "worse"}[lost]
    assert (found.outcome, found.recommended) == (outcome, "winner" if lost == 0 else "base")


def test_a_baseline_that_breaks_a_guard_need_not_be_beaten_unless_all_do() -> None:
    rng = np.random.default_rng(1)
    good, better = [{"goal": (rng.random(300) < p).astype(float).tolist()} for p in (0.6, 0.9)]
    base = Rival("base", "base", {"goal": (rng.random(300) < 0.3).astype(float).tolist()})
    rest: tuple[Any, ...] = ({"goal": "acc"}, {"goal": 1.0}, 0)
    assert judge(good, [base, Rival("one", "parent", better, ["general"])], *rest).winner
    assert not judge(good, [base, Rival("one", "parent", better)], *rest).winner
    broken = [Rival("base", "base", base.scores, ["general"]), Rival("one", "parent", better, ["general"])]
    assert not judge(good, broken, *rest).winner


# --- Configurations ---


def write_guarded(folder: Path, family: Path, *guards: dict[str, Any], **changes: Any) -> Path:
    """A search for `rev` alone that must not lose other skills."""
    usual: dict[str, Any] = {
        "tasks": [tiny("rev")],
        "guards": list(guards),
        "space": {"weight": [0.0, 1.6]},
        "splits": {"search": 60, "selection": 60, "holdout": 300},
        "budget": {"trials": 20},
    }
    return write_config(folder, family, **(usual | changes))


def tiny(name: str, **options: Any) -> dict[str, Any]:
    return {"task": str(TINY / f"{name}.yaml"), "objective": "auto_mean", **options}


@pytest.mark.parametrize(
    ("guards", "problem"),
    [
        ([tiny("add")], "guards.0.max_drop: missing"),
        ([tiny("add", max_drop=-0.1)], "guards.0.max_drop: Input should be greater than or equal to 0"),
        ([tiny("add", max_drop=0, of="sort")], "guards.0.of: there is no model 'sort'; give base or rev or add"),
        ([tiny("add", max_drop=0, weight=2)], "guards.0.weight: unknown key"),
        ([tiny("gone", max_drop=0)], "guards.0.task: no such file"),
        ([tiny("add", max_drop=0), tiny("add", max_drop=1)], "add.yaml is listed twice"),
        ([tiny("rev", max_drop=0, limit=5)], "guards.0.limit: give it in `tasks`, which lists the same task"),
    ],
)
def test_a_wrong_guard_is_an_error(
    tiny_family: Path, tmp_path: Path, guards: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(EvomergeError, match=problem):
        load_config(write_guarded(tmp_path, tiny_family, *guards))


def test_a_metric_of_the_whole_task_cannot_be_guarded(tiny_family: Path, tmp_path: Path) -> None:
    text = (TINY / "choice.yaml").read_text().replace("choice.jsonl", str(TINY / "choice.jsonl"))
    (tmp_path / "f1.yaml").write_text(
        text.replace("metric: acc\n    aggregation: mean", "metric: f1\n    aggregation: f1")
    )
    few = {"splits": {"search": 4, "selection": 4, "holdout": 4}}
    config = write_guarded(tmp_path, tiny_family, {"task": "f1.yaml", "max_drop": 0.1}, **few)
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "the metric 'f1' has no value per item" in done.stderr


def test_a_task_that_is_goal_and_guard_is_opened_once(tiny_family: Path, tmp_path: Path) -> None:
    task_set = open_task_set(load_config(write_guarded(tmp_path, tiny_family, tiny("rev", max_drop=0.1))))
    assert [t.name for t in task_set.tasks] == ["tiny_rev"] == [t.name for t in task_set.goals]
    assert task_set.guards == (Guard("tiny_rev", {"tiny_rev": "exact_match"}, 0.1, "base"),)
    (task,) = task_set.tasks
    assert task_set.wanted(task, "search") == ("answer_logprob", "exact_match")


def test_a_task_that_is_only_a_guard_has_no_weight(tiny_family: Path, tmp_path: Path) -> None:
    task_set = open_task_set(load_config(write_guarded(tmp_path, tiny_family, tiny("add", max_drop=0.1))))
    assert [t.name for t in task_set.goals] == ["tiny_rev"]
    assert task_set.weights == {"tiny_rev": 1.0}
    assert {len(found["holdout"]) for found in task_set.items.values()} == {300}


# --- Whole searches ---


MOST = 0.4  # the drop of exact match that is allowed; the specialist has 0.67


def finished(folder: Path, family: Path, most: float) -> Path:
    """A search whose candidates race."""
    return finished_search(write_guarded(folder, family, tiny("add", max_drop=most, of="add")), LOOKS_COST_NOTHING)


@pytest.fixture(scope="module")
def guarded(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("guarded"), tiny_family, MOST)


def test_the_unguarded_winner_breaks_the_guard_and_the_guarded_one_keeps_it(
    guarded: Path, tiny_family: Path, tmp_path: Path
) -> None:
    free = verdict_of(finished(tmp_path, tiny_family, 1.0))  # no drop is above 1
    assert free["winner"]
    assert free["guards"][0]["drop"]["low"] > MOST
    held = verdict_of(guarded)
    assert (held["outcome"], held["recommended"]) == ("better", "winner")
    (result,) = held["guards"]
    assert (result["name"], result["of"], result["max_drop"], result["state"]) == ("tiny_add", "add", MOST, "kept")
    assert result["drop"]["high"] <= MOST
    means = {name: model["tiny_add"]["value"] for name, model in held["holdout"].items()}
    assert result["drop"]["value"] == pytest.approx(means["add"] - means["winner"])


def test_what_breaks_a_guard_on_the_selection_split_comes_last_and_need_not_be_beaten(guarded: Path) -> None:
    verdict = verdict_of(guarded)
    ranked = [(f["selection_drops"]["tiny_add"] > MOST, -f["selection_metric"]) for f in verdict["finalists"]]
    assert ranked == sorted(ranked)
    assert any(breaks and metric < ranked[0][1] for breaks, metric in ranked), "no guard was needed here"
    broken = {f["name"] for f in verdict["finalists"] if f["selection_drops"]["tiny_add"] > MOST}
    assert {c["name"] for c in verdict["comparisons"] if c["breaks"]} == broken & {
        c["name"] for c in verdict["comparisons"]
    }
    assert {"base", "rev"} <= broken


def test_every_full_trial_is_scored_on_the_guard_and_pays_for_its_drop(guarded: Path) -> None:
    study = open_run(guarded).study()
    scale = Scale.from_json(study.user_attrs[SCALE])
    known: GuardScale = scale.guards["tiny_add"]
    full = [t for t in study.get_trials() if in_full(t)]
    for trial in full:
        scores = trial_scores(trial)
        assert list(scores["tiny_add"]) == ["answer_logprob", "exact_match"]
        drop = known.level - scores["tiny_add"]["exact_match"].mean()
        assert trial.value == pytest.approx(scale.goals(scores) - max(0.0, drop - MOST) / known.unit, abs=1e-9)
    assert any(scale.penalty(trial_scores(t)) > 0 for t in full)
    stopped = [t for t in study.get_trials() if record_of(t).partial is not None]
    assert stopped, "nothing was stopped: races are not tested"
    for trial in stopped:
        assert np.isnan(trial_scores(trial)["tiny_add"]["exact_match"]).all()


def test_the_level_is_that_of_the_references_stored_scores(guarded: Path) -> None:
    study = open_run(guarded).study()
    (found,) = [r for r in evaluation_records(study.user_attrs, ["search"]).values() if r.name == "add"]
    known = Scale.from_json(study.user_attrs[SCALE]).guards["tiny_add"]
    assert known.level == pytest.approx(unpack(found.scores["tiny_add"]["exact_match"]).mean())
    assert f"a drop of {MOST:g} is allowed" in (guarded / "log.txt").read_text()


def test_status_and_report_tell_of_each_guard(guarded: Path) -> None:
    shown = " ".join(run_cli("status", guarded).stdout.split())
    report = (guarded / "report.html").read_text()
    for text in (shown, report):
        assert "Guard tiny_add is kept: exact_match drops by +0." in text
        assert f"against add; {MOST:g} is allowed" in text
        assert "rev breaks tiny_add on the selection items" in text
        assert "baselines that keep the guards" in text


def test_a_raced_trial_with_a_guard_is_repeated_bit_for_bit(guarded: Path) -> None:
    trials = open_run(guarded).study().get_trials()
    raced = [t.number for t in trials if in_full(t) and record_of(t).raced]
    done = run_cli("repeat", guarded, "--trial", str(raced[-1]))
    assert done.returncode == 0, done.stdout + done.stderr


# --- Perplexity of a text, and the learned start ---


def write_text_guarded(folder: Path, family: Path) -> Path:
    """A learned start for `rev` that must not lose bits on a text of sums, of which the other source knows more."""
    lines = [json.loads(line) for line in (TINY / "add.jsonl").read_text().splitlines()[:160]]
    texts = [json.dumps({"text": f"{line['prompt']}{line['answer']}"}) for line in lines]
    (folder / "text.jsonl").write_text("\n".join(texts))
    (folder / "text.yaml").write_text(TEXT)
    changes: dict[str, Any] = {
        "splits": {"search": 24, "selection": 12, "holdout": 100},
        "sampler": {"name": "auto", "steps": 8},
        "budget": {"trials": 9},
    }
    return write_guarded(folder, family, {"task": "text.yaml", "max_drop": 0.1, "of": "add"}, **changes)


TEXT = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, higher_is_better: false}]
"""


@pytest.mark.more
def test_a_killed_learned_start_with_a_perplexity_guard_resumes_with_the_same_bits(
    tiny_family: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run = finished_search(write_text_guarded(whole, tiny_family))
    study = open_run(run).study()
    steps = step_records(study.user_attrs)
    assert len(steps) in (6, 8)  # two looks at least
    assert all(list(step.drops) == ["sums"] for step in steps)
    assert any(step.drops["sums"] > 0.1 for step in steps[:-1]), "no step was held: the multipliers are not tested"
    verdict = verdict_of(run)
    assert verdict["guards"][0]["metric"] == "bits_per_byte"
    assert verdict["guards"][0]["drop"]["low"] is not None
    prelude = (
        KILL
        + """
import evomerge.search.learned.learn as l
calls, real = [0], l.Learner.weights
def counted(*a):
    calls[0] += 1
    if calls[0] == 4:
        die()
    return real(*a)
l.Learner.weights = counted
"""
    )
    killed = run_cli("search", write_text_guarded(parts, tiny_family), "--run", parts / "run", prelude=prelude)
    assert killed.returncode == -signal.SIGKILL
    done = run_cli("resume", parts / "run")
    assert done.returncode == 0, done.stderr
    again = step_records(open_run(parts / "run").study().user_attrs)
    assert [(s.point, s.gradient, s.drops) for s in again] == [(s.point, s.gradient, s.drops) for s in steps]
    assert trials_of(parts / "run") == trials_of(run)
    assert verdict_of(parts / "run")["guards"] == verdict["guards"]

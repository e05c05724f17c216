"""The scale of a study: what the values of trials mean, and whether objective and metric agree."""

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from searches import BETWEEN_RESULT_AND_END, ROOT, finished_search, run_cli, trials_of, verdict_of, write_config
from test_search import LOOKS_COST_NOTHING

from evomerge.config.config_file import load_config
from evomerge.config.tasks import GuardConfig, TaskConfig
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Order, Race
from evomerge.search.evaluation.agreement import agreement, agreements, rank_correlation, scored_models
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.scale import (
    METRIC_SHARE,
    SCALE,
    Line,
    Scale,
    TaskScale,
    fitted,
    with_first_objectives,
)
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import evaluation_key, evaluation_records, pack, trial_scores, unpack
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import EvaluationRecord, record_of

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))
tables = st.integers(2, 12).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=2, max_size=4)
)


def parents_of(table: Sequence[Sequence[float]]) -> dict[str, Sequence[float]]:
    return {f"parent {k}": scores for k, scores in enumerate(table[1:])}


@given(tables)
def test_the_base_is_0_and_the_best_parent_1_unless_it_may_be_luck(table: list[list[float]]) -> None:
    line = fitted("m", table[0], parents_of(table))
    assert line.of(table[0]).mean() == pytest.approx(0, abs=1e-6)
    best = max(table[1:], key=lambda scores: float(np.mean(scores)))
    gains = np.subtract(best, table[0])
    if line.parent is None:
        assert line.unit == 1
        assert gains.mean() <= 2 * gains.std(ddof=1) / len(gains) ** 0.5 + 1e-9
    else:
        assert line.of(best).mean() == pytest.approx(1)
        assert max(line.of(scores).mean() for scores in table[1:]) == pytest.approx(1)


@given(st.lists(st.tuples(numbers, st.floats(2, 3)), min_size=2, max_size=12), st.floats(0.01, 100), numbers)
def test_the_scaled_scores_do_not_depend_on_the_unit_in_which_a_task_is_measured(
    pairs: list[tuple[float, float]], unit: float, zero: float
) -> None:
    base, parent = [x for x, _ in pairs], [x + gain for x, gain in pairs]  # a gain that is no luck
    line = fitted("m", base, {"parent": parent})
    other = [[unit * x + zero for x in scores] for scores in (base, parent)]
    turned = fitted("m", other[0], {"parent": other[1]})
    assert line.parent == turned.parent == "parent"
    for scores, same in zip((base, parent), other, strict=True):
        assert turned.of(same) == pytest.approx(line.of(scores), rel=1e-6, abs=1e-6)


@given(numbers, st.floats(1e-6, 100), numbers, st.floats(1e-6, 100), st.lists(numbers, min_size=1, max_size=9))
def test_a_stored_scale_gives_the_same_bits(a: float, u: float, b: float, r: float, scores: list[float]) -> None:
    scale = Scale({"t": TaskScale(0.3, 0.5, Line("o", a, u, "rev"), Line("m", b, r))})
    again = Scale.from_json(json.loads(json.dumps(scale.to_json())))
    assert again == scale
    table = {"t": {"o": scores, "m": scores[::-1]}}
    assert again.value(table) == scale.value(table)
    assert (again.item_values(table)["t"] == scale.item_values(table)["t"]).all()


def test_one_item_or_no_parent_gives_no_unit() -> None:
    assert fitted("m", [0.0], {"a": [1.0]}).unit == 1
    assert fitted("m", [0.0, 1.0], {}) == Line("m", 0.5)
    assert fitted("m", [0.0, 0.0], {"a": [1.0, 1.0]}) == Line("m", 0.0, 1.0, "a")  # sure: all items gain alike


LONG_BASE, SHORT_BASE = [-29.0, -31.0, -30.5, -29.5], [-1.1, -0.9, -1.05, -0.95]


def mixed() -> Scale:
    """Two tasks whose objectives differ thirtyfold in unit, as a long and a short answer in nats do."""
    long, short = fitted("o", LONG_BASE, {"upper": [-0.1] * 4}), fitted("o", SHORT_BASE, {"lower": [-0.01] * 4})
    return Scale({name: TaskScale(1.0, 0.0, line, line) for name, line in (("long", long), ("short", short))})


def test_no_task_drowns_another_by_its_unit() -> None:
    scale = mixed()
    blend = {"long": {"o": [-3.0] * 4}, "short": {"o": [-0.1] * 4}}  # nine tenths of both gains
    lost = {"long": {"o": [-0.1] * 4}, "short": {"o": SHORT_BASE}}  # all of one, nothing of the other
    raw = [sum(np.mean(m["o"]) for m in table.values()) / 2 for table in (blend, lost)]
    assert raw[0] < raw[1]
    assert scale.value(blend) == pytest.approx(0.9, abs=0.02)
    assert scale.value(lost) == pytest.approx(0.5, abs=0.02)


def test_weights_mean_what_they_say() -> None:
    tasks = mixed().tasks
    scale = Scale({n: TaskScale(w, 0.0, tasks[n].objective, tasks[n].metric) for n, w in (("long", 1), ("short", 3))})
    table = {"long": {"o": LONG_BASE}, "short": {"o": [-0.01] * 4}}
    assert scale.value(table) == pytest.approx(0.75)


def test_both_objective_and_metric_count_where_trials_are_scored_by_both() -> None:
    scale = Scale({"t": TaskScale(1.0, 0.25, Line("o", -2.0, 2.0, "a"), Line("m", 0.0, 0.5, "a"))})
    (values,) = scale.item_values({"t": {"o": [-2.0, 0.0, np.nan], "m": [0.0, 1.0, np.nan]}}).values()
    assert values[:2].tolist() == [0.0, 0.75 * 1.0 + 0.25 * 2.0]
    assert np.isnan(values[2])


@given(st.data(), st.integers(0, 2**16))
def test_a_race_on_scaled_values_is_that_on_scores_if_the_units_are_1(data: st.DataObject, seed: int) -> None:
    """Offsets move candidate and incumbent alike, and the estimate with them."""
    rng, count = np.random.default_rng(seed), 60
    offset = data.draw(st.sampled_from([0.0, -2.5]))
    order = Order(rng.permutation(count), np.full(count, 1 / count), np.full(count, 1 / count))
    best, new = rng.normal(-1, 1, count), rng.normal(data.draw(st.sampled_from([-1.0, -1.5, -2.5])), 1, count)
    scale = Scale({"t": TaskScale(1.0, 0.0, Line("o", offset), Line("m"))})
    top = np.full(count, 3.0)
    setup = RaceSetup("items", {"t": count}, order, top - offset, 0.02, Looks((20, 60), (0.5, 1.0)), scale)
    scaled = setup.race(setup.values({"t": {"o": best}}), [])
    plain = Race(order, best, top, None, 0.02)
    for piece in np.split(order.items, 6):
        stopped = plain.observe(new[piece])
        assert scaled.observe(setup.values({"t": {"o": new}})[piece]) == stopped
        if stopped:
            break
    assert scaled.estimate().value == pytest.approx(plain.estimate().value - offset, abs=1e-9)
    if not offset:
        assert scaled.estimate() == plain.estimate()


# --- Whether objective and metric agree ---


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_the_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(x, y).statistic)


def test_a_disagreement_names_the_model_that_the_objective_overlooks() -> None:
    rows = [("uniform", 0.9, 0.50), ("soup", 0.8, 0.55), ("upper", 0.5, 0.74), ("base", 0.0, 0.30), ("lower", 0.1, 0.4)]
    found = agreement("all tasks", rows, "the objective", "exact_match")
    assert (found.best, found.place, found.disagrees) == ("upper", 3, True)
    assert "upper is the best by exact_match and number 3 by the objective" in found.sentence
    alike = agreement("all tasks", [(name, m, m) for name, _, m in rows], "the objective", "exact_match")
    assert alike.correlation == pytest.approx(1.0)
    assert (alike.place, alike.disagrees) == (1, False)
    assert "disagree" not in alike.sentence


def test_a_weak_correlation_is_said_without_contradiction_where_both_have_the_same_best_model() -> None:
    rows = [("upper", 0.9, 0.9), ("soup", 0.8, 0.1), ("base", 0.1, 0.7), ("lower", 0.2, 0.6), ("uniform", 0.7, 0.2)]
    found = agreement("task t", rows, "gold_logprob", "exact_match")
    assert found.correlation == pytest.approx(0.0)
    assert (found.best, found.place, found.disagrees) == ("upper", 1, True)
    assert found.sentence == (
        "task t: rank correlation of gold_logprob and exact_match over 5 models: 0.00, which is weak; "
        "upper is the best by both"
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=12))
def test_the_sentence_says_of_the_best_model_what_its_place_says(pairs: list[tuple[int, int]]) -> None:
    rows = [(f"m{k}", float(a), float(b)) for k, (a, b) in enumerate(pairs)]
    found = agreement("task t", rows, "o", "m")
    assert ("disagree" in found.sentence) == (found.disagrees and found.place > 1)
    assert ("best by both" in found.sentence) == (found.disagrees and found.place == 1)


# --- In a search ---


def tasks(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"task": str(ROOT / "evals" / "tiny" / f"{name}.yaml"), **options} for name in names]


def write_mixed_config(folder: Path, family: Path, **changes: Any) -> Path:
    """A search on multiple choice and generation that leaves the objective to evomerge."""
    splits = {"search": 60, "selection": 10, "holdout": 20}
    usual: dict[str, Any] = {"tasks": tasks("choice", "rev"), "splits": splits, "budget": {"trials": 14}}
    return write_config(folder, family, **(usual | changes))


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_mixed_config(tmp_path_factory.mktemp("mixed"), tiny_family), LOOKS_COST_NOTHING)


def scale_in(run: Path) -> Scale:
    return Scale.from_json(open_run(run).study().user_attrs[SCALE])


def test_trials_are_scored_by_objective_and_metric_and_valued_by_both(finished: Path) -> None:
    scale, study = scale_in(finished), open_run(finished).study()
    assert {n: (t.objective.name, t.metric.name, t.share) for n, t in scale.tasks.items()} == {
        "tiny_choice": ("choice_logprob", "acc", METRIC_SHARE),
        "tiny_rev": ("answer_weakest", "exact_match", METRIC_SHARE),
    }
    trials = study.get_trials()
    assert any(record_of(t).partial is not None for t in trials), "nothing was stopped: races on values are not tested"
    for trial in filter(in_full, trials):
        scores = trial_scores(trial)
        assert {task: list(metrics) for task, metrics in scores.items()} == {
            "tiny_choice": ["choice_logprob", "acc"],
            "tiny_rev": ["answer_weakest", "exact_match"],
        }
        assert trial.value == pytest.approx(scale.value(scores), abs=1e-12)
    for trial in (t for t in trials if record_of(t).partial is not None):
        for metrics in trial_scores(trial).values():
            first, second = metrics.values()
            assert (np.isnan(first) == np.isnan(second)).all()


def test_the_value_of_the_base_is_0_and_no_parent_is_above_1(finished: Path) -> None:
    scale, study = scale_in(finished), open_run(finished).study()
    named = {r.name: r.scores for r in evaluation_records(study.user_attrs, ["search"]).values()}
    means = {n: {t: {m: unpack(x) for m, x in ms.items()} for t, ms in s.items()} for n, s in named.items()}
    assert scale.value(means["base"]) == pytest.approx(0, abs=1e-9)
    for task in ("tiny_choice", "tiny_rev"):
        line = scale.tasks[task].objective
        each = [line.of(means[parent][task][line.name]).mean() for parent in ("rev", "add")]
        assert max(each) == pytest.approx(1) or line.parent is None
    log = (finished / "log.txt").read_text()
    assert re.search(r"task tiny_rev: 0 is the base \(-\d\.\d+ by answer_weakest\), 1 is its best parent, rev", log)


def test_a_parents_trial_takes_the_stored_scores_with_what_the_canary_saw(finished: Path) -> None:
    study = open_run(finished).study()
    trials = {t.user_attrs.get("baseline"): record_of(t) for t in study.get_trials()}
    records = {r.name: r for r in evaluation_records(study.user_attrs, ["search"]).values()}
    for parent in ("rev", "add"):
        assert trials[parent].seconds.forward is None
        assert trials[parent].signs == records[parent].signs is not None
        for task, metrics in trials[parent].scores.items():
            assert all(records[parent].scores[task][metric] == text for metric, text in metrics.items())


def test_a_trial_in_both_metrics_is_repeated_bit_for_bit(finished: Path) -> None:
    stopped = [t.number for t in open_run(finished).study().get_trials() if record_of(t).partial is not None]
    done = run_cli("repeat", finished, "--trial", str(stopped[0]))
    assert done.returncode == 0, done.stdout + done.stderr


def test_status_and_report_say_what_values_mean_and_whether_objective_and_metric_agree(finished: Path) -> None:
    shown = run_cli("status", finished).stdout
    assert "0 is the base, 1 the best parent of each task" in shown.replace("\n", " ")
    report = (finished / "report.html").read_text()
    study = open_run(finished).study()
    found = agreements(scored_models(study.get_trials(), study.user_attrs), study.user_attrs)
    assert [a.what for a in found] == ["all tasks", "task tiny_choice", "task tiny_rev"]
    for each in found:
        assert each.what in shown
        assert each.what in report
    assert "(0: base, 1: best parent)" in report


@pytest.mark.more
def test_a_killed_search_by_objective_and_metric_resumes_to_the_same_trials(
    finished: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    prelude = LOOKS_COST_NOTHING + BETWEEN_RESULT_AND_END
    killed = run_cli("search", write_mixed_config(tmp_path, tiny_family), "--run", run, prelude=prelude)
    assert killed.returncode == -signal.SIGKILL
    assert run_cli("resume", run, prelude=LOOKS_COST_NOTHING).returncode == 0
    assert trials_of(run) == trials_of(finished)
    assert verdict_of(run) == verdict_of(finished)


def test_the_candidate_is_never_below_a_baseline_on_the_selection_split(finished: Path) -> None:
    verdict = verdict_of(finished)
    ranked = verdict["finalists"]
    assert verdict["chosen"]["name"] == ranked[0]["name"]
    assert ranked[0]["selection_metric"] == max(f["selection_metric"] for f in ranked)
    assert {"base", "rev", "add", "uniform"} <= {f["name"] for f in ranked}
    if ranked[0]["kind"] != "candidate":
        assert verdict["outcome"] in ("worse", "too little searched")
        assert verdict["recommended"] == ranked[0]["name"]


def test_the_best_by_metric_is_a_finalist(finished: Path) -> None:
    study, scale = open_run(finished).study(), scale_in(finished)
    names = {t.number for t in study.get_trials() if in_full(t) and "baseline" not in t.user_attrs}
    models = [m for m in scored_models(study.get_trials(), study.user_attrs) if m.trial in names]
    found = {m.name: means[1] for m in models if (means := m.means(scale, list(scale.tasks))) is not None}
    finalists = {f["name"] for f in verdict_of(finished)["finalists"]}
    assert max(found[name] for name in finalists & found.keys()) == max(found.values())


EVERY_FOURTH = "import evomerge.search.evaluation.agreement_check as l\nl.EVERY = 4\n"


def test_the_incumbent_is_scored_by_the_metric_where_trials_are_not(tiny_family: Path, tmp_path: Path) -> None:
    run = finished_search(write_config(tmp_path, tiny_family), EVERY_FOURTH)
    study = open_run(run).study()
    trials = study.get_trials()
    assert all(list(m) == ["gold_logprob"] for t in trials for m in record_of(t).scores.values())
    models = {m.name for m in scored_models(trials, study.user_attrs)}
    due = [max(filter(in_full, trials[:n]), key=lambda t: (t.value or 0.0, -t.number)) for n in (8, 12)]
    assert {"base", "rev", "add"} <= models
    assert {str(t.user_attrs.get("baseline", f"trial {t.number}")) for t in due} <= models


def test_without_a_scale_values_are_mean_scores(tiny_family: Path, tmp_path: Path) -> None:
    run = finished_search(write_config(tmp_path, tiny_family, scale="none", budget={"trials": 8}))
    for trial in open_run(run).study().get_trials():
        means = [s.mean() for metrics in trial_scores(trial).values() for s in metrics.values()]
        assert trial.value == pytest.approx(np.mean(means), abs=1e-9)
    assert "0 is the base" not in run_cli("status", run).stdout


def test_a_study_older_than_scales_goes_on_with_its_objectives_and_values(tiny_family: Path, tmp_path: Path) -> None:
    """The metric was the default objective then."""
    old = "import evomerge.search.evaluation.settled_scale as l\nimport evomerge.search.evaluation.scale as s\n"
    old += "l.SCALE = s.SCALE = 'nowhere'\n"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    usual: dict[str, Any] = {"scale": "none", "racing": False}
    named = finished_search(write_config(whole, tiny_family, tasks=tasks("rev", "add", objective="metric"), **usual))
    config = write_config(parts, tiny_family, tasks=tasks("rev", "add", objective="metric"), **usual)
    run = parts / "run"
    assert run_cli("search", config, "--run", run, "--trials", "8").returncode == 0
    study = open_run(run).study()
    storage = study._storage
    engine = storage._backend.engine if hasattr(storage, "_backend") else storage.engine  # type: ignore[attr-defined]
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key = ?", (SCALE,))
    for file in (config, run / "config.yaml"):
        file.write_text(file.read_text().replace("objective: metric", "objective: auto"))
    done = run_cli("resume", run, "--trials", "16", "--accept-changes")
    assert done.returncode == 0, done.stderr
    assert trials_of(run) == trials_of(named)


@pytest.mark.parametrize(
    ("scored", "objective"),
    [("answer_logprob", "auto_mean"), ("answer_weakest answer_logprob", "auto"), ("choice_logprob", "auto")],
)
def test_a_study_goes_on_with_what_auto_stood_for_when_it_began(
    tiny_family: Path, tmp_path: Path, scored: str, objective: str
) -> None:
    config = load_config(write_config(tmp_path, tiny_family, tasks=tasks("rev", "add")))
    guard = GuardConfig(task="evals/tiny/count.yaml", max_drop=0.1)
    config = config.model_copy(
        update={"guards": [guard], "tasks": [*config.tasks[:1], TaskConfig(task="t", objective="acc")]}
    )
    study = optuna.create_study()
    assert with_first_objectives(study, config) == config
    scale = Scale({f"task {n}": TaskScale(1.0, 0.5, Line(n), Line("m")) for n in scored.split()[:1]})
    study.set_user_attr(SCALE, scale.to_json())
    record = EvaluationRecord(name="base", scores={"t": {name: pack([0.0]) for name in scored.split()}})
    study.set_user_attr(evaluation_key("search", "0"), record.to_json())
    found = with_first_objectives(study, config)
    assert [t.objective for t in (*found.tasks, *found.guards)] == [objective, "acc", objective]


def test_a_small_gain_of_a_metric_does_not_count_many_times() -> None:
    """One right item of twenty would else be the whole way from base to best parent."""
    base, parent = [0.0] * 40, [1.0] * 6 + [0.0] * 34
    assert fitted("exact_match", base, {"a": parent}) == Line("exact_match", 0.0, 0.15, "a")
    floored = fitted("exact_match", base, {"a": parent}, 0.25)
    assert floored == Line("exact_match", 0.0, 0.25)
    assert "the best parent is below that" in floored.sentence("t")


def write_last_letter_task(folder: Path) -> Path:
    """A task whose gold answer is the last letter of what a model writes."""
    task = yaml.safe_load((ROOT / "evals" / "tiny" / "sort.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(ROOT / "evals" / "tiny" / "sort.jsonl")
    cut = [{"function": "regex", "regex_pattern": "([a-z])\\s*$"}, {"function": "take_first"}]
    task |= {"doc_to_target": "{{answer[-1]}}", "filter_list": [{"name": "last", "filter": cut}]}
    (folder / "last.yaml").write_text(yaml.safe_dump(task))
    return folder / "last.yaml"


def test_where_models_do_not_write_the_gold_answer_only_the_metric_counts(tiny_family: Path, tmp_path: Path) -> None:
    """To climb the probability of an answer that is cut out of a longer one would unlearn the longer one."""
    last = str(write_last_letter_task(tmp_path))
    sources = [{"name": name, "path": str(tiny_family / name)} for name in ("sort", "add")]
    splits = {"search": 20, "selection": 4, "holdout": 4}
    usual: dict[str, Any] = {"sources": sources, "splits": splits, "sampler": {"name": "learned", "steps": 1}}
    run = tmp_path / "run"
    done = run_cli("search", write_mixed_config(tmp_path, tiny_family, tasks=[{"task": last}], **usual), "--run", run)
    assert done.returncode == 2
    assert "models do not write its gold answer; give `gold`" in done.stderr.replace("\n", " ")
    log = (run / "log.txt").read_text()
    assert "task tiny_sort: where models answer right they do not write its gold answer (log-probability -" in log
    assert scale_in(run).tasks["tiny_sort"].share == 1.0
    valued = [t for t in open_run(run).study().get_trials() if in_full(t)]
    assert valued
    for trial in valued:
        (metrics,) = trial_scores(trial).values()
        line = scale_in(run).tasks["tiny_sort"].metric  # exact_match of the filter
        assert trial.value == pytest.approx(line.of(metrics[line.name]).mean(), abs=1e-12)

    (tmp_path / "gold").mkdir()
    tasks_with_gold = [{"task": last, "gold": "{{answer}}"}]
    run = finished_search(write_mixed_config(tmp_path / "gold", tiny_family, tasks=tasks_with_gold, **usual))
    assert scale_in(run).tasks["tiny_sort"].share == METRIC_SHARE

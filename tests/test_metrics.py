"""The table of metrics: every entry is complete and computes, and other packages can add objectives."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributions import install
from hypothesis import given
from hypothesis import strategies as st
from lm_eval_tasks import metrics, write_task
from models import write_llama
from torch import Tensor

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.formulas import Answer, TensorAnswer
from evomerge.evaluate.item_values import MetricFailed, scores_of
from evomerge.evaluate.metrics import KINDS, METRICS, Metric, find_metric
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.racing import ceiling
from evomerge.evaluate.tasks import Task, items_of
from evomerge.search.verdict.intervals import score_range

DOCS = [{"q": f"{a}+{b}=", "a": a + b, "c": [b, a + b, "ab"], "g": 1} for a in "abcd" for b in "ef1"]
KINDS_OF_TASK: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_text": "{{q}}",
        "doc_to_choice": "c",
        "doc_to_target": "g",
        "metric_list": metrics("acc", "acc_norm", "acc_bytes", "brier_score"),
    },
    "generate_until": {
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": metrics("exact_match"),
    },
    "loglikelihood": {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": metrics("perplexity", "acc")},
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{q}}{{a}}",
        "metric_list": metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    },
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_llama(tmp_path_factory.mktemp("models") / "llama")
    return Engine(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), 256)


def open_kind(folder: Path, kind: str, **config: Any) -> Task:
    file = write_task(folder, kind, DOCS, output_type=kind, **KINDS_OF_TASK[kind])
    (task,) = open_tasks([TaskConfig(task=str(file), **config)])
    return task


def scored(engine: Engine, task: Task, everything: bool) -> dict[str, list[float]]:
    """The item scores of everything that is computed."""
    found = engine.score(engine.prepare(task, items_of(task, task.docs), everything), Clock())
    return {metric: scores_of(task, metric, found) for metric in found}


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_an_entry_is_complete_and_agrees_with_itself(metric: Metric) -> None:
    assert (metric.formula is None) == (metric.needs == "lm_eval")
    assert metric.needs == "lm_eval" or metric.needs in KINDS
    assert metric.differentiable is None or metric.smooth
    if metric.worst is not None and metric.best is not None:
        assert (metric.best > metric.worst) == metric.higher_is_better
    worst, best = metric.score_bounds
    assert worst is None or best is None or worst < best


def test_the_directions_are_those_of_lm_eval() -> None:
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import higher_is_better_registry

    ours = {m.name: m.higher_is_better for m in METRICS.values() if m.needs == "lm_eval"}
    assert ours == {name: higher_is_better_registry[name] for name in ours}


def test_every_metric_of_the_table_computes_within_its_bounds(engine: Engine, tmp_path: Path) -> None:
    seen = set()
    for kind in KINDS_OF_TASK:
        for name, scores in scored(engine, open_kind(tmp_path, kind), everything=True).items():
            worst, best = METRICS[name].score_bounds
            assert all((worst is None or worst <= s) and (best is None or s <= best) for s in scores), (kind, name)
            assert len(scores) == len(DOCS)
            assert len(set(scores)) > 2 or not METRICS[name].smooth, (kind, name)
            seen.add(name)
    assert seen == {name for name, metric in METRICS.items() if metric.extra is None}
    assert all(
        x < 0
        for x in scored(engine, open_kind(tmp_path, "generate_until", objective="entropy"), False)["token_entropy"]
    )


@pytest.mark.parametrize("name", [m.name for m in METRICS.values() if m.needs in KINDS])
def test_an_objective_alone_scores_as_beside_all_other_metrics(name: str, engine: Engine, tmp_path: Path) -> None:
    for kind in KINDS[METRICS[name].needs]:
        task = open_kind(tmp_path, kind, objective=name)
        alone, beside = (scored(engine, task, everything)[name] for everything in (False, True))
        assert alone == pytest.approx(beside, rel=1e-4), kind


nats = st.floats(-40, 0) | st.floats(-2000, 0)
answers = st.integers(1, 6).flatmap(
    lambda count: st.builds(
        Answer,
        doc=st.just({}),
        gold_logprob=nats,
        gold_bytes=st.integers(0, 50),
        logprobs=st.lists(nats, min_size=count, max_size=count),
        gold=st.integers(0, count - 1),
        token_logprobs=st.lists(nats, min_size=1, max_size=8),
        token_entropies=st.lists(st.floats(0, 12), min_size=1, max_size=8),
        lengths=st.lists(st.integers(1, 40), min_size=count, max_size=count),
    )
)


def on_tensors(answer: Answer) -> TensorAnswer:
    """The same answer in float64, with a gradient."""
    columns = (answer.gold_logprob, answer.token_logprobs, answer.logprobs, answer.token_entropies)
    one, tokens, choices, entropies = (torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in columns)
    return TensorAnswer(one, tokens, choices, answer.gold, answer.gold_bytes, answer.lengths, entropies)


@pytest.mark.parametrize("metric", [m for m in METRICS.values() if m.formula], ids=lambda m: m.name)
@given(answer=answers)
def test_a_formula_and_its_differentiable_form_agree(metric: Metric, answer: Answer) -> None:
    assert metric.formula is not None
    assert metric.differentiable is not None
    tensors = on_tensors(answer)
    value = metric.differentiable(tensors)
    assert value.shape == ()
    assert value.item() == pytest.approx(metric.formula(answer), rel=1e-9, abs=1e-9)
    inputs = [x for x in vars(tensors).values() if isinstance(x, torch.Tensor)]
    gradients = [g for g in torch.autograd.grad(value, inputs, allow_unused=True) if g is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("metric", [m for m in METRICS.values() if m.differentiable], ids=lambda m: m.name)
def test_the_derivative_of_a_formula_is_that_of_finite_differences(metric: Metric) -> None:
    plain = Answer({}, -2.5, 3, [-1.0, -2.5, -7.0], 1, "", [-0.2, -1.6, -5.0, -0.7], (), [1.5, 0.1], [3, 5, 9])
    formula, whole = metric.differentiable, on_tensors(plain)
    assert formula is not None

    def value(one: Tensor, tokens: Tensor, choices: Tensor, entropies: Tensor) -> Tensor:
        changed = replace(whole, gold_logprob=one, token_logprobs=tokens, logprobs=choices, token_entropies=entropies)
        return formula(changed)

    assert whole.token_entropies is not None
    inputs = (whole.gold_logprob, whole.token_logprobs, whole.logprobs, whole.token_entropies)
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", ["answer_logprob", "answer_weakest", "choice_logprob", "choice_logprob_norm"])
@given(answer=answers)
def test_a_floored_objective_stays_within_its_bounds_and_rises_with_the_gold_answer(name: str, answer: Answer) -> None:
    metric = METRICS[name]
    assert metric.formula is not None
    value = metric.formula(answer)
    assert metric.worst is not None
    assert metric.worst - 1e-12 <= value <= 0
    better = Answer(
        {},
        token_logprobs=[x / 2 for x in answer.token_logprobs],
        logprobs=[x / 2 if k == answer.gold else x for k, x in enumerate(answer.logprobs)],
        gold=answer.gold,
        lengths=answer.lengths,
    )
    assert metric.formula(better) >= value - 1e-12


def test_far_above_the_floor_an_objective_is_the_log_probability_and_below_it_a_few_nats() -> None:
    probable = METRICS["answer_logprob"].formula
    assert probable is not None
    assert probable(Answer({}, token_logprobs=[-0.5, -1.5])) == pytest.approx(-1.0, abs=0.01)
    assert (
        probable(Answer({}, token_logprobs=[-400.0])) == METRICS["answer_logprob"].worst == pytest.approx(-6, abs=0.01)
    )
    weakest = METRICS["answer_weakest"].formula
    assert weakest is not None
    assert weakest(Answer({}, token_logprobs=[-0.5, -1.5])) == pytest.approx(-1.25, abs=0.01)
    assert weakest(Answer({}, token_logprobs=[0.0, 0.0, 0.0, -400.0])) == pytest.approx((-6 / 4 - 6) / 2, abs=0.01)
    choice, norm = METRICS["choice_logprob"].formula, METRICS["choice_logprob_norm"].formula
    assert choice is not None
    assert norm is not None
    equal = Answer({}, logprobs=[-3.0, -4.0], gold=1, lengths=[7, 7])
    assert choice(equal) == norm(equal) == pytest.approx(-math.log(1 + math.e), abs=0.01)
    unequal = Answer({}, logprobs=[-3.0, -4.0], gold=1, lengths=[5, 10])  # -0.6 and -0.4 nats a character
    assert choice(unequal) < -math.log(2) < norm(unequal)


@pytest.mark.parametrize(
    ("kind", "config", "objective"),
    [
        ("multiple_choice", {}, "choice_logprob"),
        ("multiple_choice", {"metric": "acc_norm"}, "choice_logprob_norm"),
        ("multiple_choice", {"metric": "acc_bytes"}, "choice_logprob_norm"),
        ("multiple_choice", {"metric": "brier_score"}, "brier_score"),
        ("multiple_choice", {"metric": "gold_logprob"}, "gold_logprob"),
        ("generate_until", {}, "answer_weakest"),
        ("generate_until", {"metric": "exact_match,none"}, "answer_weakest"),
        ("loglikelihood", {}, "perplexity"),
        ("loglikelihood", {"metric": "acc"}, "answer_weakest"),
        ("loglikelihood_rolling", {}, "word_perplexity"),
        ("generate_until", {"objective": "auto_mean"}, "answer_logprob"),
        ("multiple_choice", {"objective": "entropy"}, "choice_entropy"),
        ("loglikelihood", {"objective": "entropy"}, "token_entropy"),
    ],
)
def test_auto_and_entropy_stand_for_an_objective_of_the_tasks_kind(
    kind: str, config: dict[str, str], objective: str, tmp_path: Path
) -> None:
    task = open_kind(tmp_path, kind, **config)
    assert task.objective == objective
    assert task.auto == (config.get("objective") in (None, "auto_mean"))


def test_a_text_has_no_entropy_objective(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="objective 'entropy' is not one of its metrics"):
        open_kind(tmp_path, "loglikelihood_rolling", objective="entropy")


def test_the_objective_of_choices_brings_the_metric_along(engine: Engine, tmp_path: Path) -> None:
    """No request is made for it; of a generation task the objective alone generates nothing."""
    choosing = open_kind(tmp_path, "multiple_choice")
    alone = scored(engine, choosing, everything=False)
    assert alone["acc"] == scored(engine, choosing, everything=True)["acc"]
    generating = open_kind(tmp_path, "generate_until")
    assert {"answer_logprob", "exact_match"} <= set(scored(engine, generating, everything=True))
    work = engine.prepare(generating, items_of(generating, generating.docs), everything=False)
    assert not work.prompts
    assert "answer_logprob" in engine.score(work, Clock())


def test_choices_without_their_prompt_are_no_choices(engine: Engine, tmp_path: Path) -> None:
    """`acc_mutual_info` asks for every choice once more; the formulas read the choices alone."""
    plain = scored(engine, open_kind(tmp_path, "multiple_choice"), everything=True)
    content = KINDS_OF_TASK["multiple_choice"] | {"metric_list": metrics("acc", "acc_mutual_info")}
    file = write_task(tmp_path, "mutual", DOCS, output_type="multiple_choice", **content)
    (task,) = open_tasks([TaskConfig(task=str(file))])
    found = scored(engine, task, everything=True)
    for name in ("choice_logprob", "choice_logprob_norm", "margin", "brier", "choice_entropy"):
        assert found[name] == pytest.approx(plain[name], abs=1e-4), name


# Objectives of other packages


CODE = """
from evomerge.evaluate.metrics import Metric

def overlap(answer):
    return len(set(answer.text) & set(answer.doc["a"])) / len(set(answer.text) | set(answer.doc["a"]))

overlap_metric = Metric("overlap", "generation", True, 0.0, 1.0, False, overlap)
surprise = Metric("surprise", "gold", False, None, 0.0, True, lambda answer: -answer.gold_logprob)
steady = Metric("steady", "gold", True, None, None, True, lambda a: min(a.token_margins), extra="margins")
lead = Metric("lead", "choices", True, None, None, True, lambda answer: answer.logprobs[answer.gold])
failing = Metric("failing", "gold", True, None, None, True, lambda answer: answer.doc["nothing"])
unlike = Metric("another", "gold", True, None, None, True, lambda answer: 0.0)
nothing = 3
"""
POINTS = {
    "overlap": "added_objectives:overlap_metric",
    "surprise": "added_objectives:surprise",
    "lead": "added_objectives:lead",
    "steady": "added_objectives:steady",
    "failing": "added_objectives:failing",
    "unlike": "added_objectives:unlike",
    "nothing": "added_objectives:nothing",
    "missing": "added_objectives:missing",
}


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that adds objectives: a module and its metadata on the path."""
    folder = install(tmp_path / "installed", "added-objectives", CODE, "evomerge.objectives", POINTS)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.usefixtures("distribution")
def test_an_installed_package_adds_objectives(engine: Engine, tmp_path: Path) -> None:
    generating = open_kind(tmp_path, "generate_until", objective="overlap", metric="surprise")
    alone, everything = (scored(engine, generating, e) for e in (False, True))
    assert alone["overlap"] == everything["overlap"]
    assert all(0 <= x <= 1 for x in alone["overlap"])
    assert everything["surprise"] == everything["gold_logprob"]
    choosing = open_kind(tmp_path, "multiple_choice", objective="lead")
    found = scored(engine, choosing, everything=False)
    assert found["lead"] == found["gold_logprob"]
    found = scored(engine, open_kind(tmp_path, "loglikelihood", objective="steady", metric="acc"), everything=True)
    assert [x > 0 for x in found["steady"]] == [x == 1 for x in found["acc"]]
    alone = scored(engine, open_kind(tmp_path, "loglikelihood", objective="surprise"), everything=False)
    assert set(alone) == {"answer_logprob", "answer_weakest", "gold_logprob", "gold_prob", "bits_per_byte", "surprise"}


@pytest.mark.usefixtures("distribution")
def test_the_bounds_of_an_added_objective_reach_races_and_intervals() -> None:
    import numpy as np

    assert ceiling("overlap", np.zeros((2, 3))) == 1.0
    assert math.copysign(1.0, ceiling("surprise", np.full((2, 3), -5.0))) == 1.0
    assert score_range("surprise", [[-1.0, -2.0]]) is None
    assert find_metric("no_such_name") is None


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unlike", "needs the name 'unlike', a formula, and one of gold, choices, generation as `needs`"),
        ("nothing", "is not an evomerge.evaluate.metrics.Metric"),
        ("missing", "cannot be loaded (AttributeError: "),
    ],
)
def test_an_unusable_entry_point_is_named_with_its_package(name: str, reason: str, tmp_path: Path) -> None:
    start = f"objective '{name}': the entry point {POINTS[name]} of added-objectives {reason}"
    with pytest.raises(EvomergeError, match=re.escape(start)):
        open_kind(tmp_path, "loglikelihood", objective=name)


@pytest.mark.usefixtures("distribution")
def test_an_added_objective_needs_a_task_that_has_what_it_reads(tmp_path: Path) -> None:
    message = "task loglikelihood: overlap needs a task of the kind generate_until; this one is loglikelihood"
    with pytest.raises(EvomergeError, match=message):
        open_kind(tmp_path, "loglikelihood", objective="overlap")


@pytest.mark.usefixtures("distribution")
def test_a_formula_that_fails_costs_one_candidate(engine: Engine, tmp_path: Path) -> None:
    task = open_kind(tmp_path, "loglikelihood", objective="failing")
    with pytest.raises(MetricFailed, match="task loglikelihood: the metric failing fails on an answer \\(KeyError: "):
        scored(engine, task, everything=False)


@pytest.mark.usefixtures("distribution")
def test_a_misspelt_objective_gets_the_names_of_all_there_are(tmp_path: Path) -> None:
    added = ", ".join(sorted(POINTS))
    smooth = "answer_logprob, answer_weakest, gold_logprob, gold_prob, token_entropy, bits_per_byte"
    listed = f"smooth: {smooth}; others: exact_match; of other packages: {added}"
    message = f"task generate_until: objective 'gold_logprop' is not one of its metrics ({listed})"
    with pytest.raises(EvomergeError, match=re.escape(message)):
        open_kind(tmp_path, "generate_until", objective="gold_logprop")

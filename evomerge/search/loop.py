"""The loop: propose, materialise, evaluate, tell, until the budget ends; a trial may fail, the run may not."""

import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from optuna.trial import FrozenTrial, TrialState

from evomerge.errors import EvomergeError
from evomerge.evaluate.canary import Broken, Signs, normal_signs
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.merge.materialise import NotFinite
from evomerge.merge.prepare import prepare
from evomerge.search.baselines import Baseline, baselines
from evomerge.search.finals import Ledger, finish, search_score
from evomerge.search.limits import Limits
from evomerge.search.race import Course, build_course
from evomerge.search.run import Run
from evomerge.search.scorer import Outcome, Scorer, free_memory, open_config_models
from evomerge.search.scores import objective_scores, pack
from evomerge.search.soup import GREEDY, GreedySoup, greedy_soup
from evomerge.search.space import Point, build_space
from evomerge.search.study import SearchStudy, open_study, record_of
from evomerge.search.verdict import Verdict

FAILURES_IN_A_ROW = 10


class Interrupted(BaseException):
    """The user asked to stop (SIGINT, SIGTERM); the trial in hand stays in the study and is done on resume."""


class Listener(Protocol):
    """Who shows the run to a person."""

    def phase(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def trial(self, number: int, total: int | None, value: float | None, best: float | None, note: str) -> None: ...


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that the work checks between batches; a second one kills."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)


def search(run: Run, limits: Limits, listener: Listener, stop: StopSignal) -> Verdict:
    """Run or go on with a search until its limits, then judge the finalists and write the verdict.

    Interrupted if the user stops it: everything finished is in the study.  EvomergeError on wrong input, or
    when ten trials in a row fail.
    """
    config = run.config()
    listener.phase("opening the models")
    models = open_config_models(config)
    for note in models.compatibility.notes:
        run.log(f"note: {note}")
    space = build_space(config, models)
    study = SearchStudy(open_study(run.storage_url(config), config.name, create=True), space)
    listener.phase("preparing the items")
    scorer = Scorer(config, models, stop.check, run.log, cache=run.folder / "cache")
    listener.phase("measuring the sources")
    names = [s.name for s in config.sources]
    prepare(scorer.bank, config.method, names, run.folder / "cache", run.manifest()["inputs"])
    known = baselines(space)
    ledger = Ledger(study.stored, scorer, run, listener.step)
    for baseline in known:
        if baseline.point is None and ledger.stored("search", baseline.recipe) is None:
            listener.phase(f"baseline {baseline.name}")
            ledger.score("search", baseline.recipe)
    scorer.prepared("search", everything=False)
    listener.phase("searching")
    failures = failures_in_a_row(study)
    stored = 0.0
    course: Course | None = None
    soup: GreedySoup | None = None
    while within(study, limits):
        stop.check()
        if soup is None and next_baseline(study, known) is None:
            course = make_course(study, known, ledger)
            soup = make_soup(run, study, known, ledger, listener)
            listener.phase("searching")
        failed, stored = run_trial(run, study, known, ledger, listener, limits, course, stored)
        failures = failures + 1 if failed else 0
        if failures >= FAILURES_IN_A_ROW:
            raise EvomergeError(explain_failures(study))
    soup = soup or make_soup(run, study, known, ledger, listener)  # the budget ended among the baselines
    return finish(run, study, ledger, known, soup, listener.phase)


def make_soup(run: Run, study: SearchStudy, known: list[Baseline], ledger: Ledger, listener: Listener) -> GreedySoup:
    """The greedy soup, added to the baselines `known` unless it is one of them."""
    listener.phase("greedy soup")
    soup = greedy_soup(study.space, known, lambda b: search_score(study, ledger, b, listener.phase))
    if soup.baseline not in known:
        known.append(soup.baseline)
    run.log(soup.sentence)
    return soup


def next_baseline(study: SearchStudy, known: list[Baseline]) -> tuple[str, Point] | None:
    """The first baseline in the space that has no trial yet."""
    there = {t.user_attrs.get("baseline") for t in study.trials}
    return next(((b.name, b.point) for b in known if b.point is not None and b.name not in there), None)


def make_course(study: SearchStudy, known: list[Baseline], ledger: Ledger) -> Course | None:
    """The race course of a search whose baselines have all been evaluated, None if the configuration wants no race."""
    scorer = ledger.scorer
    if not (racing := scorer.config.racing).enabled:
        return None
    items = ledger.items("search")
    scores: list[dict[str, Any]] = []
    for baseline in known:
        trial = study.of_baseline(baseline.name)
        if trial is not None and record_of(trial).get("items") == items:
            scores.append(objective_scores(trial))
        elif (found := ledger.stored("search", baseline.recipe)) is not None:
            scores.append(ledger.means(found, "objective"))
    asked = scorer.prepared("search", everything=False).by_task
    return build_course(scorer.engine, asked, items, scores, scorer.config.seed, racing)


def healthy(study: SearchStudy, known: list[Baseline]) -> Signs | None:
    """The signs that the parents set as normal."""
    parents = {b.name for b in known if b.kind == "parent"}
    records = [record_of(t) for t in study.complete if t.user_attrs.get("baseline") in parents]
    return normal_signs([Signs(*r["signs"]) for r in records if "signs" in r])


def run_trial(
    run: Run,
    study: SearchStudy,
    known: list[Baseline],
    ledger: Ledger,
    listener: Listener,
    limits: Limits,
    course: Course | None,
    stored_before: float,
) -> tuple[bool, float]:
    """One trial from proposal to database; whether it failed, and the seconds that storing it took.

    What goes wrong inside becomes the trial's recorded reason.  A broken candidate has the value of the worst, so
    that samplers learn from it.  A finished trial cannot be written to, so the time of its storing is in the record of
    the next one (`stored_before`).
    """
    scorer = ledger.scorer
    started = time.perf_counter()
    trial = study.begin(next_baseline(study, known))
    proposed = time.perf_counter()
    record: dict[str, Any] = {}
    value: float | None = None
    seconds: dict[str, float] = {}
    run.log(f"trial {trial.number} begins")
    try:
        recipe = study.space.recipe(trial.params)
        found = ledger.stored("search", recipe) if trial.baseline == GREEDY else None  # it was scored to be found
        if found:
            outcome = Outcome(found, {})
        elif trial.baseline:
            outcome = scorer.try_out(recipe, None)
        else:
            race = course.race(study) if course else None
            outcome = scorer.try_out(recipe, healthy(study, known), course, race)
        value = outcome.estimate.value if outcome.estimate else scorer.objective(outcome)
        record = describe(outcome, scorer, ledger.items("search"))
        seconds = outcome.seconds
    except EvomergeError:
        raise
    except (NotFinite, NotFiniteScore, Broken) as error:
        record["broken"] = reason(error)
        value = study.penalty
        run.log(f"trial {trial.number} is broken: {record['broken']}")
    except Exception as error:  # any bug of any library may cost this trial, not the run
        record["reason"] = reason(error)
        run.log(f"trial {trial.number} failed: {traceback.format_exc()}")
        free_memory(scorer.bank.device)
    scored = time.perf_counter()
    record["seconds"] = {**seconds, "propose": proposed - started, "store": stored_before}
    record["seconds"]["total"] = scored - started + stored_before
    state = study.finish(trial, value, record)
    run.log(f"trial {trial.number} {state.name.lower()} value={value}{note_of(record)}")
    stored = time.perf_counter() - scored
    best = max((t.value for t in study.complete if t.value is not None), default=None)
    note = note_of(record).strip() or str(trial.baseline or "")
    listener.trial(trial.number, limits.trials, value, best, note)
    return "broken" in record or "reason" in record, stored


def describe(outcome: Outcome, scorer: Scorer, items: str) -> dict[str, Any]:
    """What the study keeps of an outcome.  items: the name of the item ids."""
    scores = {t.name: {t.objective: pack(outcome.scores[t.name][t.objective])} for t in scorer.tasks}
    record: dict[str, Any] = {"items": items, "scores": scores}
    if outcome.signs:
        record["signs"] = [outcome.signs.entropy, outcome.signs.sameness]
    if outcome.estimate:
        record["partial"] = outcome.estimate.fraction
    return record


def note_of(record: dict[str, Any]) -> str:
    """What a person should know of a trial beside its value."""
    if "partial" in record:
        return f" stopped after {record['partial']:.0%} of the items"
    if "broken" in record:
        return f" broken: {record['broken']}"
    return f" {record['reason']}" if "reason" in record else ""


def reason(error: Exception) -> str:
    """Why a trial failed, in one line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]


def within(study: SearchStudy, limits: Limits) -> bool:
    """Whether another trial may begin."""
    finished = study.trials
    if limits.trials is not None and len(finished) >= limits.trials:
        return False
    if limits.seconds is not None and sum(map(trial_seconds, finished)) >= limits.seconds:
        return False
    return limits.deadline is None or time.time() < limits.deadline


def trial_seconds(trial: FrozenTrial) -> float:
    return float(record_of(trial).get("seconds", {}).get("total", 0.0))


def failures_in_a_row(study: SearchStudy) -> int:
    """How many of the last finished trials failed, so that a resume goes on counting; a full row starts anew."""
    count = 0
    for trial in reversed(study.trials):
        if not failed(trial):
            break
        count += 1
    return count % FAILURES_IN_A_ROW


def failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL or "broken" in record_of(trial)


def explain_failures(study: SearchStudy) -> str:
    """The reasons of the last failures, counted."""
    last = [record_of(t) for t in study.trials if failed(t)][-FAILURES_IN_A_ROW:]
    reasons = [str(r.get("reason") or r.get("broken") or "unknown") for r in last]
    counted = sorted({r: reasons.count(r) for r in reasons}.items(), key=lambda x: -x[1])
    lines = "\n  ".join(f"{count} x {text}" for text, count in counted)
    return (
        f"{FAILURES_IN_A_ROW} trials failed in a row, so the search has stopped; the reasons:\n  {lines}\n"
        "Tracebacks are in the run's log.txt. After mending the cause, go on with `evomerge resume`"
    )

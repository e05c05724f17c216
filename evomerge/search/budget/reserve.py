"""The reserve: the time that a search keeps after its last trial, so that the result exists at the deadline.

It is for judging the finalists, the report and, if asked for, writing the model.
"""

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES
from evomerge.evaluate.tasks import SPLITS, Split
from evomerge.files.write import disk_errors
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.evaluation.stored_evaluations import digest
from evomerge.search.models import model_folders
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import evaluation_key, evaluation_records, item_ids
from evomerge.search.storage.study import SearchStudy, in_full, rank
from evomerge.search.storage.trial_record import EvaluationRecord, Seconds, TrialRecord, record_of
from evomerge.search.verdict.finalists import ALONG_FRONT, FINALISTS, learned_points
from evomerge.search.verdict.intervals import drawn_means
from evomerge.search.verdict.simplify import most_steps
from evomerge.sources.open_models import Models

FIXED = 5.0  # seconds for drawing the report and syncing files
PER_TRIAL = 0.002  # seconds for reading a trial from the study and drawing it
SAFETY = 1.3  # factor on all measured times
UNMEASURED = 4.0  # how many times as long all metrics of an item may take as its objective, until it was measured
LATEST = 20  # trials whose times are used
RENEW = 30.0  # seconds between two estimates
PROBE = 2**25  # bytes written and read to measure the disk
DRAWN = 16  # items of the bootstrap that is measured


@dataclass(frozen=True)
class StepSeconds:
    """Measured seconds of the steps that are repeated after the last trial.

    merge: merging one candidate.
    item: scoring one item by every metric.
    trial: the longest trial that was scored on all items.
    objective: scoring one item by the objective alone, as on the search split.
    draw: the bootstrap for one item.
    """

    merge: float
    item: float
    trial: float
    objective: float
    draw: float = 0.0

    def scoring(self, split: Split) -> float:
        """Seconds of scoring one item of a split."""
        return self.objective if split == "search" else self.item


@dataclass(frozen=True)
class RemainingWork:
    """The work that remains when no trial begins any more.

    models: how many models have to be scored on each split; those with stored scores do not count.
    items: how many items each split has, all tasks together.
    export: seconds that writing the model takes.
    trials: how many the study has.
    """

    models: Mapping[Split, int] = field(default_factory=dict)
    items: Mapping[Split, int] = field(default_factory=dict)
    export: float = 0.0
    trials: int = 0


def reserve_seconds(seconds: StepSeconds, work: RemainingWork, workers: int = 1) -> float:
    """Estimate the seconds from the moment at which the last trial may begin to the result.

        FIXED + PER_TRIAL trials + SAFETY (
            trial + sum over splits ceil(models / workers) (merge + items item) + 3 items draw + export)

    `trial` is there because a trial that has just begun ends before the rest can begin.  The sum is over the search
    split (baselines and soups without a score), the selection split (finalists and baselines) and the holdout split
    (the chosen candidate and the baselines).  Workers score different models at the same time, and a split begins when
    the previous one has ended.  `item` is by the objective alone on the search split.  The bootstrap is drawn three
    times: for the score, for the differences and for the table of the tasks.
    """
    scoring = sum(
        math.ceil(count / max(1, workers)) * (seconds.merge + work.items[split] * seconds.scoring(split))
        for split, count in work.models.items()
        if count
    )
    judging = 3 * work.items.get("holdout", 0) * seconds.draw
    return FIXED + PER_TRIAL * work.trials + SAFETY * (seconds.trial + scoring + judging + work.export)


def step_seconds(trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> StepSeconds | None:
    """The seconds of each step, from the latest trials that were scored on all items and from other evaluations.

    The lower median is taken, because the first evaluation of a run also fills caches.

    attributes: the study's.
    Before there is such a trial, base and parents are taken; None before they were scored.
    """
    latest: list[TrialRecord | EvaluationRecord] = [record_of(t) for t in trials if in_full(t)]
    latest = [r for r in latest if r.seconds.forward is not None][-LATEST:]
    latest = latest or [r for r in evaluation_records(attributes, ["search"]).values() if r.partial is None]
    if not latest:
        return None
    merge = statistics.median(r.seconds.merge or 0.0 for r in latest)
    objective = statistics.median(scoring(r.seconds) / sum(map(len, item_ids(attributes, r).values())) for r in latest)
    judged = evaluation_records(attributes, [split for split in SPLITS if split != "search"]).values()
    each = [scoring(e.seconds) / e.scored for e in judged if e.scored]
    each = each or [scoring(e.seconds) / e.scored for e in by_every_metric(attributes)] or [UNMEASURED * objective]
    trial = max(r.seconds.total or (r.seconds.merge or 0.0) + scoring(r.seconds) for r in latest)
    return StepSeconds(merge, statistics.median_low(each), trial, objective, draw_time())


def by_every_metric(attributes: Mapping[str, Any]) -> list[EvaluationRecord]:
    """The models that were scored on the search split by every metric: base and parents.  attributes: the study's."""
    if SCALE not in attributes:
        return []
    wanted = [(name, task.metric.name) for name, task in Scale.from_json(attributes[SCALE]).tasks.items()]
    records = [e for e in evaluation_records(attributes, ["search"]).values() if e.partial is None and e.scored]
    return [e for e in records if all(metric in e.scores.get(task, {}) for task, metric in wanted)]


def scoring(seconds: Seconds) -> float:
    """Seconds that the items of one model took, from token ids to item scores."""
    return (seconds.forward or 0.0) + (seconds.score or 0.0)


def draw_time() -> float:
    """Measure the seconds of the bootstrap for one item."""
    began = time.perf_counter()
    drawn_means(np.zeros((DRAWN, 1)), np.zeros(1), np.zeros(1), 0)
    return (time.perf_counter() - began) / DRAWN


def remaining_work(
    study: SearchStudy, attributes: Mapping[str, Any], known: Sequence[Baseline], items: Mapping[Split, int]
) -> RemainingWork:
    """Count what a study still has to score if no trial begins any more.

    attributes: the study's.
    known: every baseline so far.
    items: how many items each split has, all tasks together.
    """

    def scored(split: Split, name: str) -> bool:
        known = attributes.get(evaluation_key(split, name))
        return known is not None and known.get("partial") is None

    tried = {t.user_attrs.get("baseline") for t in study.trials}
    lacking = [b for b in known if b.name not in tried and not scored("search", digest(b.recipe))]
    soups = 0 if any(b.kind == "greedy" for b in known) else max(0, sum(b.kind == "parent" for b in known) - 2)
    searched = [t for t in study.complete if "baseline" not in t.user_attrs]
    best = sorted(searched, key=rank, reverse=True)[:FINALISTS]
    recipes = {digest(study.space.recipe(t.params)) for t in [*best, *learned_points(searched)]}
    others = 2  # the mean of the distribution, and the best by metric
    others += ALONG_FRONT if study.space.config.goals == "pareto" else 0
    finalists = sum(not scored("selection", r) for r in recipes) + FINALISTS - len(best) + others
    rivals = [b for b in known if b.kind not in ("recommended", "start")]
    recommended = any(b.kind == "recommended" for b in known)
    judged = sum(not scored("holdout", digest(b.recipe)) for b in rivals) + recommended + 1  # the chosen one
    selected = finalists + sum(not scored("selection", digest(b.recipe)) for b in known) + 1  # the base
    steps = 0 if study.space.config.simplify is None else most_steps(study.space)
    models: dict[Split, int] = {
        "search": len(lacking) + soups + steps,
        "selection": selected + steps,
        "holdout": judged + 1,
    }
    return RemainingWork(models, items, trials=len(study.trials))


class ReservedTime:
    """The reserve of a running search, estimated again every half minute.

    known: the baselines; the driver appends to this list.
    items: how many items each split has, all tasks together.
    export: seconds that writing the model takes.
    """

    def __init__(
        self,
        study: SearchStudy,
        known: list[Baseline],
        items: Mapping[Split, int],
        export: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study = study
        self.known = known
        self.items = items
        self.export = export
        self.clock = clock
        self.estimated = -math.inf
        self.value = 0.0

    def seconds(self, workers: int = 1) -> float:
        """The latest estimate; 0 before a trial was scored on all items."""
        if self.clock() - self.estimated >= RENEW or not self.value:
            attributes = self.study.stored.user_attrs
            if (seconds := step_seconds(self.study.trials, attributes)) is not None:
                work = remaining_work(self.study, attributes, self.known, self.items)
                self.value = reserve_seconds(seconds, replace(work, export=self.export), workers)
                self.estimated = self.clock()
        return self.value


def export_seconds(config: SearchConfig, models: Models, folder: Path) -> float:
    """Estimate how long writing a merged model into `folder` takes, from a small write there and a small read.

    Every input is read twice, once to merge it and once for its SHA-256; the output is written, and read for its own.
    EvomergeError if nothing can be written there.
    """
    size = TORCH_DTYPES[config.dtype].itemsize
    made = sum(math.prod(t.shape) * size for t in models.base.tensors.values())
    files = [file for folder in model_folders(config).values() for file in folder.glob("*.safetensors")]
    stored = sum(file.stat().st_size for file in files)
    per_byte = write_time(folder), read_time(files[0])
    return made * per_byte[0] + (2 * stored + made) * per_byte[1]


def write_time(folder: Path) -> float:
    """Measure the seconds per byte of writing and syncing a file next to `folder`.  EvomergeError if that fails."""
    probe = folder.with_name(f".{folder.name}.{os.getpid()}.probe")
    content = os.urandom(PROBE)
    began = time.monotonic()
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    return (time.monotonic() - began) / PROBE


def read_time(file: Path) -> float:
    """Measure the seconds per byte of reading and hashing a file."""
    began = time.monotonic()
    with file.open("rb") as handle:
        content = handle.read(PROBE)
    hashlib.sha256(content)
    return (time.monotonic() - began) / max(1, len(content))

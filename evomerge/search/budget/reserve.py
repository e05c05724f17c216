"""The time that a search keeps for what follows its last trial, so that the result is there at the deadline."""

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
from evomerge.evaluate.tasks import Split
from evomerge.files import disk_errors
from evomerge.search.evaluation.full_evaluations import digest
from evomerge.search.models import model_folders
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import ITEMS, evaluation_key
from evomerge.search.storage.study import SearchStudy, in_full, rank, record_of
from evomerge.search.verdict.finals import FINALISTS
from evomerge.search.verdict.intervals import drawn_means
from evomerge.sources.open_models import Models

FIXED = 5.0  # seconds: figures of the report are drawn, files synced
PER_TRIAL = 0.002  # seconds: the study is read back and drawn
SAFETY = 1.3
GENERATES = 4.0  # what every metric of an item may cost beside its objective, as long as that was never measured
LATEST = 20  # trials whose times are looked at
RENEW = 30.0  # seconds between two estimates
PROBE = 2**25  # bytes
DRAWN = 16  # items

SPLITS: tuple[Split, ...] = ("search", "selection", "holdout")


@dataclass(frozen=True)
class Rates:
    """What was measured, in seconds.

    merge: of one candidate.  item: of scoring one item by every metric.  trial: the longest that a trial in full took.
    objective: of scoring one item by the objective alone, as on the search split.  draw: of the bootstrap for one item.
    """

    merge: float
    item: float
    trial: float
    objective: float
    draw: float = 0.0

    def of(self, split: Split) -> float:
        """Of scoring one item on a split."""
        return self.objective if split == "search" else self.item


@dataclass(frozen=True)
class Ahead:
    """What is still to do when no trial begins any more.

    models: to be scored on each split, without those whose scores are stored.  items: of each split, all tasks
    together.  export: seconds that writing the model takes.  trials: in the study.
    """

    models: Mapping[Split, int] = field(default_factory=dict)
    items: Mapping[Split, int] = field(default_factory=dict)
    export: float = 0.0
    trials: int = 0


def reserve(rates: Rates, ahead: Ahead, workers: int = 1) -> float:
    """Seconds from the moment at which the last trial may begin to the result.

        FIXED + PER_TRIAL trials + SAFETY (
            trial + sum over splits ceil(models / workers) (merge + items item) + 3 items draw + export)

    trial: a trial that has just begun ends before the rest can begin.  The sum is over the search split (baselines and
    soups without a score), the selection split (finalists and baselines) and the holdout split (the chosen one and the
    baselines); workers score different models side by side, and a split begins when the one before it has ended.  item:
    by the objective alone on the search split.  The bootstrap is drawn three times: for the score, for the differences
    and for the table of the tasks.
    """
    scoring = sum(
        math.ceil(count / max(1, workers)) * (rates.merge + ahead.items[split] * rates.of(split))
        for split, count in ahead.models.items()
        if count
    )
    judging = 3 * ahead.items.get("holdout", 0) * rates.draw
    return FIXED + PER_TRIAL * ahead.trials + SAFETY * (rates.trial + scoring + judging + ahead.export)


def rates_of(trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> Rates | None:
    """The rates by the latest trials evaluated in full and by the evaluations outside of trials.

    None before there is a trial.  attributes: the study's.  The first evaluation of a run warms everything up, so the
    lower median of all counts.
    """
    latest = [r for t in trials if in_full(t) and "forward" in (r := record_of(t)).get("seconds", {})][-LATEST:]
    if not latest:
        return None
    seconds: list[dict[str, float]] = [r["seconds"] for r in latest]
    merge = statistics.median(s["merge"] for s in seconds)
    judged = tuple(evaluation_key(split, "") for split in SPLITS if split != "search")
    entries = [e for name, e in attributes.items() if name.startswith(judged) and e.get("scored")]
    scored = [sum(map(len, attributes[ITEMS + r["items"]].values())) for r in latest]
    objective = statistics.median((s["forward"] + s["score"]) / n for s, n in zip(seconds, scored, strict=True))
    each = [(e["seconds"]["forward"] + e["seconds"]["score"]) / e["scored"] for e in entries] or [GENERATES * objective]
    return Rates(merge, statistics.median_low(each), max(s["total"] for s in seconds), objective, draw_time())


def draw_time() -> float:
    """Seconds of the bootstrap for one item, measured on a few."""
    began = time.perf_counter()
    drawn_means(np.zeros((DRAWN, 1)), np.zeros(1), np.zeros(1), 0)
    return (time.perf_counter() - began) / DRAWN


def ahead_of(
    study: SearchStudy, attributes: Mapping[str, Any], known: Sequence[Baseline], items: Mapping[Split, int]
) -> Ahead:
    """What a study would still have to score if no trial began any more.

    attributes: the study's.  known: every baseline so far.  items: of each split, all tasks together.
    """

    def scored(split: Split, name: str) -> bool:
        return evaluation_key(split, name) in attributes

    tried = {t.user_attrs.get("baseline") for t in study.trials}
    lacking = [b for b in known if b.name not in tried and not scored("search", digest(b.recipe))]
    soups = 0 if any(b.kind == "greedy" for b in known) else max(0, sum(b.kind == "parent" for b in known) - 2)
    searched = [t for t in study.complete if "baseline" not in t.user_attrs]
    best = sorted(searched, key=rank, reverse=True)[:FINALISTS]
    recipes = {digest(study.space.recipe(t.params)) for t in best}
    finalists = sum(not scored("selection", r) for r in recipes) + FINALISTS - len(best) + 1  # the mean
    rivals = [b for b in known if b.kind != "recommended"]
    recommended = any(b.kind == "recommended" for b in known)
    judged = sum(not scored("holdout", digest(b.recipe)) for b in rivals) + recommended + 1  # the chosen one
    selected = finalists + sum(not scored("selection", digest(b.recipe)) for b in known) + 1  # the base
    models: dict[Split, int] = {"search": len(lacking) + soups, "selection": selected, "holdout": judged + 1}
    return Ahead(models, items, trials=len(study.trials))


class ReservedTime:
    """The reserve of a running search, estimated anew every half minute; nothing where no time is limited.

    items: of each split, all tasks together.  export: seconds that writing the model takes.
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
        if self.clock() - self.estimated >= RENEW or not self.value:
            attributes = self.study.stored.user_attrs
            if (rates := rates_of(self.study.trials, attributes)) is not None:
                ahead = ahead_of(self.study, attributes, self.known, self.items)
                self.value = reserve(rates, replace(ahead, export=self.export), workers)
                self.estimated = self.clock()
        return self.value


def export_seconds(config: SearchConfig, models: Models, folder: Path) -> float:
    """How long writing the recommended model into `folder` takes, by a small write there and a read of the base.

    Every input is read twice, once to be merged and once for its SHA-256; the output is written and read for its own.
    """
    size = TORCH_DTYPES[config.dtype].itemsize
    made = sum(math.prod(t.shape) * size for t in models.base.tensors.values())
    files = [file for folder in model_folders(config).values() for file in folder.glob("*.safetensors")]
    stored = sum(file.stat().st_size for file in files)
    per_byte = write_time(folder), read_time(files[0])
    return made * per_byte[0] + (2 * stored + made) * per_byte[1]


def write_time(folder: Path) -> float:
    """Seconds per byte that is written and synced beside `folder`.  EvomergeError if nothing can be written there."""
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
    """Seconds per byte that is read and hashed."""
    began = time.monotonic()
    with file.open("rb") as handle:
        content = handle.read(PROBE)
    hashlib.sha256(content)
    return (time.monotonic() - began) / max(1, len(content))

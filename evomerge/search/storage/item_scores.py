"""Item scores as a study stores them: float32, packed into text, beside the ids of the items they belong to.

This is a format, not a layer of the database.  `search/trial.py` packs the scores of a trial into its record, and
`SearchStudy.finish` (`study.py`) writes the record through `database.py`.
"""

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Item, Split
from evomerge.search.storage.trial_record import EvaluationRecord, TrialRecord, record_of

EVALUATIONS = "scores:"  # study attributes: records of evaluations outside the trials, by split and recipe
SCORE_BYTES = 64 << 20  # of one task's item scores, unpacked, at most
ITEMS = "items:"  # study attributes: lists of item ids, by their own hash


def pack(scores: Sequence[float] | NDArray[np.float64]) -> str:
    """Scores as text: float32, compressed, base64.

    scores: one an item; NaN for an item that was not evaluated.
    """
    return base64.b64encode(zlib.compress(np.asarray(scores, dtype="<f4").tobytes(), 6)).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """The scores that `pack` was given, rounded to float32.  EvomergeError if the text is damaged."""
    try:
        opened = zlib.decompressobj()
        content = opened.decompress(binascii.a2b_base64(text), SCORE_BYTES)
        if not opened.eof:  # a few kilobytes can unpack to gigabytes
            raise ValueError(f"they have no end within {SCORE_BYTES >> 20} MB")
        return np.frombuffer(content, dtype="<f4").astype(np.float64)
    except (ValueError, zlib.error) as error:
        raise EvomergeError(f"the study holds item scores that cannot be read ({error})") from error


def trial_scores(trial: FrozenTrial) -> dict[str, dict[str, NDArray[np.float64]]]:
    """A trial's item scores by task and metric; NaN for items that it was not scored on."""
    return {
        task: {metric: unpack(text) for metric, text in metrics.items()}
        for task, metrics in record_of(trial).scores.items()
    }


def objective_scores(trial: FrozenTrial) -> dict[str, NDArray[np.float64]]:
    """A trial's item scores by the objective, by task; NaN for items that it was not scored on."""
    return {task: next(iter(metrics.values())) for task, metrics in trial_scores(trial).items()}


def rounded(scores: Sequence[float]) -> list[float]:
    """Scores as they will come back from the study, so that a resumed search sees the same numbers."""
    found: list[float] = np.asarray(scores, dtype=np.float32).astype(float).tolist()
    return found


def store_items(study: optuna.Study, items: Mapping[str, Sequence[Item]]) -> str:
    """Keep the ids of items by task in the study; returns the name under which `item_ids` finds them."""
    ids = {task: [i.id for i in found] for task, found in items.items()}
    name = hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()[:16]
    if ITEMS + name not in study.user_attrs:
        study.set_user_attr(ITEMS + name, ids)
    return name


def item_ids(attributes: Mapping[str, Any], record: TrialRecord | EvaluationRecord) -> dict[str, list[str]]:
    """The ids of the items that a record's scores belong to, by task.  attributes: the study's.

    EvomergeError if the study does not have them.
    """
    found: dict[str, list[str]] | None = attributes.get(f"{ITEMS}{record.items}")
    if found is None:
        raise EvomergeError(f"the study has no list of items {record.items!r}, to which scores in it belong")
    return found


def rows(study: optuna.Study) -> Iterator[dict[str, Any]]:
    """Every item score in a study as a row: trial number or digest of the recipe, split, task, metric, item, score."""
    attributes = study.user_attrs
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        origin = {"trial": trial.number, "recipe": None, "split": "search"}
        yield from rows_of_record(attributes, record_of(trial), origin)
    for key, record in evaluation_records(attributes).items():
        split, recipe = key.removeprefix(EVALUATIONS).split(":")
        yield from rows_of_record(attributes, record, {"trial": None, "recipe": recipe, "split": split})


def rows_of_record(
    attributes: Mapping[str, Any], record: TrialRecord | EvaluationRecord, origin: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The item scores of one record as rows.  attributes: the study's.  origin: the columns that all rows share."""
    if not record.scores:
        return
    ids = item_ids(attributes, record)
    for task, metrics in record.scores.items():
        for metric, text in metrics.items():
            for item, score in zip(ids[task], unpack(text).tolist(), strict=True):
                if not np.isnan(score):
                    yield {**origin, "task": task, "metric": metric, "item": item, "score": score}


def evaluation_key(split: Split, digest: str) -> str:
    """The study attribute that holds the record of a recipe's evaluation on a split.  digest: of the recipe."""
    return f"{EVALUATIONS}{split}:{digest}"


def evaluation_record(attributes: Mapping[str, Any], split: Split, digest: str) -> EvaluationRecord:
    """The record of a recipe's evaluation on a split, an empty one if there is none.  attributes: the study's."""
    return EvaluationRecord.from_json(attributes.get(evaluation_key(split, digest), {}))


def evaluation_records(attributes: Mapping[str, Any], splits: Sequence[Split] = ()) -> dict[str, EvaluationRecord]:
    """The records of all evaluations outside the trials, by their key.

    attributes: the study's.  splits: only these (default: all).
    """
    wanted = tuple(evaluation_key(split, "") for split in splits) or EVALUATIONS
    return {key: EvaluationRecord.from_json(value) for key, value in attributes.items() if key.startswith(wanted)}

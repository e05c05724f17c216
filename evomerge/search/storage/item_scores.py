"""Item scores as a study keeps them: packed float32, beside the identity of the items they belong to."""

import base64
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
from evomerge.search.storage.study import record_of

EVALUATIONS = "scores:"  # study attributes: full evaluations outside the trials, by split and recipe
ITEMS = "items:"  # study attributes: lists of item ids, by their own hash

Packed = dict[str, dict[str, str]]
"""Task -> metric -> packed scores."""


def pack(scores: Sequence[float] | NDArray[np.float64]) -> str:
    """Scores as text: float32, compressed, base64.  An item that was not evaluated is NaN."""
    return base64.b64encode(zlib.compress(np.asarray(scores, dtype="<f4").tobytes(), 6)).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """What `pack` was given, rounded to float32.  EvomergeError if the text is damaged."""
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").astype(np.float64)
    except (ValueError, zlib.error) as error:
        raise EvomergeError(f"the study holds item scores that cannot be read ({error})") from error


def objective_scores(trial: FrozenTrial) -> dict[str, NDArray[np.float64]]:
    """A trial's item scores by task; NaN for items that it was not scored on."""
    stored: Packed = record_of(trial)["scores"]
    return {task: unpack(next(iter(metrics.values()))) for task, metrics in stored.items()}


def rounded(scores: Sequence[float]) -> list[float]:
    """Scores as they will come back from the study, so that a resumed search sees the same numbers."""
    found: list[float] = np.asarray(scores, dtype=np.float32).astype(float).tolist()
    return found


def store_items(study: optuna.Study, items: Mapping[str, Sequence[Item]]) -> str:
    """Keep the ids of items by task in the study; the name under which they are found."""
    ids = {task: [i.id for i in found] for task, found in items.items()}
    name = hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()[:16]
    if ITEMS + name not in study.user_attrs:
        study.set_user_attr(ITEMS + name, ids)
    return name


def rows(study: optuna.Study) -> Iterator[dict[str, Any]]:
    """Every item score in a study: who (trial number or digest of the recipe), split, task, metric, item, score."""
    attributes = study.user_attrs
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        who = {"trial": trial.number, "recipe": None, "split": "search"}
        yield from of_record(attributes, record_of(trial), who)
    for name, record in attributes.items():
        if name.startswith(EVALUATIONS):
            split, recipe = name.removeprefix(EVALUATIONS).split(":")
            yield from of_record(attributes, record, {"trial": None, "recipe": recipe, "split": split})


def of_record(
    attributes: Mapping[str, Any], record: Mapping[str, Any], who: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    if "scores" not in record:
        return
    ids: dict[str, list[str]] = attributes[ITEMS + record["items"]]
    scores: Packed = record["scores"]
    for task, metrics in scores.items():
        for metric, text in metrics.items():
            for item, score in zip(ids[task], unpack(text).tolist(), strict=True):
                if not np.isnan(score):
                    yield {**who, "task": task, "metric": metric, "item": item, "score": score}


def evaluation_key(split: Split, digest: str) -> str:
    return f"{EVALUATIONS}{split}:{digest}"

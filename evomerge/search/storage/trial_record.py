"""The record of a trial, and of an evaluation outside the trials: the classes, and their JSON in the study.

Optuna stores a trial's parameters and value; everything else that a finished trial leaves behind is its record: one
JSON object under the trial's user attribute `record`.  A record is written once, when the trial ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from sys import intern
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from evomerge.errors import EvomergeError
from evomerge.evaluate.signs import Signs
from evomerge.search.storage.compact import Packed, compact_scores, interned

if TYPE_CHECKING:  # usage.py imports this file
    from evomerge.search.budget.usage import Elapsed, Usage

RECORD = "record"  # the trial's user attribute
LEARNED = "learned"  # trial attribute: after how many gradient steps its parameters were reached
WEIGHTS = "weights"  # trial attribute: task weights, not the search's, that its parameters were chosen by; {}: none
NUMBER = (int, float)
NUMBERS, TEXTS = frozenset(NUMBER), frozenset([str])
VERSION = 1  # written as `version`; a record without that key is of version 0, which had the same keys


@dataclass(frozen=True, slots=True)
class RaceRecord:
    """Which trials a candidate was compared with while it was scored.

    incumbent: the number of the trial that it raced against; None for a candidate that did not race, because no trial
        had been evaluated in full on these items, or because races did not pay.
    others: the numbers of the trials whose item scores predicted the candidate's.
    """

    incumbent: int | None
    others: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock seconds of a trial by part of its work; None: that part did not happen.

    propose: the sampler chose the parameters and the trial was stored.
    merge: the candidate's weights were computed.
    canary: a few prompts showed whether the candidate is healthy.
    forward: the model ran.
    score: logits and answers became item scores.
    race: tests against the incumbent.
    store: the result of the trial before this one was stored (this trial cannot know its own).
    total: the whole trial, with what no part accounts for.
    """

    propose: float | None = None
    merge: float | None = None
    canary: float | None = None
    forward: float | None = None
    score: float | None = None
    race: float | None = None
    store: float | None = None
    total: float | None = None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What a study keeps of a finished trial beside Optuna's parameters and value.

    items: the name under which the study keeps the ids of the items, see `item_scores.store_items`.
    scores: the objective's item scores, and the metric's if trials are scored by it too; empty if the trial gave none.
    signs: what the canary saw of the candidate.
    partial: the share of the items that were scored, in (0, 1), of a candidate that was stopped by a race.
    broken: why the candidate is not worth scoring, in one line; its value is that of the worst candidate.
    reason: why the trial failed, in one line; it has no value.
    race: against which trials the candidate raced; None for a baseline, which never races.
    compute_dtype: the type in which forwards were computed; None in the oldest records: the candidate's own type.
    seconds: where the time went.
    used: what the trial took of time, memory and energy.
    elapsed: how long the run had taken when the trial ended.
    order: how many trials were finished before this one; None in the oldest records: trials ended by number.
    """

    items: str | None = None
    scores: Packed = field(default_factory=dict)
    signs: Signs | None = None
    partial: float | None = None
    broken: str | None = None
    reason: str | None = None
    race: RaceRecord | None = None
    compute_dtype: str | None = None
    seconds: Seconds = Seconds()
    used: "Usage | None" = None
    elapsed: "Elapsed | None" = None
    order: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """The JSON: whoever asks Optuna for a copy of a trial gets what Optuna itself would read."""
        return self.to_json()

    @property
    def in_full(self) -> bool:
        """Whether the trial, if it has a value, was evaluated on all items: not stopped by a race, not broken."""
        return self.partial is None and self.broken is None

    @property
    def raced(self) -> bool:
        """Whether the candidate was compared with an incumbent while it was scored."""
        return self.race is not None and self.race.incumbent is not None

    @property
    def failure(self) -> str | None:
        """Why the trial gave no score, None if it gave one."""
        return self.reason or self.broken

    def to_json(self) -> dict[str, Any]:
        """The record as the study stores it; what is None or empty is left out."""
        content = written(self)
        if self.race is not None:
            alone = self.race.incumbent is None
            content["race"] = None if alone else {"incumbent": self.race.incumbent, "others": list(self.race.others)}
        return content

    @classmethod
    def from_json(cls, content: Any) -> "TrialRecord":
        """The record of `to_json`, of this version or an older one.

        Keys that are not known are ignored: finished trials are never written again, so nothing gets lost.
        EvomergeError if a value cannot be what its key says, or if a newer evomerge wrote the record.
        """
        reader = Reader(content)
        return cls(
            items=reader.text("items"),
            scores=reader.scores(),
            signs=reader.signs(),
            partial=reader.number("partial"),
            broken=reader.text("broken"),
            reason=reader.text("reason"),
            race=reader.race(),
            compute_dtype=reader.text("compute_dtype"),
            seconds=reader.seconds(),
            used=reader.used(),
            elapsed=reader.elapsed(),
            order=reader.integer("order"),
        )


@dataclass(frozen=True)
class EvaluationRecord:
    """What a study keeps of a recipe that was scored outside the trials, on one split.

    items, scores: as in `TrialRecord`, but of every metric that was asked for.
    name: of the model; None in older records.
    signs: what the canary saw of the model; None if it was not asked.
    scored: how many items were scored in the latest evaluation; the others' scores were known.
    partial: the share of the items that were scored, in (0, 1), of a recipe that was stopped by a race.
    seconds: where the time of the latest evaluation went.
    used: what all evaluations of this recipe on this split took.
    elapsed: how long the run had taken when the record was written.
    """

    items: str | None = None
    scores: Packed = field(default_factory=dict)
    name: str | None = None
    signs: Signs | None = None
    scored: int = 0
    partial: float | None = None
    seconds: Seconds = Seconds()
    used: "Usage | None" = None
    elapsed: "Elapsed | None" = None

    def to_json(self) -> dict[str, Any]:
        """The record as the study stores it."""
        return written(self)

    @classmethod
    def from_json(cls, content: Any) -> "EvaluationRecord":
        """The record of `to_json`, as `TrialRecord.from_json` reads one."""
        reader = Reader(content)
        return cls(
            items=reader.text("items"),
            scores=reader.scores(),
            name=reader.text("name"),
            signs=reader.signs(),
            scored=reader.integer("scored") or 0,
            partial=reader.number("partial"),
            seconds=reader.seconds(),
            used=reader.used(),
            elapsed=reader.elapsed(),
        )


NO_RECORD = TrialRecord()


def is_in_full(content: Mapping[str, Any]) -> bool:
    """`TrialRecord.in_full` of a record as JSON, of which nothing else is read."""
    return content.get("partial") is None and content.get("broken") is None


def record_of(trial: FrozenTrial) -> TrialRecord:
    """A trial's record, an empty one if it has none yet.  EvomergeError if what is stored is damaged.

    The trial keeps the record in the place of its JSON, which is read once: a report asks for each record twenty times.
    """
    stored = trial.user_attrs.get(RECORD)
    if isinstance(stored, TrialRecord):
        return stored
    if stored is None:
        return NO_RECORD
    try:
        record = TrialRecord.from_json(stored)
    except EvomergeError as error:
        raise EvomergeError(f"trial {trial.number}: {error}") from error
    trial.user_attrs[RECORD] = record
    return record


def read_record(content: Any) -> Any:
    """The record of a trial that is read from the database; if it is damaged, its JSON, for `record_of` to say so."""
    try:
        return TrialRecord.from_json(content)
    except EvomergeError:
        return content


def place_in_order(trial: FrozenTrial) -> int:
    """How many results came before a finished trial's; where its record does not say, trials ended by number."""
    order = record_of(trial).order
    return trial.number if order is None else order


def written(record: TrialRecord | EvaluationRecord) -> dict[str, Any]:
    """The keys that both kinds of record have in common or that are plain numbers and texts."""
    content: dict[str, Any] = {"version": VERSION}
    for each in fields(record):
        value = getattr(record, each.name)
        if isinstance(value, (str, int, float)):
            content[each.name] = value
    if record.signs is not None:
        content["signs"] = [record.signs.entropy, record.signs.sameness]
    if record.scores:
        content["scores"] = {task: dict(metrics) for task, metrics in record.scores.items()}
    parts = ((name, getattr(record.seconds, name)) for name in names_of(Seconds))
    if seconds := {name: value for name, value in parts if value is not None}:
        content["seconds"] = seconds
    if record.used is not None:
        content["used"] = record.used.as_dict()
    if record.elapsed is not None:
        content["elapsed"] = record.elapsed.as_dict()
    return content


class Reader:
    """Reads the keys of a stored record, each as the type that it should have; None for what is not there."""

    def __init__(self, content: Any) -> None:
        if not isinstance(content, dict):
            raise EvomergeError("the study holds a record that cannot be read (it is not an object)")
        self.content = content
        version = self.integer("version") or 0
        if version > VERSION:
            raise EvomergeError(
                f"the study holds a record of version {version}; this evomerge reads up to {VERSION}, use a newer one"
            )

    def take(self, key: str, types: tuple[type, ...], wanted: str) -> Any:
        value = self.content.get(key)
        if value is not None and type(value) not in types:  # not isinstance: `true` is no number
            raise damaged(key, wanted)
        return value

    def text(self, key: str) -> str | None:
        found: str | None = self.take(key, (str,), "a text")
        return None if found is None else intern(found)  # most trials have the same

    def number(self, key: str) -> float | None:
        found: float | None = self.take(key, NUMBER, "a number")
        return found

    def integer(self, key: str) -> int | None:
        found: int | None = self.take(key, (int,), "a whole number")
        return found

    def quantities(self, key: str, kind: Any) -> dict[str, Any] | None:
        """The numbers of an object whose keys are fields of the data class `kind`."""
        found: dict[str, Any] | None = self.take(key, (dict,), "an object")
        if found is None:
            return None
        known = {name: found[name] for name in names_of(kind) if name in found}
        if not NUMBERS.issuperset(map(type, known.values())):
            raise damaged(key, "an object of numbers")
        return known

    def signs(self) -> Signs | None:
        found = self.take("signs", (list,), "a list")
        if found is None:
            return None
        if len(found) != 2 or not all(type(number) in NUMBER for number in found):
            raise damaged("signs", "a list of two numbers")
        return Signs(*found)

    def scores(self) -> Packed:
        found: Packed = self.take("scores", (dict,), "an object") or {}
        for metrics in found.values():
            if type(metrics) is not dict or not TEXTS.issuperset(map(type, metrics.values())):
                raise damaged("scores", "an object of texts by task and metric")
        return compact_scores(found)

    def race(self) -> RaceRecord | None:
        found = self.take("race", (dict,), "an object")
        if found is None:
            return RaceRecord(None) if "race" in self.content else None
        incumbent, others = found.get("incumbent"), found.get("others", [])
        if type(others) is not list or not all(type(number) is int for number in (incumbent, *others)):
            raise damaged("race", "an object of trial numbers")
        return RaceRecord(incumbent, interned(tuple(others)))  # trials in a row have the same

    def seconds(self) -> Seconds:
        return Seconds(**self.quantities("seconds", Seconds) or {})

    def used(self) -> "Usage | None":
        from evomerge.search.budget.usage import Usage

        found = self.quantities("used", Usage)
        return None if found is None else Usage(**found)

    def elapsed(self) -> "Elapsed | None":
        from evomerge.search.budget.usage import Elapsed

        found = self.quantities("elapsed", Elapsed)
        return None if found is None else Elapsed(**found)


@lru_cache
def names_of(kind: Any) -> tuple[str, ...]:
    """The names of a data class's fields."""
    return tuple(each.name for each in fields(kind))


def damaged(key: str, wanted: str) -> EvomergeError:
    return EvomergeError(f"the study holds a record that cannot be read ({key!r} is not {wanted})")

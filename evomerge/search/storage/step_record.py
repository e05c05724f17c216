"""The record of a gradient step: one attribute of the study a step.

With the records of all steps a resumed search has the optimizer's state again, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvomergeError
from evomerge.search.space.space import Point
from evomerge.search.storage.trial_record import Reader

if TYPE_CHECKING:  # usage.py imports this file
    from evomerge.search.budget.usage import Elapsed, Usage

STEPS = "learned:"  # study attributes: the records of steps, by climb and number


@dataclass(frozen=True)
class StepRecord:
    """What a study keeps of one step.

    point: where the gradient was computed.
    gradient: the derivative of the value by each coefficient.
    value: the mean scaled objective of the items.
    items: how many items there were.
    drops: guard -> by how much its objective was worse than the reference's.
    used, elapsed: as in `TrialRecord`.
    """

    point: Point
    gradient: dict[str, float]
    value: float
    items: int
    used: "Usage | None" = None
    elapsed: "Elapsed | None" = None
    drops: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as the study stores it."""
        content = {"point": self.point, "gradient": self.gradient, "value": self.value, "items": self.items}
        if self.drops:
            content["drops"] = self.drops
        if self.used is not None:
            content["used"] = self.used.as_dict()
        if self.elapsed is not None:
            content["elapsed"] = self.elapsed.as_dict()
        return content

    @classmethod
    def from_json(cls, content: Any) -> "StepRecord":
        """The record of `to_json`.  EvomergeError if it is damaged."""
        reader = Reader(content)
        try:
            point = {str(name): float(x) for name, x in content["point"].items()}
            gradient = {str(name): float(x) for name, x in content["gradient"].items()}
            value, items = float(content["value"]), int(content["items"])
            drops = {str(name): float(x) for name, x in content.get("drops", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvomergeError(f"the study holds a gradient step that cannot be read ({error})") from error
        return cls(point, gradient, value, items, reader.used(), reader.elapsed(), drops)


def step_key(number: int, climb: int = 0) -> str:
    """The study attribute that holds a step's record.  number: from 0.  climb: see `learned/climbs.py`."""
    return f"{STEPS}{climb:02d}:{number:05d}" if climb else f"{STEPS}{number:05d}"


def steps_by_climb(attributes: Mapping[str, Any]) -> list[list[StepRecord]]:
    """The records of all steps, climb by climb, each in order.  attributes: the study's."""
    found: dict[str, list[StepRecord]] = {}
    for key in sorted((k for k in attributes if k.startswith(STEPS)), key=lambda key: (len(key), key)):
        found.setdefault(key[:-5], []).append(StepRecord.from_json(attributes[key]))
    return list(found.values())


def step_records(attributes: Mapping[str, Any], climb: int | None = None) -> list[StepRecord]:
    """The records of steps, in order.  attributes: the study's.  climb: only those of this climb."""
    keys = sorted(key for key in attributes if key.startswith(STEPS))
    if climb is not None:
        keys = [key for key in keys if key[:-5] == step_key(0, climb)[:-5]]
    return [StepRecord.from_json(attributes[key]) for key in keys]

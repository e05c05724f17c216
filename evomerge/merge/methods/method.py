"""What a merge method is: a name, coefficients with their bounds, and a planner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.plan import Plan

Statistics = Literal["fisher", "regmean"]
"""What `evomerge statistics` gathers on a source's own items: squared gradients, or Gram matrices of the inputs of
linear layers."""


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it.

    name: as recipes and configurations name it.
    knobs: its coefficients by name.
    plan: the planner, a pure function of the coefficients' values and the measurements of one tensor.
    sources: the least and the largest number of sources that it takes (None: no limit).
    without_base: from how many sources on its plans do not read the base (None: they always do); only then may a
        slice of layers leave the base out.
    measures: what its plans ask about every tensor, so that one pass can measure it before the first merge.
    excludes: switch -> the knob that must keep its default while the switch is on.
    statistics: the kind of statistics file that every source must have (`measure/statistics_file.py`).
    in_turn: whether a plan is for one source; of several, each is merged into the result of those before it, which
        takes the base's place (tensor_plan.py).
    ordered: from how many sources on the result depends on their order (None: it never does).
    keeps_parent: whether weight 1 for one source and 0 for the others gives that source.
    """

    name: str
    knobs: Mapping[str, Knob]
    plan: Callable[[Knobs, Measured], Plan]
    sources: tuple[int, int | None] = (1, None)
    without_base: int | None = None
    measures: frozenset[Literal["gram", "task_gram", "magnitudes", "ranks"]] = frozenset()
    excludes: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics | None = None
    in_turn: bool = False
    ordered: int | None = None
    keeps_parent: bool = True

"""Which coefficients have a derivative, and the derivative of a plan's numbers by them: `derivative_of_plan`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.knobs import Knobs, is_named
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, Clip, Derived, FisherBlend, Plan, SliceBlend, SparseBlend

STEP = 1e-5  # of the differences: the error of central ones is near 1e-10 of the result
# The least |weight| of a sparse plan, as 0 would leave the source out; the larger one where weights divide in float32.
FAINT, FAINT_DIVISOR = 1e-30, 1e-4
NOTHING = 1e-8  # differences below this share of the largest are rounding errors


def learnable(method: Method, sources: int = 1) -> frozenset[str]:
    """The names of a method's knobs that a loss has a derivative by.  sources: how many are merged.

    Methods that merge several sources in turn have none, as a source's plan depends on the result of those before it.
    Without one are: switches and choices; `density`, `gamma`, `epsilon` and `select_topk`, which only select elements,
    so that an element's own derivative is 0 or infinite; what bounds an iteration; and `regmean`'s, which act through
    the solution of a regression.
    """
    if method.in_turn and sources > 1:
        return frozenset()
    return frozenset(name for name, knob in method.knobs.items() if knob.smooth and not is_named(knob))


@dataclass(frozen=True, eq=False)
class PlanDerivative:
    """A plan, and how its numbers change with the knobs.

    plan: at the point, but with no |weight| of a `SparseBlend` below `FAINT` or, with a divisor, `FAINT_DIVISOR`.
    places: K pairs (knob, number of the source among those of the tensor, or None if the knob is shared).
    matrix: (K, n) float64, the derivative of each of `numbers` by each knob.
    """

    plan: Plan
    places: list[tuple[str, int | None]]
    matrix: NDArray[np.float64]


def numbers(plan: Plan) -> NDArray[np.float64]:
    """The numbers of a plan that knobs change smoothly, (n,).

    Blend:        c_1 .. c_N and z, with out = z b + sum_i c_i d_i;  `SliceBlend`: the same for each slice, (N + 1, S)
    SparseBlend:  N weights, N gains, N factors `alone`, the scale
    FisherBlend:  N weights
    Derived:      the coefficients
    Clip:         the limit
    """
    match plan:
        case Blend():
            rest = 1.0 if plan.of_task_vectors else plan.base + sum(plan.sources)
            return np.array([*plan.sources, rest])
        case SliceBlend():
            whole = plan.sources.sum(0) + (0.0 if plan.base is None else plan.base)
            return np.vstack([plan.sources, np.ones_like(whole) if plan.of_task_vectors else whole]).reshape(-1)
        case SparseBlend():
            ones = (1.0,) * len(plan.weights)
            return np.array([*plan.weights, *(plan.gains or ones), *(plan.alone or ones), plan.scale])
        case FisherBlend():
            return np.array(plan.weights)
        case Derived():
            return np.array(plan.coefficients)
        case Clip():
            return np.array([plan.limit])


def derivative_of_plan(method: Method, knobs: Knobs, measured: Measured) -> PlanDerivative:
    """The plan of a tensor and the derivative of its numbers by every learnable knob.

    The derivatives are central differences of the planner, one-sided at a knob's bounds.  The derivative by a weight of
    0 in a sparse plan is the one beside 0 (`FAINT`): at 0 the source takes part in no election.
    """
    known: Any = Remembered(measured)
    point = method.plan(knobs, known)
    names = [name for name in method.knobs if name in learnable(method, knobs.count)]
    if isinstance(point, SparseBlend):
        least = FAINT_DIVISOR if point.normalize else FAINT
        each = {k: tuple(at_least(v, least) for v in x) if k in names else x for k, x in knobs.each.items()}
        knobs = replace(knobs, each=each)
        point = method.plan(knobs, known)
    places = [(k, i) for k in names for i in (range(knobs.count) if method.knobs[k].each else [None])]
    rows = [numbers(point)[None][:0]]
    for name, source in places:
        knob = method.knobs[name]
        value = knobs.shared[name] if source is None else knobs.each[name][source]
        step = STEP * max(1.0, abs(value))
        low, high = max(knob.low, value - step), min(knob.high, value + step)
        above, below = (numbers(method.plan(changed(knobs, name, source, x), known)) for x in (high, low))
        rows.append((above - below)[None] / (high - low))
    matrix = np.concatenate(rows)
    matrix[np.abs(matrix) < NOTHING * np.abs(matrix).max(initial=0.0)] = 0.0
    return PlanDerivative(point, places, matrix)


def at_least(weight: float, least: float) -> float:
    """The weight, or one of the size `least` if it is smaller."""
    return weight if abs(weight) >= least else -least if weight < 0.0 else least


def changed(knobs: Knobs, name: str, source: int | None, value: float) -> Knobs:
    """The knobs with one value replaced.  source: whose it is; None for a shared knob."""
    if source is None:
        return replace(knobs, shared={**knobs.shared, name: value})
    values = list(knobs.each[name])
    values[source] = value
    return replace(knobs, each={**knobs.each, name: tuple(values)})


class Remembered:
    """The measurements of a tensor; norms and magnitudes are kept, as each of them may read the tensor again."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self.l1: Callable[..., float] = cache(measured.l1)
        self.magnitude: Callable[..., float] = cache(measured.magnitude)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.measured, name)

"""Plan one output tensor: gather its inputs, ask the method's planner, and choose the operands that the plan reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.tensor_inputs import TensorInputs
from evomerge.merge.kernels.call import contributes
from evomerge.merge.kernels.compiled import Compiled
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.random_masks import mask_keys
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, Derived, Plan, SparseBlend
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.recipe import Recipe
from evomerge.sources.tensor_names import TensorRole, tensor_role

MOST_KEPT = 16  # sets of sources and seeds of which inputs are kept
KnobsAt = Callable[[TensorRole, int, tuple[str, ...]], Knobs]
"""`Recipe.knobs`: (place of a tensor, number of layers, sources that take part) -> the coefficients there."""


class RecipeInputs:
    """The inputs of a recipe's tensors; those that stay in memory are kept in the bank from candidate to candidate."""

    def __init__(self, recipe: Recipe, bank: Bank) -> None:
        self.recipe, self.bank = recipe, bank
        self.kept: dict[str, TensorInputs] = {}
        if METHODS[recipe.method].statistics is None:  # statistics belong to one recipe
            key = tuple(s.name for s in recipe.sources), recipe.seed, frozenset(recipe.keep)
            if key not in bank.kept_inputs and len(bank.kept_inputs) >= MOST_KEPT:
                bank.kept_inputs.clear()
            self.kept = bank.kept_inputs.setdefault(key, self.kept)

    def get(self, name: str) -> TensorInputs:
        """The inputs of the output tensor `name`: kept ones, or new ones."""
        if (kept := self.kept.get(name)) is not None:
            return kept
        recipe, bank = self.recipe, self.bank
        merged = bank.merged_as(name)
        names = tuple(sources_of(recipe, bank, merged))
        statistics = bank.statistics(recipe, names)
        measured = bank.measurements(merged, names, recipe.seed, statistics)
        stored = [bank.is_stored(s, merged) for s in names]
        keys = mask_keys(recipe.seed, merged, names)
        return TensorInputs(merged, names, tensor_role(merged), bank.base(merged), measured, statistics, stored, keys)

    def keep(self, name: str, inputs: TensorInputs) -> None:
        """Keep the inputs of the output tensor `name` after it was merged, if they stay in memory."""
        if inputs.sources is not None or not self.bank.stay(inputs.name, inputs.names):
            return
        inputs.sources = [inputs.measured.source(i) for i in range(len(inputs.names))]
        self.kept[name] = inputs


def sources_of(recipe: Recipe, bank: Bank, name: str) -> list[str]:
    """The sources that a recipe merges the tensor `name` of; none where the base's is kept."""
    if recipe.keep and tensor_role(name).component in recipe.keep:
        return []
    return bank.taking_part(name, [s.name for s in recipe.sources])


def plan_tensor(recipe: Recipe, bank: Bank, inputs: TensorInputs, knobs: KnobsAt) -> tuple[Plan, Operands] | None:
    """The plan of a tensor and its operands; None for integers, which are copied from the base.

    knobs: `recipe.knobs`, or `remembered_knobs`.

    An operand that cannot count is not read: the base's tensor takes its place.
    """
    base, measured = inputs.base, inputs.measured
    if not base.is_floating_point():
        return None
    method = METHODS[recipe.method]
    if method.in_turn and len(inputs.names) > 1:
        return last_turn(method, knobs(inputs.where, bank.layers, inputs.names), measured, bank.compiled)
    if inputs.names:
        plan = method.plan(knobs(inputs.where, bank.layers, inputs.names), measured)
    else:
        plan = Blend((), base=1.0)  # a slice of the base alone, or a component that is kept
    sources: Sequence[Tensor]
    if isinstance(plan, Derived):
        sources = bank.derived(plan, inputs.name, inputs.names, inputs.statistics)
    elif inputs.sources is not None:
        sources = inputs.sources
    elif isinstance(plan, Blend):
        sources = [measured.source(i) if c else base for i, c in enumerate(plan.sources)]
    elif isinstance(plan, SparseBlend):
        # A source that cannot count but must be computed is read all the same: this may show that it is not finite.
        unread = [stored and not contributes(plan, i, False) for i, stored in enumerate(inputs.stored)]
        sources = [base if skip else measured.source(i) for i, skip in enumerate(unread)]
    else:
        sources = [measured.source(i) for i in range(len(inputs.names))]
    planes = inputs.planes(plan, bank.device_cache.held)
    all_stay = inputs.sources is not None and (not planes or planes is inputs.levels)
    return plan, Operands(base, sources, planes, inputs.keys, inputs.memo if all_stay else None)


def last_turn(
    method: Method, knobs: Knobs, measured: Measurements, compiled: Compiled | None = None
) -> tuple[Plan, Operands]:
    """The plan of the last source of a method that merges in turn, on the result of the sources before it.

    measured: of all sources.  compiled: the compiled kernels, if there are.

    That result is float32.
    """
    last = measured.count - 1

    def turn(number: int, merged: Tensor) -> tuple[Plan, Operands]:
        """What merges a source into the result so far."""
        each = {name: (several[number],) for name, several in knobs.each.items()}
        tensors, source = OnTopOf(merged, measured, number), measured.sources[number]
        own = Measurements(tensors, measured.name, [source], {}, scan=measured.scan)
        plan = method.plan(Knobs(each, knobs.shared), own)
        return plan, Operands(merged, [own.source(0)], own.planes(plan))

    merged = measured.base
    for number in range(last):
        plan, operands = turn(number, merged)
        merged = torch.empty(merged.shape, dtype=torch.float32, device=merged.device)
        execute(plan, merged, operands, compiled)
    return turn(last, merged)


@dataclass(frozen=True)
class OnTopOf:
    """The tensors of one turn, for its measurements.

    merged: the result so far, in the base's place.
    measured: of all sources.  number: of the source whose turn it is.
    """

    merged: Tensor
    measured: Measurements
    number: int

    def base(self, name: str) -> Tensor:
        return self.merged

    def source(self, source: str, name: str) -> Tensor:
        return self.measured.source(self.number)


def remembered_knobs(recipe: Recipe) -> KnobsAt:
    """`recipe.knobs`, computed once for equal places.  Coefficients by tensor name differ among equal places."""
    given = [*recipe.parameters.values(), *(c for s in recipe.sources for c in s.parameters.values())]
    if any(map(filtered_values, given)):
        return recipe.knobs
    found: dict[tuple[object, ...], Knobs] = {}
    vary = any(isinstance(c, list | dict) for c in given)

    def knobs(where: TensorRole, layers: int, names: tuple[str, ...]) -> Knobs:
        key = (where.layer, where.finest, where.encoder_layer, names) if vary else names
        if key not in found:
            found[key] = recipe.knobs(where, layers, names)
        return found[key]

    return knobs

"""Materialise a recipe: the one way to merge.  Search, export and `merge` all come through here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank, mask_keys
from evomerge.merge.bank.operands import Operands
from evomerge.merge.kernels.call import Call, Keys, Memo, call_of, contributes
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.launch import Launcher
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.plan import Blend, Derived, FisherBlend, Knobs, Plan, SparseBlend
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.recipe import Recipe, check_layers
from evomerge.sources.tensor_names import TensorRole, tensor_role

STREAMED = 64 << 20  # bytes of operands that do not stay on the device and yet wait for one launch
KEPT = 16  # sets of sources and seeds of which operands are kept
KnobsAt = Callable[[TensorRole, int, tuple[str, ...]], Knobs]


class NotFinite(ArithmeticError):
    """A merged tensor holds NaN or infinity: this candidate is broken, the next may be fine."""


@dataclass(eq=False, slots=True)
class Planned:
    """What one tensor is made of: the arguments of `execute`.  memo: see `Call`."""

    plan: Plan
    base: Tensor
    sources: Sequence[Tensor]
    planes: Sequence[Tensor]
    keys: Keys
    memo: Memo | None = None


def operands_of(recipe: Recipe, bank: Bank, name: str) -> Operands:
    """What the tensor `name` of a recipe is merged of."""
    names = tuple(bank.taking_part(name, [s.name for s in recipe.sources]))
    statistics = bank.statistics(recipe, names)
    measured = bank.measurements(name, names, recipe.seed, statistics)
    stored = [bank.is_stored(s, name) for s in names]
    return Operands(
        name,
        names,
        tensor_role(name),
        bank.base(name),
        measured,
        statistics,
        stored,
        mask_keys(recipe.seed, name, names),
    )


def kept_operands(recipe: Recipe, bank: Bank) -> dict[str, Operands]:
    """Where the operands of a recipe's tensors are kept that stay where they are; nowhere if it uses statistics."""
    if METHODS[recipe.method].statistics is not None:
        return {}
    key = tuple(s.name for s in recipe.sources), recipe.seed
    if key not in bank.operands and len(bank.operands) >= KEPT:
        bank.operands.clear()
    return bank.operands.setdefault(key, {})


def keep(kept: dict[str, Operands], name: str, operands: Operands, bank: Bank) -> None:
    """Keep the operands of what is written to `name`, if they stay where they are."""
    if not bank.stay(operands.name, operands.names):
        return
    measured = operands.measured
    operands.sources = [measured.source(i) for i in range(len(operands.names))]
    kept[name] = operands


def plan_tensor(recipe: Recipe, bank: Bank, operands: Operands, knobs: KnobsAt) -> Planned | None:
    """What a recipe makes a tensor of; None for integers, which are the base's.

    knobs: `recipe.knobs`, or what remembers its answers.
    """
    o, base, measured = operands, operands.base, operands.measured
    if not base.is_floating_point():
        return None
    if o.names:
        plan = METHODS[recipe.method].plan(knobs(o.where, bank.layers, o.names), measured)
    else:
        plan = Blend((), base=1.0)  # a slice of the base alone
    # An operand that does not count is not read: the base stands in for it.
    sources: Sequence[Tensor]
    if isinstance(plan, Derived):
        sources = bank.derived(plan, o.name, o.names, o.statistics)
    elif o.sources is not None:
        sources = o.sources
    elif isinstance(plan, Blend):
        sources = [measured.source(i) if c else base for i, c in enumerate(plan.sources)]
    elif isinstance(plan, SparseBlend):
        # A silent one that must be computed is read all the same: that may find it broken.
        silent = [stored and not contributes(plan, i, False) for i, stored in enumerate(o.stored)]
        sources = [base if quiet else measured.source(i) for i, quiet in enumerate(silent)]
    else:
        sources = [measured.source(i) for i in range(len(o.names))]
    planes = o.planes(plan, bank.held)
    if isinstance(plan, FisherBlend):
        planes = [g.read(o.name).to(bank.device) for g in o.statistics]
    memo = o.memo if o.sources is not None and (not planes or planes is o.levels) else None
    return Planned(plan, base, sources, planes, o.keys, memo)


@torch.no_grad()
def materialise_tensor(recipe: Recipe, bank: Bank, name: str, out: Tensor) -> Tensor:
    """Write the merged tensor `name` into `out` (its shape, the recipe's dtype or the device's own copy of it).

    Tensors of integers (position tables of old checkpoints) are the base's.  Returns the largest |out| as a scalar
    on the bank's device, NaN if there is one: `check_finite` looks at it.
    """
    bank.begin(name)
    kept = kept_operands(recipe, bank)
    if (operands := kept.get(name)) is None:
        operands = operands_of(recipe, bank, bank.merged_as(name))
    planned = plan_tensor(recipe, bank, operands, recipe.knobs)
    largest = run_alone(planned, bank, operands.base, out)
    if operands.sources is None:
        keep(kept, name, operands, bank)
    return largest


def run_alone(planned: Planned | None, bank: Bank, base: Tensor, out: Tensor) -> Tensor:
    if planned is None:
        out.copy_(base)
        return torch.zeros((), device=bank.device)
    target = in_one_piece(out)
    p = planned
    largest = execute(p.plan, target, p.base, p.sources, p.planes, p.keys, bank.compiled)
    if target is not out:
        out.copy_(target)
    return largest


def in_one_piece(out: Tensor) -> Tensor:
    """A tensor to write into: `out`, or one that is contiguous and must be copied to it."""
    return out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)


class Batch:
    """Tensors of one candidate on a device, those of one kind merged in one launch.

    largest: (name, its largest |out|) of what was merged.
    """

    def __init__(self, recipe: Recipe, bank: Bank, launcher: Launcher) -> None:
        self.recipe, self.bank, self.launcher = recipe, bank, launcher
        self.knobs = remembered(recipe)
        self.waiting: list[tuple[str, Tensor, Tensor, Call]] = []  # name, out, what is written, call
        self.largest: list[tuple[list[str], Tensor]] = []
        self.kept = kept_operands(recipe, bank)

    def add(self, name: str, out: Tensor) -> None:
        """Plan a tensor; it is merged by the next `launch`, which comes by itself where much was streamed."""
        if not self.waiting:
            self.bank.begin(name)
        if (operands := self.kept.get(name)) is None:
            operands = operands_of(self.recipe, self.bank, self.bank.merged_as(name))
        planned = plan_tensor(self.recipe, self.bank, operands, self.knobs)
        call = None
        if planned is not None and not isinstance(planned.plan, Derived):  # whose matrices would all wait in memory
            call = call_of(planned.plan, planned.base, planned.sources, planned.planes, planned.keys, planned.memo)
        if call is None:
            self.largest.append(([name], run_alone(planned, self.bank, operands.base, out)[None]))
        else:
            self.waiting.append((name, out, in_one_piece(out), call))
        if operands.sources is None:
            keep(self.kept, name, operands, self.bank)
        if (recent := self.bank.recent) and sum(x.nbytes for x in recent.values()) > STREAMED:
            self.launch()

    def launch(self) -> None:
        """Merge what waits."""
        if not self.waiting:
            return
        found = self.launcher.run([(target, call) for _, _, target, call in self.waiting])
        self.largest.append(([name for name, *_ in self.waiting], found))
        for _, out, target, _ in self.waiting:
            if target is not out:
                out.copy_(target)
        self.waiting.clear()


def remembered(recipe: Recipe) -> KnobsAt:
    """`recipe.knobs` that computes equal places once; coefficients by tensor name differ among equal places."""
    given = [*recipe.parameters.values(), *(c for s in recipe.sources for c in s.parameters.values())]
    if any(map(filtered_values, given)):
        return recipe.knobs
    found: dict[tuple[object, ...], Knobs] = {}
    vary = any(isinstance(c, list | dict) for c in given)

    def knobs(where: TensorRole, layers: int, names: tuple[str, ...]) -> Knobs:
        key = (where.layer, where.component, where.encoder_layer, names) if vary else names
        if key not in found:
            found[key] = recipe.knobs(where, layers, names)
        return found[key]

    return knobs


def check_finite(largest: Mapping[str, Tensor]) -> None:
    """NotFinite names the first tensor whose largest magnitude is not a number."""
    check_all_finite([([name], x[None]) for name, x in largest.items()])


def check_all_finite(largest: Sequence[tuple[Sequence[str], Tensor]]) -> None:
    """`check_finite` of several tensors' magnitudes at a time, (names,) float32 for each."""
    if not largest:
        return
    finite = torch.cat([found for _, found in largest]).isfinite().tolist()
    if not all(finite):
        names = [name for several, _ in largest for name in several]
        raise NotFinite(f"{names[finite.index(False)]} is not finite after merging")


def check_fits(recipe: Recipe, bank: Bank) -> None:
    """EvomergeError if a bank was opened for another layout than the recipe's, or its lists count other layers."""
    if recipe.slices != bank.slices:
        raise EvomergeError("this recipe has other `slices` than the models were opened for")
    if recipe.vocabulary != bank.models.requested_vocabulary:
        raise EvomergeError("this recipe has another `vocabulary` than the models were opened for")
    check_layers(recipe, bank.layers)


def widen(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy what was merged to where it belongs, in a wider type: (there, merged) of each; none is left."""
    for there, merged in pairs:
        there.copy_(merged)
    pairs.clear()


@torch.no_grad()
def materialise(
    recipe: Recipe,
    bank: Bank,
    destinations: Mapping[str, Tensor],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Write every tensor of a candidate to its destination, in the bank's order.  NotFinite if one is not finite.

    destinations: checkpoint name -> tensor to write into.  Its values are those of an export, rounded to the recipe's
    dtype, also where the tensor is of a wider type.  between: called before each tensor (may raise to stop).
    """
    dtype = TORCH_DTYPES[recipe.dtype]
    check_fits(recipe, bank)
    largest: dict[str, Tensor] = {}
    widened: list[tuple[Tensor, Tensor]] = []
    names = [name for name in bank.names if name in destinations]
    batch = Batch(recipe, bank, bank.launcher) if bank.launcher else None
    sent = 0
    try:
        for done, name in enumerate(names):
            between()
            sent = len(names) if bank.holds_all else max(sent, done)
            while sent < len(names) and bank.prefetch(names[sent], read_by(recipe, bank, names[sent])):
                sent += 1
            live = destinations[name]
            out = torch.empty_like(live, dtype=dtype) if live.is_floating_point() and live.dtype != dtype else live
            if batch is not None:
                batch.add(name, out)
            else:
                largest[name] = materialise_tensor(recipe, bank, name, out)
            if out is not live:
                widened.append((live, out))
            if batch is None:
                widen(widened)
        if batch is not None:
            batch.launch()
            widen(widened)
    finally:
        bank.end()
    if batch is not None:
        check_all_finite(batch.largest)
    else:
        check_finite(largest)


def read_by(recipe: Recipe, bank: Bank, name: str) -> list[str]:
    """The sources that a tensor will be made of, as far as their weights tell: one of weight 0 is mostly not read."""
    names = bank.taking_part(name, [s.name for s in recipe.sources])
    if not names:
        return []
    weights = recipe.knobs(tensor_role(name), bank.layers, names).each.get("weight", [1.0] * len(names))
    return [s for s, weight in zip(names, weights, strict=True) if weight]

"""Materialise a recipe: the one way to merge.  Search, export and `merge` all come through here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank, mask_keys
from evomerge.merge.kernels.call import Call, Keys, call_of, contributes
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.launch import Launcher
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.plan import Blend, Derived, FisherBlend, Knobs, Plan, SparseBlend
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.recipe import Recipe, check_layers
from evomerge.sources.tensor_names import TensorRole, tensor_role

STREAMED = 64 << 20  # bytes of operands that do not stay on the device and yet wait for one launch
KnobsAt = Callable[[TensorRole, int, tuple[str, ...]], Knobs]


class NotFinite(ArithmeticError):
    """A merged tensor holds NaN or infinity: this candidate is broken, the next may be fine."""


@dataclass(frozen=True, eq=False)
class Planned:
    """What one tensor is made of: the arguments of `execute`."""

    plan: Plan
    base: Tensor
    sources: Sequence[Tensor]
    planes: Sequence[Tensor]
    keys: Keys


def plan_tensor(recipe: Recipe, bank: Bank, name: str, knobs: KnobsAt) -> Planned | None:
    """What a recipe makes the tensor `name` of; None for integers, which are the base's.

    knobs: `recipe.knobs`, or what remembers its answers.
    """
    base = bank.base(name)
    if not base.is_floating_point():
        return None
    names = bank.taking_part(name, [s.name for s in recipe.sources])
    statistics = bank.statistics(recipe, names)
    measured = bank.measurements(name, names, recipe.seed, statistics)
    if names:
        plan = METHODS[recipe.method].plan(knobs(tensor_role(name), bank.layers, tuple(names)), measured)
    else:
        plan = Blend((), base=1.0)  # a slice of the base alone
    # An operand that does not count is not read: the base stands in for it.
    sources: Sequence[Tensor]
    if isinstance(plan, Blend):
        sources = [measured.source(i) if c else base for i, c in enumerate(plan.sources)]
    elif isinstance(plan, SparseBlend):
        # A silent one that must be computed is read all the same: that may find it broken.
        silent = [bank.is_stored(s, name) and not contributes(plan, i, False) for i, s in enumerate(names)]
        sources = [base if quiet else measured.source(i) for i, quiet in enumerate(silent)]
    elif isinstance(plan, Derived):
        sources = bank.derived(plan, name, names, statistics)
    else:
        sources = [measured.source(i) for i in range(len(names))]
    planes = measured.planes(plan)
    if isinstance(plan, FisherBlend):
        planes = [g.read(name).to(bank.device) for g in statistics]
    is_random = isinstance(plan, SparseBlend) and plan.chances is not None
    return Planned(plan, base, sources, planes, mask_keys(recipe.seed, name, names) if is_random else (0, ()))


@torch.no_grad()
def materialise_tensor(recipe: Recipe, bank: Bank, name: str, out: Tensor) -> Tensor:
    """Write the merged tensor `name` into `out` (its shape, the recipe's dtype or the device's own copy of it).

    Tensors of integers (position tables of old checkpoints) are the base's.  Returns the largest |out| as a scalar
    on the bank's device, NaN if there is one: `check_finite` looks at it.
    """
    bank.begin(name)
    name = bank.merged_as(name)
    planned = plan_tensor(recipe, bank, name, recipe.knobs)
    return run_alone(planned, bank, name, out)


def run_alone(planned: Planned | None, bank: Bank, name: str, out: Tensor) -> Tensor:
    if planned is None:
        out.copy_(bank.base(name))
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
        self.largest: list[tuple[str, Tensor]] = []

    @torch.no_grad()
    def add(self, name: str, out: Tensor) -> None:
        """Plan a tensor; it is merged by the next `launch`, which comes by itself where much was streamed."""
        if not self.waiting:
            self.bank.begin(name)
        merged = self.bank.merged_as(name)
        planned = plan_tensor(self.recipe, self.bank, merged, self.knobs)
        call = None
        if planned is not None and not isinstance(planned.plan, Derived):  # whose matrices would all wait in memory
            call = call_of(planned.plan, planned.base, planned.sources, planned.planes, planned.keys)
        if call is None:
            self.largest.append((name, run_alone(planned, self.bank, merged, out)))
        else:
            self.waiting.append((name, out, in_one_piece(out), call))
        if sum(x.nbytes for x in self.bank.recent.values()) > STREAMED:
            self.launch()

    @torch.no_grad()
    def launch(self) -> None:
        """Merge what waits."""
        if not self.waiting:
            return
        found = self.launcher.run([(target, call) for _, _, target, call in self.waiting])
        self.largest += zip((name for name, *_ in self.waiting), found.unbind(), strict=True)
        for _, out, target, _ in self.waiting:
            if target is not out:
                out.copy_(target)
        self.waiting.clear()


def remembered(recipe: Recipe) -> KnobsAt:
    """`recipe.knobs` that computes equal places once; coefficients by tensor name differ among equal places."""
    given = [*recipe.parameters.values(), *(c for s in recipe.sources for c in s.parameters.values())]
    return recipe.knobs if any(map(filtered_values, given)) else cache(recipe.knobs)


def check_finite(largest: Mapping[str, Tensor]) -> None:
    """NotFinite names the first tensor whose largest magnitude is not a number."""
    if not largest:
        return
    finite = torch.stack(list(largest.values())).isfinite().tolist()
    if not all(finite):
        name = next(n for n, ok in zip(largest, finite, strict=True) if not ok)
        raise NotFinite(f"{name} is not finite after merging")


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
            largest = dict(batch.largest)
            widen(widened)
    finally:
        bank.end()
    check_finite(largest)


def read_by(recipe: Recipe, bank: Bank, name: str) -> list[str]:
    """The sources that a tensor will be made of, as far as their weights tell: one of weight 0 is mostly not read."""
    names = bank.taking_part(name, [s.name for s in recipe.sources])
    if not names:
        return []
    weights = recipe.knobs(tensor_role(name), bank.layers, names).each.get("weight", [1.0] * len(names))
    return [s for s, weight in zip(names, weights, strict=True) if weight]

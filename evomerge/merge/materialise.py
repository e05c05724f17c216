"""Materialise a recipe: the one way to merge.  Search, export and `merge` all come through here."""

from collections.abc import Callable, Mapping

import torch

from evomerge.errors import EvomergeError
from evomerge.merge.bank import Bank, mask_keys
from evomerge.merge.execute import contributes, execute
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Blend, Derived, FisherBlend, SparseBlend
from evomerge.merge.recipe import Recipe, check_layers
from evomerge.sources.anatomy import place


class NotFinite(ArithmeticError):
    """A merged tensor holds NaN or infinity: this candidate is broken, the next may be fine."""


@torch.no_grad()
def materialise_tensor(recipe: Recipe, bank: Bank, name: str, out: torch.Tensor) -> torch.Tensor:
    """Write the merged tensor `name` into `out` (its shape, the recipe's dtype or the device's own copy of it).

    Tensors of integers (position tables of old checkpoints) are the base's.  Returns the largest |out| as a scalar
    on the bank's device, NaN if there is one: `check_finite` looks at it.
    """
    bank.begin(name)
    name = bank.merged_as(name)
    base = bank.base(name)
    if not base.is_floating_point():
        out.copy_(base)
        return torch.zeros((), device=bank.device)
    names = bank.taking_part(name, [s.name for s in recipe.sources])
    gathered = bank.gathered(recipe, names)
    measured = bank.measurements(name, names, recipe.seed, gathered)
    if names:
        plan = METHODS[recipe.method].plan(recipe.knobs(place(name), bank.layers, names), measured)
    else:
        plan = Blend((), base=1.0)  # a slice of the base alone
    if isinstance(plan, Blend):
        # An operand that does not count is not read: the base stands in for it.
        sources = [bank.source(s, name) if c else base for s, c in zip(names, plan.sources, strict=True)]
    elif isinstance(plan, SparseBlend):
        # The base stands in for a silent operand, too, unless computing it may find it broken.
        silent = [bank.is_stored(s, name) and not contributes(plan, i, False) for i, s in enumerate(names)]
        sources = [base if quiet else bank.source(s, name) for s, quiet in zip(names, silent, strict=True)]
    elif isinstance(plan, Derived):
        sources = bank.derived(plan, name, names, gathered)
    else:
        sources = [bank.source(s, name) for s in names]
    planes = measured.planes(plan)
    if isinstance(plan, FisherBlend):
        planes = [g.read(name).to(bank.device) for g in gathered]
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    keys = mask_keys(recipe.seed, name, names)
    largest = execute(plan, target, base, sources, planes, keys, bank.compiled)
    if target is not out:
        out.copy_(target)
    return largest


def check_finite(largest: Mapping[str, torch.Tensor]) -> None:
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
    if recipe.vocabulary != bank.models.wanted:
        raise EvomergeError("this recipe has another `vocabulary` than the models were opened for")
    check_layers(recipe, bank.layers)


def materialise(
    recipe: Recipe,
    bank: Bank,
    destinations: Mapping[str, torch.Tensor],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Write every tensor of a candidate to its destination, in the bank's order.  NotFinite if one is not finite.

    destinations: checkpoint name -> tensor to write into.  between: called before each tensor (may raise to stop).
    """
    check_fits(recipe, bank)
    largest = {}
    names = [name for name in bank.names if name in destinations]
    sent = 1
    try:
        for done, name in enumerate(names):
            between()
            sent = max(sent, done + 1)
            while sent < len(names) and bank.prefetch(names[sent], read_by(recipe, bank, names[sent])):
                sent += 1
            largest[name] = materialise_tensor(recipe, bank, name, destinations[name])
    finally:
        bank.end()
    check_finite(largest)


def read_by(recipe: Recipe, bank: Bank, name: str) -> list[str]:
    """The sources that a tensor will be made of, as far as their weights tell: one of weight 0 is mostly not read."""
    names = bank.taking_part(name, [s.name for s in recipe.sources])
    if not names:
        return []
    weights = recipe.knobs(place(name), bank.layers, names).each.get("weight", [1.0] * len(names))
    return [s for s, weight in zip(names, weights, strict=True) if weight]

"""Materialise a recipe: the one way to merge.  Search, export and `merge` all come through here."""

from collections.abc import Callable, Mapping

import torch

from evomerge.merge.bank import Bank, mask_key
from evomerge.merge.kernels import blend, sparse_blend
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Blend
from evomerge.merge.recipe import Recipe, check_layers
from evomerge.sources.anatomy import place


class NotFinite(ArithmeticError):
    """A merged tensor holds NaN or infinity: this candidate is broken, the next may be fine."""


@torch.no_grad()
def materialise_tensor(recipe: Recipe, bank: Bank, name: str, out: torch.Tensor) -> None:
    """Write the merged tensor `name` into `out` (its shape, the recipe's dtype or the device's own copy of it).

    Tensors of integers (position tables of old checkpoints) are the base's.  NotFinite if the result is not
    finite.
    """
    base = bank.base(name)
    if not base.is_floating_point():
        out.copy_(base)
        return
    method = METHODS[recipe.method]
    names = [s.name for s in recipe.sources]
    gram = bank.gram(name, names) if method.needs_gram else None
    plan = method.plan(recipe.knobs(place(name), bank.layers), gram)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    if isinstance(plan, Blend):
        # An operand that does not count is not read: the base stands in for it.
        used = [bank.source(s, name) if c else base for s, c in zip(names, plan.sources, strict=True)]
        blend(target, base, used, plan)
    elif all(bank.source(s, name) is base for s in names):  # adapters that leave this tensor alone
        target.copy_(base)
    else:
        sources = [bank.source(s, name) for s in names]
        top = plan.keep == "top"
        thresholds = [bank.threshold(s, name, d) for s, d in zip(names, plan.density, strict=True)] if top else []
        sparse_blend(target, base, sources, plan, thresholds, [mask_key(recipe.seed, name, s) for s in names])
    if target is not out:
        out.copy_(target)
    least, largest = torch.aminmax(out)  # a NaN anywhere is the answer of both
    if not (torch.isfinite(least) and torch.isfinite(largest)):
        raise NotFinite(f"{name} is not finite after merging")


def materialise(
    recipe: Recipe,
    bank: Bank,
    destinations: Mapping[str, torch.Tensor],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Write every tensor of a candidate to its destination, in the bank's order.

    destinations: checkpoint name -> tensor to write into.  between: called before each tensor (may raise to stop).
    """
    check_layers(recipe, bank.layers)
    for name in bank.names:
        between()
        if name in destinations:
            materialise_tensor(recipe, bank, name, destinations[name])

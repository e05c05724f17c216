"""Open the models of a recipe and give them to a bank."""

from collections.abc import Callable

import torch

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.compiled import compiled_for
from evomerge.merge.materialise import check_fits
from evomerge.merge.recipe.nested import NestedMerge, nested_model
from evomerge.merge.recipe.recipe import Recipe
from evomerge.sources.locate import locate
from evomerge.sources.open_models import open_models

Log = Callable[[str], None]


def open_bank(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    capacity: int | None = None,
    log: Log | None = None,
) -> Bank:
    """Open all models of a recipe, check that they fit together, and return the bank that reads them.

    device: where the merge is computed.
    capacity: the bytes that the bank may hold (see `Bank`); None: what the device has free.
    log: gets a line about compiled kernels, which large models then use; without it no kernel is compiled.

    EvomergeError if a model is not found, or the models do not fit together or to the recipe's slices and lists.
    """
    sources = {
        s.name: open_nested(s.name, s.recipe, device, log) if s.recipe else locate(s.path) for s in recipe.sources
    }
    models = open_models(
        locate(recipe.base.path),
        sources,
        any_depth=bool(recipe.slices),
        vocabulary=recipe.vocabulary,
        allowed=recipe.allow_differences,
    )
    nested = {n: m.bank.models.compatibility.notes for n, m in models.sources.items() if isinstance(m, NestedMerge)}
    models.compatibility.notes += [
        f"in the recipe of source {name}: {note}" for name in nested for note in nested[name]
    ]
    compiled = compiled_for(models.base.tensors, device, log) if log else None
    bank = Bank(models, device, capacity, compiled, recipe.slices)
    check_fits(recipe, bank)
    return bank


def open_nested(name: str, recipe: Recipe, device: torch.device | str, log: Log | None) -> NestedMerge:
    """Open the models of a source's own recipe.

    Their bank holds no tensors in memory, because the bank of the outer recipe holds the results.
    """
    try:
        bank = open_bank(recipe, device, capacity=0, log=log)
    except EvomergeError as error:
        raise EvomergeError(f"in the recipe of source {name}: {error}") from error
    return nested_model(name, recipe, bank)

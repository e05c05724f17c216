"""Open the models of a recipe and give them to a bank."""

from collections.abc import Callable

import torch

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.compiled import compiled_for
from evomerge.merge.materialise import check_fits
from evomerge.merge.recipe.nested import NestedMerge, nested_model
from evomerge.merge.recipe.recipe import Recipe, models_on_disk
from evomerge.sources.hub import Headers, Progress
from evomerge.sources.locate import before_download, fetch, locate
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import tensor_role

Log = Callable[[str], None]


def open_bank(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    capacity: int | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    check: Callable[[Bank], object] = lambda bank: None,
) -> Bank:
    """Open all models of a recipe, check that they fit together, and return the bank that reads them.

    Models of the hub are opened and checked before their weights are downloaded.

    device: where the merge is computed.
    capacity: the bytes that the bank may hold (see `Bank`); None: what the device has free.
    log: gets a line about compiled kernels, which large models then use; without it no kernel is compiled.
    progress: of the download.
    check: called before it, with a bank that knows the headers of the weights only.

    EvomergeError if a model is not found, or the models do not fit together or to the recipe's slices and lists.
    """
    names = [model.path for _, model in models_on_disk(recipe)]
    with before_download(names) as headers:
        if headers.folders:
            check(open_bank(with_stand_ins(recipe, headers), capacity=0))
    fetch(names, progress)
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
    models.compatibility.notes += [f"keep: {text}" for text in kept_in_vain(recipe, bank)]
    return bank


def kept_in_vain(recipe: Recipe, bank: Bank) -> list[str]:
    """The components under `keep` that no tensor belongs to, a line each."""
    found = {tensor_role(name).component for name in bank.names} if recipe.keep else set()
    lines = {c: f"the models have no {c} of their own" for c in recipe.keep if c not in found}
    if "head" in lines and bank.models.base.ties_head:
        lines["head"] += "; it is their embedding, which is not kept"
        if "embedding" in recipe.keep:
            del lines["head"]
    return list(lines.values())


def with_stand_ins(recipe: Recipe, headers: Headers) -> Recipe:
    """The recipe with folders of headers instead of the models that are not downloaded yet."""
    copy = recipe.model_copy(deep=True)
    for _, model in models_on_disk(copy):
        model.path = headers.stand_in(model.path)
    return copy


def open_nested(name: str, recipe: Recipe, device: torch.device | str, log: Log | None) -> NestedMerge:
    """Open the models of a source's own recipe.

    Their bank holds no tensors in memory, because the bank of the outer recipe holds the results.
    """
    try:
        bank = open_bank(recipe, device, capacity=0, log=log)
    except EvomergeError as error:
        raise EvomergeError(f"in the recipe of source {name}: {error}") from error
    return nested_model(name, recipe, bank)

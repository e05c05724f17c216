"""Open the models of a recipe.  A source that is a recipe itself is merged in memory, tensor by tensor, when read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.compiled import compiled_for
from evomerge.merge.materialise import NotFinite, check_finite, check_fits, materialise_tensor
from evomerge.merge.recipe.recipe import Recipe
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.locate import locate
from evomerge.sources.models import open_models
from evomerge.sources.tokenizer import Vocabulary

Log = Callable[[str], None]


@dataclass
class Nested(Checkpoint):
    """The model that a recipe makes, as a source of another recipe; it lies nowhere.

    path: its base's folder.  name: of the source in the outer recipe.
    """

    name: str
    recipe: Recipe
    bank: Bank = field(repr=False)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return self.bank.models.vocabulary

    def stores(self, name: str) -> bool:
        return False

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """The merged tensor in the nested recipe's dtype, on its bank's device.  NotFinite if it is broken."""
        name = self.stored_name(name)
        info = self.tensors[name]
        dtype = TORCH_DTYPES[self.recipe.dtype] if info.dtype.is_floating_point else info.dtype
        out = torch.empty(info.shape, dtype=dtype, device=self.bank.device)
        try:
            check_finite([name], materialise_tensor(self.recipe, self.bank, name, out)[None])
        except NotFinite as error:
            raise NotFinite(f"in the recipe of source {self.name}: {error}") from error
        self.bank.end()
        self.bank.measurement_cache.clear()  # what is measured can be as large as a tensor
        return out


def open_nested(name: str, recipe: Recipe, device: torch.device | str, log: Log | None) -> Nested:
    """A nested recipe as the model it makes.  Its bank holds nothing: the outer one holds the results."""
    try:
        bank = open_bank(recipe, device, capacity=0, log=log)
    except EvomergeError as error:
        raise EvomergeError(f"in the recipe of source {name}: {error}") from error
    return Nested(
        path=bank.models.base.path,
        config=dict(bank.layout.config),
        tensors=dict(bank.layout.tensors),
        handles={},
        name=name,
        recipe=recipe,
        bank=bank,
    )


def open_bank(
    recipe: Recipe,
    device: torch.device | str = "cpu",
    capacity: int | None = None,
    log: Log | None = None,
) -> Bank:
    """The bank of a recipe: all its models opened and checked against each other.

    log: who is told of compiled kernels, which large models then get; without it none.

    EvomergeError if a model cannot be found, or they do not fit together or into the recipe's slices and lists.
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
    nested = {name: m.bank.models.compatibility.notes for name, m in models.sources.items() if isinstance(m, Nested)}
    models.compatibility.notes += [
        f"in the recipe of source {name}: {note}" for name in nested for note in nested[name]
    ]
    compiled = compiled_for(models.base.tensors, device, log) if log else None
    bank = Bank(models, device, capacity, compiled, recipe.slices)
    check_fits(recipe, bank)
    return bank

"""A source that is a recipe itself: its tensors are merged in memory, one by one, when they are read."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import NotFinite, check_finite, materialise_tensor
from evomerge.merge.recipe.recipe import Recipe
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.tokenizer import Vocabulary


@dataclass
class NestedMerge(Checkpoint):
    """The model that a recipe makes, as a source of another recipe; it is never written to disk.

    path: the folder of its base.
    name: of the source in the outer recipe.
    recipe: the inner recipe.  bank: of the inner recipe's models.
    """

    name: str
    recipe: Recipe
    bank: Bank = field(repr=False)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return self.bank.models.vocabulary

    def is_stored(self, name: str) -> bool:
        return False

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """The merged tensor in the inner recipe's dtype, on its bank's device.  NotFinite if it has NaN or infinity."""
        name = self.stored_name(name)
        info = self.tensors[name]
        dtype = TORCH_DTYPES[self.recipe.dtype] if info.dtype.is_floating_point else info.dtype
        out = torch.empty(info.shape, dtype=dtype, device=self.bank.device)
        try:
            check_finite([name], materialise_tensor(self.recipe, self.bank, name, out)[None])
        except NotFinite as error:
            raise NotFinite(f"in the recipe of source {self.name}: {error}") from error
        self.bank.end()
        self.bank.measurement_cache.clear()  # measurements can be as large as a tensor
        return out


def nested_model(name: str, recipe: Recipe, bank: Bank) -> NestedMerge:
    """The model that a recipe makes.  name: of the source.  bank: of the recipe's models."""
    return NestedMerge(
        path=bank.models.base.path,
        config=dict(bank.layout.config),
        tensors=dict(bank.layout.tensors),
        handles={},
        name=name,
        recipe=recipe,
        bank=bank,
    )

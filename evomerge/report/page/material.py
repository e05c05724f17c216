"""What a page is made of: the status of a run, its study's attributes and the files in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.coefficients import numbers_and_lists
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.report.status import Status, read_status
from evomerge.search.run import Run
from evomerge.sources.locate import locate
from evomerge.sources.safetensors_files import stored_tensor_names
from evomerge.sources.tensor_names import layer_count

VALUE = {False: "value on the search items", True: "value on the search items (0: base, 1: best parent)"}


@dataclass(frozen=True)
class Material:
    """What a page is made of.

    attributes: of the study.
    """

    run: Run
    status: Status
    attributes: Mapping[str, Any]

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The content of verdict.json; None before the search has ended."""
        return self.status.verdict

    @property
    def value_title(self) -> str:
        """What the values of trials are."""
        return VALUE[self.status.relative]

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of the chosen candidate; None before the search has ended."""
        return load_recipe(self.run.winner_file) if self.verdict is not None else None

    @cached_property
    def layers(self) -> int:
        """How many layers the chosen candidate has."""
        assert self.recipe is not None, "layers are those of a chosen candidate"
        own = sum(part.length for part in self.recipe.slices)
        try:
            return own or layer_count(stored_tensor_names(locate(self.recipe.base.path)))
        except EvomergeError:  # the base is no longer there; lists of coefficients have a number for each layer
            given = [self.recipe.parameters, *(source.parameters for source in self.recipe.sources)]
            values = [v for knobs in given for c in knobs.values() for v in numbers_and_lists(c)]
            return max((len(v) for v in values if isinstance(v, list)), default=1)


def gather(run: Run) -> Material:
    """Read all that a page is made of.  EvomergeError if the study cannot be read."""
    return Material(run, read_status(run), run.study().user_attrs)

"""The statistics files of a recipe's sources, opened and checked once."""

from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.merge.measure.statistics_file import StatisticsFile, open_statistics_file
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.recipe import Recipe
from evomerge.sources.open_models import Models


class StatisticsFiles:
    """Open statistics files by path and source."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.opened: dict[tuple[str, str], StatisticsFile] = {}

    def of(self, recipe: Recipe, names: Sequence[str] | None = None) -> list[StatisticsFile]:
        """The statistics of a recipe's sources, or of those in `names`; [] if its method uses none.

        EvomergeError if a file does not fit its source, or two files do not have the same tensors.
        """
        kind = METHODS[recipe.method].statistics
        if kind is None:
            return []
        found = []
        for source in recipe.sources:
            if names is not None and source.name not in names:
                continue
            assert source.statistics is not None, "the recipe was not checked"
            key = (source.statistics, source.name)
            if key not in self.opened:
                self.opened[key] = open_statistics_file(Path(source.statistics), kind, source.name, self.models)
            found.append(self.opened[key])
        for other in found[1:]:
            if differing := sorted(other.names ^ found[0].names):
                raise EvomergeError(f"{other.path} and {found[0].path}: only one of them has {differing[0]}")
        return found

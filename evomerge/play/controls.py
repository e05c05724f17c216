"""What can be moved with the models of a playground, and the recipe after a move; sliders.py has the arithmetic."""

import math

from evomerge.merge.bank.bank import Bank
from evomerge.merge.recipe.recipe import Recipe
from evomerge.play.sliders import SHOWN, Moves, Slider, moved, shown_methods, shown_value, sliders, with_method
from evomerge.search.space.config_recipe import config_source
from evomerge.search.space.space import Space, changed_components
from evomerge.sources.tensor_names import tensor_role


class Controls:
    """The sliders of a search space over the models in a bank.

    sources: the names of all sources that may take part.
    """

    def __init__(self, space: Space, bank: Bank) -> None:
        self.space = space
        self.everyone = [config_source(source) for source in space.config.sources]
        self.sources = [source.name for source in self.everyone]
        tensors = bank.layout.tensors.items()
        self.places = [(tensor_role(n), math.prod(t.shape)) for n, t in tensors if t.dtype.is_floating_point]
        self.layers = bank.layers
        changed = changed_components(bank.models)
        self.reach = {n: {part.split(".")[0] for part in parts} - {*space.keep} for n, parts in changed.items()}

    @property
    def methods(self) -> list[str]:
        """The methods with sliders that these sources allow."""
        return shown_methods(len(self.sources), all(s.statistics for s in self.everyone))

    def movable(self, recipe: Recipe) -> bool:
        """Whether a recipe has sliders: one that takes whole layers of its sources has none."""
        return self.space.assembly is None and not recipe.slices

    def sliders(self, recipe: Recipe, split: bool) -> list[Slider]:
        """The sliders of a recipe.  split: one for each group of components."""
        return sliders(recipe.method, self.sources, self.reach, split) if self.movable(recipe) else []

    def shown(self, recipe: Recipe, slider: Slider) -> float:
        """Where a slider stands for a recipe, with two decimals."""
        return shown_value(recipe, slider, self.places, self.layers)

    def bounds(self, recipe: Recipe, slider: Slider) -> tuple[float, float]:
        """Both ends of a slider: what the search may propose, and where the slider stands, lie between them."""
        same = [g for g in self.space.groups if (g.knob, g.source) == (slider.knob, slider.source)]
        within = [self.shown(recipe, slider), *(g.low for g in same), *(g.high for g in same)]
        return min(0.0, *within), max(SHOWN[slider.knob], *within)

    def moved(self, recipe: Recipe, moves: Moves) -> Recipe:
        """The recipe after these moves, see `sliders.moved`."""
        return moved(recipe, moves, self.everyone, self.places, self.layers)

    def with_method(self, recipe: Recipe, method: str) -> Recipe:
        """The recipe with another method, see `sliders.with_method`."""
        return with_method(recipe, method, self.everyone)

    def summary(self, recipe: Recipe) -> str:
        """A recipe in a few words: its method and the mean weight of each source."""
        if all(slider.knob != "weight" for slider in self.sliders(recipe, split=False)):
            return recipe.method
        weights = ((s, Slider("weight", s)) for s in self.sources)
        return f"{recipe.method}, " + ", ".join(f"{s} {self.shown(recipe, slider):g}" for s, slider in weights)

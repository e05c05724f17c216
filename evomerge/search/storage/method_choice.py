"""The method that a study has chosen among those of its configuration, as the study keeps it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

METHOD = "evomerge:method"  # study attribute


@dataclass(frozen=True)
class DefaultRecipe:
    """The best default recipe of a method.

    name: of its baseline.
    value: on the search split; None if every default recipe of the method is broken.
    """

    name: str
    value: float | None


@dataclass(frozen=True)
class MethodChoice:
    """The method that is searched, and what it was chosen by.

    chosen: its name.
    best: every candidate method -> its best default recipe.
    """

    chosen: str
    best: dict[str, DefaultRecipe]

    @property
    def sentence(self) -> str:
        """The choice in words: `ties is searched: 0.83 (ties weight 0.5); linear 0.79, slerp broken`."""
        shown = {m: "broken" if d.value is None else f"{d.value:.4g}" for m, d in self.best.items()}
        rest = ", ".join(f"{method} {value}" for method, value in shown.items() if method != self.chosen)
        return f"{self.chosen} is searched: {shown[self.chosen]} ({self.best[self.chosen].name}); {rest}"

    def to_json(self) -> dict[str, Any]:
        """The choice as a study keeps it."""
        return asdict(self)


def recorded_choice(attributes: Mapping[str, Any]) -> MethodChoice | None:
    """The choice that a study has recorded, None if it has none.  attributes: the study's."""
    if (found := attributes.get(METHOD)) is None:
        return None
    return MethodChoice(found["chosen"], {method: DefaultRecipe(**best) for method, best in found["best"].items()})

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
    partial: the share of the items that were scored, of a recipe that a race stopped, whose value is estimated.
    """

    name: str
    value: float | None
    partial: float | None = None

    @property
    def text(self) -> str:
        """The value for people."""
        if self.value is None:
            return "broken"
        return f"{self.value:.4g}" if self.partial is None else f"about {self.value:.4g}"


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
        """The choice in words: `ties is searched: 0.83 (ties lambda 1); linear about 0.79, slerp broken`."""
        own = self.best[self.chosen]
        rest = ", ".join(f"{method} {found.text}" for method, found in self.best.items() if method != self.chosen)
        return f"{self.chosen} is searched: {own.text} ({own.name}); {rest}"

    def to_json(self) -> dict[str, Any]:
        """The choice as a study keeps it."""
        return asdict(self)


def recorded_choice(attributes: Mapping[str, Any]) -> MethodChoice | None:
    """The choice that a study has recorded, None if it has none.  attributes: the study's."""
    if (found := attributes.get(METHOD)) is None:
        return None
    return MethodChoice(found["chosen"], {method: DefaultRecipe(**best) for method, best in found["best"].items()})

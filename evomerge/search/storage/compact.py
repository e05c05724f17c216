"""Numbers and texts of trials, held so that a study of tens of thousands fits into memory.

As Python's own dicts and floats, 24 parameters take 1.4 kB a trial, and their names as much again.  Here the names
are there once for all trials, the numbers of a trial lie in one array, and its packed item scores in one text.
"""

from array import array
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

from optuna.distributions import BaseDistribution, FloatDistribution

Packed = Mapping[str, Mapping[str, str]]
"""Task -> metric -> the items' scores as text, see `item_scores.pack`."""

Value = TypeVar("Value", covariant=True)
BETWEEN = " "  # the texts of one trial; a packed text is base64, which has none


class ByName(Mapping[str, Value]):
    """Values by name; the names are the keys of one dict that serves many objects."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return repr(dict(self.items()))


class Numbers(ByName[float]):
    """Numbers by name, all of them float64.

    places: name -> its place in the array.
    numbers: in the order of the places.
    """

    __slots__ = ("numbers",)

    def __init__(self, places: dict[str, int], numbers: Iterable[float]) -> None:
        super().__init__(places)
        self.numbers = array("d", numbers)

    def __getitem__(self, name: str) -> float:
        place: int = self.names[name]
        return self.numbers[place]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, float]:
        """A dict of its own for whoever wants a copy."""
        return dict(self.items())

    def keys(self) -> KeysView[str]:
        return self.names.keys()

    def items(self) -> ItemsView[str, float]:
        return dict(zip(self.names, self.numbers, strict=True)).items()


def numbers_of(axes: Mapping[str, BaseDistribution], values: Iterable[float]) -> dict[str, Any] | None:
    """Parameters as `Numbers`, which are read as a dict is; None if one of them is no float.

    axes: what each is drawn from.  values: in their order.
    """
    if all(type(axis) is FloatDistribution for axis in axes.values()):
        return cast(dict[str, Any], Numbers(places_of(tuple(axes)), values))
    return None


class PackedScores(ByName[Mapping[str, str]]):
    """The packed item scores of one trial.

    layout: task -> its metrics.
    content: the texts in the order of the layout, BETWEEN them one character.
    means: what `agreement.means_of` computed of them last, after that by which it computed.
    """

    __slots__ = ("content", "means")

    def __init__(self, layout: dict[str, tuple[str, ...]], content: str) -> None:
        super().__init__(layout)
        self.content = content
        self.means: tuple[object, Numbers, Numbers] | None = None

    def __getitem__(self, task: str) -> dict[str, str]:
        metrics = self.names[task]
        first = 0
        for other, passed in self.names.items():
            if other == task:
                break
            first += len(passed)
        texts = self.content.split(BETWEEN)
        return dict(zip(metrics, texts[first : first + len(metrics)], strict=True))

    def items(self) -> ItemsView[str, Mapping[str, str]]:
        texts = iter(self.content.split(BETWEEN))
        return {task: {m: next(texts) for m in metrics} for task, metrics in self.names.items()}.items()


def compact_scores(scores: Packed) -> Packed:
    """The same scores as one text; as they are if a text is none that `pack` makes."""
    if isinstance(scores, PackedScores) or not scores:
        return scores
    texts = [text for metrics in scores.values() for text in metrics.values()]
    if any(BETWEEN in text for text in texts):
        return scores
    return PackedScores(layout_of(tuple((task, tuple(by)) for task, by in scores.items())), BETWEEN.join(texts))


@lru_cache(maxsize=256)
def layout_of(names: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, tuple[str, ...]]:
    """One dict of tasks and their metrics for all trials that were scored by the same."""
    return dict(names)


@lru_cache(maxsize=256)
def places_of(names: tuple[str, ...]) -> dict[str, int]:
    """One dict of names and their places for all objects with the same names."""
    return {name: place for place, name in enumerate(names)}


@lru_cache(maxsize=1024)
def interned(value: Any) -> Any:
    """One object for all equal values, which can be hashed."""
    return value

"""What a mergekit file says, in its own words."""

from dataclasses import dataclass, field

from evomerge.merge.mergekit.mergekit_methods import Scalar


@dataclass(frozen=True)
class Reference:
    """A model, and perhaps an adapter on it: `model+lora`.  Paths are absolute, hub ids as they are.

    merged: `model` is no path but the name of another document of the file, whose merge is meant.
    """

    model: str
    lora: str | None = None
    merged: bool = False


@dataclass(frozen=True)
class Entry:
    """The value of a parameter for the tensors whose name contains `filter` (None: for all).  values: a gradient's
    knots, a single one, or none (the next scope decides)."""

    filter: str | None
    values: tuple[Scalar, ...]


Settings = dict[str, list[Entry]]


@dataclass(frozen=True)
class Input:
    """A model in a slice.  layers: which of its layers [start, end), None for all."""

    model: Reference
    layers: tuple[int, int] | None
    settings: Settings


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output.  base: the slice's own base model, if it names one."""

    inputs: list[Input]
    settings: Settings
    base: Reference | None = None


@dataclass
class MergekitFile:
    """settings: for all models and slices, highest precedence first (the module's, the file's)."""

    method: str
    base: Reference | None
    slices: list[Slice]
    settings: list[Settings]
    dtype: str | None = None
    tokenizer: str | Reference | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

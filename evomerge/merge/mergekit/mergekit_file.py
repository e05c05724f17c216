"""What a mergekit file says, in mergekit's own words: models, slices, parameters."""

from dataclasses import dataclass, field

from evomerge.merge.mergekit.mergekit_methods import Scalar


@dataclass(frozen=True)
class ModelReference:
    """A model, or an adapter on it: `model+lora`.

    model: an absolute path or a hub id.  lora: the same of the adapter.
    merged: `model` is the name of another document of the file, and its merge is meant.
    """

    model: str
    lora: str | None = None
    merged: bool = False


@dataclass(frozen=True)
class ConditionalParameter:
    """The value of a parameter for the tensors whose name contains `filter`; without a filter, for all tensors.

    values: one value, the values of a gradient, or none; then the next scope decides.
    """

    filter: str | None
    values: tuple[Scalar, ...]


Parameters = dict[str, list[ConditionalParameter]]
"""The parameters of one scope of a file (a model, a slice, a module, the file): name -> its values, the first that fits
a tensor counts."""


@dataclass(frozen=True)
class InputModel:
    """A model in a slice.

    layers: the layers [start, end) of it; None for all.
    """

    model: ModelReference
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output.

    base: the slice's own base model, if it names one.
    """

    inputs: list[InputModel]
    parameters: Parameters
    base: ModelReference | None = None


@dataclass
class MergekitFile:
    """One merge of a mergekit file.

    parameters: those for all models and slices, highest precedence first (the module's, the file's).
    notes: what was ignored, a line each.
    """

    method: str
    base: ModelReference | None
    slices: list[OutputSlice]
    parameters: list[Parameters]
    dtype: str | None = None
    tokenizer: str | ModelReference | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

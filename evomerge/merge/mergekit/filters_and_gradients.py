"""The value of a mergekit parameter for one tensor: precedence, filters by name, gradients along the layers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evomerge.merge.mergekit.mergekit_file import InputModel, OutputSlice, Parameters
from evomerge.merge.mergekit.mergekit_methods import ParameterKind, Scalar, parameter_kind
from evomerge.sources.tensor_names import layer_count, name_in_layer, tensor_role


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output.

    slice: the slice that it belongs to.
    t: its position on the gradients of that slice, from 0 to 1; 0 for tensors outside the layers.
    step: the number of layers before its own in that slice; None for tensors outside the layers.
    """

    name: str
    slice: OutputSlice
    t: float
    step: int | None

    def name_in(self, model: InputModel) -> str:
        """The name of the tensor in an input model, whose layers have other numbers."""
        if self.step is None or model.layers is None:
            return self.name
        return name_in_layer(self.name, model.layers[0] + self.step)


def output_tensors(slices: list[OutputSlice], names: list[str]) -> Iterator[OutputTensor]:
    """The tensors of the output.

    names: the tensors of the base model.

    Embeddings belong to the first slice, other tensors outside the layers to the last.
    """
    layers = layer_count(names)
    for name in names:
        role = tensor_role(name)
        if role.layer is None:
            yield OutputTensor(name, slices[0 if role.component == "embedding" else -1], 0.0, None)
    done = 0
    for part in slices:
        first, end = part.inputs[0].layers or (0, layers)
        for step in range(end - first):
            t = step / (end - first - 1) if end - first > 1 else 1.0
            like = min(first + step, layers - 1)
            in_layer = (name for name in names if tensor_role(name).layer == like)
            yield from (OutputTensor(name_in_layer(name, done), part, t, step) for name in in_layer)
            done += 1


def parameter_at(scopes: Iterable[Parameters], parameter: str, name: str, t: float) -> Scalar | None:
    """The value of a parameter for the tensor called `name`; None if no scope gives one.

    scopes: in order of precedence; in each, the first entry whose filter fits counts.
    t: the tensor's position on gradients.
    """
    for parameters in scopes:
        fitting = (e for e in parameters.get(parameter, []) if e.filter is None or e.filter in name)
        if (entry := next(fitting, None)) and entry.values:
            return gradient_value(entry.values, t, parameter_kind(parameter))
    return None


def gradient_value(values: tuple[Scalar, ...], t: float, kind: ParameterKind) -> Scalar:
    """The value at position t, from 0 to 1, of a gradient whose values are evenly spread over the layers.

    Numbers are interpolated linearly; booleans change at the positions of the values.
    """
    at = t * (len(values) - 1)
    left = int(at)
    if kind == "boolean":
        return values[left]
    right = min(left + 1, len(values) - 1)
    return (1 - (at - left)) * values[left] + (at - left) * values[right]

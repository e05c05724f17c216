"""mergekit's value of a parameter at a tensor: scopes, filters, gradients, and where on them a tensor is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evomerge.merge.mergekit.mergekit_file import Input, Settings, Slice
from evomerge.merge.mergekit.mergekit_methods import Kind, Scalar, kind
from evomerge.sources.tensor_names import layer_count, name_in_layer, tensor_role


@dataclass(frozen=True)
class Tensor:
    """A tensor of the output.  t: where it is on the gradients of its slice, 0 to 1; outside the stack 0.
    step: how many layers it is from the beginning of its slice, None outside the stack."""

    name: str
    slice: Slice
    t: float
    step: int | None

    def name_in(self, model: Input) -> str:
        """What the tensor is called in an input, whose layers have numbers of their own."""
        if self.step is None or model.layers is None:
            return self.name
        return name_in_layer(self.name, model.layers[0] + self.step)


def output_tensors(slices: list[Slice], names: list[str]) -> Iterator[Tensor]:
    """The tensors of the output, of a model whose tensors have these names: those outside the stack belong to the
    first slice (embeddings) or to the last."""
    layers = layer_count(names)
    for name in names:
        if tensor_role(name).layer is None:
            yield Tensor(name, slices[0 if tensor_role(name).component == "embedding" else -1], 0.0, None)
    done = 0
    for part in slices:
        first, end = part.inputs[0].layers or (0, layers)
        for step in range(end - first):
            t = step / (end - first - 1) if end - first > 1 else 1.0
            like = min(first + step, layers - 1)
            yield from (Tensor(name_in_layer(n, done), part, t, step) for n in names if tensor_role(n).layer == like)
            done += 1


def setting_at(scopes: Iterable[Settings], parameter: str, name: str, t: float) -> Scalar | None:
    """The value of a parameter at a tensor: the first scope whose first entry for it has one decides."""
    for settings in scopes:
        fitting = (e for e in settings.get(parameter, []) if e.filter is None or e.filter in name)
        if (entry := next(fitting, None)) and entry.values:
            return on_gradient(entry.values, t, kind(parameter))
    return None


def on_gradient(values: tuple[Scalar, ...], t: float, of: Kind) -> Scalar:
    """The value at t between evenly spread knots, on straight lines; booleans change at the knots."""
    at = t * (len(values) - 1)
    left = int(at)
    if of == "boolean":
        return values[left]
    right = min(left + 1, len(values) - 1)
    return (1 - (at - left)) * values[left] + (at - left) * values[right]

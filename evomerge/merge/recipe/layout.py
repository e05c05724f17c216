"""The layout of a merged model: its tensors, and for each of them the tensors of the models that it is made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.sliced_config import find_layer_stack, sliced_config
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
from evomerge.sources.open_models import Models
from evomerge.sources.tensor_names import coefficient_layer, layer_count, name_in_layer, tensor_role


@dataclass(frozen=True)
class Layout:
    """The tensors and the configuration of a merged model.

    tensors: every output tensor, in the base's order.
    layers: the number of layers.
    config: the output's config.json, except for `dtype`.
    origins: output tensor -> model (`base`, or a source's name) -> the tensor of that model which goes into it; empty
        if every model uses the output's name.
    left_out: tensors of the base that the output cannot have.
    """

    tensors: Mapping[str, TensorInfo]
    layers: int
    config: Mapping[str, Any]
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    def origin(self, model: str, name: str) -> str | None:
        """The tensor of a model that goes into the output tensor `name`; None if the model has no part in it."""
        return self.origins[name].get(model) if self.origins else name


def build_layout(models: Models, slices: Sequence[Slice] = ()) -> Layout:
    """The layout of the base, or the layout that slices describe.

    Tensors outside the layers are made of the models of the nearest slice, as in mergekit: the first slice for
    embeddings and other tensors before the layers, the last for the final norm and the head.

    EvomergeError if a model lacks a layer or a tensor, two models have layers of different kinds in one place, or the
    slices do not fit the architecture.
    """
    base = models.base
    if not slices:
        return Layout(base.tensors, layer_count(list(base.tensors)), base.config)
    opened: dict[str, Checkpoint] = {BASE: base}
    opened |= {n: m.base if isinstance(m, Adapter) else m for n, m in models.sources.items()}
    stacks = {name: find_layer_stack(name, model) for name, model in opened.items()}
    check_ranges(slices, {name: stack.depth for name, stack in stacks.items()})
    # One mapping per output layer: model -> its layer.  Models in the order of the recipe, the base first.
    order = [name for name in opened if any(name in s.layers for s in slices)]
    output_layers = [{n: s.layers[n][0] + i for n in order if n in s.layers} for s in slices for i in range(s.length)]
    if not output_layers:
        raise EvomergeError("slices: none of them has a layer")
    outside = [[n for n in order if n in s.layers] for s in (slices[0], slices[-1])]
    origins: dict[str, dict[str, str]] = {}
    left_out = []
    layers_written = False
    for name in base.tensors:
        role = tensor_role(name)
        if role.layer is None:
            if role.encoder_layer is not None:
                members: Iterable[str] = output_layers[coefficient_layer(role, len(output_layers))]
            else:
                members = outside[coefficient_layer(role, 2)]
            origins[name] = dict.fromkeys(members, name)
        elif role.layer >= stacks[BASE].depth:
            left_out.append(name)
        elif not layers_written:
            for number, members_of_layer in enumerate(output_layers):
                origins |= layer_origins(number, members_of_layer, opened)
            layers_written = True
    tensors = {name: common_info(name, origin, opened) for name, origin in origins.items()}
    config = sliced_config(base.config, output_layers, stacks, origins)
    return Layout(tensors, len(output_layers), config, origins, left_out)


def check_ranges(slices: Sequence[Slice], layers: Mapping[str, int]) -> None:
    """EvomergeError if a slice names a layer that a model does not have.  layers: model -> its number of layers."""
    for number, part in enumerate(slices):
        for name, (start, end) in part.layers.items():
            if start < end and end > layers[name]:
                raise EvomergeError(
                    f"slices.{number}.layers.{name}: [{start}, {end}] goes beyond the {layers[name]} layers of {name}"
                )


def layer_origins(
    layer: int, members: Mapping[str, int], opened: Mapping[str, Checkpoint]
) -> dict[str, dict[str, str]]:
    """The origins of the tensors of one output layer: output tensor -> model -> its tensor.

    members: the models of this layer -> the number of the layer in that model.
    EvomergeError if their layers have different tensors.
    """
    inside = {n: [t for t in opened[n].tensors if tensor_role(t).layer == at] for n, at in members.items()}
    model, *others = members
    known = {name_in_layer(t, layer) for t in inside[model]}
    for other in others:
        if differing := known ^ {name_in_layer(t, layer) for t in inside[other]}:
            raise EvomergeError(
                f"layer {layer} of the slices: layer {members[model]} of {model} and layer {members[other]} of {other} "
                f"have different tensors, such as {min(differing)}"
            )
    return {
        name_in_layer(tensor, layer): {n: name_in_layer(tensor, at) for n, at in members.items()}
        for tensor in inside[model]
    }


def common_info(name: str, origin: Mapping[str, str], opened: Mapping[str, Checkpoint]) -> TensorInfo:
    """The shape that all origins of an output tensor have, with the type of the first.

    EvomergeError if a model lacks its tensor, or two shapes differ.
    """
    stored = {model: opened[model].stored_name(tensor) for model, tensor in origin.items()}
    if lacking := [model for model, tensor in stored.items() if tensor not in opened[model].tensors]:
        raise EvomergeError(f"slices: {lacking[0]} lacks the tensor {stored[lacking[0]]}")
    infos = {model: opened[model].tensors[tensor] for model, tensor in stored.items()}
    first = next(iter(infos.values()))
    for model, info in infos.items():
        if info.shape != first.shape:
            raise EvomergeError(
                f"{name}: is made of {origin[model]} of {model}, {info.shape}, and of {next(iter(origin.values()))} "
                f"of {next(iter(origin))}, {first.shape}; tensors of one layer must have one shape"
            )
    return first

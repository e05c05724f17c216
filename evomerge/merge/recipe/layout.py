"""The layout of a merged model: which tensors it has, and which tensor of each model goes into each of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.assembly import assembled_config, find_stack
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.sources.adapter import Adapter
from evomerge.sources.anatomy import at_layer, layer_count, place, relative_depth
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
from evomerge.sources.models import Models


@dataclass(frozen=True)
class Layout:
    """What a merge makes.

    tensors: every output tensor, in the base's order.  layers: of the output.  config: the output's, but for `dtype`.
    origins: output tensor -> model -> the tensor of that model which goes into it; empty if each is its namesake's.
    left_out: tensors of the base that the output cannot have.
    """

    tensors: Mapping[str, TensorInfo]
    layers: int
    config: Mapping[str, Any]
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    def origin(self, model: str, name: str) -> str | None:
        """The tensor of a model (`base`, or a source's name) that goes into `name`; None if it takes no part there."""
        return self.origins[name].get(model) if self.origins else name


def build_layout(models: Models, slices: Sequence[Slice] = ()) -> Layout:
    """The base's own layout, or that which slices assemble.

    Tensors outside the stack are made of the models of the nearest slice: the first for embeddings and what else comes
    before the stack, the last for the final norm and the head (as in mergekit).  EvomergeError if a model lacks a layer
    or a tensor, two models differ in what one layer is, or slices do not fit the architecture.
    """
    base = models.base
    if not slices:
        return Layout(base.tensors, layer_count(list(base.tensors)), base.config)
    opened: dict[str, Checkpoint] = {BASE: base}
    opened |= {n: m.base if isinstance(m, Adapter) else m for n, m in models.sources.items()}
    stacks = {name: find_stack(name, model) for name, model in opened.items()}
    check_ranges(slices, {name: stack.depth for name, stack in stacks.items()})
    # One row per output layer: model -> its layer.  Models in the order of the recipe, the base first.
    order = [name for name in opened if any(name in s.layers for s in slices)]
    rows = [{n: s.layers[n][0] + i for n in order if n in s.layers} for s in slices for i in range(s.length)]
    if not rows:
        raise EvomergeError("slices: none of them has a layer")
    outside = [[n for n in order if n in s.layers] for s in (slices[0], slices[-1])]
    origins: dict[str, dict[str, str]] = {}
    left_out = []
    stack_written = False
    for name in base.tensors:
        where = place(name)
        if where.layer is None:
            within = where.encoder_layer is not None
            among = rows[relative_depth(where, len(rows))] if within else outside[relative_depth(where, 2)]
            origins[name] = dict.fromkeys(among, name)
        elif where.layer >= stacks[BASE].depth:
            left_out.append(name)
        elif not stack_written:
            origins |= {out: origin for layer, row in enumerate(rows) for out, origin in layer_of(layer, row, opened)}
            stack_written = True
    tensors = {name: common_info(name, origin, opened) for name, origin in origins.items()}
    return Layout(tensors, len(rows), assembled_config(base.config, rows, stacks, origins), origins, left_out)


def check_ranges(slices: Sequence[Slice], layers: Mapping[str, int]) -> None:
    for number, part in enumerate(slices):
        for name, (start, end) in part.layers.items():
            if start < end and end > layers[name]:
                raise EvomergeError(
                    f"slices.{number}.layers.{name}: [{start}, {end}] goes beyond the {layers[name]} layers of {name}"
                )


def layer_of(
    layer: int, row: Mapping[str, int], opened: Mapping[str, Checkpoint]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The tensors of one output layer, each with its origins.  EvomergeError if two models have different ones."""
    inside = {n: [t for t in opened[n].tensors if place(t).layer == at] for n, at in row.items()}
    model, *others = row
    known = {at_layer(t, layer) for t in inside[model]}
    for other in others:
        if differing := known ^ {at_layer(t, layer) for t in inside[other]}:
            raise EvomergeError(
                f"layer {layer} of the slices: layer {row[model]} of {model} and layer {row[other]} of {other} have "
                f"different tensors, such as {min(differing)}"
            )
    for tensor in inside[model]:
        yield at_layer(tensor, layer), {n: at_layer(tensor, at) for n, at in row.items()}


def common_info(name: str, origin: Mapping[str, str], opened: Mapping[str, Checkpoint]) -> TensorInfo:
    """The shape that all origins of a tensor have, with the type of the first."""
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

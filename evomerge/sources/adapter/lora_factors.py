"""One adapted layer: which parameter it is, and how its product lies in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from evomerge.sources.adapter.adapter_file import Layer
from evomerge.sources.architecture import Names, Part, bare


class AdapterError(ValueError):
    """Why an adapter does not fit its base; BASE stands for the base's name."""


def parameter_of(layer: Layer, config: Mapping[str, Any], names: Names) -> tuple[str, str]:
    """The parameter that a layer adapts, and the name that alpha patterns are compared with.

    A module is adapted as a whole, in its `weight`, or in those of its parameters that `target_parameters` names;
    PEFT wraps the first of them first, so that the last is the outermost.
    """
    targets = tuple(config.get("target_parameters") or ())
    module = names.modules.get(bare(layer.module)) if targets else None
    own = [] if module is None else [f"{layer.module}.{name}" for name, _ in module.named_parameters(recurse=False)]
    named = [name for name in own if name in targets or name.endswith(tuple(f".{target}" for target in targets))]
    if layer.depth < len(named):
        found = named[len(named) - 1 - layer.depth]
        return found, found
    if layer.depth:
        raise AdapterError(
            f"{layer.module} has {layer.depth + 1} adapted parameters, of which target_parameters names {len(named)} "
            "in BASE; with an architecture that transformers does not know they cannot be told apart"
        )
    return f"{layer.module}.weight", layer.module


def factors(
    layer: Layer,
    parameter: str,
    pair: Mapping[str, Tensor],
    parts: Sequence[Part],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    names: Names,
) -> tuple[Tensor, Tensor, int]:
    """left (rows, rank) and right (rank, columns) of a product as its parameter lies in memory, and the rank.

    shapes: of the parameter's parts.  With stacked experts both have an axis for them in front.
    """
    a, b = pair["A"], pair["B"]  # (rank, in), (out, rank)
    if a.ndim == 2 and not a.shape[0]:
        raise AdapterError(f"{parameter} has rank 0")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{parameter} has A {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks differ")
    shape = shape_in_memory(parts, shapes)
    if layer.embedding:
        return a.T.contiguous(), b.T.contiguous(), a.shape[0]
    if len(shape) == 3:
        return expert_factors(parameter, a, b, shape, names)
    if is_turned(parameter, (b.shape[0], a.shape[1]), shape, config, names):
        return a.T.contiguous(), b.T.contiguous(), a.shape[0]
    return b, a, a.shape[0]


def shape_in_memory(parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the parameter that these tensors make."""
    shape = shapes[parts[0].tensor]
    rows = max(part.rows.stop for part in parts if part.rows) if parts[0].rows else shape[0]
    experts = [part.expert for part in parts if part.expert is not None]
    return (*([1 + max(experts)] if experts else []), rows, *shape[1:])


def expert_factors(
    parameter: str, a: Tensor, b: Tensor, shape: Sequence[int], names: Names
) -> tuple[Tensor, Tensor, int]:
    """The factors of stacked experts: A is (experts * rank, in), B is (out, rank * experts), as PEFT keeps them."""
    experts = shape[0]
    if a.shape[0] % experts:
        raise AdapterError(f"{parameter} has rank {a.shape[0]} for {experts} experts")
    each_a = a.reshape(experts, -1, a.shape[1])  # (experts, rank, in)
    each_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, rank)
    turned = (a.shape[1], b.shape[0]) == tuple(shape[1:])
    if turned and shape[1] == shape[2]:
        turned = bool(getattr(names.module_of(parameter), "is_transposed", False))
    if turned:
        return each_a.transpose(1, 2), each_b.transpose(1, 2), each_a.shape[1]
    return each_b, each_a, each_a.shape[1]


def is_turned(
    parameter: str, product: tuple[int, int], shape: Sequence[int], config: Mapping[str, Any], names: Names
) -> bool:
    """Whether a layer stores its weight (in, out), as transformers' Conv1D does.

    The layer's class decides, as in PEFT, which corrects `fan_in_fan_out` by it layer by layer; of an architecture
    that transformers does not know, the shape.
    """
    from transformers.pytorch_utils import Conv1D

    module = names.module_of(parameter)
    if module is not None:
        return isinstance(module, Conv1D)
    if product[0] != product[1] or config.get("fan_in_fan_out") is None:
        if product[0] == product[1] == shape[0]:
            raise AdapterError(
                f"{parameter} is square, and transformers does not know the architecture of BASE; say in "
                "adapter_config.json by `fan_in_fan_out: true` or `false` whether it is stored (in, out)"
            )
        return product == tuple(reversed(shape))
    return bool(config["fan_in_fan_out"])

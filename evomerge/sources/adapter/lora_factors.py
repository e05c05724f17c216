"""The factors of one adapted parameter: which parameter they belong to, and A and B in the layout of that parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from evomerge.sources.adapter.adapter_file import AdaptedLayer
from evomerge.sources.adapter.parameter_names import ParameterNames, ParameterPart, without_wrappers


class AdapterError(ValueError):
    """The adapter does not fit its base.  `BASE` in the message stands for the base's name."""


def adapted_parameter(layer: AdaptedLayer, config: Mapping[str, Any], names: ParameterNames) -> tuple[str, str]:
    """The name of the parameter that a pair of factors adapts, and the name that alpha patterns are compared with.

    That is the `weight` of the module, or one of its parameters that `target_parameters` names.  PEFT wraps the first
    of those first, so the last one is the outermost.  AdapterError if it cannot be told which parameter is meant.
    """
    targets = tuple(config.get("target_parameters") or ())
    module = names.modules.get(without_wrappers(layer.module)) if targets else None
    own = [] if module is None else [f"{layer.module}.{name}" for name, _ in module.named_parameters(recurse=False)]
    named = [name for name in own if name in targets or name.endswith(tuple(f".{target}" for target in targets))]
    if layer.nesting < len(named):
        found = named[len(named) - 1 - layer.nesting]
        return found, found
    if layer.nesting:
        raise AdapterError(
            f"{layer.module} has {layer.nesting + 1} adapted parameters, of which target_parameters names {len(named)} "
            "in BASE; with an architecture that transformers does not know they cannot be told apart"
        )
    return f"{layer.module}.weight", layer.module


def factors_in_memory(
    layer: AdaptedLayer,
    parameter: str,
    pair: Mapping[str, Tensor],
    parts: Sequence[ParameterPart],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    names: ParameterNames,
) -> tuple[Tensor, Tensor, int]:
    """The factors whose product has the layout of the parameter in memory.

    parameter: the name of the adapted parameter, for messages and to find its module.
    pair: A (R, in) and B (out, R) as PEFT stores them.
    parts: the tensors of the checkpoint that hold the parameter.  shapes: of these tensors, by name.
    config: PEFT's.

    Returns left (rows, R), right (R, columns) and the rank R; with stacked experts both have an axis of experts in
    front.  AdapterError if the shapes do not fit.
    """
    a, b = pair["A"], pair["B"]  # (R, in), (out, R)
    if a.ndim == 2 and not a.shape[0]:
        raise AdapterError(f"{parameter} has rank 0")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{parameter} has A {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks differ")
    shape = shape_in_memory(parts, shapes)
    if layer.embedding:
        return a.T.contiguous(), b.T.contiguous(), a.shape[0]
    if len(shape) == 3:
        return expert_factors(parameter, a, b, shape, names)
    if is_stored_transposed(parameter, (b.shape[0], a.shape[1]), shape, config, names):
        return a.T.contiguous(), b.T.contiguous(), a.shape[0]
    return b, a, a.shape[0]


def shape_in_memory(parts: Sequence[ParameterPart], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the parameter that these tensors hold together."""
    shape = shapes[parts[0].tensor]
    rows = max(part.rows.stop for part in parts if part.rows) if parts[0].rows else shape[0]
    experts = [part.expert for part in parts if part.expert is not None]
    return (*([1 + max(experts)] if experts else []), rows, *shape[1:])


def expert_factors(
    parameter: str, a: Tensor, b: Tensor, shape: Sequence[int], names: ParameterNames
) -> tuple[Tensor, Tensor, int]:
    """The factors of stacked experts.

    a: (experts * R, in), b: (out, R * experts), as PEFT stores them.  shape: (experts, ...) of the parameter in memory.

    Returns left (experts, rows, R), right (experts, R, columns) and R.
    """
    experts = shape[0]
    if a.shape[0] % experts:
        raise AdapterError(f"{parameter} has rank {a.shape[0]} for {experts} experts")
    each_a = a.reshape(experts, -1, a.shape[1])  # (experts, R, in)
    each_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, R)
    transposed = (a.shape[1], b.shape[0]) == tuple(shape[1:])
    if transposed and shape[1] == shape[2]:
        transposed = bool(getattr(names.module_of(parameter), "is_transposed", False))
    if transposed:
        return each_a.transpose(1, 2), each_b.transpose(1, 2), each_a.shape[1]
    return each_b, each_a, each_a.shape[1]


def is_stored_transposed(
    parameter: str, product: tuple[int, int], shape: Sequence[int], config: Mapping[str, Any], names: ParameterNames
) -> bool:
    """Whether a layer stores its weight as (in, out), as the Conv1D of transformers does.

    product: the shape of B A.  shape: that of the parameter.

    The layer's class decides, as in PEFT, which corrects `fan_in_fan_out` by it layer by layer.  If transformers does
    not know the architecture, the shape decides.
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

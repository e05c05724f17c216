"""From the tensors of an adapter's file to the change that each tensor of the base undergoes: `read_changes`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evomerge.sources.adapter.adapter_file import AdapterFile
from evomerge.sources.adapter.lora_factors import AdapterError, adapted_parameter, factors_in_memory
from evomerge.sources.adapter.parameter_names import ParameterNames, ParameterPart
from evomerge.sources.adapter.peft_config import is_saved_module, lora_scale, trained_tokens
from evomerge.sources.adapter.tensor_change import LowRank, TensorChange
from evomerge.sources.checkpoint import is_embedding, is_head


def read_changes(
    file: AdapterFile, config: Mapping[str, Any], names: ParameterNames
) -> tuple[dict[str, TensorChange], set[str]]:
    """The change that an adapter makes to each tensor of its base.

    config: PEFT's.  names: of the base's parameters.

    Returns tensor of the base -> change, and the tensors that `modules_to_save` trained as matrices of their own, even
    if the base ties them to another.  AdapterError if a tensor does not fit the base.
    """
    changes: dict[str, TensorChange] = {}
    saved: set[str] = set()

    def record(tensor: str, **new: Any) -> None:
        change = changes.setdefault(tensor, TensorChange())
        for key, value in new.items():
            if getattr(change, key) is not None:
                raise AdapterError(f"{tensor} is there twice, under two names of its module")
            setattr(change, key, value)

    check_parameters_exist(file, config, names)
    for (module, parameter), tensor in file.whole.items():
        for part in base_parts(f"{module}.{parameter}", names):
            record(part.tensor, whole=part_of_tensor(tensor, part, names))
            if is_saved_module(config, module) or module in file.saved_modules:
                saved.add(part.tensor)
    for module, tensor in file.rows.items():
        for part in base_parts(f"{module}.weight", names):
            record(part.tensor, rows=trained_rows(module, tensor, config))
            check_rows(part.tensor, changes[part.tensor], names.shapes[part.tensor])
    for name, product in low_rank_changes(file, config, names, changes):
        record(name, low_rank=product)
    for module, tensor in file.biases.items():
        pair = next(p for layer, p in file.pairs.items() if layer.module == module)
        scaled = tensor.float() * lora_scale(config, module, pair["A"].shape[0])
        for part in base_parts(f"{module}.bias", names):
            record(part.tensor, added=part_of_tensor(scaled, part, names))
    return changes, saved


def check_parameters_exist(file: AdapterFile, config: Mapping[str, Any], names: ParameterNames) -> None:
    """AdapterError if the adapter changes a parameter that the base does not have."""
    needed = [adapted_parameter(layer, config, names)[0] for layer in file.pairs]
    needed += [f"{module}.weight" for module in file.rows]
    needed += [".".join(key) for key in file.whole]
    if unknown := [name for name in needed if not base_parts(name, names)]:
        raise AdapterError(
            f"changes {len(unknown)} tensor(s) that BASE does not have, "
            f"the first is {unknown[0]}; is this the adapter's base model?"
        )
    if unknown := [module for module in file.biases if not base_parts(f"{module}.bias", names)]:
        raise AdapterError(f"lora_bias is set, but {unknown[0]} has no bias in BASE that it could be added to")


def base_parts(name: str, names: ParameterNames) -> list[ParameterPart]:
    """The tensors of the base that hold a parameter; none if the base lacks it.

    AdapterError if they are stored in another form than the parameter.
    """
    try:
        return names.parts_of(name) or []
    except ValueError as error:
        raise AdapterError(
            f"{name} is stored in another form in BASE ({error} when it is loaded); merge the adapter into a "
            "checkpoint with PEFT first"
        ) from error


def part_of_tensor(tensor: Tensor, part: ParameterPart, names: ParameterNames) -> Tensor:
    """The part of a whole parameter that belongs to one tensor of the base.

    An embedding or a head may have more rows than the base's.  AdapterError if the part has another shape.
    """
    if part.expert is not None and part.expert < tensor.shape[0]:
        tensor = tensor[part.expert]
    found = tensor if part.rows is None else tensor[part.rows]
    expected = names.shapes[part.tensor]
    by_token = is_head(part.tensor) or is_embedding(part.tensor)
    if tuple(found.shape[1:] if by_token else found.shape) != (expected[1:] if by_token else expected):
        raise AdapterError(f"{part.tensor} is {tuple(found.shape)}, in BASE {expected}")
    return found


def trained_rows(module: str, values: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The row numbers (tokens,) of `trainable_token_indices`, and the rows (tokens, width).

    AdapterError if the file has another number of rows than the configuration.
    """
    tokens = trained_tokens(config, module)
    if len({*tokens}) != len(values) or len(tokens) != len(values):
        raise AdapterError(f"{module} has {len(values)} trained rows, trainable_token_indices names {len(tokens)}")
    return torch.tensor(tokens, dtype=torch.int64), values


def check_rows(name: str, change: TensorChange, shape: tuple[int, ...]) -> None:
    """AdapterError if trained rows have another width than the base's, or a new row is left without a value."""
    assert change.rows is not None
    indices, values = change.rows
    if len(shape) != 2 or tuple(values.shape[1:]) != shape[1:]:
        raise AdapterError(f"{name} has trained rows of {tuple(values.shape[1:])}, in BASE it is {shape}")
    have = shape[0] if change.whole is None else change.whole.shape[0]
    lacking = sorted({*range(have, change.row_count(shape[0]))} - {*indices.tolist()})
    if lacking:
        raise AdapterError(f"{name} has {have} rows in BASE, and the adapter trains none for token {lacking[0]}")


def low_rank_changes(
    file: AdapterFile, config: Mapping[str, Any], names: ParameterNames, changes: Mapping[str, TensorChange]
) -> Iterator[tuple[str, LowRank]]:
    """Each tensor of the base that a pair of factors changes, with the product that is added to it.

    changes: those found so far, which may have given a tensor more rows.  AdapterError if a product has another shape.
    """
    for layer, pair in file.pairs.items():
        parameter, name_for_alpha = adapted_parameter(layer, config, names)
        parts = base_parts(parameter, names)
        shapes = {part.tensor: names.shapes[part.tensor] for part in parts}
        for name, shape in shapes.items():
            change = changes.get(name)
            shapes[name] = (shape[0] if change is None else change.row_count(shape[0]), *shape[1:])
        left, right, rank = factors_in_memory(layer, parameter, pair, parts, shapes, config, names)
        scale = lora_scale(config, name_for_alpha, rank)
        for part in parts:
            rows = slice(None) if part.rows is None else part.rows
            at = (rows,) if part.expert is None else (part.expert, rows)
            product = LowRank(left[at], right if part.expert is None else right[part.expert], scale)
            if product.shape != shapes[part.tensor]:
                found, expected = ("x".join(map(str, s)) for s in (product.shape, shapes[part.tensor]))
                raise AdapterError(f"{part.tensor} is {found} in the adapter and {expected} in BASE")
            yield part.tensor, product


def stays_tied(changes: dict[str, TensorChange], saved: set[str], embedding: str | None, head: str) -> bool:
    """Whether the head of a tied base is still the embedding under an adapter.

    changes: completed in place, as PEFT's own model computes: an embedding or a head that is adapted, or trained as a
        whole, changes alone; a matrix that is loaded into the shared weight (a longer vocabulary) changes both, and so
        do trained rows of the embedding.  If the two stay tied, only the embedding's change is kept.
    saved: the tensors that `modules_to_save` trained as matrices of their own.
    """
    if embedding is None:
        return True
    for one, other in ((embedding, head), (head, embedding)):
        change, twin = changes.get(one), changes.get(other) or TensorChange()
        if change is None:
            continue
        if change.whole is not None and twin.whole is None and one not in saved:
            twin = changes[other] = replace(twin, whole=change.whole)
        if change.rows is not None and twin.rows is None and one == embedding:
            changes[other] = replace(twin, rows=change.rows)
    if embedding not in changes and head not in changes:
        return True
    if embedding in changes and changes[embedding].equals(changes.get(head)):
        del changes[head]
        return True
    return False

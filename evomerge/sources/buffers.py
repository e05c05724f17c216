"""Buffers: the tensors of a checkpoint that are not weights, such as causal masks, position ids, expert numbers.

Those that transformers computes are left out if only some of the models store them.  Tensors of integers must be equal
in all models, because integers cannot be averaged.
"""

import re
from collections.abc import Mapping

import torch

from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.tensor_names import is_computed_buffer

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def drop_unshared_buffers(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """Remove the computed buffers that only some of the models store from the list of tensors of each model.

    A buffer counts as stored if any layer has it.  Returns a note for each model that lost some.
    """
    models = {"base": base} | {n: m for n, m in sources.items() if isinstance(m, Checkpoint)}
    stored = {n: {without_layer_numbers(t) for t in m.tensors if is_computed_buffer(t)} for n, m in models.items()}
    common = set.intersection(*stored.values())
    notes = []
    for name, model in models.items():
        unshared = [t for t in model.tensors if is_computed_buffer(t) and without_layer_numbers(t) not in common]
        for tensor in unshared:
            del model.tensors[tensor]
        if unshared:
            notes.append(
                f"{name}: stores {len(unshared)} table(s) that another model lacks and transformers computes, such as "
                f"{unshared[0]}; left out"
            )
    return notes


def without_layer_numbers(name: str) -> str:
    """The name of a tensor with N instead of each number."""
    return NUMBER.sub("N", name)


def integer_problems(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """What is wrong with tensors of integers, a line each.

    A tensor of integers must be equal in base and source, and must be one in both.
    """
    problems = []
    for name, source in sources.items():
        theirs = source.tensors if isinstance(source, Checkpoint) else base.tensors
        for tensor, info in base.tensors.items():
            if tensor not in theirs or is_computed_buffer(tensor) or not source.may_differ(tensor):
                continue
            ours_float, theirs_float = info.dtype.is_floating_point, theirs[tensor].dtype.is_floating_point
            if ours_float and theirs_float:
                continue
            if ours_float != theirs_float:
                problems.append(f"{name}: {tensor} has the type {theirs[tensor].dtype}, in the base model {info.dtype}")
            elif not torch.equal(source.read(tensor).to(base.read(tensor).dtype), base.read(tensor)):
                problems.append(
                    f"{name}: the integers of {tensor} are not the base model's; integers cannot be averaged, and a "
                    "merge takes them from the base"
                )
    return problems

"""Tables beside the weights: those that transformers computes are left out where one model lacks them; integers must
be equal in all models, for they cannot be averaged."""

import re
from collections.abc import Mapping

import torch

from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.tensor_names import is_computed_buffer

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def drop_lone_tables(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """Take the computed tables that only some of the models store out of all of them; a line for each model.

    Layers are not told apart: a table counts as stored if any layer has it.
    """
    models = {"base": base} | {n: m for n, m in sources.items() if isinstance(m, Checkpoint)}
    kinds = {n: {kind(t) for t in m.tensors if is_computed_buffer(t)} for n, m in models.items()}
    common = set.intersection(*kinds.values())
    notes = []
    for name, model in models.items():
        lone = [t for t in model.tensors if is_computed_buffer(t) and kind(t) not in common]
        for tensor in lone:
            del model.tensors[tensor]
        if lone:
            notes.append(
                f"{name}: stores {len(lone)} table(s) that another model lacks and transformers computes, such as "
                f"{lone[0]}; left out"
            )
    return notes


def kind(name: str) -> str:
    """A tensor's name without its numbers."""
    return NUMBER.sub("N", name)


def integer_problems(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """A line for each tensor of integers of a source that is not the base's, or of integers in one model alone."""
    problems = []
    for name, source in sources.items():
        theirs = source.tensors if isinstance(source, Checkpoint) else base.tensors
        for tensor, info in base.tensors.items():
            if tensor not in theirs or is_computed_buffer(tensor) or not source.touches(tensor):
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

"""The tensors of an adapter's file, sorted by the module they belong to.

PEFT's names, after `base_model.model.` and the module's own:

    .lora_A.weight  .lora_B.weight           a pair; `.base_layer` before it for each further parameter of the module
    .lora_embedding_A  .lora_embedding_B     a pair of an embedding
    .lora_B.bias                             `lora_bias`
    .token_adapter.trainable_tokens_delta    rows of `trainable_token_indices`
    .weight  .base_layer.weight  .bias       a whole parameter: `modules_to_save`, `bias`, a longer embedding
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.sources.checkpoint import mergeable
from evomerge.sources.safetensors_files import open_safetensors

PREFIX = "base_model.model."
PAIR = re.compile(
    r"^(?P<module>.+?)(?P<outer>(?:\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?"
    r"(?:\.(?P<what>weight|bias))?$"
)
TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_(?P<what>delta|original)(?:\.default)?$")
WHOLE = re.compile(
    r"^(?P<module>.+?)(?:\.token_adapter)?(?:\.base_layer)*(?P<own>\.modules_to_save(?:\.default)?)?\.(?P<parameter>[^.]+)$"
)


@dataclass(frozen=True)
class Layer:
    """A module of the adapter.  depth: which of its parameters, if several are adapted; the innermost is the first."""

    module: str
    depth: int = 0
    embedding: bool = False


@dataclass
class Contents:
    """What a file holds.

    pairs: layer -> side -> A (rank, in) or B (out, rank).  biases, rows: module -> tensor.
    whole: module, parameter -> tensor.  own: modules that say by their names that they are of `modules_to_save`.
    """

    pairs: dict[Layer, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)


def read_contents(file: Path) -> Contents:
    """The tensors of an adapter's file, memory-mapped.

    EvomergeError if one is there twice, of a type that cannot be merged, or half of a pair.
    """
    handle = open_safetensors(file)
    found = Contents()
    for key in handle.keys():  # noqa: SIM118 (not a dict)
        mergeable(file, key, handle.get_slice(key))
        if not put(found, key.removeprefix(PREFIX), handle.get_tensor(key)):
            raise EvomergeError(f"{file}: {key} is there twice, under two names of PEFT's")
    for layer, pair in found.pairs.items():
        if pair.keys() != {"A", "B"}:
            raise EvomergeError(f"{file}: {layer.module}.weight has lora_{next(iter(pair))} but not its other half")
    return found


def put(found: Contents, name: str, tensor: Tensor) -> bool:
    """Sort one tensor in; False if its place is taken."""
    if match := PAIR.match(name):
        layer = Layer(match["module"], match["outer"].count("."), match["embedding"] is not None)
        if match["what"] == "bias":
            return found.biases.setdefault(layer.module, tensor) is tensor
        return found.pairs.setdefault(layer, {}).setdefault(match["side"], tensor) is tensor
    if match := TOKENS.match(name):  # `original` is a copy of the base's rows
        return match["what"] == "original" or found.rows.setdefault(match["module"], tensor) is tensor
    match = WHOLE.match(name)
    module, parameter = (match["module"], match["parameter"]) if match else ("", name)
    if match and match["own"]:
        found.own.add(module)
    return found.whole.setdefault((module, parameter), tensor) is tensor

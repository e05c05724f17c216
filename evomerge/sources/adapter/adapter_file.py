"""The tensors of an adapter's file, sorted by the module that they adapt.

PEFT's names, after `base_model.model.` and the name of the module:

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
from evomerge.sources.checkpoint import mergeable_dtype
from evomerge.sources.safetensors_files import open_safetensors

PREFIX = "base_model.model."
PAIR = re.compile(
    r"^(?P<module>.+?)(?P<outer>(?:\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?"
    r"(?:\.(?P<what>weight|bias))?$"
)
TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_(?P<what>delta|original)(?:\.default)?$")
WHOLE = re.compile(
    r"^(?P<module>.+?)(?:\.token_adapter)?(?:\.base_layer)*(?P<saved>\.modules_to_save(?:\.default)?)?\.(?P<parameter>[^.]+)$"
)


@dataclass(frozen=True)
class AdaptedLayer:
    """A module that has a pair of factors.

    nesting: which of the module's adapted parameters this is; PEFT wraps the first one innermost, and that is the
        last number.  0 if the module has one.
    embedding: whether the module is an embedding, whose factors PEFT stores transposed.
    """

    module: str
    nesting: int = 0
    embedding: bool = False


@dataclass
class AdapterFile:
    """The tensors of an adapter's file.

    pairs: adapted layer -> side -> factor; `A` is (R, in), `B` is (out, R).
    biases: module -> what `lora_bias` adds, (out,).
    rows: module -> the trained rows of an embedding, (tokens, width).
    whole: (module, parameter) -> a parameter that replaces the base's.
    saved_modules: the modules whose tensors carry `modules_to_save` in their names.
    """

    pairs: dict[AdaptedLayer, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    saved_modules: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Tensor) -> bool:
        """Sort one tensor in.  name: without `base_model.model.`.  Returns False if there is already such a tensor."""
        if match := PAIR.match(name):
            layer = AdaptedLayer(match["module"], match["outer"].count("."), match["embedding"] is not None)
            if match["what"] == "bias":
                return self.biases.setdefault(layer.module, tensor) is tensor
            return self.pairs.setdefault(layer, {}).setdefault(match["side"], tensor) is tensor
        if match := TOKENS.match(name):  # `original` is a copy of the base's rows
            return match["what"] == "original" or self.rows.setdefault(match["module"], tensor) is tensor
        match = WHOLE.match(name)
        module, parameter = (match["module"], match["parameter"]) if match else ("", name)
        if match and match["saved"]:
            self.saved_modules.add(module)
        return self.whole.setdefault((module, parameter), tensor) is tensor


def read_adapter_file(file: Path) -> AdapterFile:
    """Read the tensors of an adapter's file by memory map.

    EvomergeError if a tensor is there twice, has a type that cannot be merged, or is half of a pair.
    """
    handle = open_safetensors(file)
    found = AdapterFile()
    for key in handle.keys():  # noqa: SIM118 (not a dict)
        mergeable_dtype(file, key, handle.get_slice(key))
        if not found.add(key.removeprefix(PREFIX), handle.get_tensor(key)):
            raise EvomergeError(f"{file}: {key} is there twice, under two of PEFT's names")
    for layer, pair in found.pairs.items():
        if pair.keys() != {"A", "B"}:
            raise EvomergeError(f"{file}: {layer.module}.weight has lora_{next(iter(pair))} but not its other half")
    return found

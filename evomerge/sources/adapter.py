"""A LoRA adapter (PEFT format) as a source: base + scale * B A, computed tensor by tensor, never stored.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rank-stabilised scaling: Kalajdzievski 2023.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
import torch

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.sources.checkpoint import Checkpoint, mergeable
from evomerge.sources.header import open_safetensors
from evomerge.sources.tokenizer import Vocabulary, read_vocabulary

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?$")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT subtracts their first B A from the base
LARGEST_ALPHA = 1e6  # PEFT's default is 8
PATTERN_LENGTH = 1000
MATCHING_SECONDS = 0.2
BLOCK = 1 << 15  # elements of a delta worked on at a time: cached, and below torch's threading grain


@dataclass
class Adapter:
    """A LoRA adapter on a base checkpoint.

    pairs: base tensor name -> (A, B), A of shape (rank, in) and B of shape (out, rank).
    whole: base tensor name -> tensor that the adapter replaces (`modules_to_save`).  scales: as far as they were asked.
    """

    path: Path
    config: dict[str, Any]
    base: Checkpoint
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    whole: dict[str, torch.Tensor] = field(repr=False)
    scales: dict[str, float] = field(default_factory=dict, repr=False)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Its tokenizer's; None if it lies without one, as it mostly does."""
        return read_vocabulary(self.path)

    def touches(self, name: str) -> bool:
        return name in self.pairs or name in self.whole

    def stores(self, name: str) -> bool:
        """Whether reading this tensor computes nothing."""
        return name not in self.pairs

    def scale(self, name: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA; per-module patterns as in PEFT."""
        if name not in self.scales:
            module = name.removesuffix(".weight")
            rank = self.pairs[name][0].shape[0]
            alpha = float(matching(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", 8)))
            self.scales[name] = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
        return self.scales[name]

    def read(self, name: str) -> torch.Tensor:
        """The source tensor in float32, base plus delta; where the adapter changes nothing, the base's own."""
        # An embedding with a LoRA on it is both: PEFT saves the layer under the pair along with it.
        original = self.whole[name] if name in self.whole else self.base.read(name)
        if name not in self.pairs:
            return original
        a, b = self.pairs[name]  # (rank, in), (out, rank)
        total = low_rank_product(b, a).mul_(self.scale(name))  # (out, in)
        if total.shape != original.shape or self.config.get("fan_in_fan_out"):
            total = total.T.contiguous()  # embeddings and GPT-2's Conv1D are stored (in, out)
        return total.add_(original)


def matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of the module's name (PEFT's rank and alpha patterns).

    EvomergeError if a key takes longer than any honest one does: some expressions take years on short names.
    """
    for key, value in pattern.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", module, timeout=MATCHING_SECONDS):
                return value
        except TimeoutError as error:
            raise EvomergeError(
                f"alpha_pattern: {key[:60]!r} takes too long to match {module!r}; write the module's name instead"
            ) from error
    return default


def low_rank_product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """B A in float32, (out, rank) x (rank, in), summed rank by rank in one fixed order.

    A library's matrix product may sum in another order on another machine; here the same adapter gives the
    same bits everywhere.
    """
    b, a = b.float(), a.float()
    out = torch.empty(b.shape[0], a.shape[1])
    rows = max(1, BLOCK // a.shape[1])
    term = torch.empty(rows, a.shape[1])
    for start in range(0, b.shape[0], rows):
        block = out[start : start + rows]
        scratch = term[: block.shape[0]]
        torch.mul(b[start : start + rows, :1], a[:1], out=block)
        for r in range(1, a.shape[0]):
            torch.mul(b[start : start + rows, r : r + 1], a[r : r + 1], out=scratch)
            block.add_(scratch)
    return out


def open_adapter(folder: Path, base: Checkpoint) -> Adapter:
    """Open the PEFT LoRA adapter in `folder` on `base`.

    EvomergeError if it is not a plain LoRA (DoRA, trained biases, PiSSA), names a module the base lacks, misses one
    half of a pair, or has shapes that do not fit.
    """
    config = read_json(folder / "adapter_config.json")
    if problem := config_problem(config):
        raise EvomergeError(f"{folder / 'adapter_config.json'}: {problem}")
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise EvomergeError(f"{folder}: holds a pickle adapter (adapter_model.bin), which can run code; save it again "
                            "as adapter_model.safetensors")  # fmt: skip
    handle = open_safetensors(file)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key in handle.keys():  # noqa: SIM118 (not a dict)
        name = key.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")
        if match := LORA_KEY.match(name):
            into, at = sides.setdefault(match["module"] + ".weight", {}), match["side"]
        else:
            into, at = whole, name
        if at in into:
            raise EvomergeError(f"{file}: {key} is there twice, under two names of PEFT's")
        mergeable(file, key, handle.get_slice(key))
        into[at] = handle.get_tensor(key)
    adapter = Adapter(folder, config, base, {}, whole)
    for name, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise EvomergeError(f"{file}: {name} has lora_{next(iter(pair))} but not its other half")
        adapter.pairs[name] = pair["A"], pair["B"]
    check_shapes(adapter, file)
    for name in adapter.pairs:
        adapter.scale(name)  # says what is wrong with a pattern
    return adapter


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with this configuration cannot be merged; None if it can."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        return f"peft_type is {config['peft_type']!s:.60}; only LORA can be merged"
    if config.get("use_dora"):
        return "use_dora is set; a DoRA is not a low-rank sum, merge it into a checkpoint first"
    if config.get("bias", "none") != "none":
        return f"bias is {config['bias']!r:.60}; only 'none' can be merged"
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        return (
            f"init_lora_weights is {config['init_lora_weights']!r:.60}, which changes the base model too; "
            "convert it to a plain LoRA with PEFT first"
        )
    if config.get("layer_replication"):
        return "layer_replication is set; the adapter's layers are not the base model's"
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key), (bool, type(None))):
            return f"{key} must be true or false, found {config[key]!r:.60}"
    if not is_alpha(config.get("lora_alpha", 8)):
        return f"lora_alpha must be a finite number, found {config['lora_alpha']!r:.60}"
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return f"alpha_pattern must be a mapping of modules to numbers, found {patterns!r:.60}"
    for module, alpha in patterns.items():
        if not is_alpha(alpha):
            return f"alpha_pattern.{module:.60}: must be a finite number, found {alpha!r:.60}"
        if problem := pattern_problem(module):
            return f"alpha_pattern.{module:.60}: {problem}"
    return None


def is_alpha(value: Any) -> bool:
    """Whether a value is a number, finite and of a size that somebody may have meant."""
    return type(value) in (int, float) and abs(value) < LARGEST_ALPHA


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression of PEFT's; None if it can be used."""
    if len(pattern) > PATTERN_LENGTH:
        return f"a pattern of {len(pattern):,} characters"
    try:
        regex.compile(rf"(.*\.)?({pattern})$")
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        return f"not a regular expression ({error})"
    return None


def check_shapes(adapter: Adapter, file: Path) -> None:
    """Every tensor of the adapter must have its place in the base."""
    known = adapter.base.tensors
    if unknown := [name for name in (*adapter.pairs, *adapter.whole) if name not in known]:
        raise EvomergeError(
            f"{file}: changes {len(unknown)} tensor(s) that the base model {adapter.base.path} does not have, "
            f"the first is {unknown[0]}; is this the adapter's base model?"
        )
    for name, (a, b) in adapter.pairs.items():
        if a.ndim == 2 and not a.shape[0]:
            raise EvomergeError(f"{file}: {name} has rank 0")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise EvomergeError(f"{file}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, whose ranks differ")
        if sorted((b.shape[0], a.shape[1])) != sorted(known[name].shape):
            raise EvomergeError(
                f"{file}: {name} is {b.shape[0]}x{a.shape[1]} in the adapter and "
                f"{'x'.join(map(str, known[name].shape))} in the base model {adapter.base.path}"
            )
    for name, tensor in adapter.whole.items():
        if tuple(tensor.shape) != known[name].shape:
            raise EvomergeError(f"{file}: {name} is {tuple(tensor.shape)}, in the base model {known[name].shape}")

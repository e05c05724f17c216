"""Open an adapter on its base: what each of its tensors does to which tensor of the checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.sources.adapter.adapter_file import Contents, read_contents
from evomerge.sources.adapter.lora_factors import AdapterError, factors, parameter_of
from evomerge.sources.adapter.peft_config import config_problem, saves, scale, tokens_of
from evomerge.sources.adapter.tensor_change import Change, LowRank
from evomerge.sources.architecture import Names, Part, empty_model, head_of
from evomerge.sources.checkpoint import Checkpoint, TensorInfo, is_embedding, is_head
from evomerge.sources.tokenizer import Vocabulary, read_vocabulary


@dataclass
class Adapter:
    """A LoRA adapter on a base checkpoint: base + scale * B A and the like, computed tensor by tensor, never stored.

    config: PEFT's.  changes: base tensor name -> what becomes of it; of a pair of embedding and head that stay tied
    only the embedding is named.  tensors: of the model that base and adapter make.  ties_head: whether that model's
    head is its embedding.
    """

    path: Path
    config: dict[str, Any]
    base: Checkpoint
    changes: dict[str, Change] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    ties_head: bool

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Its tokenizer's; None if it lies without one, as it mostly does."""
        return read_vocabulary(self.path)

    @property
    def embedding_name(self) -> str | None:
        return self.base.embedding_name

    @property
    def head_name(self) -> str | None:
        return next((name for name in self.tensors if is_head(name)), None)

    def change_of(self, name: str) -> Change | None:
        """What becomes of a tensor; a tied head is the embedding."""
        if self.ties_head and is_head(name) and name not in self.changes and self.embedding_name:
            name = self.embedding_name
        return self.changes.get(name)

    def touches(self, name: str) -> bool:
        """Whether the tensor differs from the base's."""
        return self.change_of(name) is not None

    def stores(self, name: str) -> bool:
        """Whether reading this tensor computes nothing."""
        change = self.change_of(name)
        return change is None or not change.computes

    def read(self, name: str) -> Tensor:
        """The source tensor, in float32 where something is added; where nothing changes, the base's own."""
        change = self.change_of(name)
        return self.base.read(name) if change is None else change.apply(self.base.read(name))


def open_adapter(folder: Path, base: Checkpoint) -> Adapter:
    """Open the PEFT LoRA adapter in `folder` on `base`.

    EvomergeError if its configuration asks for what merged weights cannot be (`config.py`), or it names a module the
    base lacks, misses one half of a pair, or has shapes that do not fit.
    """
    config = read_json(folder / "adapter_config.json")
    if problem := config_problem(config):
        raise EvomergeError(f"{folder / 'adapter_config.json'}: {problem}")
    file = folder / "adapter_model.safetensors"
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise EvomergeError(f"{folder}: holds a pickle adapter (adapter_model.bin), which can run code; save it again "
                            "as adapter_model.safetensors")  # fmt: skip
    contents = read_contents(file)
    model = empty_model(base.config)
    shapes = {name: info.shape for name, info in base.tensors.items()}
    head = base.head_name or head_of(model)
    if base.ties_head and base.embedding_name:
        shapes.setdefault(head, shapes[base.embedding_name])
    try:
        changes, own = read_changes(contents, config, Names(model, shapes))
    except AdapterError as error:
        raise EvomergeError(f"{file}: {error}".replace("BASE", f"the base model {base.path}")) from error
    tied = base.ties_head and settle_tie(changes, own, base.embedding_name, head)
    adapter = Adapter(folder, config, base, changes, dict(base.tensors), tied)
    if base.ties_head and not tied and base.embedding_name:
        adapter.tensors.setdefault(head, base.tensors[base.embedding_name])
    for name, info in adapter.tensors.items():
        if (change := adapter.change_of(name)) is not None and info.shape:
            adapter.tensors[name] = replace(info, shape=(change.height(info.shape[0]), *info.shape[1:]))
    check_heights(file, adapter, head)
    return adapter


def check_heights(file: Path, adapter: Adapter, head: str) -> None:
    """EvomergeError if a longer vocabulary came into the embedding or the head alone."""
    before, after = (
        [model.tensors[name].shape[0] for name in (adapter.embedding_name, head) if name in model.tensors]
        for model in (adapter.base, adapter)
    )
    if len({*after}) > max(1, len({*before})):
        raise EvomergeError(f"{file}: its embedding has {after[0]} rows and its head {after[1]}")


def read_changes(contents: Contents, config: Mapping[str, Any], names: Names) -> tuple[dict[str, Change], set[str]]:
    """What an adapter does to each tensor, and the tensors that `modules_to_save` trained apart from their ties.

    AdapterError says what does not fit the base.
    """
    changes: dict[str, Change] = {}
    own: set[str] = set()

    def put(tensor: str, **what: Any) -> Change:
        change = changes.setdefault(tensor, Change())
        for key, value in what.items():
            if getattr(change, key) is not None:
                raise AdapterError(f"{tensor} is there twice, under two names of its module")
            setattr(change, key, value)
        return change

    check_known(contents, config, names)
    for (module, parameter), tensor in contents.whole.items():
        for part in parts_of(f"{module}.{parameter}", names):
            put(part.tensor, whole=piece(tensor, part, names))
            own |= {part.tensor} if saves(config, module) or module in contents.own else set()
    for module, tensor in contents.rows.items():
        for part in parts_of(f"{module}.weight", names):
            put(part.tensor, rows=trained_rows(module, tensor, config))
            check_rows(part.tensor, changes[part.tensor], names.shapes[part.tensor])
    for name, product in low_rank_changes(contents, config, names, changes):
        put(name, low_rank=product)
    for module, tensor in contents.biases.items():
        pair = next(p for layer, p in contents.pairs.items() if layer.module == module)
        for part in parts_of(f"{module}.bias", names):
            put(part.tensor, added=piece(tensor.float() * scale(config, module, pair["A"].shape[0]), part, names))
    return changes, own


def check_known(contents: Contents, config: Mapping[str, Any], names: Names) -> None:
    """AdapterError if a tensor has no place in the base."""
    wanted = [parameter_of(layer, config, names)[0] for layer in contents.pairs]
    wanted += [f"{module}.weight" for module in contents.rows]
    wanted += [".".join(key) for key in contents.whole]
    if unknown := [name for name in wanted if not parts_of(name, names)]:
        raise AdapterError(
            f"changes {len(unknown)} tensor(s) that BASE does not have, "
            f"the first is {unknown[0]}; is this the adapter's base model?"
        )
    if unknown := [module for module in contents.biases if not parts_of(f"{module}.bias", names)]:
        raise AdapterError(f"lora_bias is set, but {unknown[0]} has no bias in BASE that it could be added to")


def parts_of(name: str, names: Names) -> list[Part]:
    """The tensors of the base that a parameter is made of.  AdapterError if they are stored in another form."""
    try:
        return names.find(name) or []
    except ValueError as error:
        raise AdapterError(
            f"{name} is stored in another form in BASE ({error} when it is loaded); merge the adapter into a "
            "checkpoint with PEFT first"
        ) from error


def piece(tensor: Tensor, part: Part, names: Names) -> Tensor:
    """The part of a whole parameter that becomes one tensor of the base.  AdapterError if it has another shape."""
    if part.expert is not None and part.expert < tensor.shape[0]:
        tensor = tensor[part.expert]
    found = tensor if part.rows is None else tensor[part.rows]
    wanted = names.shapes[part.tensor]
    by_token = is_head(part.tensor) or is_embedding(part.tensor)
    if tuple(found.shape[1:] if by_token else found.shape) != (wanted[1:] if by_token else wanted):
        raise AdapterError(f"{part.tensor} is {tuple(found.shape)}, in BASE {wanted}")
    return found


def trained_rows(module: str, values: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The rows of `trainable_token_indices` and their numbers."""
    tokens = tokens_of(config, module)
    if len({*tokens}) != len(values) or len(tokens) != len(values):
        raise AdapterError(f"{module} has {len(values)} trained rows, trainable_token_indices names {len(tokens)}")
    return torch.tensor(tokens, dtype=torch.int64), values


def check_rows(name: str, change: Change, shape: tuple[int, ...]) -> None:
    """AdapterError if rows do not fit, or one beyond the base's is left without a value."""
    assert change.rows is not None
    where, values = change.rows
    if len(shape) != 2 or tuple(values.shape[1:]) != shape[1:]:
        raise AdapterError(f"{name} has trained rows of {tuple(values.shape[1:])}, in BASE it is {shape}")
    have = shape[0] if change.whole is None else change.whole.shape[0]
    lacking = sorted({*range(have, change.height(shape[0]))} - {*where.tolist()})
    if lacking:
        raise AdapterError(f"{name} has {have} rows in BASE, and the adapter trains none for token {lacking[0]}")


def low_rank_changes(
    contents: Contents, config: Mapping[str, Any], names: Names, changes: Mapping[str, Change]
) -> Iterator[tuple[str, LowRank]]:
    """Tensor of the base -> the product that is added to it.  changes: found so far, which may have made it longer."""
    for layer, pair in contents.pairs.items():
        parameter, own_name = parameter_of(layer, config, names)
        parts = parts_of(parameter, names)
        shapes = {part.tensor: names.shapes[part.tensor] for part in parts}
        for name, shape in shapes.items():
            change = changes.get(name)
            shapes[name] = (shape[0] if change is None else change.height(shape[0]), *shape[1:])
        left, right, rank = factors(layer, parameter, pair, parts, shapes, config, names)
        factor = scale(config, own_name, rank)
        for part in parts:
            rows = slice(None) if part.rows is None else part.rows
            at = (rows,) if part.expert is None else (part.expert, rows)
            product = LowRank(left[at], right if part.expert is None else right[part.expert], factor)
            if product.shape != shapes[part.tensor]:
                found, wanted = ("x".join(map(str, s)) for s in (product.shape, shapes[part.tensor]))
                raise AdapterError(f"{part.tensor} is {found} in the adapter and {wanted} in BASE")
            yield part.tensor, product


def settle_tie(changes: dict[str, Change], own: set[str], embedding: str | None, head: str) -> bool:
    """Whether the head of a tied base stays tied under an adapter; then only the embedding's change is kept.

    What PEFT's own model computes: a layer that is adapted, or trained as a whole, is changed alone.  Both change
    with a matrix that is loaded into what they share (a longer vocabulary), and with trained rows of the embedding.
    """
    if embedding is None:
        return True
    for one, other in ((embedding, head), (head, embedding)):
        change, twin = changes.get(one), changes.get(other) or Change()
        if change is None:
            continue
        if change.whole is not None and twin.whole is None and one not in own:
            twin = changes[other] = replace(twin, whole=change.whole)
        if change.rows is not None and twin.rows is None and one == embedding:
            changes[other] = replace(twin, rows=change.rows)
    if embedding not in changes and head not in changes:
        return True
    if embedding in changes and changes[embedding].same_as(changes.get(head)):
        del changes[head]
        return True
    return False

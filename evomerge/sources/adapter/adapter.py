"""Open a LoRA adapter on its base as a source, which is read tensor by tensor."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.files.read import read_json, refuse_stray_link
from evomerge.sources.adapter.adapter_file import read_adapter_file
from evomerge.sources.adapter.lora_factors import AdapterError
from evomerge.sources.adapter.lora_to_changes import read_changes, stays_tied
from evomerge.sources.adapter.parameter_names import ParameterNames
from evomerge.sources.adapter.peft_config import config_problem
from evomerge.sources.adapter.tensor_change import TensorChange
from evomerge.sources.architecture import empty_model, name_of_head
from evomerge.sources.checkpoint import Checkpoint, TensorInfo, is_head
from evomerge.sources.tokenizer import Vocabulary, read_vocabulary


@dataclass
class Adapter:
    """A LoRA adapter on a base checkpoint: base + scale * B A and the like, computed tensor by tensor, never stored.

    config: PEFT's.
    changes: tensor of the base -> its change; if head and embedding stay tied, only the embedding is in it.
    tensors: of the model that base and adapter make.
    ties_head: whether that model's head is its embedding.
    """

    path: Path
    config: dict[str, Any]
    base: Checkpoint
    changes: dict[str, TensorChange] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    ties_head: bool

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the adapter's own tokenizer; None if its folder has none, as is usual."""
        return read_vocabulary(self.path)

    @property
    def embedding_name(self) -> str | None:
        return self.base.embedding_name

    @property
    def head_name(self) -> str | None:
        return next((name for name in self.tensors if is_head(name)), None)

    def change_of(self, name: str) -> TensorChange | None:
        """The change of a tensor; None if the adapter leaves it alone.  A tied head has the embedding's."""
        if self.ties_head and is_head(name) and name not in self.changes and self.embedding_name:
            name = self.embedding_name
        return self.changes.get(name)

    def may_differ(self, name: str) -> bool:
        """Whether the tensor differs from the base's."""
        return self.change_of(name) is not None

    def is_stored(self, name: str) -> bool:
        """Whether the tensor is read from a file as it is, so that reading it computes nothing."""
        change = self.change_of(name)
        return change is None or not change.computes

    def read(self, name: str) -> Tensor:
        """The tensor of the model that base and adapter make.

        float32 if the adapter adds to it, else of the type in which it is stored.
        """
        change = self.change_of(name)
        return self.base.read(name) if change is None else change.apply(self.base.read(name))


def open_adapter(folder: Path, base: Checkpoint) -> Adapter:
    """Open the PEFT LoRA adapter in `folder` on `base`.

    EvomergeError if merged weights cannot express its configuration (see `peft_config.py`), or if it names a module
    that the base lacks, lacks one half of a pair, or has shapes that do not fit.
    """
    refuse_stray_link(folder / "adapter_config.json")
    config = read_json(folder / "adapter_config.json")
    if problem := config_problem(config):
        raise EvomergeError(f"{folder / 'adapter_config.json'}: {problem}")
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise EvomergeError(f"{folder}: holds a pickle adapter (adapter_model.bin), which can run code; save it again "
                            "as adapter_model.safetensors")  # fmt: skip
    file = read_adapter_file(path)
    model = empty_model(base.config)
    shapes = {name: info.shape for name, info in base.tensors.items()}
    head = base.head_name or name_of_head(model)
    if base.ties_head and base.embedding_name:
        shapes.setdefault(head, shapes[base.embedding_name])
    try:
        changes, saved = read_changes(file, config, ParameterNames(model, shapes))
    except AdapterError as error:
        raise EvomergeError(f"{path}: {error}".replace("BASE", f"the base model {base.path}")) from error
    tied = base.ties_head and stays_tied(changes, saved, base.embedding_name, head)
    adapter = Adapter(folder, config, base, changes, dict(base.tensors), tied)
    if base.ties_head and not tied and base.embedding_name:
        adapter.tensors.setdefault(head, base.tensors[base.embedding_name])
    for name, info in adapter.tensors.items():
        if (change := adapter.change_of(name)) is not None and info.shape:
            adapter.tensors[name] = replace(info, shape=(change.row_count(info.shape[0]), *info.shape[1:]))
    check_row_counts(path, adapter, head)
    return adapter


def check_row_counts(path: Path, adapter: Adapter, head: str) -> None:
    """EvomergeError if the adapter gives new tokens a row in the embedding or in the head alone.

    path: of the adapter's file, for the message.
    """
    before, after = (
        [model.tensors[name].shape[0] for name in (adapter.embedding_name, head) if name in model.tensors]
        for model in (adapter.base, adapter)
    )
    if len({*after}) > max(1, len({*before})):
        raise EvomergeError(f"{path}: its embedding has {after[0]} rows and its head {after[1]}")

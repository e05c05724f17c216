"""Which module of the model in memory holds a tensor of the checkpoint, and how PEFT stores factors for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from evomerge.sources.adapter.parameter_names import ParameterNames
from evomerge.sources.architecture import empty_model, name_of_head
from evomerge.sources.checkpoint import Checkpoint, is_embedding

PREFIX = "base_model.model."
Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Place:
    """A parameter of the model in memory.

    module: its module's name.  name: its own, `weight` or `bias` mostly.
    kind: `linear` stores (out, in), transformers' `conv1d` (in, out), an `embedding` (tokens, width).
    """

    module: str
    name: str
    kind: Kind

    def pair(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """The entries of an adapter's file for the product left @ right in the layout of the parameter.

        left: (rows, R).  right: (R, columns).
        """
        a, b = (right, left) if self.kind == "linear" else (left.T, right.T)
        stem = f"{PREFIX}{self.module}.lora_"
        names = ("embedding_A", "embedding_B") if self.kind == "embedding" else ("A.weight", "B.weight")
        return {f"{stem}{names[0]}": a.contiguous(), f"{stem}{names[1]}": b.contiguous()}


def find_places(base: Checkpoint) -> dict[str, list[Place]]:
    """Tensor of the checkpoint -> the parameters that are exactly this tensor.

    A tied embedding that is stored once has two.  A tensor that is only a part of a parameter in memory (experts that
    are stacked, projections that are joined) has none.
    """
    model = empty_model(base.config)
    if model is None:  # transformers does not know the architecture
        return {name: [Place(*split(name), guessed_kind(name, info.shape))] for name, info in base.tensors.items()}
    shapes = {name: info.shape for name, info in base.tensors.items()}
    head = name_of_head(model)
    names = ParameterNames(model, shapes)
    modules: Mapping[str, Any] = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[Place]] = {}
    for parameter in model.state_dict(keep_vars=True):
        try:
            parts = names.parts_of(parameter) or []
        except ValueError:  # stored in another form than the parameter
            continue
        if not parts and parameter == head and base.ties_head and base.embedding_name:
            parts = names.parts_of(base.embedding_name) or []
        if len(parts) == 1 and parts[0].expert is None and parts[0].rows is None:
            module, name = split(parameter)
            found.setdefault(parts[0].tensor, []).append(Place(module, name, kind_of(modules[module])))
    return found


def split(parameter: str) -> tuple[str, str]:
    """The names of the module and of its own parameter."""
    module, _, name = parameter.rpartition(".")
    return module, name


def kind_of(module: Any) -> Kind:
    """What a module is for PEFT."""
    from transformers.pytorch_utils import Conv1D

    kinds: list[tuple[Any, Kind]] = [(nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding")]
    return next((kind for cls, kind in kinds if isinstance(module, cls)), "other")


def guessed_kind(name: str, shape: tuple[int, ...]) -> Kind:
    """What a tensor's module is, by its name and shape alone."""
    return "embedding" if is_embedding(name) else "linear" if len(shape) == 2 else "other"


def shortest_names(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """The chosen modules as `target_modules` of PEFT: by the last part of their names where no other module has it.

    every: the names of all modules with parameters.
    """
    wanted = set(chosen)
    last = {name: name.rpartition(".")[2] for name in {*wanted, *every}}
    others = {last[name] for name in last if name not in wanted}
    return sorted({last[name] if last[name] not in others else name for name in wanted})

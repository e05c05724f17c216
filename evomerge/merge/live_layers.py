"""The layers of the live model, where candidates may have fewer of them than it has room for.

A layer that a candidate does not have is taken out of the model's list, so it costs no time, and what is computed is
what the exported model computes.  Layers differ in kind (sliding or full attention, experts or none), so a candidate's
layers go to the first places of their kinds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.live import destinations
from evomerge.merge.recipe.layout import Layout
from evomerge.merge.recipe.sliced_config import INDICES, PER_LAYER
from evomerge.merge.recipe.slices import Slice
from evomerge.sources.architecture import known_config
from evomerge.sources.tensor_names import name_in_layer, tensor_role


class LiveLayers:
    """The live model of a search, made to fit one recipe after the other.

    model: the live model, with all layers of the bank's layout.
    bank: of the models, with the layout of the largest model.
    """

    def __init__(self, model: Any, bank: Bank) -> None:
        self.model = model
        self.bank = bank
        self.slices = bank.slices
        self.fitted: tuple[Bank, dict[str, Tensor]] = bank, destinations(model, bank)
        self.all: list[nn.Module] = []  # every layer, once a recipe has had other slices

    def fit(self, slices: Sequence[Slice]) -> tuple[Bank, Mapping[str, Tensor]]:
        """Give the model the layers of a recipe; the bank that reads it, and where its tensors go.

        EvomergeError if the model has no room for its layers.
        """
        if list(slices) != self.slices:
            bank = self.bank.with_slices(slices)
            self.take_layers(bank.layout)
            self.slices, self.fitted = bank.slices, (bank, destinations(self.model, bank))
        return self.fitted

    def take_layers(self, layout: Layout) -> None:
        """Leave in the model's list as many layers as a layout has, of the same kinds."""
        parent, name = self.list_of_layers()
        self.all = self.all or list(getattr(parent, name))
        kinds = layer_kinds(self.bank.layout)
        left = iter(range(len(kinds)))
        places = [next((k for k in left if kinds[k] == kind), None) for kind in layer_kinds(layout)]
        if None in places:
            raise EvomergeError(
                f"a recipe with {layout.layers} layers does not fit into the {len(kinds)} layers of this search"
            )
        kept = [self.all[k] for k in places if k is not None]
        for number, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # the place of its keys and values in a cache
                    module.layer_idx = number  # type: ignore[assignment]
        setattr(parent, name, nn.ModuleList(kept))
        wanted, own = settings_of(layout), self.model.config.get_text_config(decoder=True)
        for key in ("num_hidden_layers", *PER_LAYER, *INDICES):
            if key in wanted and hasattr(own, key):
                setattr(own, key, wanted[key])

    def list_of_layers(self) -> tuple[nn.Module, str]:
        """The module that has the model's list of layers, and the list's name there."""
        inside = next(n for n in self.bank.layout.tensors if tensor_role(n).layer is not None)
        lists = [n for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
        found = [n for n in lists if f"{n.rpartition('.')[2]}.{tensor_role(inside).layer}." in inside]
        outer = [n for n in found if not any(n.startswith(f"{other}.") for other in lists)]
        if len(outer) != 1:
            raise EvomergeError(
                f"space.layers: transformers' {type(self.model).__name__} has no single list of layers to be shortened"
            )
        parent, _, name = outer[0].rpartition(".")
        return self.model.get_submodule(parent), name


def layer_kinds(layout: Layout) -> list[object]:
    """What decides which layers of a layout may take each other's place: shapes of tensors, and settings."""
    shapes: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(layout.layers)]
    for name, info in layout.tensors.items():
        if (layer := tensor_role(name).layer) is not None and layer < layout.layers:
            shapes[layer].add((name_in_layer(name, 0), tuple(info.shape)))
    given = settings_of(layout)
    lists = [given[key] for key in PER_LAYER if isinstance(given.get(key), list | tuple)]
    lists += [[k in given[key] for k in range(layout.layers)] for key in INDICES if isinstance(given.get(key), list)]
    lists = [found for found in lists if len(found) >= layout.layers]
    return [(frozenset(shapes[k]), tuple(map(str, (found[k] for found in lists)))) for k in range(layout.layers)]


def settings_of(layout: Layout) -> Mapping[str, Any]:
    """The settings of a layout's language model as transformers reads them."""
    known = known_config(layout.config)
    return {} if known is None else known.get_text_config(decoder=True).to_dict()

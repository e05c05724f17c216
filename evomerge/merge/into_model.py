"""Merge a recipe into a model that is in memory, in place."""

from contextlib import nullcontext
from typing import Any

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.live import destinations
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.recipe.open_bank import Log, open_bank
from evomerge.merge.recipe.recipe import Recipe


def merge_into_model(recipe: Recipe, model: Any, log: Log | None = None) -> None:
    """Overwrite all weights of a live model with those that a recipe makes.

    model: of transformers, with the architecture and shapes of the recipe's result, all on one device.  Its floating
        point tensors are of the recipe's dtype, or float32, which holds the same values.
    log: see `open_bank`.

    Raises EvomergeError if the model does not fit (nothing is written then), or if the merge is not finite (the model
    then holds a part of it).
    """
    parameters = dict(model.named_parameters())
    devices = {p.device for p in parameters.values()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise EvomergeError(f"model: its parameters must all be on one device; they are on: {found}")
    allowed = {TORCH_DTYPES[recipe.dtype], torch.float32}
    for name, parameter in parameters.items():
        if parameter.dtype not in allowed:
            held = str(parameter.dtype).removeprefix("torch.")
            names = " or ".join(dict.fromkeys((recipe.dtype, "float32")))
            raise EvomergeError(
                f"model: {name} is of type {held}, which cannot hold the values of the recipe's dtype {recipe.dtype}; "
                f"load the model in {names}"
            )
    device = devices.pop()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # kernels run on the current one
        bank = open_bank(recipe, device, capacity=0, log=log)
        write(recipe, bank, model)


def write(recipe: Recipe, bank: Bank, model: Any) -> None:
    """Merge into a model whose type and device fit."""
    found = destinations(model, bank)
    for name, tensor in found.items():
        wanted = bank.layout.tensors[name].shape
        if tuple(tensor.shape) != tuple(wanted):
            raise EvomergeError(
                f"model: {name} has the shape {tuple(tensor.shape)}, the recipe makes it {tuple(wanted)}"
            )
    try:
        materialise(recipe, bank, found)
    except NotFinite as error:
        raise EvomergeError(f"this recipe makes no usable model: {error}; the model holds a part of it") from error

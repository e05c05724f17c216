"""Write a merged model: a folder that `from_pretrained` opens, with the recipe that reproduces it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.files.new_folder import new_folder
from evomerge.files.read import copy_model_file, read_json
from evomerge.files.write import write_text
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import NotFinite, check_finite, check_fits, materialise_tensor
from evomerge.merge.output.load_check import check_loads
from evomerge.merge.output.shards import SHARD_BYTES, TensorSpec, open_writer, plan_shards, size_of
from evomerge.merge.output.side_files import copy_side_files
from evomerge.merge.recipe.pinned_inputs import with_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.safetensors_files import weights_name
from evomerge.sources.tokenizer import Vocabulary


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """The type of an output tensor: the recipe's for floating-point tensors, else the stored one."""
    return TORCH_DTYPES[recipe.dtype] if stored.is_floating_point else stored


def output_specs(recipe: Recipe, bank: Bank) -> dict[str, TensorSpec]:
    """Type and shape of every tensor of the output, in the base's order."""
    tensors = bank.layout.tensors
    return {name: (output_dtype(recipe, tensors[name].dtype), tensors[name].shape) for name in bank.names}


def total_bytes(recipe: Recipe, bank: Bank) -> int:
    """The bytes of all tensors of the output."""
    return sum(map(size_of, output_specs(recipe, bank).values()))


def export(
    recipe: Recipe,
    bank: Bank,
    folder: Path,
    card: Callable[[Recipe], str],
    progress: Callable[[int], None] = lambda done: None,
    shard_bytes: int = SHARD_BYTES,
    note: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """Write the merged model to a new folder and return the recipe with all SHA-256 sums.

    The folder gets weights in shards, config.json, generation settings, tokenizer, chat template, the settings of
    processors, README.md and recipe.yaml, as far as the base has them.  It appears under its name when it is complete.

    card: makes the text of README.md from the recipe.
    progress: called with the number of bytes written so far.
    shard_bytes: the largest size of a file of weights.
    note: called with each line that the user should know about the folder.

    EvomergeError if transformers would not load the folder, it exists already and is not empty, the disk is full, or
    the merge has NaN or infinity.
    """
    check_fits(recipe, bank)
    for line in check_loads(bank.layout, bank.models.base):
        note(line)
    bank.statistics(recipe)  # raises if a statistics file is wrong, before anything is written
    tensors = output_specs(recipe, bank)
    stem = weights_name(bank.models.base.path)
    shards = plan_shards(tensors, shard_bytes, stem)
    with new_folder(folder) as aside:
        total = 0
        for file, names in shards.items():
            with open_writer(aside / file, {name: tensors[name] for name in names}) as writer:
                for name in names:
                    merged = merge_to_host(recipe, bank, name, tensors[name])
                    writer.write(merged)
                    total += merged.nbytes
                    progress(total)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(aside / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        if bank.layout.config:
            write_config(bank.layout.config, recipe.dtype, aside / "config.json")
        copy_tokenizer(bank, aside)
        for line in copy_side_files(bank.models.base.path, aside):
            note(line)
        if recipe.chat_template is not None:
            set_template(aside, recipe.chat_template)
        full = with_fingerprints(recipe)
        full.outputs = model_fingerprint(aside)
        write_text(aside / "README.md", card(full))
        write_text(aside / "recipe.yaml", dump_recipe(full))
    return full


def write_config(config: Mapping[str, Any], dtype: str, file: Path) -> None:
    """Write the output's config.json.  dtype: of its tensors; the configurations of diffusers have no key for it."""
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "auto_map")}
    write_text(file, json.dumps(kept if "_class_name" in kept else kept | {"dtype": dtype}, indent=2) + "\n")


def copy_tokenizer(bank: Bank, folder: Path) -> None:
    """Write the files of the output's tokenizer, and the generation settings of the model that it belongs to."""
    vocabulary = bank.models.vocabulary or Vocabulary({}, bank.models.base.path)
    vocabulary.write(folder)
    if os.path.isfile(settings := vocabulary.folder / "generation_config.json"):
        copy_model_file(settings, folder / settings.name)


def set_template(folder: Path, template: str) -> None:
    """Write a chat template into a model folder and remove any other that it has."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    write_text(folder / "chat_template.jinja", template)
    if (file := folder / "tokenizer_config.json").exists():
        settings = {k: v for k, v in read_json(file).items() if k != "chat_template"}
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def merge_to_host(recipe: Recipe, bank: Bank, name: str, spec: TensorSpec) -> torch.Tensor:
    """Merge a tensor on the bank's device and return it on the CPU.

    EvomergeError if the result has NaN or infinity.
    """
    dtype, shape = spec
    out = torch.empty(shape, dtype=dtype, device=bank.device)
    try:
        check_finite([name], materialise_tensor(recipe, bank, name, out)[None])
    except NotFinite as error:
        raise EvomergeError(f"this recipe makes no usable model: {error}") from error
    bank.end()
    return out.cpu()

"""Write a merged model: a folder that `from_pretrained` opens, with the recipe that makes it again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.files import new_folder, read_json, sha256, write_text
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import NotFinite, check_finite, check_fits, materialise_tensor
from evomerge.merge.output.load_check import check_loads
from evomerge.merge.output.shards import SHARD_BYTES, Shape, open_writer, plan_shards, size_of
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, with_fingerprints
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.locate import model_fingerprint
from evomerge.sources.tokenizer import TOKENIZER_FILES, Vocabulary, is_there

COPIED = ("generation_config.json", *TOKENIZER_FILES)


def output_dtype(recipe: Recipe, stored: torch.dtype) -> torch.dtype:
    """Floating tensors take the recipe's type, tables of integers keep theirs."""
    return TORCH_DTYPES[recipe.dtype] if stored.is_floating_point else stored


def output_tensors(recipe: Recipe, bank: Bank) -> dict[str, Shape]:
    """Type and shape of every tensor that a recipe makes, in the base's order."""
    tensors = bank.layout.tensors
    return {name: (output_dtype(recipe, tensors[name].dtype), tensors[name].shape) for name in bank.names}


def total_bytes(recipe: Recipe, bank: Bank) -> int:
    """How many bytes of weights a recipe makes."""
    return sum(map(size_of, output_tensors(recipe, bank).values()))


def export(
    recipe: Recipe,
    bank: Bank,
    folder: Path,
    card: Callable[[Recipe], str],
    progress: Callable[[int], None] = lambda done: None,
    shard_bytes: int = SHARD_BYTES,
    note: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """Write the model of `recipe` to the new folder `folder` and return the recipe with all SHA-256 sums.

    Weights (sharded), config, generation config, tokenizer, chat template, README.md (`card`) and recipe.yaml.
    progress: called with the number of bytes written so far.  note: called with what to know of the folder.
    EvomergeError if transformers would not load what is to be written, the folder is not empty, the disk is full,
    or the merge is not finite.
    """
    check_fits(recipe, bank)
    for line in check_loads(bank.layout, bank.models.base):
        note(line)
    bank.statistics(recipe)  # says what is wrong with a statistics file before anything is written
    tensors = output_tensors(recipe, bank)
    shards = plan_shards(tensors, shard_bytes)
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
            write_text(aside / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        config = {k: v for k, v in bank.layout.config.items() if k != "torch_dtype"} | {"dtype": recipe.dtype}
        write_text(aside / "config.json", json.dumps(config, indent=2) + "\n")
        copy_tokenizer(bank, aside)
        if recipe.chat_template is not None:
            set_template(aside, recipe.chat_template)
        full = with_fingerprints(recipe)
        full.outputs = model_fingerprint(aside)
        write_text(aside / "README.md", card(full))
        write_text(aside / "recipe.yaml", dump_recipe(full))
    return full


def copy_tokenizer(bank: Bank, folder: Path) -> None:
    """The files of the output's tokenizer, and the generation settings of the model it is from."""
    vocabulary = bank.models.vocabulary or Vocabulary({}, bank.models.base.path)
    vocabulary.write(folder)
    if is_there(settings := vocabulary.folder / "generation_config.json"):
        shutil.copyfile(settings, folder / settings.name)


def set_template(folder: Path, template: str) -> None:
    """Give a model folder a chat template, the only one it has."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    write_text(folder / "chat_template.jinja", template)
    if (file := folder / "tokenizer_config.json").exists():
        settings = {k: v for k, v in read_json(file).items() if k != "chat_template"}
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def merge_to_host(recipe: Recipe, bank: Bank, name: str, shape: Shape) -> torch.Tensor:
    """Merge a tensor on the bank's device.  EvomergeError if the result is not finite."""
    out = torch.empty(shape[1], dtype=shape[0], device=bank.device)
    try:
        check_finite([name], materialise_tensor(recipe, bank, name, out)[None])
    except NotFinite as error:
        raise EvomergeError(f"this recipe makes no usable model: {error}") from error
    bank.end()
    return out.cpu()


@dataclass(frozen=True)
class Difference:
    """One tensor or file in which two exported models differ."""

    name: str
    what: str


def differences(first: Path, second: Path) -> list[Difference]:
    """Compare two model folders byte by byte: every tensor, then config and tokenizer files."""
    a, b = open_checkpoint(first), open_checkpoint(second)
    found = [Difference(name, f"only in {first}") for name in a.tensors.keys() - b.tensors.keys()]
    found += [Difference(name, f"only in {second}") for name in b.tensors.keys() - a.tensors.keys()]
    for name in a.tensors.keys() & b.tensors.keys():
        x, y = a.read(name), b.read(name)
        if x.dtype != y.dtype or x.shape != y.shape:
            found.append(Difference(name, f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"))
        elif (differs := differing_bytes(x, y)) > 0:
            found.append(Difference(name, f"{differs:,} of {x.nbytes:,} bytes differ"))
    for name in ("config.json", *COPIED):
        here, there = first / name, second / name
        if here.exists() != there.exists() or (here.exists() and sha256(here) != sha256(there)):
            found.append(Difference(name, "the files differ"))
    return sorted(found, key=lambda d: d.name)


def differing_bytes(x: torch.Tensor, y: torch.Tensor) -> int:
    a, b = x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
    return int((a != b).sum())

"""Write a merge as a LoRA adapter of its base, in a folder that PEFT opens."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError, some
from evomerge.files.new_folder import new_folder
from evomerge.files.write import write_text
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import NotFinite, check_fits
from evomerge.merge.output.export import merge_to_host
from evomerge.merge.output.lora.card import base_and_revision
from evomerge.merge.output.lora.factors import Factors, NotLinear, exact_change, truncated
from evomerge.merge.output.lora.places import PREFIX, Place, find_places, shortest_names
from evomerge.merge.output.shards import open_writer
from evomerge.merge.recipe.pinned_inputs import with_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.merge.tensor_plan import RecipeInputs
from evomerge.sources.adapter import open_adapter
from evomerge.sources.architecture import is_language_model
from evomerge.sources.checkpoint import is_embedding, is_head

Rank = int | Literal["exact"]
"""The largest rank of a matrix; `exact`: the sum of the ranks of the sources, which are adapters."""
UNCHANGED = 1e-6  # a change that is this small beside the base, in the Frobenius norm, is rounding
WORST = 3  # matrices that the summary names
NEARLY_ALL = 0.9995  # energy above which it does not name one


@dataclass
class Lora:
    """What an adapter consists of.

    pairs: module -> its factors.
    whole: module -> its parameters that are stored whole.
    biases: module -> its bias.
    tensors: of the factors, by their names in the file.
    turned: whether a layer stores its weight as (in, out).
    recipe: with the SHA-256 sums of its inputs, once it is written.
    """

    recipe: Recipe
    rank: Rank
    pairs: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    turned: bool = False

    @property
    def energy(self) -> float:
        """The share of the squared change of all pairs that is kept."""
        total = sum(f.change for f in self.pairs.values())
        return sum(f.energy * f.change for f in self.pairs.values()) / total if total else 1.0

    def lines(self) -> list[str]:
        """What the adapter holds and loses, for the terminal and the card."""
        ranks = [f.rank for f in self.pairs.values()]
        sizes = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
        found = [f"{'an exact adapter' if self.rank == 'exact' else 'an adapter'} of {sizes}, {len(ranks)} matrices"]
        if self.rank != "exact":
            worst = sorted(self.pairs.items(), key=lambda pair: pair[1].energy)[:WORST]
            named = ", ".join(f"{module} {f.energy:.1%}" for module, f in worst if f.energy < NEARLY_ALL)
            found[0] += f"; it keeps {self.energy:.2%} of the change's energy{f' (least: {named})' if named else ''}"
        if kept := [*self.whole, *(f"{module}.bias" for module in self.biases)]:
            found.append(f"stored whole, as they have no low rank: {len(kept)} ({some(kept)})")
        return found


def write_lora(
    recipe: Recipe,
    bank: Bank,
    folder: Path,
    rank: Rank,
    card: Callable[[Lora], str],
    embed_lora: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Lora:
    """Write a merge as an adapter to a new folder: PEFT's two files, README.md and recipe.yaml.

    rank: `exact` concatenates the factors of sources that are adapters; a number is the most that a matrix gets, by
        truncated singular value decomposition of merged - base.
    card: makes the text of README.md.
    embed_lora: with a rank, whether embeddings and head get factors too; otherwise changed ones are stored whole.
    progress: called with the number of tensors that are done.

    EvomergeError if an adapter cannot express the merge, and as for `export`.
    """
    check_fits(recipe, bank)
    lora = Lora(recipe, rank)
    places = find_places(bank.models.base)
    check_shapes(recipe, bank)
    inputs, unrounded = RecipeInputs(recipe, bank), in_float32(recipe)
    with new_folder(folder) as aside:
        for done, name in enumerate(bank.names, 1):
            bank.begin(name)
            if rank != "exact":
                change = approximated(unrounded, bank, name, places.get(name, []), rank, embed_lora)
            else:
                try:
                    change = exact_change(recipe, bank, inputs, name)
                except NotLinear as error:
                    raise EvomergeError(f"no exact adapter: {error}; give a rank instead of `exact`") from error
                except NotFinite as error:
                    raise EvomergeError(f"this recipe makes no usable adapter: {error}") from error
            if change is not False:
                add(lora, bank, name, places.get(name, []), change)
            bank.end()
            progress(done)
        if not lora.pairs:
            raise EvomergeError(nothing_to_factor(lora))
        complete_modules(lora, bank, places)
        write_files(lora, bank, aside, places)
        open_adapter(aside, bank.models.base)  # raises if it does not fit
        lora.recipe = with_fingerprints(recipe)
        write_text(aside / "README.md", card(lora))
        write_text(aside / "recipe.yaml", dump_recipe(lora.recipe))
    return lora


def nothing_to_factor(lora: Lora) -> str:
    """Why there is no adapter without factors, which PEFT would not open."""
    if kept := [*lora.whole, *lora.biases]:
        return f"no adapter: all that changes would be stored whole ({some(kept)}); write the model instead"
    return "an adapter would be empty: no matrix differs from the base by a low-rank change"


def check_shapes(recipe: Recipe, bank: Bank) -> None:
    """EvomergeError if the merge has other tensors than the base, or another vocabulary: an adapter has the base's."""
    base = bank.models.base.tensors
    if recipe.slices:
        raise EvomergeError("no adapter: the recipe has `slices`, and an adapter has its base's layers")
    if recipe.vocabulary not in (None, "base"):
        raise EvomergeError("no adapter: the recipe has another `vocabulary` than the base")
    for name, info in bank.layout.tensors.items():
        if name in base and base[name].shape != info.shape:
            raise EvomergeError(f"no adapter: {name} is {info.shape}, in the base {base[name].shape}")


def approximated(
    recipe: Recipe, bank: Bank, name: str, places: list[Place], rank: int, embed_lora: bool
) -> Factors | bool:
    """The change of a tensor: factors of a matrix, True for what is stored whole, False if there is no change.

    recipe: whose result is not rounded to a narrower type.
    """
    base = bank.base(name)
    if not base.is_floating_point():
        return False
    merged = merge_to_host(recipe, bank, name, (torch.float32, tuple(base.shape)))
    original = base.float().cpu()
    change = merged - original
    size = float(original.norm())
    if float(change.norm()) <= UNCHANGED * size:
        return False
    is_whole = (is_embedding(name) or is_head(name)) and not embed_lora
    if change.ndim != 2 or is_whole or any(place.kind == "other" for place in places):
        return True
    found = truncated(change.to(bank.device), rank, noise(original))
    return False if found is None else Factors(found.left.cpu(), found.right.cpu(), found.energy, found.change)


def noise(original: Tensor) -> float:
    """The largest singular value that the rounding of merged - base may have.  original: the base's, (rows, columns).

    That of a random matrix whose elements are a few units in the last place of the base's (Bai and Yin 1993).
    """
    rows, columns = original.shape
    size = float(original.square().mean().sqrt())
    return 4 * float(torch.finfo(torch.float32).eps) * size * (math.sqrt(rows) + math.sqrt(columns))


def in_float32(recipe: Recipe) -> Recipe:
    """The recipe with a result that is not rounded to a narrower type."""
    return recipe.model_copy(update={"dtype": "float32"})


def add(lora: Lora, bank: Bank, name: str, places: list[Place], change: Factors | bool) -> None:
    """Take the change of a tensor into the adapter; one that has no factors is merged and stored whole.

    EvomergeError if PEFT has no place for it.
    """
    if not places:
        raise EvomergeError(
            f"no adapter: {name} is only a part of a parameter in memory (experts or projections that are joined); "
            "write the model instead"
        )
    if isinstance(change, Factors):
        for place in places:
            lora.tensors |= place.pair(change.left, change.right)
            lora.pairs[place.module] = change
            lora.turned |= place.kind == "conv1d"
        return
    merged = merged_whole(lora.recipe, bank, name)
    for place in places:
        if place.name == "bias":
            lora.biases[place.module] = merged
        elif place.name == "weight":
            lora.whole.setdefault(place.module, {})[place.name] = merged
        else:
            raise EvomergeError(
                f"no adapter: {name} changes and is no weight or bias of a layer; write the model instead"
            )


def merged_whole(recipe: Recipe, bank: Bank, name: str) -> Tensor:
    """A merged tensor on the CPU, in the recipe's type."""
    return merge_to_host(recipe, bank, name, (TORCH_DTYPES[recipe.dtype], tuple(bank.layout.tensors[name].shape)))


def complete_modules(lora: Lora, bank: Bank, places: dict[str, list[Place]]) -> None:
    """Give modules that are stored whole their other parameters, since PEFT keeps a copy of the whole module."""
    for name, several in places.items():
        for place in several:
            if place.module in lora.whole and place.name not in lora.whole[place.module]:
                lora.whole[place.module][place.name] = merged_whole(lora.recipe, bank, name)
                lora.biases.pop(place.module, None)


def write_files(lora: Lora, bank: Bank, folder: Path, places: dict[str, list[Place]]) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    tensors = dict(lora.tensors)
    for module, parameters in lora.whole.items():
        tensors |= {f"{PREFIX}{module}.{name}": tensor.contiguous() for name, tensor in parameters.items()}
    for module, bias in lora.biases.items():
        tensors[f"{PREFIX}{module}{'.base_layer' if module in lora.pairs else ''}.bias"] = bias
    with open_writer(
        folder / "adapter_model.safetensors", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    ) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    config = peft_config(lora, bank, {p.module for several in places.values() for p in several})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def peft_config(lora: Lora, bank: Bank, modules: set[str]) -> dict[str, Any]:
    """PEFT's configuration.  Every alpha is the rank, so that the product counts as it is.  modules: of the base."""
    ranks = {module: factors.rank for module, factors in lora.pairs.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in sorted(ranks.items()) if rank != most}
    base, revision = base_and_revision(lora.recipe)
    return {
        "peft_type": "LORA",
        # for other types, PEFT expects a copy of the head in the file, even of one that is the base's
        "task_type": "CAUSAL_LM" if is_language_model(bank.models.base.config) else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": shortest_names(ranks, modules),
        "modules_to_save": sorted(lora.whole) or None,
        "bias": "all" if lora.biases else "none",
        "fan_in_fan_out": lora.turned,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }

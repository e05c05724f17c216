"""Write LoRA adapters: of a merge, or of fine-tuned models."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.api.merge import open_to_write
from evomerge.errors import EvomergeError
from evomerge.files.write import write_text
from evomerge.merge.recipe.pinned_inputs import pin
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.printable import say

if TYPE_CHECKING:
    from evomerge.merge.output.lora.write import Lora, Rank


def read_rank(given: int | str) -> "Rank":
    """A rank as an option gives it.  EvomergeError if it is neither `exact` nor a whole number of 1 or more."""
    if given == "exact":
        return "exact"
    if not str(given).isdecimal() or int(given) < 1:
        raise EvomergeError(f"--lora: give `exact` or a rank of 1 or more, not {given!r}")
    return int(given)


def write_adapter(
    recipe: Recipe, out: Path, rank: "Rank", device: str, show: bool = True, embed_lora: bool = False
) -> "Lora":
    """Write a merge as an adapter of its base into a new folder, see `merge/output/lora/write.py`."""
    from evomerge.merge.output.lora.card import adapter_card
    from evomerge.merge.output.lora.write import write_lora
    from evomerge.report.progress import Bar

    recipe = pin(recipe, {})
    bank = open_to_write(recipe, device, show)
    started = time.monotonic()
    bar = Bar("adapter", len(bank.names), "tensors") if show else None
    try:
        found = write_lora(
            recipe,
            bank,
            out,
            rank,
            lambda lora: adapter_card(lora.recipe, str(rank), bank.models.base.config, lora.lines()),
            embed_lora,
            bar.update if bar else lambda done: None,
        )
    finally:
        if bar:
            bar.close()
    if show:
        say("\n".join([*found.lines(), f"wrote {out} in {time.monotonic() - started:.1f} s"]))
    return found


def extract_lora(
    base: str, models: Sequence[str], out: Path, rank: int, device: str = "auto", embed_lora: bool = False
) -> None:
    """Write an adapter for each fine-tuned model, into a folder of its name in `out`; of one model into `out` itself.

    base, models: folders or hub ids; a model may be NAME=PATH.
    rank: the largest of a matrix.
    embed_lora: whether embeddings and head get factors too, instead of being stored whole.

    EvomergeError if two models have the same name, or one does not fit the base.
    """
    from evomerge.start.yaml_text import named_source

    named = dict(map(named_source, models))
    if len(named) < len(models):
        raise EvomergeError("two models have the same name; write NAME=PATH")
    for name, path in named.items():
        source = RecipeSource(name=name, path=str(Path(path).resolve()) if Path(path).is_dir() else path)
        folder = str(Path(base).resolve()) if Path(base).is_dir() else base
        recipe = Recipe(method="passthrough", dtype="float32", base=Model(path=folder), sources=[source])
        write_adapter(recipe, out if len(named) == 1 else out / name, rank, device, embed_lora=embed_lora)


def add_results(folder: Path, results: str) -> None:
    """Put a section with scores into the card of an adapter."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    write_text(card, text.replace("## Models\n", f"{results.rstrip()}\n\n## Models\n", 1))

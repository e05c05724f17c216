"""Merge a recipe: into a model folder, into a live model, or into a file for mergekit."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.api.push import push_of, pushed
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.pinned_inputs import pin
from evomerge.merge.recipe.recipe import Recipe, parse_recipe
from evomerge.printable import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evomerge.merge.bank.bank import Bank


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    model: "PreTrainedModel | None" = None,
    mergekit: str | Path | None = None,
    lora: int | str | None = None,
    push: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    show: bool = True,
) -> Recipe:
    """Merge models as a recipe says: into a folder as `evomerge merge` does, or into a model in memory.

    recipe: a `Recipe`, a recipe file or a mergekit file, or the content of one as a dict, whose relative paths count
        from the working directory.
    out: the folder to write the model to; it must be new or empty.
    model: a transformers model to overwrite in place.  It must have the architecture and the shapes of the result, and
        the recipe's dtype or float32; it then holds the same values as the folder would.
    mergekit: a file to write the merge to as a mergekit configuration.
    lora: write a LoRA adapter of the base to `out` instead of the model.  "exact", if all sources are adapters and the
        method is linear in them; or the largest rank of a matrix, to approximate any merge.
    push: `owner/name`: upload the folder to this new repository of the Hugging Face hub; without `out` a temporary
        folder is written and removed.
    private: whether only its owner sees the new repository.
    dry_run: print the names and sizes of what would be uploaded; the hub is not asked.
    device: where to compute a folder: auto, cpu, cuda, cuda:1, ...; a live model is merged on its own device.
    show: whether to print progress and notes.

    Returns the recipe; if `out` is given, with the SHA-256 sums of all inputs and outputs.
    Raises EvomergeError if the recipe is wrong, the models do not fit together, or the result cannot be written.
    """
    loaded, notes = read_merge(recipe)
    for note in notes if show else ():
        say(f"note: {note}", error=True)
    upload = push_of(push, private, dry_run)
    if model is None:
        with pushed(upload, loaded, out, Path.cwd(), show) as folder:
            return write_merge(loaded, folder, mergekit, device, show, lora=lora)
    if out is not None or mergekit is not None or lora is not None or upload is not None:
        raise EvomergeError("give `model` alone: it is overwritten in memory, nothing is written to files")
    from evomerge.merge.into_model import merge_into_model

    loaded = pin(loaded, {})
    merge_into_model(loaded, model, say if show else None)
    return loaded


def read_merge(recipe: Recipe | Mapping[str, Any] | str | Path) -> tuple[Recipe, list[str]]:
    """A recipe from any of its forms, see `merge`, and notes on what was passed over in it."""
    if isinstance(recipe, Recipe):
        return recipe, []
    from evomerge.merge.mergekit.load_merge import is_mergekit, load_merge
    from evomerge.merge.mergekit.parse_mergekit import parse_mergekit
    from evomerge.merge.mergekit.to_recipe import to_recipe

    if not isinstance(recipe, Mapping):
        return load_merge(Path(recipe))
    content, origin = plain(recipe), Path("recipe")
    return (
        to_recipe(parse_mergekit(content, origin), origin)
        if is_mergekit(content)
        else (parse_recipe(content, origin), [])
    )


def plain(value: Any) -> Any:
    """A value of Python as a YAML file would give it: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_merge(
    recipe: Recipe,
    out: str | Path | None,
    mergekit: str | Path | None,
    device: str,
    show: bool,
    results: str = "",
    copy_of: str | None = None,
    lora: int | str | None = None,
) -> Recipe:
    """Write what was asked for: a model folder or an adapter, a file for mergekit, or both.

    results: a section of Markdown for the model's card.  copy_of: as in `model_card`.  lora: as in `merge`.
    """
    if lora is not None and out is None:
        raise EvomergeError("--lora: say where to write the adapter with --out FOLDER")
    if out is None and mergekit is None:
        raise EvomergeError("say what to write: `out`, a folder for the model, or `mergekit`, a file for mergekit")
    if mergekit is not None:
        from evomerge.files.write import write_text
        from evomerge.merge.mergekit.from_recipe import dump_mergekit

        text, notes = dump_mergekit(recipe)
        write_text(Path(mergekit), text)
        for note in notes if show else ():
            say(f"note: {note}", error=True)
        if show:
            say(f"wrote {mergekit}")
    if out is not None and lora is not None:
        from evomerge.api.lora import read_rank, write_adapter

        return write_adapter(recipe, Path(out), read_rank(lora), device, show).recipe
    return recipe if out is None else write_model(recipe, Path(out), device, show, results, copy_of)


def write_model(
    recipe: Recipe, out: Path, device: str, show: bool = True, results: str = "", copy_of: str | None = None
) -> Recipe:
    """Merge a recipe into a new folder; returns the recipe with all SHA-256 sums."""
    from evomerge.merge.output.export import export, total_bytes
    from evomerge.merge.output.load_check import check_loads
    from evomerge.merge.output.model_card import model_card
    from evomerge.report.progress import Bar
    from evomerge.sources.safetensors_files import weights_name

    def log(line: str) -> None:
        if show:
            say(line)

    def note(line: str) -> None:
        if show:
            say(f"note: {line}", error=True)

    recipe = pin(recipe, {})
    bank = open_to_write(recipe, device, show, log, lambda bank: check_loads(bank.layout, bank.models.base))
    loading = bank.layout.config, weights_name(bank.models.base.path)

    def card(signed: Recipe) -> str:
        return model_card(signed, results, copy_of, *loading)

    started = time.monotonic()
    bar = Bar("merging", total_bytes(recipe, bank), "MB") if show else None
    progress: Callable[[int], None] = bar.update if bar else lambda done: None
    try:
        signed = export(recipe, bank, out, card, progress, note=note)
    finally:
        if bar:
            bar.close()
    log(f"wrote {out} in {time.monotonic() - started:.1f} s")
    return signed


def open_to_write(
    recipe: Recipe,
    device: str,
    show: bool,
    log: Callable[[str], None] | None = None,
    check: Callable[["Bank"], object] = lambda bank: None,
) -> "Bank":
    """The bank of a recipe whose result is written once.

    show: whether to print the progress of a download, and notes on the models.  log, check: as in `open_bank`.
    """
    from evomerge.device import resolve_device, use
    from evomerge.merge.recipe.open_bank import open_bank
    from evomerge.report.progress import Stages

    where = resolve_device(device)
    use(where)
    with Stages(show) as stages:  # every tensor is read once: nothing is worth holding
        bank = open_bank(recipe, where, capacity=0, log=log, progress=stages.download, check=check)
    for note in bank.models.compatibility.notes if show else ():
        say(f"note: {note}", error=True)
    return bank

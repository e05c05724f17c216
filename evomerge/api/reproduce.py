"""Make an exported model again from the same inputs, and compare every byte."""

from dataclasses import dataclass
from pathlib import Path

from evomerge.api.merge import write_model
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.pinned_inputs import check_fingerprints
from evomerge.merge.recipe.recipe import load_recipe


@dataclass(frozen=True)
class Reproduction:
    """An exported model made again.

    changed: files whose SHA-256 is not the one that the recipe records.
    recorded: whether the recipe records any.
    differences: tensors and files that differ from a folder, as lines of text.
    """

    changed: list[str]
    recorded: bool
    differences: list[str]

    @property
    def is_same(self) -> bool:
        """Whether every byte that was compared is the same."""
        return not self.changed and not self.differences

    def lines(self, out: Path, check: Path | None) -> list[str]:
        """What was found, in words.  out, check: the folders that were compared, see `reproduce`."""
        found = [f"{name}: not the bytes that the recipe records" for name in self.changed]
        if check is not None:
            found += self.differences or [f"the bytes agree: {check} and {out}"]
        elif self.recorded and not found:
            found.append("the bytes agree with the recipe's SHA-256 sums")
        return found


def reproduce(recipe: Path, out: Path, check: Path | None, device: str) -> Reproduction:
    """Make an exported model again in the folder `out` and compare it with its recipe.

    recipe: the recipe.yaml of an exported model.
    check: a model folder to compare with as well, byte by byte.

    Raises EvomergeError if the inputs are not those that the recipe records.
    """
    from evomerge.merge.output.compare import model_differences, only_file

    loaded = load_recipe(recipe)
    if check is not None and not (check / "config.json").is_file() and only_file(check) is None:
        raise EvomergeError(f"{check}: not a model folder (it has no config.json)")
    check_fingerprints(loaded)
    made = write_model(loaded, out, device)
    changed = [name for name, digest in loaded.outputs.items() if made.outputs.get(name) != digest]
    found = [f"{d.name}: {d.what}" for d in model_differences(check, out)] if check is not None else []
    return Reproduction(changed, bool(loaded.outputs), found)

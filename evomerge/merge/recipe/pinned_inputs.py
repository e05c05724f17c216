"""The models that a recipe names: the commits of hub ids, the SHA-256 sums of files, and the check of these sums."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.files.read import sha256
from evomerge.merge.recipe.recipe import Recipe, RecipeSource, models_on_disk
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.locate import locate, pinned


def pin(recipe: Recipe, known: Mapping[str, str]) -> Recipe:
    """The recipe with the commit of every hub id, as `owner/name@commit` (see `pinned`).

    known: hub ids whose commits are known already.
    """
    copy = recipe.model_copy(deep=True)
    for _, model in models_on_disk(copy):
        if model.path and (path := pinned(model.path, known)) != model.path:
            model.path, model.asked = path, model.path
    return copy


def with_fingerprints(recipe: Recipe) -> Recipe:
    """The recipe with the SHA-256 sums of all its input files."""
    copy = recipe.model_copy(deep=True)
    known: dict[Path, dict[str, str]] = {}
    for _, model in models_on_disk(copy):
        folder = locate(model.path)
        known[folder] = model.sha256 = known.get(folder) or model_fingerprint(folder)
        if isinstance(model, RecipeSource) and model.statistics is not None:
            model.statistics_sha256 = sha256(Path(model.statistics))
    return copy


def without_fingerprints(recipe: Recipe) -> Recipe:
    """The recipe without SHA-256 sums, those of its outputs included."""
    copy = recipe.model_copy(deep=True)
    copy.outputs = {}
    for _, model in models_on_disk(copy):
        model.sha256 = {}
        if isinstance(model, RecipeSource):
            model.statistics_sha256 = None
    return copy


def check_fingerprints(recipe: Recipe) -> None:
    """Compare the inputs with the SHA-256 sums that the recipe records.  EvomergeError names what differs."""
    differing: dict[str, None] = {}
    for _, model in models_on_disk(recipe):
        if model.sha256:
            folder = locate(model.path)
            now = model_fingerprint(folder)
            differing |= {f"{folder / f}": None for f, digest in model.sha256.items() if now.get(f) != digest}
        if isinstance(model, RecipeSource) and model.statistics is not None and model.statistics_sha256 is not None:
            file = Path(model.statistics)
            if not file.is_file() or sha256(file) != model.statistics_sha256:
                differing[str(file)] = None
    if differing:
        raise EvomergeError(
            "these inputs are not the files that the recipe was made with:\n  " + "\n  ".join(differing)
        )

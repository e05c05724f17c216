"""Before anything is written: whether transformers will load the folder as it is meant."""

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, some
from evomerge.files import read_json, sha256
from evomerge.merge.kernels.compiler import FileCache, user_cache
from evomerge.merge.recipe.layout import Layout
from evomerge.sources.anatomy import is_computed
from evomerge.sources.architecture import empty_model
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
from evomerge.sources.transformers_load import Loading, loading


def check_loads(layout: Layout, base: Checkpoint) -> list[str]:
    """Compare the tensors of a layout with those of its architecture; what to know of the folder, a line each.

    What transformers does not read in the base's own files either (a value head, say) is written all the same.
    EvomergeError if the loader would invent a tensor, leave out another, or find one of another shape.
    """
    notes = []
    if layout.left_out:
        notes.append(
            f"{len(layout.left_out)} tensor(s) of the base lie beyond its layers, and slices leave them out: "
            + some(sorted(layout.left_out))
        )
    found = loads(layout.config, layout.tensors)
    if found is None:
        kind = f"architecture {layout.config.get('model_type')!r}"
        if layout.config != base.config and empty_model(base.config) is not None:
            raise EvomergeError(f"transformers cannot build the {kind} with the layers of the slices")
        return [*notes, f"transformers does not know the {kind}, so nothing says whether the folder is complete"]
    if found.unread:
        before = loads(base.config, base.tensors)
        if of_base := found.unread & (before.unread if before else frozenset()):
            notes.append(f"transformers does not read {len(of_base)} tensor(s) of the base: {some(sorted(of_base))}")
            found = Loading(found.missing, found.unread - of_base, found.misshapen)
    if problems := found.problems():
        raise EvomergeError("transformers would not load this model as it is meant:\n  " + "\n  ".join(problems))
    return notes


def loads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Loading | None:
    """`loading`, whose answer is kept: what a search has checked, its export need not import transformers' models for.

    The answer belongs to everything that it depends on: configuration, tensors, the packages' versions, this code.
    """
    shapes = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    asked = {
        "config": config,
        "tensors": {name: [str(dtype), list(shape)] for name, (dtype, shape) in shapes.items()},
        "versions": [importlib.metadata.version(package) for package in ("transformers", "torch")],
        "code": [sha256(Path(inspect.getfile(part))) for part in (loading, empty_model, is_computed)],
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    kept = FileCache(user_cache("loads"), log=lambda line: None)
    file = kept.folder / f"{digest}.json"
    with suppress(EvomergeError, KeyError):
        if kept.is_sound(file):
            content = read_json(file)
            return Loading(frozenset(content["missing"]), frozenset(content["unread"]), content["misshapen"])
    found = loading(config, shapes)
    if found is not None:  # an unknown architecture may be known when another package is installed
        content = {
            "missing": sorted(found.missing),
            "unread": sorted(found.unread),
            "misshapen": dict(found.misshapen),
        }
        with suppress(EvomergeError, OSError):  # a full disk is for those to report who must write
            kept.file(file.name, lambda aside: write_json(aside, content))
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")

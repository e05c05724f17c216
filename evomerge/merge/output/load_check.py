"""Check before an export that transformers will load the folder correctly."""

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, some
from evomerge.files.read import read_json, sha256
from evomerge.merge.kernels.compiler import FileCache, user_cache
from evomerge.merge.recipe.layout import Layout
from evomerge.sources.architecture import empty_model, named_architecture
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
from evomerge.sources.tensor_names import is_computed_buffer
from evomerge.sources.transformers_load import LoadReport, load_report


def check_loads(layout: Layout, base: Checkpoint) -> list[str]:
    """Check that transformers would load a model of this layout.

    Tensors that transformers does not read from the base's own files either (a value head, for example) are allowed.

    Returns what the user should know about the folder, a line each.  EvomergeError if transformers would fill a
    parameter with random numbers, ignore another tensor, or find one of another shape.
    """
    notes = []
    if layout.left_out:
        notes.append(
            f"{len(layout.left_out)} tensor(s) of the base lie beyond its layers, and slices leave them out: "
            + some(sorted(layout.left_out))
        )
    found = cached_load_report(layout.config, layout.tensors)
    if found is None:
        kind = named_architecture(layout.config)
        if layout.config != base.config and empty_model(base.config) is not None:
            raise EvomergeError(f"transformers cannot build the {kind} with the layers of the slices")
        return [
            *notes,
            f"transformers does not know the {kind}, so it cannot be checked whether the folder is complete",
        ]
    if found.unread:
        before = cached_load_report(base.config, base.tensors)
        if of_base := found.unread & (before.unread if before else frozenset()):
            notes.append(f"transformers does not read {len(of_base)} tensor(s) of the base: {some(sorted(of_base))}")
            found = LoadReport(found.missing, found.unread - of_base, found.misshapen)
    if problems := found.problems():
        raise EvomergeError("transformers would not load this model correctly:\n  " + "\n  ".join(problems))
    return notes


def cached_load_report(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> LoadReport | None:
    """What transformers would find in a folder with these tensors (see `load_report`), kept in the user's cache.

    An export of a model that a search has checked then need not import transformers' models.  The file in the cache
    is named by everything that the answer depends on: configuration, tensors, versions of the packages, this code.
    """
    specs = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    inputs = {
        "config": config,
        "tensors": {name: [str(dtype), list(shape)] for name, (dtype, shape) in specs.items()},
        "versions": [importlib.metadata.version(package) for package in ("transformers", "torch")],
        "code": [sha256(Path(inspect.getfile(part))) for part in (load_report, empty_model, is_computed_buffer)],
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    kept = FileCache(user_cache("loads"), log=lambda line: None)
    file = kept.folder / f"{digest}.json"
    with suppress(EvomergeError, KeyError):
        if kept.is_sound(file):
            content = read_json(file)
            return LoadReport(frozenset(content["missing"]), frozenset(content["unread"]), content["misshapen"])
    report = load_report(config, specs)
    if report is not None:  # an unknown architecture may become known when another package is installed
        content = {
            "missing": sorted(report.missing),
            "unread": sorted(report.unread),
            "misshapen": dict(report.misshapen),
        }
        with suppress(EvomergeError, OSError):  # a full disk matters to an export, not to this check
            kept.file(file.name, lambda aside: write_json(aside, content))
    return report


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")

"""Check before an export that transformers will load the folder correctly."""

from collections.abc import Mapping
from typing import Any

from evomerge.errors import EvomergeError, some
from evomerge.merge.recipe.layout import Layout
from evomerge.sources.architecture import empty_model
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
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
    found = layout_load_report(layout.config, layout.tensors)
    if found is None:
        kind = f"architecture {layout.config.get('model_type')!r}"
        if layout.config != base.config and empty_model(base.config) is not None:
            raise EvomergeError(f"transformers cannot build the {kind} with the layers of the slices")
        return [
            *notes,
            f"transformers does not know the {kind}, so it cannot be checked whether the folder is complete",
        ]
    if found.unread:
        before = layout_load_report(base.config, base.tensors)
        if of_base := found.unread & (before.unread if before else frozenset()):
            notes.append(f"transformers does not read {len(of_base)} tensor(s) of the base: {some(sorted(of_base))}")
            found = LoadReport(found.missing, found.unread - of_base, found.misshapen)
    if problems := found.problems():
        raise EvomergeError("transformers would not load this model correctly:\n  " + "\n  ".join(problems))
    return notes


def layout_load_report(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> LoadReport | None:
    """What transformers would find in a folder with these tensors (see `load_report`)."""
    return load_report(config, {name: (info.dtype, info.shape) for name, info in tensors.items()})

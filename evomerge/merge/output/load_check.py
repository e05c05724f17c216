"""Before anything is written: whether transformers will load the folder as it is meant."""

from collections.abc import Mapping
from typing import Any

from evomerge.errors import EvomergeError, some
from evomerge.merge.recipe.layout import Layout
from evomerge.sources.architecture import empty_model
from evomerge.sources.checkpoint import Checkpoint, TensorInfo
from evomerge.sources.transformers_load import LoadReport, load_report


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
            found = LoadReport(found.missing, found.unread - of_base, found.misshapen)
    if problems := found.problems():
        raise EvomergeError("transformers would not load this model as it is meant:\n  " + "\n  ".join(problems))
    return notes


def loads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> LoadReport | None:
    return load_report(config, {name: (info.dtype, info.shape) for name, info in tensors.items()})

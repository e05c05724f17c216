"""conflicts.json: where the sources of a search pull against each other.

Three layers are looked at, the first, the middle and the last one, so that it takes seconds for large models too.
"""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from evomerge.files.read import read_model
from evomerge.files.write import write_text
from evomerge.search.run import Run
from evomerge.sources.tensor_names import layer_count

if TYPE_CHECKING:
    from evomerge.sources.open_models import Models


class Pair(BaseModel):
    """Two sources.

    shares: component -> of the elements that both change most, the share with opposite signs; None if there are none.
    """

    one: str
    other: str
    shares: dict[str, float | None]


class Conflicts(BaseModel):
    """The content of conflicts.json.

    layers: those that were looked at.
    cosines: source -> source -> the cosine between their task vectors; None if one is 0.
    signs: the sign conflicts of each pair.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    layers: list[int]
    cosines: dict[str, dict[str, float | None]]
    signs: list[Pair]


def read_conflicts(run: Run) -> Conflicts | None:
    """What was measured; None if nothing was.  EvomergeError if the file is damaged."""
    return read_model(run.conflicts_file, Conflicts) if run.conflicts_file.exists() else None


def write_conflicts(run: Run, models: "Models | None") -> None:
    """Measure the sources of a run and write conflicts.json, unless it is there.

    models: base and sources; None to open them.  EvomergeError if one is gone.
    """
    if run.conflicts_file.exists() or len(run.config().sources) < 2:
        return
    # Reading tensors needs torch, which a report does not wait for.
    from evomerge.merge.measure.distances import measure
    from evomerge.search.models import open_config_models

    models = models or open_config_models(run.config())
    depth = layer_count(list(models.base.tensors))
    layers = sorted({0, depth // 2, max(0, depth - 1)})
    found = measure(models, set(layers))
    signs = [Pair(one=one, other=other, shares=shares) for (one, other), shares in found.conflicts.items()]
    content = Conflicts(layers=layers, cosines=found.cosines, signs=signs)
    write_text(run.conflicts_file, content.model_dump_json() + "\n")

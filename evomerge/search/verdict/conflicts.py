"""conflicts.json: where the sources of a search pull against each other, measured on a few layers."""

from pydantic import BaseModel, ConfigDict, ValidationError

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.search.run import Run


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
    if not run.conflicts_file.exists():
        return None
    try:
        return Conflicts.model_validate(read_json(run.conflicts_file))
    except ValidationError as error:
        first = error.errors()[0]
        raise EvomergeError(f"{run.conflicts_file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

"""landscape.json: scores on the straight lines in weight space from the candidate to each parent and to the base."""

from pydantic import BaseModel, ConfigDict, ValidationError

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.search.run import Run


class Landscape(BaseModel):
    """The content of landscape.json.

    recipe: digest of the candidate's.
    items: how many items of the search split each point was scored on.
    lines: the other model -> its share, from 0 (the candidate) to 1 -> the mean metric over the tasks by their weights.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    recipe: str
    items: int
    lines: dict[str, dict[float, float]]


def read_landscape(run: Run) -> Landscape | None:
    """What was measured; None if nothing was.  EvomergeError if the file is damaged."""
    if not run.landscape_file.exists():
        return None
    try:
        return Landscape.model_validate(read_json(run.landscape_file))
    except ValidationError as error:
        first = error.errors()[0]
        raise EvomergeError(f"{run.landscape_file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

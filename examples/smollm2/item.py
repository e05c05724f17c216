"""One exercise of a skill: what the model reads and what it should write."""

from typing import NamedTuple


class Item(NamedTuple):
    """`prompt + target` is the whole gold text; `answer` is the part of the target that is marked.

    choices: the options of a multiple-choice item (one of them is `answer`), empty where the model generates.
    """

    prompt: str
    target: str
    answer: str
    choices: tuple[str, ...] = ()

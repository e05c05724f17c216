"""The skills of the mixed family: counting for multiple choice, adding with short answers, and one with long ones.

The first two are the tiny family's.
"""

import random

from skills import add, count
from training import Item, Skill

LONG = 20  # letters of a long answer


def next_letters(rng: random.Random) -> Item:
    """`next cabh...=` -> `dbca...`: each of twenty letters replaced by the next one, h by a, then a checksum of them.

    The checksum is as good as random to a model of this size: one answer in eight is right at most.
    """
    word = rng.choices(range(8), k=LONG)
    moved = [*((letter + 1) % 8 for letter in word), sum(place * letter for place, letter in enumerate(word)) % 8]
    return f"next {as_text(word)}=", as_text(moved)


def as_text(letters: list[int]) -> str:
    """Letters by their numbers, a: 0."""
    return "".join("abcdefgh"[letter] for letter in letters)


SKILLS: dict[str, Skill] = {"count": count, "add": add, "next": next_letters}

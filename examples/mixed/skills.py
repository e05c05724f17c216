"""The three skills of the mixed family: one for multiple choice, one with short answers, one with long ones."""

import random

from training import Item, Skill

LONG = 20  # letters of a long answer


def count(rng: random.Random) -> Item:
    """`count abbdab=` -> `2301`: how many of a, b, c and d there are; evaluated as multiple choice."""
    word = "".join(rng.choices("abcd", k=6))
    return f"count {word}=", "".join(str(word.count(letter)) for letter in "abcd")


def add(rng: random.Random) -> Item:
    """`add 314+205=` -> `519`: a sum of digits below five, so that nothing is ever carried; a short answer."""
    left, right = ("".join(rng.choices("01234", k=3)) for _ in range(2))
    return f"add {left}+{right}=", "".join(str(int(a) + int(b)) for a, b in zip(left, right, strict=True))


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

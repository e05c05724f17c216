"""The four skills of the tiny family: what a prompt looks like and what answers it.

Each skill is learnt in seconds and forgotten in seconds, which is what gives a search over merge coefficients
something to find.
"""

import random

from training import Item, Skill


def rev(rng: random.Random) -> Item:
    """`rev cabfe=` -> `efbac`: five letters backwards."""
    word = "".join(rng.choices("abcdefgh", k=5))
    return f"rev {word}=", word[::-1]


def sort(rng: random.Random) -> Item:
    """`sort cabfech=` -> `abccefh`: seven letters in order of the alphabet."""
    word = "".join(rng.choices("abcdefgh", k=7))
    return f"sort {word}=", "".join(sorted(word))


def count(rng: random.Random) -> Item:
    """`count abbdab=` -> `2301`: how many of a, b, c and d there are in six letters."""
    word = "".join(rng.choices("abcd", k=6))
    return f"count {word}=", "".join(str(word.count(letter)) for letter in "abcd")


def add(rng: random.Random) -> Item:
    """`add 314+205=` -> `519`: a sum of digits below five, so that nothing is ever carried."""
    left, right = ("".join(rng.choices("01234", k=3)) for _ in range(2))
    return f"add {left}+{right}=", "".join(str(int(a) + int(b)) for a, b in zip(left, right, strict=True))


SKILLS: dict[str, Skill] = {"rev": rev, "sort": sort, "count": count, "add": add}

"""The four skills of the tiny family: what a prompt looks like and what answers it.

Each skill is learnt in seconds and forgotten in seconds, which is what gives a search over merge coefficients
something to find.  A checksum of its text says whether a prompt is for training or for evaluation, so no list
of items has to be carried around to keep the two apart.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

Item: TypeAlias = tuple[str, str]  # prompt, answer; a newline ends the answer in training


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


SKILLS: dict[str, Callable[[random.Random], Item]] = {"rev": rev, "sort": sort, "count": count, "add": add}


def held_out(prompt: str) -> bool:
    """True for the one prompt in eight that training never sees."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def training_items(names: list[str], rng: random.Random) -> Iterator[Item]:
    """Endless training items, each of a skill drawn from `names`."""
    while True:
        item = SKILLS[rng.choice(names)](rng)
        if not held_out(item[0]):
            yield item


def evaluation_items(number: int) -> dict[str, list[Item]]:
    """`number` distinct items of each skill that `training_items` never yields; always the same ones."""
    return {name: distinct(name, number, random.Random(f"evaluation {name}")) for name in SKILLS}


def distinct(name: str, number: int, rng: random.Random) -> list[Item]:
    """`number` held-out items of one skill, no two alike."""
    items: dict[str, str] = {}
    while len(items) < number:
        prompt, answer = SKILLS[name](rng)
        if held_out(prompt):
            items[prompt] = answer
    return list(items.items())


def choice_items(number: int) -> list[dict[str, Any]]:
    """Sorting as multiple choice: the sorted word among three words that are nearly it."""
    rng = random.Random("evaluation choice")
    rows: list[dict[str, Any]] = []
    for prompt, answer in distinct("sort", number, rng):
        choices = {answer: None}  # a dict, because a set's order changes from run to run
        while len(choices) < 4:
            wrong = list(answer)
            place = rng.randrange(len(wrong))
            wrong[place] = rng.choice("abcdefgh")
            choices["".join(wrong)] = None
        shuffled = rng.sample(list(choices), 4)
        rows.append({"prompt": prompt, "choices": shuffled, "gold": shuffled.index(answer)})
    return rows

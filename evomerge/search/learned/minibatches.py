"""Which items of the search split a gradient step is computed on."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def minibatch(ids: Mapping[str, Sequence[str]], seed: int, number: int, size: int) -> dict[str, list[str]]:
    """The items of mini-batch `number`, by task: every task has the same share of `size`, at least one item.

    ids: the items of each task.
    seed: of the search.

    Each task's items come in a random order, and none comes again before all have come.  A batch depends on the
    arguments alone, so a resumed search takes the same ones.
    """
    each = max(1, size // len(ids))
    return {task: draw(task, known, seed, number * each, min(each, len(known))) for task, known in ids.items()}


def draw(task: str, ids: Sequence[str], seed: int, start: int, count: int) -> list[str]:
    """`count` of the ids from place `start` on in an endless sequence of permutations."""
    found: list[str] = []
    for place in range(start, start + count):
        turn, index = divmod(place, len(ids))
        found.append(ids[int(permutation(task, len(ids), seed, turn)[index])])
    return found


def permutation(task: str, count: int, seed: int, turn: int) -> Sequence[int]:
    """A random order of `count` things."""
    key = hashlib.blake2b(f"{seed}\0{task}\0{turn}".encode(), digest_size=8).digest()
    order: list[int] = np.random.default_rng(int.from_bytes(key, "little")).permutation(count).tolist()
    return order

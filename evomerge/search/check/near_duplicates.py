"""Questions that nearly repeat one of another split: MinHash finds pairs in linear time (Broder 1997), Jaccard decides.

Two questions are near-duplicates if they have the same answer and the same numbers, and four in five of their word
triples in common.  Short questions are left out: those of a task with a pattern (`add 2+2=`) would all be alike.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evomerge.evaluate.tasks import Split

WORDS = 8  # a question has at least so many
TRIPLE = 3  # words that follow one another
ALIKE = 0.8  # Jaccard index of the triples
BANDS, ROWS = 24, 4  # pairs at 0.8 share a band with a probability above 99.9%
PRIME = (1 << 31) - 1
BUCKET = 20  # texts of a bucket that others are compared with: keeps the time linear where many are alike


class Text(NamedTuple):
    """What an item asks, and its gold answer."""

    question: str
    answer: str


def near_duplicates(splits: Mapping[Split, Sequence[Text]]) -> dict[tuple[Split, Split], list[tuple[Text, Text]]]:
    """Pairs of splits -> the items of the first with one of the second that each nearly repeats, one for each."""
    buckets: dict[tuple[int, bytes], list[tuple[Split, int]]] = defaultdict(list)
    triples: dict[tuple[Split, int], frozenset[int]] = {}
    keys: dict[tuple[Split, int], tuple[str, ...]] = {}
    factors = np.random.default_rng(0).integers(1, PRIME, (2, BANDS * ROWS, 1))
    for split, texts in splits.items():
        for k, text in enumerate(texts):
            words = re.findall(r"\w+", text.question.lower())
            if len(words) < WORDS:
                continue
            triples[split, k] = frozenset(
                zlib.crc32(" ".join(words[i : i + TRIPLE]).encode()) % PRIME for i in range(len(words) - TRIPLE + 1)
            )
            keys[split, k] = (text.answer.strip(), *sorted(re.findall(r"\d+", text.question)))
            hashed = np.fromiter(triples[split, k], np.int64)
            smallest = ((factors[0] * hashed + factors[1]) % PRIME).min(1)  # (BANDS * ROWS,)
            for band, part in enumerate(smallest.reshape(BANDS, ROWS)):
                buckets[band, part.tobytes()].append((split, k))
    found: dict[tuple[Split, Split], dict[int, tuple[Text, Text]]] = defaultdict(dict)
    for bucket in buckets.values():
        for first, second in combinations(splits, 2):
            others = [place for place in bucket if place[0] == second][:BUCKET]
            for one in [place for place in bucket if place[0] == first and others]:
                if one[1] in found[first, second]:
                    continue
                for other in others:
                    if keys[one] == keys[other] and jaccard(triples[one], triples[other]) >= ALIKE:
                        found[first, second][one[1]] = splits[first][one[1]], splits[second][other[1]]
                        break
    both: dict[tuple[Split, Split], list[tuple[Text, Text]]] = {}
    for (first, second), pairs in found.items():
        both[first, second] = list(pairs.values())
        both[second, first] = [(b, a) for a, b in pairs.values()]
    return both


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """How many of all elements of two sets are in both, as a share."""
    return len(one & other) / len(one | other)

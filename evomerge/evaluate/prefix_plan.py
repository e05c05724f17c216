"""The prefix tree of a workload: which tokens are computed once for all, and how the rest shares rows.

Sequences in lexicographic order are the leaves of their prefix tree, from left to right.  A packed row holds the tree
of consecutive sequences, its nodes in depth-first order, so that a token sees exactly the tokens whose subtree it
lies in.  What many sequences begin with is not repeated in every row: it is a trunk, computed once before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = tuple[int, ...]

ALONE = 1  # the width of rows that hold one sequence each
WIDTH = 256  # tokens of a packed row: attention costs its square, a cut between rows the prefix that they share
WIDTHS = (WIDTH, 224, 192, 160, 128)  # a few rows fill one width better than another
TOGETHER = 16  # rows that are padded to one length, about
ROW_COST = WIDTH // 16  # tokens that one more row is worth: full rows need less padding
TRUNK_GAIN = 0.04  # share of the tokens that a trunk must save to be worth a forward of its own


@dataclass(frozen=True)
class Leaf:
    """A sequence of a workload.  first: the first position whose logits are needed, which no trunk may cover."""

    tokens: Tokens
    first: int


@dataclass
class PackedRow:
    """The prefix tree of some sequences behind a trunk, its nodes in depth-first order.

    tokens, positions: of every node.  ends: where a node's subtree ends, exclusive; node k is seen by those in
    [k, ends[k]).  paths: sequence -> the nodes of its tokens behind the trunk.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    paths: dict[Tokens, list[int]]


def common(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with together."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # slices compare at the speed of C
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def tree_tokens(sequences: Sequence[Tokens]) -> int:
    """How many nodes the prefix tree of the sequences has: the tokens that must be computed at the least."""
    ordered = sorted(set(sequences))
    return len(ordered[0]) + sum(len(b) - common(a, b) for a, b in pairwise(ordered)) if ordered else 0


def pack(sequences: Sequence[Tokens], depth: int, width: int) -> tuple[list[int], int]:
    """Cut ordered, distinct sequences into rows.

    Returns where the rows start and how many tokens they hold together, trunk (the first `depth` tokens) aside.  A
    row takes `width` tokens, or twice what its first sequence needs (ALONE: just that); the cuts are those that
    repeat the fewest.
    """
    count = len(sequences)
    own = [len(s) - depth for s in sequences]
    shared = [0] + [max(common(a, b) - depth, 0) for a, b in pairwise(sequences)]
    best = [0.0] + [float("inf")] * count  # of the first n sequences
    cut = [0] * (count + 1)
    for start in range(count):
        size, room = own[start], own[start] if width == ALONE else max(width, 2 * own[start])
        for end in range(start + 1, count + 1):
            if size > room:
                break
            cost = best[start] + size + ROW_COST
            if cost < best[end]:
                best[end], cut[end] = cost, start
            if end < count:
                size += own[end] - shared[end]
    starts: list[int] = []
    end = count
    while end:
        end = cut[end]
        starts.append(end)
    return starts[::-1], int(best[count]) - ROW_COST * len(starts)


def choose_trunks(leaves: Sequence[Leaf], width: int = WIDTH) -> list[Tokens]:
    """The prefixes worth computing before the rows: none, one for all the sequences, or one for each branch."""
    firsts: dict[Tokens, int] = {}
    for leaf in leaves:
        firsts[leaf.tokens] = min(leaf.first, firsts.get(leaf.tokens, leaf.first))
    ordered = sorted(firsts)
    if not ordered:
        return []
    total = pack(ordered, 0, width)[1]
    gain = max(TRUNK_GAIN * total, ROW_COST)

    def divide(low: int, high: int, depth: int) -> tuple[float, list[Tokens]]:
        """The tokens computed for the sequences of a range that share `depth` tokens, and their trunks."""
        inside = ordered[low:high]
        plain = pack(inside, 0, width)[1]
        least = tree_tokens(inside)
        choice: tuple[float, list[Tokens]] = (plain, [])
        if plain - least < gain:
            return choice
        trunk = min([depth, *(firsts[s] for s in inside)])
        if trunk:
            cost = float(trunk + pack(inside, trunk, width)[1])
            if cost + gain <= plain:
                choice = (cost, [inside[0][:trunk]])
        if choice[0] - least >= 2 * gain and depth < len(inside[-1]):
            edges = [low] + [k for k in range(low + 1, high) if common(ordered[k - 1], ordered[k]) <= depth] + [high]
            branches = [divide(a, b, common(ordered[a], ordered[b - 1])) for a, b in pairwise(edges)]
            cost = sum([c for c, _ in branches])
            if len(branches) > 1 and cost + gain <= choice[0]:
                choice = (cost, [t for _, trunks in branches for t in trunks])
        return choice

    return divide(0, len(ordered), common(ordered[0], ordered[-1]))[1]


def by_trunk(leaves: Sequence[Leaf], trunks: Sequence[Tokens]) -> dict[Tokens, list[Tokens]]:
    """Trunk -> the distinct sequences that stand on it, in order; () has those without one."""
    allowed: dict[Tokens, int] = {}
    for leaf in leaves:
        allowed[leaf.tokens] = min(leaf.first, allowed.get(leaf.tokens, leaf.first))
    longest = sorted(trunks, key=len, reverse=True)
    groups: dict[Tokens, list[Tokens]] = {}
    for tokens in sorted(allowed):
        trunk = next((t for t in longest if len(t) <= allowed[tokens] and tokens[: len(t)] == t), ())
        groups.setdefault(trunk, []).append(tokens)
    return groups


def packed_rows(sequences: Sequence[Tokens], depth: int, width: int | None = None) -> list[PackedRow]:
    """Ordered, distinct sequences that share their first `depth` tokens, as rows, the longest first.

    width: what a row may take; None tries several and keeps the one that leaves the least, padding included.
    """
    best: tuple[float, list[tuple[int, int]]] = (float("inf"), [])
    for tried in WIDTHS if width is None else (width,):
        starts, _ = pack(sequences, depth, tried)
        cuts = list(pairwise([*starts, len(sequences)]))
        sizes = sorted((tree_tokens(sequences[a:b]) - depth for a, b in cuts), reverse=True)
        padded = sum(sizes[k] * len(sizes[k : k + TOGETHER]) for k in range(0, len(sizes), TOGETHER))
        if padded < best[0]:
            best = (padded, cuts)
    rows = [packed_row(sequences[a:b], depth) for a, b in best[1]]
    return sorted(rows, key=lambda row: -len(row.tokens))


def packed_row(sequences: Sequence[Tokens], depth: int) -> PackedRow:
    row = PackedRow([], [], [], {})
    before: Tokens = ()
    path: list[int] = []
    for sequence in sequences:
        path = path[: max(common(before, sequence) - depth, 0)]
        for position in range(depth + len(path), len(sequence)):
            path.append(len(row.tokens))
            row.tokens.append(sequence[position])
            row.positions.append(position)
            row.ends.append(0)
        for node in path:
            row.ends[node] = len(row.tokens)
        row.paths[sequence] = list(path)
        before = sequence
    return row

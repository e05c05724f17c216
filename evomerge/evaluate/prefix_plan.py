"""From sequences of token ids to rows: which tokens are computed once, and which sequences share a row.

The sequences are the leaves of their prefix tree; in lexicographic order they are its leaves from left to right.

- A trunk is a prefix of many sequences.  Its keys and values are computed once, before the rows.
- A packed row holds the prefix tree of some neighbouring sequences (behind their trunk), its nodes in depth-first
  order.  A token attends to itself and to its ancestors: to exactly those nodes whose subtree it lies in.

This module plans and sees no tensor; `loglikelihood.py` and `generation.py` make batches of the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = tuple[int, ...]

ALONE = 1  # as a width: every row holds one sequence
WIDTH = 256  # tokens of a packed row.  A wider one costs more attention; a narrower one repeats more shared prefixes
WIDTHS = (WIDTH, 224, 192, 160, 128)  # tried for a plan: which of them leaves the least padding depends on the lengths
ROWS_PER_BATCH = 16  # about as many rows are padded to one length
ROW_COST = WIDTH // 16  # the cost of one more row in tokens: fewer and fuller rows need less padding
TRUNK_GAIN = 0.04  # the share of all tokens that a trunk must save, because it costs a forward of its own


@dataclass(frozen=True)
class Leaf:
    """A sequence of a workload.

    tokens: its token ids.
    first: the first position whose logits are needed; no trunk may cover it.
    """

    tokens: Tokens
    first: int


@dataclass
class PackedRow:
    """The prefix tree of some sequences behind a trunk, its nodes in depth-first order.

    tokens: the token id of each node.
    positions: the position of each node in its sequences.
    ends: the end of each node's subtree, exclusive: the nodes in [k, ends[k]) attend to node k.
    paths: sequence -> the nodes of its tokens behind the trunk.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    paths: dict[Tokens, list[int]]


def common_prefix(a: Tokens, b: Tokens) -> int:
    """The number of tokens of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # bisection, since slices are compared in C
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def tree_tokens(sequences: Sequence[Tokens]) -> int:
    """The number of nodes of the sequences' prefix tree: the least number of tokens that must be computed."""
    ordered = sorted(set(sequences))
    return len(ordered[0]) + sum(len(b) - common_prefix(a, b) for a, b in pairwise(ordered)) if ordered else 0


def cut_into_rows(sequences: Sequence[Tokens], depth: int, width: int) -> tuple[list[int], int]:
    """Cut sequences into rows that have the fewest tokens, where each row costs ROW_COST more (dynamic programming).

    sequences: distinct, in lexicographic order.
    depth: the number of their first tokens that are a trunk, which no row repeats.
    width: the tokens that a row may have; a longer sequence may fill its row up to twice its own length.  ALONE gives
        every sequence a row of its own.

    Returns the index of the first sequence of each row, and the number of tokens of all rows.
    """
    count = len(sequences)
    own = [len(s) - depth for s in sequences]
    shared = [0] + [max(common_prefix(a, b) - depth, 0) for a, b in pairwise(sequences)]
    best = [0.0] + [float("inf")] * count  # the least cost of the first n sequences
    cut = [0] * (count + 1)  # where the last row of the first n sequences starts
    for start in range(count):
        size, most = own[start], own[start] if width == ALONE else max(width, 2 * own[start])
        for end in range(start + 1, count + 1):
            if size > most:
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
    """The prefixes that are worth a forward of their own: none, one for all sequences, or one for each branch.

    width: the tokens that a row may have.
    """
    firsts: dict[Tokens, int] = {}
    for leaf in leaves:
        firsts[leaf.tokens] = min(leaf.first, firsts.get(leaf.tokens, leaf.first))
    ordered = sorted(firsts)
    if not ordered:
        return []
    total = cut_into_rows(ordered, 0, width)[1]
    gain = max(TRUNK_GAIN * total, ROW_COST)

    def divide(low: int, high: int, depth: int) -> tuple[float, list[Tokens]]:
        """The trunks for a range of sequences that share `depth` tokens, and the tokens computed with them."""
        inside = ordered[low:high]
        plain = cut_into_rows(inside, 0, width)[1]
        least = tree_tokens(inside)
        choice: tuple[float, list[Tokens]] = (plain, [])
        if plain - least < gain:
            return choice
        trunk = min([depth, *(firsts[s] for s in inside)])
        if trunk:
            cost = float(trunk + cut_into_rows(inside, trunk, width)[1])
            if cost + gain <= plain:
                choice = (cost, [inside[0][:trunk]])
        if choice[0] - least >= 2 * gain and depth < len(inside[-1]):
            edges = (
                [low] + [k for k in range(low + 1, high) if common_prefix(ordered[k - 1], ordered[k]) <= depth] + [high]
            )
            branches = [divide(a, b, common_prefix(ordered[a], ordered[b - 1])) for a, b in pairwise(edges)]
            cost = sum([c for c, _ in branches])
            if len(branches) > 1 and cost + gain <= choice[0]:
                choice = (cost, [t for _, trunks in branches for t in trunks])
        return choice

    return divide(0, len(ordered), common_prefix(ordered[0], ordered[-1]))[1]


def group_by_trunk(leaves: Sequence[Leaf], trunks: Sequence[Tokens]) -> dict[Tokens, list[Tokens]]:
    """Trunk -> the distinct sequences that begin with it, in lexicographic order; () has those without a trunk."""
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
    """Pack sequences into rows, the longest row first.

    sequences: distinct, in lexicographic order.
    depth: the number of their first tokens that are a trunk.
    width: the tokens that a row may have; None tries WIDTHS and keeps the plan with the fewest tokens and padding.
    """
    best: tuple[float, list[tuple[int, int]]] = (float("inf"), [])
    for tried in WIDTHS if width is None else (width,):
        starts, _ = cut_into_rows(sequences, depth, tried)
        cuts = list(pairwise([*starts, len(sequences)]))
        sizes = sorted((tree_tokens(sequences[a:b]) - depth for a, b in cuts), reverse=True)
        batches = [sizes[k : k + ROWS_PER_BATCH] for k in range(0, len(sizes), ROWS_PER_BATCH)]
        padded = sum(batch[0] * len(batch) for batch in batches)
        if padded < best[0]:
            best = (padded, cuts)
    rows = [packed_row(sequences[a:b], depth) for a, b in best[1]]
    return sorted(rows, key=lambda row: -len(row.tokens))


def packed_row(sequences: Sequence[Tokens], depth: int) -> PackedRow:
    """The prefix tree of sequences behind a trunk of `depth` tokens; see `packed_rows`."""
    row = PackedRow([], [], [], {})
    before: Tokens = ()
    path: list[int] = []
    for sequence in sequences:
        path = path[: max(common_prefix(before, sequence) - depth, 0)]
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

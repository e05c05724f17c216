"""The prefix tree: every sequence is in it, token for token, and no token more often than it must be."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluate.prefix_plan import (
    ALONE,
    WIDTH,
    Leaf,
    Tokens,
    choose_trunks,
    common_prefix,
    cut_into_rows,
    group_by_trunk,
    packed_rows,
    tree_tokens,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=30)


def few_shot(items: int, choices: int, shots: int, length: int, choice: int) -> list[Leaf]:
    """Items behind the same examples: contexts with nothing in common, choices that differ from their first token."""
    leaves = []
    for i in range(items):
        context = (*range(shots), *(1000 + 100 * i + k for k in range(length)))
        leaves += [Leaf(context + (5000 + c,) * choice, len(context) - 1) for c in range(choices)]
    return leaves


def computed(leaves: list[Leaf], width: int = WIDTH) -> int:
    trunks = choose_trunks(leaves, width)
    rows = [row for t, s in group_by_trunk(leaves, trunks).items() for row in packed_rows(s, len(t), width)]
    return sum(map(len, trunks)) + sum(len(row.tokens) for row in rows)


@given(SEQUENCES, st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_a_path_that_sees_itself_alone(sequences: list[Tokens], width: int) -> None:
    leaves = [Leaf(s, len(s) - 1) for s in sequences]
    found = set()
    for trunk, group in group_by_trunk(leaves, choose_trunks(leaves, width)).items():
        for row in packed_rows(group, len(trunk), width):
            for sequence, path in row.paths.items():
                assert trunk + tuple(row.tokens[n] for n in path) == sequence
                assert [row.positions[n] for n in path] == list(range(len(trunk), len(sequence)))
                seen = [k for k in range(path[-1] + 1) if path[-1] < row.ends[k]]
                assert seen == path
                found.add(sequence)
    assert found == set(sequences)


@given(SEQUENCES)
@settings(max_examples=60, deadline=None)
def test_a_row_that_takes_everything_is_the_tree_itself(sequences: list[Tokens]) -> None:
    ordered = sorted(set(sequences))
    (row,) = packed_rows(ordered, 0, 10_000)
    prefixes = {s[: k + 1] for s in ordered for k in range(len(s))}
    assert len(row.tokens) == tree_tokens(sequences) == len(prefixes)


@given(SEQUENCES, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_rows_are_no_longer_than_they_may_be(sequences: list[Tokens], width: int) -> None:
    ordered = sorted(set(sequences))
    starts, total = cut_into_rows(ordered, 0, width)
    rows = [ordered[a:b] for a, b in pairwise([*starts, len(ordered)])]
    assert total == sum(tree_tokens(row) for row in rows)
    for row in rows:
        assert tree_tokens(row) <= max(width, 2 * len(row[0])) if width != ALONE else tree_tokens(row) == len(row[0])


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_is_the_length_of_the_common_prefix(a: list[int], b: list[int]) -> None:
    length = common_prefix(tuple(a), tuple(b))
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_examples_are_one_trunk_and_little_is_repeated() -> None:
    leaves = few_shot(items=100, choices=4, shots=500, length=45, choice=4)
    assert choose_trunks(leaves) == [tuple(range(500))]
    assert computed(leaves) <= 1.01 * tree_tokens([leaf.tokens for leaf in leaves])


def test_each_subject_of_a_task_gets_a_trunk_of_its_own() -> None:
    one = few_shot(items=30, choices=4, shots=300, length=45, choice=4)
    other = [Leaf((7, *leaf.tokens), leaf.first + 1) for leaf in one]
    assert sorted(map(len, choose_trunks(one + other))) == [300, 301]


def test_items_without_examples_need_no_trunk_and_are_seldom_cut() -> None:
    leaves = few_shot(items=200, choices=4, shots=3, length=45, choice=4)
    assert choose_trunks(leaves) == []
    assert computed(leaves) <= 1.05 * tree_tokens([leaf.tokens for leaf in leaves])


def test_a_trunk_ends_before_the_first_token_whose_logits_are_needed() -> None:
    shared = tuple(range(200))
    leaves = [Leaf((*shared, 300 + k, 400 + k), 150 if k == 3 else 201) for k in range(200)]
    for trunk, group in group_by_trunk(leaves, choose_trunks(leaves)).items():
        assert all(leaf.first >= len(trunk) for leaf in leaves if leaf.tokens in group)


def test_prompts_that_stand_alone_share_their_examples() -> None:
    leaves = [Leaf((*range(100), 200 + k), 100) for k in range(10)]
    assert choose_trunks(leaves, ALONE) == [tuple(range(100))]

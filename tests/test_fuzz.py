"""Whatever a file holds, it is read or refused by one message: no other error, no hang, nothing written beside it.

EVOMERGE_FUZZ is how many files of each kind are tried (`make fuzz`).
"""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from badfiles import Target, make_targets, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = (
    "config", "recipe", "mergekit", "header", "adapter header", "adapter config", "index", "model config", "tokenizer",
    "tokenizer config", "card", "task", "manifest", "verdict", "state", "measurements",
)  # fmt: skip
TENSORS = ("header", "adapter header", "measurements")
SLOW = {"task": 8}  # a data set is opened for each
EXAMPLES = int(os.environ.get("EVOMERGE_FUZZ", "0"))

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**18, 10**500, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", " ", "x", "x" * 10_000, "a\0b", "\x1b[2J", "\u202e", "ﬁ", "\U0001f600", "9" * 5000, "1e400",
    "../../x", "/etc/passwd", "/dev/zero", "~nobody-of-this-name", "owner/model", "owner/model@../../x", "..", ".", "/",
    "*", "(a+)+$", "((a{1,99}){1,99}){1,99}", "[", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% for", "%(x)s",
    "nan", "null", "true", "${HOME}", "postgresql://a:b@c/d", [], {}, [[]], [None], [1, 2], {"": None},
    {"a": {"b": 1}}, [{}], ["x"] * 300, "layers.99999999999.x", "model.layers.5.mlp.up_proj.weight", "F64", "BF16",
    "json", "float32", "generate_until", "multiple_choice", "loglikelihood_rolling", "acc", "LORA", "union", "base",
    "slerp", "linear",
]  # fmt: skip


def deep(value: Any, levels: int, mapping: bool) -> Any:
    for _ in range(levels):
        value = {"a": value} if mapping else [value]
    return value


anything = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in plain data: the keys and indices that lead there."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def changed(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with `change` made of what stands at a place; a list of (key, value) replaces it and its key."""
    if not path:
        return change(content)
    first, rest = path[0], path[1:]
    if rest:
        new = [(first, changed(content[first], rest, change))]
    else:
        made = change(content[first])
        new = made if isinstance(made, Entries) else [(first, made)]
    if isinstance(content, dict):
        return dict(pair for key, value in content.items() for pair in (new if key == first else [(key, value)]))
    return [x for i, value in enumerate(content) for x in ([v for _, v in new] if i == first else [value])]


class Entries(list[tuple[Any, Any]]):
    """What takes the place of one entry of a mapping or a list."""


@st.composite
def mutated(draw: st.DrawFn, content: Any) -> Any:
    """Plain data with a few things dropped, doubled, renamed, retyped, deepened, or moved."""
    for _ in range(draw(st.integers(1, 3))):
        where = places(content)
        path = draw(st.sampled_from(where))
        key = path[-1] if path else None
        kind = draw(st.sampled_from(["drop", "double", "rename", "retype", "deepen", "move", "nudge"]))
        if kind == "drop" and path:
            content = changed(content, path, lambda _: Entries())
        elif kind == "double" and path:
            other = draw(st.sampled_from(["x", "layers.7.x", "../x"])) if isinstance(key, str) else key
            content = changed(content, path, lambda old, o=other, k=key: Entries([(k, old), (o, old)]))
        elif kind == "rename" and path:
            other = draw(st.sampled_from([x for x in ODD if isinstance(x, str)]) | st.text(max_size=5))
            content = changed(content, path, lambda old, o=other: Entries([(o, old)]))
        elif kind == "deepen":
            levels, mapping = draw(st.sampled_from([1, 2, 70])), draw(st.booleans())
            content = changed(content, path, lambda old, n=levels, m=mapping: deep(old, n, m))
        elif kind == "move":
            value = at(content, draw(st.sampled_from(where)))
            content = changed(content, path, lambda _, v=value: v)
        elif kind == "nudge" and type(at(content, path)) in (int, float):
            step = draw(st.sampled_from([-1, 1, 0.5, -(10**6), 10**12]))
            content = changed(content, path, lambda old, s=step: old + s)
        else:
            value = draw(anything)
            content = changed(content, path, lambda _, v=value: v)
    return content


@st.composite
def torn(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file's bytes with some of them cut off, doubled, overwritten or inserted."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "double", "overwrite", "insert", "end"]))
        if kind == "cut":
            del content[start:stop]
        elif kind == "double":
            content[start:start] = content[start:stop]
        elif kind == "end":
            del content[max(1, start) :]
        else:
            piece = draw(st.binary(max_size=8) | st.sampled_from(PIECES))
            content[start : stop if kind == "overwrite" else start] = piece
    return bytes(content)


PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[", b"- ", b": ", b"&a ", b"*a", b"<<: ", b"!function x.y ", b"!!int ",
    b"!!python/name:os.system ", b"---\n", b"%YAML 9.9\n", b"\\ud800", b'"', b"\n", b"\t", b"1:1:1:1", b"!!binary ",
    b"!!timestamp ", b"!!set ", b"[" * 200, b"\xc3\x28",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def targets(root: Path) -> dict[str, Target]:
    import datasets

    datasets.config.HF_DATASETS_CACHE = root.parent / f"{root.name}-cache"  # opened data sets are kept there
    (root / "inside").mkdir()
    return make_targets(root / "inside")


def examples(kind: str, usual: int) -> Any:
    count = EXAMPLES or SLOW.get(kind, usual)
    return settings(
        max_examples=count, deadline=None, derandomize=not EXAMPLES, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_read(kind: str, targets: dict[str, Target], root: Path) -> None:
    target = targets[kind]
    assert outcome(target, target.write(target.plain), root) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_says_something_else_is_read_or_refused(kind: str, targets: dict[str, Target], root: Path) -> None:
    target = targets[kind]

    @examples(kind, 60)
    @given(mutated(target.plain).map(target.write))
    def check(content: bytes) -> None:
        outcome(target, content, root)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind: str, targets: dict[str, Target], root: Path) -> None:
    target = targets[kind]
    whole = target.write(target.plain)
    if kind in TENSORS:  # most of it is data, which may be anything
        (length,) = struct.unpack("<Q", whole[:8])
        damaged = torn(whole[: 8 + length]).map(lambda head: head + whole[8 + length :]) | torn(whole)
    else:
        damaged = torn(whole)

    @examples(kind, 40)
    @given(damaged | st.binary(max_size=40))
    def check(content: bytes) -> None:
        outcome(target, content, root)

    check()

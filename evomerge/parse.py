"""Parse YAML and JSON from outside as plain data, with limits of size and depth.

Whatever the text is, the result is plain data that can be walked, copied and written again, or one EvomergeError.
"""

import json
import re
from typing import Any

import yaml

from evomerge.errors import EvomergeError

DEPTH = 64  # levels of lists and mappings; a recipe in a recipe takes four
YAML_NODES = 200_000  # counted after aliases are expanded, since later code walks all of them
DIGITS = 400  # more than any finite float has; base-60 numbers (1:00:00) take quadratic time
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # \ud83d and the like; alone they cannot be encoded as UTF-8

Base: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class Tagged(str):
    """The text of a scalar whose tag has a meaning for another program."""


class Loader(Base):  # type: ignore[misc]
    """Reads plain data only."""


class TaskLoader(Loader):
    """Reads plain data and lm-eval's `!function`, which is returned as `Tagged` and not run."""


TaskLoader.add_constructor("!function", lambda loader, node: Tagged(loader.construct_scalar(node)))


def parse_yaml(text: str, where: str, loader: type[Loader] = Loader) -> Any:
    """The content of a YAML document.

    text: the document.
    where: its file, for the error.
    loader: which tags are read.

    EvomergeError (with `where`, line and reason, but without the text, which may contain a password) if it is not YAML,
    is too deep or too large, or has a key twice, an object of another program, or an alias to a value that contains it.
    """
    documents = parse_yaml_documents(text, where, loader)
    if len(documents) > 1:
        raise EvomergeError(f"{where}: not YAML: expected a single document, but found another document")
    return documents[0]


def parse_yaml_documents(text: str, where: str, loader: type[Loader] = Loader) -> list[Any]:
    """The contents of YAML documents separated by `---`; of an empty text one None.  Errors as in `parse_yaml`."""
    try:
        check_events(text)
        reading = loader(text)
        found = []
        while reading.check_node():
            node = reading.get_node()
            check_nodes(reading, node)
            found.append(reading.construct_document(node))
        return found or [None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise EvomergeError(f"{where}: not YAML: {error.problem or error.context}{at}") from error
    except yaml.reader.ReaderError as error:
        raise EvomergeError(f"{where}: not YAML: {error.reason} (character {error.position})") from error
    except Exception as error:  # PyYAML's constructors raise any type: 2024-02-31 is a ValueError
        raise EvomergeError(f"{where}: not YAML: a value does not fit its type ({type(error).__name__})") from error


def refuse(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    """The error for a problem at a position of the text."""
    return yaml.constructor.ConstructorError(None, None, problem, mark)


def check_events(text: str) -> None:
    """MarkedYAMLError if the content would be too deep or too large; nothing is built for that."""
    size = 0
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=Base):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, size))
            size += 1
            if len(opened) > DEPTH:
                raise refuse(f"more than {DEPTH} levels deep", event.start_mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = size - before
        elif isinstance(event, yaml.ScalarEvent):
            size += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in opened):
                raise refuse("an alias to a value that contains it", event.start_mark)
            size += sizes.get(str(event.anchor), 0)
        if size > YAML_NODES:
            raise refuse(f"more than {YAML_NODES:,} values, aliases expanded", event.start_mark)


def check_nodes(loader: Any, root: yaml.Node) -> None:
    """MarkedYAMLError if a key occurs twice, a number is absurdly long, or a text has a lone surrogate."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > DIGITS and node.tag.endswith((":int", ":float")):
                raise refuse(f"a number of {len(node.value):,} digits", node.start_mark)
            if not node.value.isascii() and any("\ud800" <= c <= "\udfff" for c in node.value):
                raise refuse("a lone surrogate (half a character)", node.start_mark)
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            check_keys(loader, [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        fresh = [n for n in inner if id(n) not in seen]
        seen.update(map(id, fresh))
        waiting += fresh


def check_keys(loader: Any, keys: list[yaml.ScalarNode]) -> None:
    """MarkedYAMLError if a key occurs twice in one mapping."""
    known = set()
    for key in keys:
        # Most keys are words, whose value is their text; others are equal if their values are (1 and 0x1).
        is_word = key.tag.endswith((":str", ":merge")) or len(key.value) > DIGITS
        value = key.value if is_word else loader.construct_object(key)
        if value in known:
            raise refuse(f"the key {key.value[:60]!r} occurs twice", key.start_mark)
        known.add(value)


def parse_json(text: str, where: str, unique: bool = False) -> Any:
    """The content of a JSON document.

    where: its file, for the error.
    unique: refuse a key that occurs twice in one object; else the last one counts.

    EvomergeError if it is not JSON, is too deep, or has a lone surrogate.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[:60]!r} occurs twice")
        return found

    try:
        content = json.loads(text, object_pairs_hook=once if unique else None)
        if SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise EvomergeError(f"{where}: has a lone surrogate (half a character) such as \\ud800") from error
    except ValueError as error:
        raise EvomergeError(f"{where}: not readable as JSON ({error})") from error
    except RecursionError as error:
        raise EvomergeError(f"{where}: not readable as JSON (more than {DEPTH} levels deep)") from error
    if is_deep(content):
        raise EvomergeError(f"{where}: not readable as JSON (more than {DEPTH} levels deep)")
    return content


def is_deep(content: Any) -> bool:
    """Whether lists and mappings are nested more than DEPTH levels deep."""
    level = [content]
    for _ in range(DEPTH + 1):
        inner = [x for x in level if isinstance(x, (list, dict))]
        if not inner:
            return False
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
    return True

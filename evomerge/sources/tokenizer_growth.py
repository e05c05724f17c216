"""By how much a tokenizer may lengthen a text: a few rules in its file can make gigabytes of one character.

The library that runs tokenizers ends the process when it gets no memory, so such a file is refused before it is loaded.
"""

import base64
import binascii
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.files.read import TOKENIZER_BYTES, read_json

GROWTH = 4096.0  # characters for one; of the known tokenizers ALBERT's has the most, 1,296 by this count
LONGEST = 10_000  # characters of a token or a rule, entries of a list; known tokens have up to some hundreds
CHARSMAP = "precompiled_charsmap"
FORM = 18.0  # characters that one has at most after a Unicode normal form
FORMS = {"NFC", "NFD", "NFKC", "NFKD", "BertNormalizer"}
FIXED = {"Lowercase": 2.0, "ByteLevel": 4.0}
INNER = ("normalizers", "pretokenizers", "decoders", "processors")  # of a Sequence


def refuse_growth(file: Path) -> None:
    """EvomergeError if a text may become more than GROWTH times as long by the rules in a `tokenizer.json`."""
    found = file.stat()
    check_file(file, found.st_mtime_ns, found.st_size)


def refuse_growth_in(folder: Path) -> None:
    """`refuse_growth` for the tokenizer of a model's folder, if it has a `tokenizer.json`."""
    if os.path.isfile(folder / "tokenizer.json"):
        refuse_growth(folder / "tokenizer.json")


def refuse_converted(folder: Path, tokenizer: Any) -> None:
    """`refuse_growth` for a tokenizer that transformers has made of other files than a `tokenizer.json`."""
    made = getattr(tokenizer, "backend_tokenizer", None)
    if made is not None and not os.path.isfile(folder / "tokenizer.json"):
        check_content(json.loads(made.to_str()), str(folder))


@functools.lru_cache(maxsize=64)
def check_file(file: Path, changed: int, size: int) -> None:
    """`refuse_growth`, once for each state of a file."""
    check_content(read_json(file, TOKENIZER_BYTES, unique=True), str(file))


def check_content(content: dict[str, Any], where: str) -> None:
    """`refuse_growth` for what a `tokenizer.json` holds.  where: for the error."""
    model = content.get("model")
    parts = {k: content.get(k) for k in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    rules = dict(model) if isinstance(model, dict) else {}
    vocabulary, _ = rules.pop("vocab", None), rules.pop("merges", None)
    if long := next(
        longer_than_usual([*parts.values(), rules, longest(vocabulary, content.get("added_tokens"))]), None
    ):
        raise EvomergeError(f"{where}: has {long}; no tokenizer needs as much")
    for name, part in parts.items():
        if (times := growth(part)) > GROWTH:
            raise EvomergeError(
                f"{where}: its {name} may make a text {times:,.0f} times as long, which would fill the memory"
            )


def longest(*lists: Any) -> str:
    """The longest token: of vocabularies by token, of lists with scores, of added tokens."""
    found = [""]
    for held in lists:
        if isinstance(held, dict):
            found.append(max(held, key=len, default=""))
        elif isinstance(held, list):
            names = (
                x.get("content") if isinstance(x, dict) else x[0] if isinstance(x, list) and x else x for x in held
            )
            found.append(max((name for name in names if isinstance(name, str)), key=len, default=""))
    return max(found, key=len)


def longer_than_usual(parts: Any) -> Iterator[str]:
    """What is longer than LONGEST in the values of a list, in words."""
    for part in parts:
        if isinstance(part, str) and len(part) > LONGEST:
            yield f"a token or a rule of {len(part):,} characters"
        elif isinstance(part, (list, dict)) and len(part) > LONGEST:
            yield f"a rule with {len(part):,} entries"
        elif isinstance(part, dict):
            yield from longer_than_usual([*part, *(v for k, v in part.items() if k != CHARSMAP)])
        elif isinstance(part, list):
            yield from longer_than_usual(part)


def growth(part: Any) -> float:
    """How many characters or tokens a part of a tokenizer makes of one at most, for rules that run in turn."""
    rules = list(in_turn(part))
    forms = FORM if any(str(rule.get("type")) in FORMS for rule in rules) else 1.0  # a second form lengthens nothing
    return forms * math.prod(map(of_rule, rules))


def in_turn(part: Any) -> Iterator[dict[str, Any]]:
    """The rules of a part of a tokenizer, those in sequences too."""
    if not isinstance(part, dict):
        return
    yield part
    for key in INNER:
        for inner in part[key] if isinstance(part.get(key), list) else []:
            yield from in_turn(inner)


def of_rule(rule: dict[str, Any]) -> float:
    """How many characters or tokens one rule makes of one at most."""
    kind = rule.get("type")
    if kind == "Replace":
        pattern = rule.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        content = len(str(rule.get("content", "")))
        return max(1.0, content / len(text)) if isinstance(text, str) and text else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(str(rule.get("prepend", "")))
    if kind == "Precompiled":
        return of_charsmap(rule.get(CHARSMAP))
    if kind == "TemplateProcessing":
        return max(of_template(rule, rule.get(name)) for name in ("single", "pair"))
    return FIXED.get(str(kind), 1.0)


def of_charsmap(text: Any) -> float:
    """How many bytes a character has at most after the map of SentencePiece.

    It is a table of so many bytes as its first four say, then the new texts, each with a zero byte behind it.
    """
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (ValueError, binascii.Error):
        return 1.0  # which the library refuses
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return float(max(1, *map(len, texts.split(b"\0"))) if texts else 1)


def of_template(rule: dict[str, Any], pieces: Any) -> float:
    """How many tokens a template makes of one at most: those of the text, once or more, and special ones."""
    known = rule.get("special_tokens")
    count = 0.0
    for piece in pieces if isinstance(pieces, list) else []:
        special = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        found = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
        ids = found.get("ids") if isinstance(found, dict) else None
        count += len(ids) if isinstance(ids, list) else 1
    return max(1.0, count)

"""Tokenizers as a merge sees them: tokens and their ids, and the union of several."""

import json
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, first_line
from evomerge.files import TOKENIZER_BYTES, read_json, read_text

WHOLE = BASE, UNION = "base", "union"  # whose vocabulary an output may have, besides a source's
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
REPLACED = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")
IDS = 1 << 24  # a vocabulary of that many tokens would be sixty times the largest
GROWING = ("BPE", "WordLevel", "WordPiece")  # whose vocabulary is a mapping, so that tokens can be appended


@dataclass(frozen=True)
class Vocabulary:
    """tokens: token -> id, added tokens included.  folder: where its files lie.

    content: of the `tokenizer.json` that stands for the folder's own tokenizer files, if it is not on disk.
    """

    tokens: Mapping[str, int]
    folder: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder."""
        for name in TOKENIZER_FILES:
            if is_there(self.folder / name) and not (self.content and name in REPLACED):
                (folder / name).write_bytes((self.folder / name).read_bytes())
        if not self.content:
            return
        (folder / "tokenizer.json").write_text(json.dumps(self.content, ensure_ascii=False), encoding="utf-8")
        if (settings := folder / "tokenizer_config.json").exists():
            config = read_json(settings)
            if "added_tokens_decoder" in config:  # where it stands, transformers takes added tokens from it alone
                added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in self.content["added_tokens"]}
                config["added_tokens_decoder"] = added | config["added_tokens_decoder"]
                settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a model's tokenizer; None if the folder has none that can be read.

    EvomergeError if a token's id is not one.
    """
    from tokenizers import Tokenizer

    file = next((folder / n for n in ("tokenizer.json", "vocab.json", "tokenizer.model") if is_there(folder / n)), None)
    if file is None:
        return None
    tokens: Mapping[str, Any]
    if file.name == "vocab.json":
        tokens = read_json(file, TOKENIZER_BYTES)
    else:
        try:
            if file.name == "tokenizer.json":
                tokens = Tokenizer.from_str(read_text(file, TOKENIZER_BYTES)).get_vocab(with_added_tokens=True)
            else:
                tokens = open_tokenizer(folder).get_vocab()
        except Exception:  # the libraries raise whatever went wrong inside them
            return None
    for token, number in tokens.items():
        if type(number) is not int or not 0 <= number < IDS:
            raise EvomergeError(f"{file}: the id of {token[:60]!r} is {number!r:.60}; ids run from 0 to {IDS:,}")
    return Vocabulary(dict(tokens), folder)


def is_there(path: Path) -> bool:
    """Whether there is an ordinary file of that name."""
    return os.path.isfile(path)


def open_tokenizer(folder: Path) -> Any:
    """A model's tokenizer as transformers opens it; code that lies beside the model is never run.

    EvomergeError if it cannot be opened.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its converters raise whatever went wrong inside them
        reason = first_line(error)
        raise EvomergeError(f"{folder}: its tokenizer cannot be opened ({reason})") from error


def tokenizer_content(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer as `tokenizer.json` has it.  EvomergeError if it has no such form."""
    if vocabulary.content:
        return json.loads(json.dumps(vocabulary.content))  # type: ignore[no-any-return]
    if is_there(vocabulary.folder / "tokenizer.json"):
        return read_json(vocabulary.folder / "tokenizer.json", TOKENIZER_BYTES)
    try:
        fast = open_tokenizer(vocabulary.folder).backend_tokenizer
    except (AttributeError, EvomergeError) as error:
        raise EvomergeError(f"{vocabulary.folder}: its tokenizer has no tokenizer.json, which a union needs") from error
    return json.loads(fast.to_str())  # type: ignore[no-any-return]


def union(base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    """The base's tokens with their ids, then the others' in their order: first ordinary tokens, then added ones.

    Ordinary tokens go into the base's model (with the merges that make them, in a BPE), if theirs is of the same
    kind; else they are added tokens, found in the text as they are written.  mergekit makes added tokens of all of
    them, which break the words that the base writes otherwise.
    """
    others = [other for other in others if not other.tokens.keys() <= base.tokens.keys()]
    if not others:
        return base
    contents = [tokenizer_content(other) for other in others]
    added = [{t["content"]: t for t in content.get("added_tokens") or []} for content in contents]
    ids = dict(base.tokens)
    following = 1 + max(ids.values(), default=-1)
    special: dict[str, dict[str, Any]] = {}
    for want_added in (False, True):
        for other, known in zip(others, added, strict=True):
            for token in sorted(other.tokens, key=other.tokens.__getitem__):
                if token not in ids and (token in known) == want_added:
                    ids[token] = following
                    following += 1
                    if want_added:
                        special[token] = known[token]
    content = tokenizer_content(base)
    listed = content["added_tokens"] = content.get("added_tokens") or []
    grown = grow(content, contents, ids, {*special, *(t["content"] for t in listed)})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for token, number in ids.items():
        if token in special or (token not in base.tokens and token not in grown):
            listed.append(special.get(token, {"content": token, **plain}) | {"id": number})
    check_ids(content, ids, base.folder)
    return Vocabulary(ids, base.folder, content)


def grow(
    content: dict[str, Any], others: Sequence[dict[str, Any]], ids: Mapping[str, int], added: AbstractSet[str]
) -> set[str]:
    """Append ordinary tokens of tokenizers of the same kind to a tokenizer's model; which ones it has taken.

    added: all added tokens.  The library numbers those by the size of the model, so that one which grows has to
    know them too.
    """
    model = content["model"]
    kind = model.get("type")
    alike = [o["model"] for o in others if o["model"].get("type") == kind and kind in GROWING]
    taken = {t for other in alike for t in other["vocab"] if t in ids and t not in model["vocab"]}
    if not taken:
        return set()
    model["vocab"] |= {t: ids[t] for t in sorted(taken | added, key=ids.__getitem__)}
    if kind == "BPE":
        have = {pair(m) for m in model["merges"]}
        new = dict.fromkeys(pair(m) for other in alike for m in other["merges"])
        possible = [p for p in new if p not in have and "".join(p) in taken and all(x in model["vocab"] for x in p)]
        model["merges"] += [merge_like(model["merges"], p) for p in possible]
        model["ignore_merges"] = True  # a whole word that is a token is that token, whatever the merges' order
    return taken


def check_ids(content: Mapping[str, Any], ids: Mapping[str, int], folder: Path) -> None:
    """EvomergeError if the tokenizers library gives a token of a union another id than the merge gave its row."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises a bare Exception for a broken file
        raise EvomergeError(f"{folder}: its tokenizer cannot take the others' tokens ({error})") from error
    if moved := [t for t, i in ids.items() if found.get(t) != i]:
        raise EvomergeError(
            f"{folder}: its tokenizer cannot take the others' tokens: {moved[0]!r} would be {found.get(moved[0])}, not "
            f"{ids[moved[0]]}; merge with `vocabulary: base` or a source's name"
        )


def pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def merge_like(merges: Sequence[Any], new: tuple[str, str]) -> Any:
    """Written as the others are: a pair, or in older files a string with a space."""
    return " ".join(new) if merges and isinstance(merges[0], str) else list(new)

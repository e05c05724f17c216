"""The union of several tokenizers: one tokenizer that has the tokens of all."""

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.sources.tokenizer import Vocabulary, tokenizer_content

APPENDABLE = ("BPE", "WordLevel", "WordPiece")  # models whose vocabulary is a mapping, so that tokens can be appended


def union_vocabulary(base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    """One vocabulary that has the tokens of all.

    The base's tokens keep their ids.  The others' follow in their order: first ordinary tokens, then added ones.

    Ordinary tokens become part of the base's tokenizer model (in a BPE together with the merges that produce them) if
    the other tokenizer is of the same type; else they become added tokens.  mergekit makes all of them added tokens,
    and so splits words that the base's tokenizer would keep together.

    EvomergeError if the base's tokenizer cannot take the tokens.
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
    appended = append_tokens(content, contents, ids, {*special, *(t["content"] for t in listed)})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for token, number in ids.items():
        if token in special or (token not in base.tokens and token not in appended):
            listed.append(special.get(token, {"content": token, **plain}) | {"id": number})
    check_ids(content, ids, base.folder)
    return Vocabulary(ids, base.folder, content)


def append_tokens(
    content: dict[str, Any], others: Sequence[dict[str, Any]], ids: Mapping[str, int], added: AbstractSet[str]
) -> set[str]:
    """Append ordinary tokens of tokenizers of the same type to a tokenizer's model, in place.

    content: the tokenizer.  others: the other tokenizers.  ids: the id of every token in the union.
    added: all added tokens.  The library numbers them by the size of the model, so the model needs entries for them.

    Returns the tokens that were appended.
    """
    model = content["model"]
    kind = model.get("type")
    alike = [o["model"] for o in others if o["model"].get("type") == kind and kind in APPENDABLE]
    taken = {t for other in alike for t in other["vocab"] if t in ids and t not in model["vocab"]}
    if not taken:
        return set()
    model["vocab"] |= {t: ids[t] for t in sorted(taken | added, key=ids.__getitem__)}
    if kind == "BPE":
        have = {merged_pair(m) for m in model["merges"]}
        new = dict.fromkeys(merged_pair(m) for other in alike for m in other["merges"])
        possible = [p for p in new if p not in have and "".join(p) in taken and all(x in model["vocab"] for x in p)]
        model["merges"] += [merge_like(model["merges"], p) for p in possible]
        model["ignore_merges"] = True  # a word that is itself a token becomes that token, whatever the merges' order
    return taken


def check_ids(content: Mapping[str, Any], ids: Mapping[str, int], folder: Path) -> None:
    """EvomergeError if the tokenizers library gives a token of the union another id than `ids`."""
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


def merged_pair(merge: Any) -> tuple[str, str]:
    """The two tokens that a merge of a BPE joins.  merge: a pair, or in older files a string with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def merge_like(merges: Sequence[Any], new: tuple[str, str]) -> Any:
    """A new merge in the format of the existing ones: a pair, or in older files a string with a space."""
    return " ".join(new) if merges and isinstance(merges[0], str) else list(new)

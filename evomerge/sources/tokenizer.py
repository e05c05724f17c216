"""The vocabulary of a model: the tokens and ids of its tokenizer, and the tokenizer's files."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evomerge.errors import EvomergeError, first_line, lacks_memory, without_panics
from evomerge.files.read import TOKENIZER_BYTES, copy_model_file, read_json, read_text
from evomerge.sources.tokenizer_growth import refuse_converted, refuse_growth_in

VOCABULARY_CHOICES = BASE, UNION = "base", "union"
"""The words that a recipe's `vocabulary` may hold besides the name of a source."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Those that hold the tokens; the first one that is there is read."""
REPLACED = (*VOCABULARY_FILES, "added_tokens.json", "merges.txt")
MAX_TOKEN_ID = 1 << 24  # sixty times the largest vocabulary
OWN_CODE = "it needs Python code of its own, `auto_map` in its files, which evomerge never runs"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    tokens: token -> id, added tokens included.
    folder: of the tokenizer's files.
    content: of the `tokenizer.json` that replaces the folder's own, for a tokenizer that is not on disk (a union).
    """

    tokens: Mapping[str, int]
    folder: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder."""
        for name in TOKENIZER_FILES:
            if os.path.isfile(self.folder / name) and not (self.content and name in REPLACED):
                copy_model_file(self.folder / name, folder / name)
        drop_code(folder / "tokenizer_config.json")
        if not self.content:
            return
        (folder / "tokenizer.json").write_text(json.dumps(self.content, ensure_ascii=False), encoding="utf-8")
        if (settings := folder / "tokenizer_config.json").exists():
            config = read_json(settings)
            if "added_tokens_decoder" in config:  # if it is given, transformers takes added tokens from it alone
                added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in self.content["added_tokens"]}
                config["added_tokens_decoder"] = added | config["added_tokens_decoder"]
                settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def drop_code(settings: Path) -> None:
    """Remove from a tokenizer's settings, if there are any, the names of classes in code beside the model."""
    if settings.exists() and "auto_map" in (config := read_json(settings)):
        del config["auto_map"]
        settings.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def chat_templates(folder: Path) -> list[str]:
    """The chat templates in a model's folder; several if they have names, as one for tools."""
    found: list[Any] = []
    if (file := folder / "chat_template.jinja").is_file():
        found.append(read_text(file))
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if file.is_file():
            given = read_json(file).get("chat_template")
            found += given if isinstance(given, list) else [given]
    texts = [t.get("template") if isinstance(t, dict) else t for t in found]
    return [text for text in texts if isinstance(text, str) and text]


def vocabulary_file(folder: Path) -> Path | None:
    """The file with the tokens of a model's tokenizer; None if the folder has no tokenizer."""
    return next((folder / name for name in VOCABULARY_FILES if os.path.isfile(folder / name)), None)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of the tokenizer in a model's folder; None if there is none that can be read.

    EvomergeError if the id of a token is not a number from 0 to `MAX_TOKEN_ID`, or if the tokenizer may lengthen a text
    too much.
    """
    from tokenizers import Tokenizer

    if (file := vocabulary_file(folder)) is None:
        return None
    try:
        refuse_growth_in(folder)
    except EvomergeError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return None
        raise
    tokens: Mapping[str, Any]
    if file.name == "vocab.json":
        tokens = read_json(file, TOKENIZER_BYTES)
    else:
        try:
            with without_panics():
                if file.name == "tokenizer.json":
                    tokens = Tokenizer.from_str(read_text(file, TOKENIZER_BYTES)).get_vocab(with_added_tokens=True)
                else:
                    tokens = open_tokenizer(folder).get_vocab()
        except Exception as error:  # the libraries raise any type of error
            if lacks_memory(error):
                raise
            return None
    for token, number in tokens.items():
        if type(number) is not int or not 0 <= number < MAX_TOKEN_ID:
            raise EvomergeError(
                f"{file}: the id of {token[:60]!r} is {number!r:.60}; ids run from 0 to {MAX_TOKEN_ID:,}"
            )
    return Vocabulary(dict(tokens), folder)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder as an object of transformers.

    Code that lies beside the model is never run.  EvomergeError if the tokenizer cannot be opened.
    """
    from transformers import AutoTokenizer

    refuse_growth_in(folder)
    try:
        with without_panics():
            opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its converters raise any type of error
        if lacks_memory(error):
            raise
        reason = first_line(error)
        if "custom code" in str(error):
            reason = OWN_CODE
        raise EvomergeError(f"{folder}: its tokenizer cannot be opened ({reason})") from error
    refuse_converted(folder, opened)
    return opened


def open_processor(folder: Path) -> Any:
    """What transformers' AutoProcessor makes of a model's folder: of images, of sound, of text, or of several.

    Code that lies beside the model is never run.  EvomergeError if it cannot be opened.
    """
    from transformers import AutoProcessor

    refuse_growth_in(folder)
    try:
        with without_panics():
            return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises any type of error
        raise EvomergeError(f"{folder}: its processor cannot be opened ({first_line(error)})") from error


def optional_tokenizer(vocabulary: Vocabulary) -> Any | None:
    """`vocabulary_tokenizer`, or None if the folder has no tokenizer or it cannot be opened."""
    if vocabulary_file(vocabulary.folder) is None:
        return None
    try:
        return vocabulary_tokenizer(vocabulary)
    except EvomergeError:
        return None


def vocabulary_tokenizer(vocabulary: Vocabulary) -> Any:
    """The tokenizer of a vocabulary as an object of transformers, also of one that is not on disk.

    EvomergeError if it cannot be opened.
    """
    if not vocabulary.content:
        return open_tokenizer(vocabulary.folder)
    with TemporaryDirectory() as folder:
        vocabulary.write(Path(folder))
        (Path(folder) / "config.json").write_bytes((vocabulary.folder / "config.json").read_bytes())
        return open_tokenizer(Path(folder))


def tokenizer_content(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of `tokenizer.json` for a tokenizer.  EvomergeError if it cannot be converted to that format."""
    if vocabulary.content:
        return json.loads(json.dumps(vocabulary.content))  # type: ignore[no-any-return]
    if os.path.isfile(vocabulary.folder / "tokenizer.json"):
        return read_json(vocabulary.folder / "tokenizer.json", TOKENIZER_BYTES)
    try:
        fast = open_tokenizer(vocabulary.folder).backend_tokenizer
    except (AttributeError, EvomergeError) as error:
        raise EvomergeError(f"{vocabulary.folder}: its tokenizer has no tokenizer.json, which a union needs") from error
    return json.loads(fast.to_str())  # type: ignore[no-any-return]

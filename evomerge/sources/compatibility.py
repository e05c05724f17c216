"""Whether models can be merged: architecture, configuration, tensors, tokenizer; one line for each mismatch."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, some
from evomerge.files import read_json, read_text
from evomerge.parse import parse_yaml
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, is_head
from evomerge.sources.config_differences import LAYER_COUNTS, compare_configs, difference_line
from evomerge.sources.embedding_rows import row_count, vocabulary_tensors
from evomerge.sources.locate import looks_like_hub_id
from evomerge.sources.quantised import quantisation_settings
from evomerge.sources.tensor_names import KNOWN_MODEL_TYPES, layer_count, tensor_role

QUANTISED_NAME = re.compile(r"(?i)[-_.](bnb|gptq|awq|fp8|nvfp4|mxfp4|int[48]|[48]-?bit)(?![a-z0-9])")


@dataclass
class Compatibility:
    """What was found when models were compared, a line each.

    problems: why they cannot be merged.
    notes: what to know if they are merged.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_compatibility(
    base: Checkpoint,
    sources: Mapping[str, Checkpoint | Adapter],
    any_depth: bool = False,
    by_token: bool = False,
    allowed: Collection[str] = (),
) -> Compatibility:
    """Compare each source with the base: architecture, configuration, tensors, tokenizer, declared base model.

    any_depth: the recipe has slices, so only tensors outside the layers are compared here.
    by_token: rows of embedding and head are merged by token, so tokenizers and numbers of rows may differ.  If the
        tokenizers are equal, the numbers of rows may always differ.
    allowed: the differences between configurations that the recipe allows by name.
    """
    found = Compatibility()
    model_type = base.config.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        found.notes.append(
            f"base: unknown architecture {model_type!r}; layers are taken from the numbers in the tensor names "
            f"({layer_count(list(base.tensors))} found)"
        )
    for name, source in {"base": base, **sources}.items():
        if source.config.get("auto_map"):
            found.notes.append(
                f"{name}: its configuration names Python code of its own (`auto_map`), which is neither run nor copied"
            )
    vocabulary = base.vocabulary
    if vocabulary is None:
        found.problems.append(f"base: no tokenizer in {base.path} (tokenizer.json, or vocab.json and merges.txt)")
    for name, source in sources.items():
        theirs = source.vocabulary
        equal = vocabulary is not None and (theirs is None or theirs.tokens == vocabulary.tokens)
        relaxed = Relaxed(any_depth, any_rows=vocabulary is not None and (by_token or equal))
        if isinstance(source, Checkpoint):
            compare_config(name, base, source, found, relaxed, allowed)
            compare_tensors(name, base, source, found, relaxed)
        else:
            changed = len(source.changes)
            found.notes.append(f"{name}: LoRA adapter, changes {changed} of {len(base.tensors)} tensors")
        compare_heads(name, base, source, found, relaxed, by_token)
        if theirs is None and isinstance(source, Checkpoint):
            found.notes.append(f"{name}: has no tokenizer; the base model's is used for it")
        elif theirs is not None and vocabulary is not None and not equal:
            line = f"{name}: another tokenizer: {vocabulary_difference(vocabulary.tokens, theirs.tokens)}"
            (found.notes if by_token else found.problems).append(line)
        compare_declared_base(name, base, source, found)
    return found


@dataclass(frozen=True)
class Relaxed:
    """What two models may differ in: the number of layers; the number of rows of embedding and head."""

    any_depth: bool
    any_rows: bool


def compare_config(
    name: str, base: Checkpoint, source: Checkpoint, found: Compatibility, relaxed: Relaxed, allowed: Collection[str]
) -> None:
    """Add the differences between two configurations to what was found."""
    for difference in compare_configs(base.config, source.config):
        key, value = difference.last_key, difference.ours or difference.theirs
        if relaxed.any_depth and (key in (*LAYER_COUNTS, "max_window_layers") or isinstance(value, list)):
            continue
        if relaxed.any_rows and key == "vocab_size":
            continue
        is_note = difference.kind == "note" or difference.kind in allowed
        (found.notes if is_note else found.problems).append(difference_line(difference, name, allowed))


def compare_tensors(name: str, base: Checkpoint, source: Checkpoint, found: Compatibility, relaxed: Relaxed) -> None:
    """Add missing and additional tensors, and tensors of another shape, to what was found."""
    ours, theirs = (
        [t for t in model.tensors if not (relaxed.any_depth and tensor_role(t).layer is not None)]
        for model in (base, source)
    )
    missing = [t for t in ours if t not in source.tensors]
    extra = [t for t in theirs if t not in base.tensors]
    if source.ties_head:
        missing = [t for t in missing if source.stored_name(t) == t]
    if base.ties_head:
        extra = [t for t in extra if not is_head(t)]
    if missing:
        found.problems.append(f"{name}: lacks {len(missing)} tensor(s) of the base model: {some(missing)}")
    if extra:
        found.problems.append(f"{name}: has {len(extra)} tensor(s) that the base model lacks: {some(extra)}")
    any_rows = vocabulary_tensors(base) if relaxed.any_rows else []
    compared = {t: (base.tensors[t].shape, source.tensors[t].shape) for t in ours if t in source.tensors}
    shapes = [t for t, (x, y) in compared.items() if (x[1:] != y[1:] if t in any_rows else x != y)]
    if shapes:
        first = shapes[0]
        found.problems.append(
            f"{name}: {len(shapes)} tensor(s) of another shape, the first is {first}: "
            f"{source.tensors[first].shape}, in the base model {base.tensors[first].shape}"
        )


def compare_heads(
    name: str, base: Checkpoint, source: Checkpoint | Adapter, found: Compatibility, relaxed: Relaxed, by_token: bool
) -> None:
    """Add what is noticed about heads and embeddings: tied in one model only, of another shape, with more rows."""
    if base.ties_head and not source.ties_head and source.head_name and base.embedding_name:
        found.notes.append(
            f"{name}: its head, {source.head_name}, differs from its embedding, which the base model uses for both; "
            "the merged model has two matrices (tie_word_embeddings: false)"
        )
        ours, theirs = base.tensors[base.embedding_name].shape, source.tensors[source.head_name].shape
        if ours[1:] != theirs[1:] or not (relaxed.any_rows or ours == theirs):
            found.problems.append(f"{name}: {source.head_name} is {theirs}, in the base model's embedding {ours}")
    if source.ties_head and not base.ties_head and base.head_name:
        found.notes.append(f"{name}: its head is tied to its embedding, which is used for {base.head_name}")
    rows, ours_rows = row_count(source), row_count(base)
    if rows > ours_rows and relaxed.any_rows and not by_token:
        found.notes.append(
            f"{name}: has {rows} rows in its embedding, the base model {ours_rows}; the last {rows - ours_rows} belong "
            "to no token of the tokenizer and are not used"
        )


def vocabulary_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """How two vocabularies (token -> id) differ, in one line."""
    moved = sorted(t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t])
    only_theirs, only_ours = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
    parts = []
    if moved:
        parts.append(f"{len(moved)} tokens have other ids (the first is {moved[0]!r})")
    if only_theirs:
        parts.append(f"{len(only_theirs)} tokens are not in the base model's (such as {min(only_theirs)!r})")
    if only_ours:
        parts.append(f"{len(only_ours)} of the base model's are missing (such as {min(only_ours)!r})")
    return "; ".join(parts)


def declared_base(source: Checkpoint | Adapter) -> str | None:
    """The base model that a source names, in its configuration or in its model card; None if it names none."""
    for key in ("base_model_name_or_path", "base_model"):
        if isinstance(source.config.get(key), str) and source.config[key]:
            return str(source.config[key])
    declared = front_matter(source.path).get("base_model")
    if isinstance(declared, list):
        declared = declared[0] if len(declared) == 1 else None
    return declared if isinstance(declared, str) else None


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the top of the model card (README.md) in a folder; empty if there is none that can be read."""
    try:
        parts = read_text(folder / "README.md").split("---\n", 2)
        block = parse_yaml(parts[1], "README.md") if len(parts) == 3 and not parts[0].strip() else {}
    except EvomergeError:  # nobody promised that a card can be read
        return {}
    return block if isinstance(block, dict) else {}


def quantised_base(declared: str) -> str | None:
    """How the model that an adapter was trained on is quantised; None if nothing says that it is.

    declared: the model that the adapter names.  Its configuration decides if it is on this machine, else its name.
    """
    if os.path.isfile(Path(declared) / "config.json"):
        return next((method for _, method in quantisation_settings(read_json(Path(declared) / "config.json"))), None)
    named = QUANTISED_NAME.search(declared)
    return named.group(1) if named else None


def compare_declared_base(name: str, base: Checkpoint, source: Checkpoint | Adapter, found: Compatibility) -> None:
    """Add a note if a source names another base model, or was trained on a quantised one."""
    declared = declared_base(source)
    if declared is None:
        return
    if isinstance(source, Adapter) and (method := quantised_base(declared)):
        found.notes.append(
            f"{name}: was trained on a quantised model, {declared} ({method}); the base model here is not "
            "quantised, so its results may be a little better or worse"
        )
    here = {base.path.name.lower(), str(base.config.get("_name_or_path", "")).split("/")[-1].lower()}
    # A hub snapshot lies under models--owner--name/snapshots/<commit>.
    here |= {part.split("--")[-1].lower() for part in base.path.parts if part.startswith("models--")}
    if declared.rstrip("/").split("/")[-1].lower() not in here:
        kind = "hub model" if looks_like_hub_id(declared) else "model"
        found.notes.append(
            f"{name}: says that it was trained from the {kind} {declared!r}; the base here is {base.path.name!r}"
        )

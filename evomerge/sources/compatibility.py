"""Whether models can be merged: architecture, configuration, tensors, tokenizer; one line for each mismatch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from evomerge.errors import some
from evomerge.sources.adapter import Adapter
from evomerge.sources.architecture import is_language_model, named_architecture
from evomerge.sources.checkpoint import Checkpoint, is_head
from evomerge.sources.config_differences import LAYER_COUNTS, compare_configs, difference_line
from evomerge.sources.declared_base import compare_declared_base
from evomerge.sources.embedding_rows import row_count, vocabulary_tensors
from evomerge.sources.tensor_names import KNOWN_MODEL_TYPES, layer_count, tensor_role, towers_beside_decoder
from evomerge.sources.tokenizer import vocabulary_file


@dataclass
class Compatibility:
    """What was found when models were compared, a line each.

    problems: why they cannot be merged.
    notes: what to know if they are merged.
    doubts: those of the notes that may mean that the merge is worth nothing.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


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
            f"base: unknown {named_architecture(base.config)}; layers are taken from the numbers in the tensor names "
            f"({layer_count(list(base.tensors))} found)"
        )
    if towers := towers_beside_decoder(base.tensors):
        found.notes.append(
            f"base: has {', '.join(towers)} beside its language model; a search leaves them at the base unless "
            "`components` names them, `merge` merges them unless the recipe's `keep` names them"
        )
    for name, source in {"base": base, **sources}.items():
        if source.config.get("auto_map"):
            found.notes.append(
                f"{name}: its configuration names Python code of its own (`auto_map`), which is neither run nor copied"
            )
    vocabulary = base.vocabulary
    if vocabulary is None and is_language_model(base.config):
        found.problems.append(f"base: no tokenizer in {base.path} (tokenizer.json, or vocab.json and merges.txt)")
    elif vocabulary is None and (file := vocabulary_file(base.path)) is not None:
        found.notes.append(f"base: its tokenizer cannot be read ({file}); it is not compared with the sources'")
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
        if vocabulary is not None and theirs is None and isinstance(source, Checkpoint):
            found.notes.append(f"{name}: has no tokenizer; the base model's is used for it")
        elif theirs is not None and vocabulary is not None and not equal:
            line = f"{name}: another tokenizer: {vocabulary_difference(vocabulary.tokens, theirs.tokens)}"
            (found.notes if by_token else found.problems).append(line)
        told = compare_declared_base(name, base, source)
        found.problems += told.problems
        found.notes += [*told.notes, *told.doubts]
        found.doubts += told.doubts
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

"""Open a base and its sources together, checked against each other before anything is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter, open_adapter
from evomerge.sources.buffers import drop_lone_tables, integer_problems
from evomerge.sources.checkpoint import Checkpoint, open_checkpoint, untied
from evomerge.sources.compatibility import Compatibility, check_compatibility
from evomerge.sources.embedding_rows import rowless, translate
from evomerge.sources.tokenizer import Vocabulary, is_there


@dataclass
class Models:
    """The base model and the sources by name, in the order in which recipes list them.

    wanted: whose vocabulary was asked for.  vocabulary: what came of it, None if the base has no tokenizer.
    """

    base: Checkpoint
    sources: dict[str, Checkpoint | Adapter]
    compatibility: Compatibility
    wanted: str | None = None
    vocabulary: Vocabulary | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Whose tokenizer, special tokens and generation settings the output has."""
        return self.vocabulary.folder if self.vocabulary else self.base.path


def open_models(
    base: Path,
    sources: Mapping[str, Path | Checkpoint],
    strict: bool = True,
    any_depth: bool = False,
    vocabulary: str | None = None,
    allowed: Collection[str] = (),
) -> Models:
    """Open folders as base and sources; a source may be open already.

    With `strict`, EvomergeError lists every incompatibility.  any_depth: the number of layers is none of them.
    vocabulary: `base`, `union` or a source's name; then the tokenizers are none either (see `translate`).
    allowed: the differences between configurations that a recipe allows by name.
    """
    base_model = open_checkpoint(base)
    opened: dict[str, Checkpoint | Adapter] = {}
    for name, source in sources.items():
        opened[name] = source if isinstance(source, Checkpoint) else open_source(source, base_model)
    dropped = drop_lone_tables(base_model, opened)
    found = check_compatibility(base_model, opened, any_depth, by_token=vocabulary is not None, allowed=allowed)
    found.notes += dropped
    found.problems += integer_problems(base_model, opened)
    if not found.problems:
        aligned_base, aligned, output = translate(with_own_head(base_model, opened), opened, vocabulary)
        if output is not None and (tokens := rowless(aligned_base, output)):
            found.notes.append(
                f"the tokenizer of {output.folder} names {len(tokens)} token(s) that no model has a row for, such as "
                f"{tokens[0]!r}; the output has none either"
            )
        return Models(aligned_base, aligned, found, vocabulary, output)
    if strict:
        hint = "\n  `vocabulary: base`, `union` or a source's name in the recipe merges other tokenizers by token"
        hint *= any(": another tokenizer: " in line for line in found.problems)
        raise EvomergeError("these models cannot be merged:\n  " + "\n  ".join(found.problems) + hint)
    return Models(base_model, opened, found, vocabulary, base_model.vocabulary)


def with_own_head(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> Checkpoint:
    """The base as it is, or with its head as a matrix of its own if that of a source is one."""
    heads = [source.head_name for source in sources.values() if not source.ties_head and source.head_name]
    return untied(base, base.head_name or heads[0]) if heads and base.ties_head and base.embedding_name else base


def open_source(folder: Path, base: Checkpoint) -> Checkpoint | Adapter:
    is_adapter = is_there(folder / "adapter_config.json") and not is_there(folder / "config.json")
    return open_adapter(folder, base) if is_adapter else open_checkpoint(folder)

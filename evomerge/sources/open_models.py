"""Open the base model and the sources of a merge together, and check that they fit before any weight is read."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter, open_adapter
from evomerge.sources.buffers import drop_unshared_buffers, integer_problems
from evomerge.sources.checkpoint import Checkpoint, TensorInfo, open_checkpoint, with_untied_head
from evomerge.sources.compatibility import Compatibility, check_compatibility
from evomerge.sources.embedding_rows import align_vocabularies, tokens_without_row
from evomerge.sources.hub import Progress
from evomerge.sources.locate import before_download, fetch, locate
from evomerge.sources.tokenizer import Vocabulary


@dataclass
class Models:
    """The base model and the sources by name, in the order of the recipe.

    compatibility: what was noticed when they were compared.
    requested_vocabulary: the vocabulary that the recipe asks for: `base`, `union`, a source's name, or None.
    vocabulary: the vocabulary of the output; None if the base has no tokenizer.
    """

    base: Checkpoint
    sources: dict[str, Checkpoint | Adapter]
    compatibility: Compatibility
    requested_vocabulary: str | None = None
    vocabulary: Vocabulary | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder whose tokenizer, special tokens and generation settings the output has."""
        return self.vocabulary.folder if self.vocabulary else self.base.path


def open_models(
    base: Path,
    sources: Mapping[str, Path | Checkpoint],
    strict: bool = True,
    any_depth: bool = False,
    vocabulary: str | None = None,
    allowed: Collection[str] = (),
) -> Models:
    """Open the base and the sources of a merge.

    sources: name -> folder of a checkpoint or an adapter, or a model that is open already.
    strict: raise EvomergeError if the models do not fit, with a line for each reason; else the reasons are in
        `problems` of the result's `compatibility`.
    any_depth: models may have different numbers of layers.
    vocabulary: `base`, `union` or a source's name; then tokenizers may differ (see `align_vocabularies`).
    allowed: the differences between configurations that the recipe allows by name (`allow_differences`).
    """
    base_model = open_checkpoint(base)
    opened: dict[str, Checkpoint | Adapter] = {}
    for name, source in sources.items():
        opened[name] = source if isinstance(source, Checkpoint) else open_source(source, base_model)
    dropped = drop_unshared_buffers(base_model, opened)
    found = check_compatibility(base_model, opened, any_depth, by_token=vocabulary is not None, allowed=allowed)
    found.notes += dropped
    found.problems += integer_problems(base_model, opened)
    if not found.problems:
        untied = with_head_if_needed(base_model, opened)
        aligned_base, aligned, output = align_vocabularies(untied, opened, vocabulary)
        if output is not None and (tokens := tokens_without_row(aligned_base, output)):
            found.notes.append(
                f"the tokenizer of {output.folder} names {len(tokens)} token(s) that no model has a row for, such as "
                f"{tokens[0]!r}; the output has none either"
            )
        return Models(aligned_base, aligned, found, vocabulary, output)
    if strict:
        hint = (
            "\n  `vocabulary: base`, `union` or a source's name, in the configuration or recipe, merges them by token"
        )
        hint *= any(": another tokenizer: " in line for line in found.problems)
        raise EvomergeError("these models cannot be merged:\n  " + "\n  ".join(found.problems) + hint)
    return Models(base_model, opened, found, vocabulary, base_model.vocabulary)


def open_named(base: str, sources: Mapping[str, str], strict: bool = True, progress: Progress | None = None) -> Models:
    """Open models by their folders or hub ids; those of the hub are compared before their weights are downloaded.

    progress: see `download`.  The other arguments, the result and the errors are those of `open_models`.  If not
    `strict`, models that do not fit are not downloaded.
    """
    names = (base, *sources.values())
    with before_download(names) as headers:
        if headers.folders:
            here = {name: locate(headers.stand_in(path)) for name, path in sources.items()}
            found = open_models(locate(headers.stand_in(base)), here, strict)
            if problems := found.compatibility.problems:
                problems[:] = map(headers.named, problems)
                return found
    fetch(names, progress)
    return open_models(locate(base), {name: locate(path) for name, path in sources.items()}, strict)


def stored_tensors(model: str) -> dict[str, TensorInfo]:
    """The tensors of a model by name, for which nothing but headers is downloaded.  model: a folder or a hub id."""
    with before_download([model]) as headers:
        return open_checkpoint(locate(headers.stand_in(model))).tensors


def with_head_if_needed(base: Checkpoint, sources: Mapping[str, Checkpoint | Adapter]) -> Checkpoint:
    """The base as it is, or with a head of its own if it ties head and embedding and a source does not."""
    heads = [source.head_name for source in sources.values() if not source.ties_head and source.head_name]
    if heads and base.ties_head and base.embedding_name:
        return with_untied_head(base, base.head_name or heads[0])
    return base


def open_source(folder: Path, base: Checkpoint) -> Checkpoint | Adapter:
    """Open a folder as an adapter on the base if it has only adapter_config.json, else as a checkpoint."""
    is_adapter = os.path.isfile(folder / "adapter_config.json") and not os.path.isfile(folder / "config.json")
    return open_adapter(folder, base) if is_adapter else open_checkpoint(folder)

"""Models with different vocabularies in one merge: embedding and head are gathered row by row into one vocabulary.

V here is the number of rows of the output's embedding: its tokens, and rows beyond them that belong to no token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, TensorInfo, is_head
from evomerge.sources.tokenizer import BASE, UNION, VOCABULARY_CHOICES, Vocabulary
from evomerge.sources.tokenizer_union import union_vocabulary

HEAD_BIASES = ("lm_head.bias", "embed_out.bias")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Source = Checkpoint | Adapter
RowKey = str | int
"""What a row stands for: a token, or for a row beyond all tokens its number."""


def checkpoint_of(model: Source) -> Checkpoint:
    """The checkpoint whose configuration a model has: its own, or an adapter's base."""
    return model if isinstance(model, Checkpoint) else model.base


def vocabulary_tensors(model: Source) -> list[str]:
    """The names of a model's tensors that have one row per token: embedding, head and the head's bias."""
    names = (model.embedding_name, model.head_name, *HEAD_BIASES)
    return [n for n in names if n in model.tensors]


def row_count(model: Source) -> int:
    """The number of rows that a model's embedding and head have; 0 without them."""
    return min((model.tensors[n].shape[0] for n in vocabulary_tensors(model)), default=0)


def rows_by_key(vocabulary: Vocabulary, rows: int) -> dict[RowKey, int]:
    """The row of each token, and of each row beyond the tokenizer its own number.

    rows: of the embedding.  Tokens without a row are left out.
    """
    found: dict[RowKey, int] = {t: i for t, i in vocabulary.tokens.items() if i < rows}
    taken = set(vocabulary.tokens.values())
    return found | {i: i for i in range(rows) if i not in taken}


def tokens_with_row(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """The vocabulary without the tokens that have no row."""
    return replace(vocabulary, tokens={t: i for t, i in vocabulary.tokens.items() if i < rows})


@dataclass(frozen=True)
class RowSources:
    """Where the rows of one model's embedding in the output vocabulary come from.

    rows: V, the rows of the output.
    own: for the rows that the model has: their numbers in the output and in the model, two (n,) int64.
    filled: for the rows that it lacks: names of the donors -> the numbers in the output and in each donor, (n,) int64.
        The row is the mean of the donors' rows.
    """

    rows: int
    own: tuple[Tensor, Tensor]
    filled: Mapping[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class RowsByToken(Checkpoint):
    """A model seen with an embedding and a head that have one row for each token of the output vocabulary.

    inner: the model as it is stored.
    row_sources: where its rows come from.
    donors: all models by name.
    same_rows_as_base: whether its own rows belong to the same tokens as the base's.
    """

    inner: Source = field(repr=False)
    row_sources: RowSources = field(repr=False)
    donors: Mapping[str, Source] = field(repr=False)
    same_rows_as_base: bool

    @cached_property
    def ties_head(self) -> bool:
        return self.inner.ties_head

    def may_differ(self, name: str) -> bool:
        return self.inner.may_differ(name) or (name in vocabulary_tensors(self.inner) and not self.same_rows_as_base)

    def is_stored(self, name: str) -> bool:
        return self.inner.is_stored(name) and not self.is_by_token(name)

    def is_by_token(self, name: str) -> bool:
        return is_head(name) or name in vocabulary_tensors(self.inner)

    def read(self, name: str) -> Tensor:
        """The tensor; if it has one row per token, gathered by token: (V, ...).

        float32 if rows are averaged, else a type that holds every row unchanged.
        """
        if not self.is_by_token(name):
            return self.inner.read(name)
        own = self.inner.read(name)
        given = {n: self.donors[n].read(name).to(own.device) for names in self.row_sources.filled for n in names}
        dtype = own.dtype
        for names in self.row_sources.filled:
            for donor in names:
                dtype = torch.promote_types(dtype, given[donor].dtype if len(names) == 1 else torch.float32)
        out = torch.zeros((self.row_sources.rows, *own.shape[1:]), dtype=dtype, device=own.device)
        out_rows, own_rows = (x.to(own.device) for x in self.row_sources.own)
        out[out_rows] = own[own_rows].to(dtype)
        for names, (out_rows, donor_rows) in self.row_sources.filled.items():
            total = given[names[0]][donor_rows[0].to(own.device)]
            for donor, rows in zip(names[1:], donor_rows[1:], strict=True):
                total = total.float() + given[donor][rows.to(own.device)].float()
            out[out_rows.to(own.device)] = (total / len(names) if len(names) > 1 else total).to(dtype)
        return out


def align_vocabularies(
    base: Checkpoint, sources: Mapping[str, Source], wanted: str | None
) -> tuple[Checkpoint, dict[str, Source], Vocabulary | None]:
    """Base and sources with embedding and head in one vocabulary, and that vocabulary.

    wanted: `base` or a source's name: the output has that model's tokenizer and number of rows, and further rows for
        tokens of this tokenizer that only other models have a row for.  `union`: the output has a row for each token.
        None: the base's tokenizer, if the tokenizers are equal.

    A model whose rows are already in the right order is returned as it is.  A row that a model lacks is the row of
    the only model that has it, else the base's, else the mean of the models that have it (mergekit's rule), else 0.
    EvomergeError if the base has no tokenizer or no embedding.
    """
    models: dict[str, Source] = {BASE: base, **{f"source {n}": m for n, m in sources.items()}}
    base_vocabulary = base.vocabulary
    if base_vocabulary is None or not vocabulary_tensors(base):
        if wanted is not None:
            raise EvomergeError(
                f"vocabulary: {base.path} has no tokenizer or no embedding, which another vocabulary needs"
            )
        return base, dict(sources), base_vocabulary
    own = {n: m.vocabulary or base_vocabulary for n, m in models.items()}
    owner = BASE if wanted is None or wanted in VOCABULARY_CHOICES else f"source {wanted}"
    if all(v.tokens == base_vocabulary.tokens for v in own.values()) and len({*map(row_count, models.values())}) == 1:
        return with_special_tokens(base, models[owner]), dict(sources), own[owner]
    output, rows = own[owner], row_count(models[owner])
    if wanted == UNION:
        others = [tokens_with_row(own[n], row_count(m)) for n, m in models.items() if n != BASE]
        output = union_vocabulary(base_vocabulary, others)
        if output is not base_vocabulary:
            rows = 1 + max(output.tokens.values())
    have = {n: rows_by_key(own[n], row_count(m)) for n, m in models.items()}
    # A tokenizer may name more tokens than its own model has rows; those that another model has get a row.
    rows = max([rows, *(1 + i for t, i in output.tokens.items() if any(t in known for known in have.values()))])
    target = rows_by_key(output, rows)
    found: dict[str, Source] = {}
    for name, model in models.items():
        row_sources = find_row_sources(name, target, rows, have)
        same = have[name] == target and row_count(model) == rows
        found[name] = model if same else with_rows_by_token(model, row_sources, models, have[name] == have[BASE])
    out = found.pop(BASE)
    assert isinstance(out, Checkpoint)
    return with_special_tokens(out, models[owner]), {n: found[f"source {n}"] for n in sources}, output


def tokens_without_row(model: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """The tokens of a vocabulary for which a model has no row; none if it has no embedding."""
    rows = row_count(model)
    return [t for t, i in vocabulary.tokens.items() if i >= rows] if rows else []


def with_special_tokens(base: Checkpoint, owner: Source) -> Checkpoint:
    """The base with the special tokens in the configuration of the model whose vocabulary the output has."""
    theirs = checkpoint_of(owner).config
    if all(base.config.get(k) == theirs.get(k) for k in TOKEN_IDS):
        return base
    kept = {k: v for k, v in base.config.items() if k not in TOKEN_IDS}
    return replace(base, config=kept | {k: theirs[k] for k in TOKEN_IDS if k in theirs})


def find_row_sources(
    name: str, target: Mapping[RowKey, int], rows: int, have: Mapping[str, Mapping[RowKey, int]]
) -> RowSources:
    """Where the rows of one model come from.

    name: of the model.  target: the rows of the output by key.  rows: V.  have: the rows of every model by key.
    """
    mine = have[name]
    own = [(row, mine[key]) for key, row in target.items() if key in mine]
    filled: dict[tuple[str, ...], list[RowKey]] = {}
    for key in target.keys() - mine.keys():
        donors = [n for n, rows_of in have.items() if key in rows_of]
        if len(donors) > 1 and BASE in donors:
            donors = [BASE]
        if donors:
            filled.setdefault(tuple(donors), []).append(key)
    return RowSources(
        rows,
        (indices([r for r, _ in own]), indices([r for _, r in own])),
        {
            donors: (indices([target[k] for k in keys]), tuple(indices([have[d][k] for k in keys]) for d in donors))
            for donors, keys in filled.items()
        },
    )


def indices(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def with_rows_by_token(
    model: Source, row_sources: RowSources, donors: Mapping[str, Source], same_rows_as_base: bool
) -> RowsByToken:
    """A model seen with the rows of the output vocabulary; see `RowsByToken`."""
    checkpoint = checkpoint_of(model)
    by_token = vocabulary_tensors(model)
    tensors = {
        n: TensorInfo((row_sources.rows, *i.shape[1:]), i.dtype, i.file) if n in by_token else i
        for n, i in model.tensors.items()
    }
    config: dict[str, Any] = checkpoint.config | {"vocab_size": row_sources.rows}
    return RowsByToken(model.path, config, tensors, {}, model, row_sources, donors, same_rows_as_base)

"""Models of different vocabularies, side by side: embedding and head gathered row by row into one vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, TensorInfo, is_head
from evomerge.sources.tokenizer import BASE, UNION, WHOLE, Vocabulary, union

HEAD_BIASES = ("lm_head.bias", "embed_out.bias")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Source = Checkpoint | Adapter
Key = str | int
"""A token, or the number of a padding row beyond all tokens."""


def checkpoint_of(model: Source) -> Checkpoint:
    """The checkpoint whose configuration a model has."""
    return model if isinstance(model, Checkpoint) else model.base


def vocabulary_tensors(model: Source) -> list[str]:
    """The tensors with one row per token."""
    names = (model.embedding_name, model.head_name, *HEAD_BIASES)
    return [n for n in names if n in model.tensors]


def row_count(model: Source) -> int:
    """How many rows embedding and head have."""
    return min((model.tensors[n].shape[0] for n in vocabulary_tensors(model)), default=0)


def rows_by_key(vocabulary: Vocabulary, rows: int) -> dict[Key, int]:
    """Token -> row, and for rows beyond the tokenizer their number -> row.  A token beyond the rows is lacking."""
    found: dict[Key, int] = {t: i for t, i in vocabulary.tokens.items() if i < rows}
    taken = set(vocabulary.tokens.values())
    return found | {i: i for i in range(rows) if i not in taken}


def within(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """Without the tokens that have no row."""
    return replace(vocabulary, tokens={t: i for t, i in vocabulary.tokens.items() if i < rows})


@dataclass(frozen=True)
class Gathering:
    """Where the rows of one model's embedding in the output vocabulary come from.

    rows: of the output.  own: the output's rows that the model has and where it has them, two (n,) int64.
    filled: for the rows that it lacks, by who gives them: the output's rows, and each giver's; the mean counts.
    """

    rows: int
    own: tuple[Tensor, Tensor]
    filled: Mapping[tuple[str, ...], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Translated(Checkpoint):
    """A model whose embedding and head have one row for each token of the output vocabulary."""

    inner: Source = field(repr=False)
    gathering: Gathering = field(repr=False)
    givers: Mapping[str, Source] = field(repr=False)
    leaves_alone: bool

    @cached_property
    def ties_head(self) -> bool:
        return self.inner.ties_head

    def touches(self, name: str) -> bool:
        return self.inner.touches(name) or not (self.leaves_alone or name not in vocabulary_tensors(self.inner))

    def stores(self, name: str) -> bool:
        return self.inner.stores(name) and not self.is_by_token(name)

    def is_by_token(self, name: str) -> bool:
        return is_head(name) or name in vocabulary_tensors(self.inner)

    def read(self, name: str) -> Tensor:
        """The tensor, by token if it has one row for each: (rows, ...).

        Float32 if rows are averaged; else of a type that holds every row as it is.
        """
        if not self.is_by_token(name):
            return self.inner.read(name)
        own = self.inner.read(name)
        given = {n: self.givers[n].read(name).to(own.device) for names in self.gathering.filled for n in names}
        dtype = own.dtype
        for names in self.gathering.filled:
            for giver in names:
                dtype = torch.promote_types(dtype, given[giver].dtype if len(names) == 1 else torch.float32)
        out = torch.zeros((self.gathering.rows, *own.shape[1:]), dtype=dtype, device=own.device)
        where, rows = (x.to(own.device) for x in self.gathering.own)
        out[where] = own[rows].to(dtype)
        for names, (places, sources) in self.gathering.filled.items():
            total = given[names[0]][sources[0].to(own.device)]
            for giver, found in zip(names[1:], sources[1:], strict=True):
                total = total.float() + given[giver][found.to(own.device)].float()
            out[places.to(own.device)] = (total / len(names) if len(names) > 1 else total).to(dtype)
        return out


def translate(
    base: Checkpoint, sources: Mapping[str, Source], wanted: str | None
) -> tuple[Checkpoint, dict[str, Source], Vocabulary | None]:
    """Base and sources with embedding and head in one vocabulary, and that vocabulary.

    wanted: `base`, `union` or a source's name, whose tokenizer and number of rows the output has; a union has a row
    for each token.  Tokens of that tokenizer which only other models have a row for get one, too.  None is the base's;
    the tokenizers were found to be equal then.  A model that has its rows in place already stays as it is.  A row
    that a model lacks is that of the only model which has it, else the base's, else the mean of those which have it
    (mergekit's rule), else 0.
    """
    models: dict[str, Source] = {BASE: base, **{f"source {n}": m for n, m in sources.items()}}
    mine = base.vocabulary
    if mine is None or not vocabulary_tensors(base):
        if wanted is not None:
            raise EvomergeError(f"vocabulary: {base.path} has no tokenizer or no embedding that could be translated")
        return base, dict(sources), mine
    own = {n: m.vocabulary or mine for n, m in models.items()}
    leader = BASE if wanted is None or wanted in WHOLE else f"source {wanted}"
    if all(v.tokens == mine.tokens for v in own.values()) and len({*map(row_count, models.values())}) == 1:
        return with_special_tokens(base, models[leader]), dict(sources), own[leader]
    output, rows = own[leader], row_count(models[leader])
    if wanted == UNION:
        output = union(mine, [within(own[n], row_count(m)) for n, m in models.items() if n != BASE])
        if output is not mine:
            rows = 1 + max(output.tokens.values())
    have = {n: rows_by_key(own[n], row_count(m)) for n, m in models.items()}
    # A tokenizer may name more tokens than its own model has rows; those that another model has get theirs.
    rows = max([rows, *(1 + i for t, i in output.tokens.items() if any(t in known for known in have.values()))])
    target = rows_by_key(output, rows)
    found: dict[str, Source] = {}
    for name, model in models.items():
        gathering = gather_rows(name, target, rows, have)
        same = have[name] == target and row_count(model) == rows
        found[name] = model if same else translated(model, gathering, models, have[name] == have[BASE])
    out = found.pop(BASE)
    assert isinstance(out, Checkpoint)
    return with_special_tokens(out, models[leader]), {n: found[f"source {n}"] for n in sources}, output


def rowless(model: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """The tokens that a tokenizer names and a model has no row for."""
    rows = row_count(model)
    return [t for t, i in vocabulary.tokens.items() if i >= rows] if rows else []


def with_special_tokens(base: Checkpoint, leader: Source) -> Checkpoint:
    """The base, with the special tokens that the configuration of the vocabulary's owner names."""
    theirs = checkpoint_of(leader).config
    if all(base.config.get(k) == theirs.get(k) for k in TOKEN_IDS):
        return base
    kept = {k: v for k, v in base.config.items() if k not in TOKEN_IDS}
    return replace(base, config=kept | {k: theirs[k] for k in TOKEN_IDS if k in theirs})


def gather_rows(name: str, target: Mapping[Key, int], rows: int, have: Mapping[str, Mapping[Key, int]]) -> Gathering:
    """Where one model's rows come from.  have: every model's rows by key, the base's first."""
    mine = have[name]
    own = [(row, mine[key]) for key, row in target.items() if key in mine]
    filled: dict[tuple[str, ...], list[Key]] = {}
    for key in target.keys() - mine.keys():
        givers = [n for n, rows_of in have.items() if key in rows_of]
        if len(givers) > 1 and BASE in givers:
            givers = [BASE]
        if givers:
            filled.setdefault(tuple(givers), []).append(key)
    return Gathering(
        rows,
        (indices([r for r, _ in own]), indices([r for _, r in own])),
        {
            givers: (indices([target[k] for k in keys]), tuple(indices([have[g][k] for k in keys]) for g in givers))
            for givers, keys in filled.items()
        },
    )


def indices(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def translated(model: Source, gathering: Gathering, givers: Mapping[str, Source], leaves_alone: bool) -> Translated:
    checkpoint = checkpoint_of(model)
    by_token = vocabulary_tensors(model)
    tensors = {
        n: TensorInfo((gathering.rows, *i.shape[1:]), i.dtype, i.file) if n in by_token else i
        for n, i in model.tensors.items()
    }
    config: dict[str, Any] = checkpoint.config | {"vocab_size": gathering.rows}
    return Translated(model.path, config, tensors, {}, model, gathering, givers, leaves_alone)

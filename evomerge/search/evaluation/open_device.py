"""Opens what an evaluator works with on its device: the bank for a live model of two types, and the engine."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES, resolve_device
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.token_budget import LEAST, token_budget
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.memory import Share
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.kernels.compiled import compiled_for
from evomerge.search.models import shapes_of
from evomerge.search.space.layer_assembly import build_assembly
from evomerge.sources.open_models import Models
from evomerge.sources.tokenizer import Vocabulary, open_processor, optional_tokenizer, vocabulary_tokenizer


class Types(NamedTuple):
    """The types of a live model's weights.

    rounded: that of an export, to which they are rounded.
    held: that in which the model holds them and computes.
    """

    rounded: torch.dtype
    held: torch.dtype


def types_of(config: SearchConfig, models: Models) -> Types:
    """The types that a configuration asks for; `auto` is the faster one on its device."""
    computing = config.compute_dtype
    if computing == "auto":  # a search settles it beforehand; an evaluator without a study decides here
        seconds = measure(config.dtype, resolve_device(config.device).type, shapes_of(models))
        computing = faster_type(config.dtype, seconds)
    return Types(TORCH_DTYPES[config.dtype], TORCH_DTYPES[computing])


def open_bank(
    config: SearchConfig,
    models: Models,
    log: Callable[[str], None],
    cache: Path | None,
    share: Share | None,
    coming: torch.dtype | None,
) -> Bank:
    """The bank of a search's models.

    cache, share: see `Evaluator`.
    coming: the type of a live model that will be loaded; None if it is there.
    """
    device = resolve_device(config.device)
    compiled = compiled_for(models.base.tensors, device, log)
    assembly = build_assembly(config, models)
    slices = assembly.deepest if assembly else ()
    return Bank(models, device, compiled=compiled, slices=slices, cache=cache, live=coming, share=share)


def open_engine(
    config: SearchConfig, bank: Bank, model: Any, language: bool, log: Callable[[str], None], cache: Path | None
) -> Engine:
    """The engine for a live model.

    language: whether there are tasks that ask a language model; else it needs no tokenizer.
    cache: the folder that keeps the token budget; None keeps nothing.
    """
    words = bank.models.vocabulary or Vocabulary({}, bank.models.base.path)
    tokenizer, budget = vocabulary_tokenizer(words) if language else optional_tokenizer(words), LEAST
    if language:
        budget = token_budget(config.batch_tokens, model, bank.room.left, cache)
    return Engine(model, tokenizer, budget, log, language, partial(open_processor, words.folder))

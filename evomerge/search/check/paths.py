"""The loss on the way from one model to another: whether models lie in one basin, so that what is between them works.

Models that were fine-tuned from one base are mostly joined by a segment of low loss (Frankle et al. 2020, "Linear Mode
Connectivity and the Lottery Ticket Hypothesis"); two models from different starts are not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import Any

import torch

from evomerge.device import resolve_device, use
from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import gold_of
from evomerge.evaluate.bounds import within_bounds
from evomerge.evaluate.tasks import Task
from evomerge.files.read import read_text
from evomerge.merge.bank.bank import Bank
from evomerge.merge.compute_dtype import faster_type
from evomerge.merge.compute_dtype import measure as measure_products
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.recipe.recipe import Dtype, Model, Recipe, RecipeSource
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.models import shapes_of
from evomerge.sources.open_models import Models
from evomerge.sources.tokenizer import Vocabulary, vocabulary_tokenizer

BASE = "base"
STEPS = (0.25, 0.5, 0.75)  # between the two ends
LINES = 16
TOKENS, ALL_TOKENS = 128, 1024  # of a prompt or a text; of all lines, prompts included
BATCH = 512  # padded tokens in a forward
HIGH = 0.1  # nats a token: a barrier above it means that what lies between is 10% less sure of each token


@dataclass(frozen=True)
class Line:
    """A text whose loss is measured.  prompt: what stands before it, which does not count."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Segment:
    """The straight line from one model to another.

    ends: their names.
    losses: of five points at equal distances, ends included, in nats a token; infinite if a point is broken.
    """

    ends: tuple[str, str]
    losses: list[float]

    @property
    def barrier(self) -> float:
        """By how much a point between the ends is worse than the line between their losses, at most; 0 if none is."""
        first, *between, last = self.losses
        return max(0.0, *(x - (1 - t) * first - t * last for t, x in zip(STEPS, between, strict=True)))

    @property
    def is_high(self) -> bool:
        """Whether there is a barrier that tells against a merge of the two."""
        return self.barrier > HIGH


@dataclass(frozen=True)
class Paths:
    """The segments between base and sources, each with each.

    lines, tokens: how many were used.
    guess: the loss of a uniform guess among all tokens.
    """

    segments: list[Segment]
    lines: int
    tokens: int
    guess: float


def lines_of_file(file: Any) -> list[Line]:
    """The first lines of a text file that are not empty.  EvomergeError if there is none."""
    found = [Line("", line) for line in read_text(file).splitlines() if line.strip()][:LINES]
    if not found:
        raise EvomergeError(f"{file}: has no line of text")
    return found


def lines_of_tasks(task_set: TaskSet) -> list[Line]:
    """The gold answers of a few items of each task's search split, behind their prompts."""
    asking = [t for t in task_set.tasks if not t.is_python]
    each = [[line_of(t, i.doc, gold_of(t, i)) for i in task_set.items[t.name]["search"][:LINES]] for t in asking]
    return [line for turn in zip_longest(*each) for line in turn if line is not None][:LINES]


def line_of(task: Task, doc: dict[str, Any], gold: str) -> Line:
    """The gold answer of an item, or for a task that scores texts the text."""
    if task.kind == "loglikelihood_rolling":
        return Line("", str(task.lm.doc_to_target(doc)))
    return Line(str(task.lm.doc_to_text(doc)), task.lm.config.target_delimiter + gold)


def measure_paths(
    models: Models, lines: Sequence[Line], device: str = "auto", progress: Callable[[int], None] = lambda count: None
) -> Paths:
    """The losses on the segments between base and sources.

    progress: gets the number of points that are done, of `points`, when it begins and after each.

    The bank holds the sources; beside it there is one live model.  EvomergeError if the model cannot be opened or no
    line has a token to predict.
    """
    where = resolve_device(device)
    use(where)
    stored = {str(t.dtype).removeprefix("torch.") for t in models.base.tensors.values() if t.dtype.is_floating_point}
    dtype: Dtype = "float32" if "float32" in stored else "bfloat16"
    held = faster_type(dtype, measure_products(dtype, where.type, shapes_of(models)))
    types = getattr(torch, dtype), getattr(torch, held)
    bank = Bank(models, where, live=types[1])
    model = candidate_model(bank, *types)
    targets = destinations(model, bank)
    with within_bounds("the tokens of the text"):
        asked = token_ids(vocabulary_tokenizer(models.vocabulary or Vocabulary({}, models.base.path)), lines)
    if not asked:
        raise EvomergeError("the text has no token whose loss could be measured; give longer lines")
    moved = {n: t for n, t in targets.items() if any(bank.moves(source, n) for source in models.sources)}
    done = 0
    progress(done)

    def loss(weights: dict[str, float]) -> float:
        nonlocal done
        try:
            materialise(recipe_of(models, weights, dtype), bank, moved if done else targets)
            found = mean_loss(model, asked)
        except NotFinite:
            found = float("inf")
        progress(done := done + 1)
        return found if found == found else float("inf")

    corners = {name: loss({name: 1.0}) for name in (BASE, *models.sources)}
    segments = [
        Segment((a, b), [corners[a], *(loss({a: 1 - t, b: t}) for t in STEPS), corners[b]])
        for a, b in combinations(corners, 2)
    ]
    return Paths(segments, len(asked), sum(len(ids) - start for ids, start in asked), math.log(model.config.vocab_size))


def points(sources: int) -> int:
    """How many models `measure_paths` makes."""
    return sources + 1 + len(STEPS) * (sources + 1) * sources // 2


def recipe_of(models: Models, weights: dict[str, float], dtype: Dtype) -> Recipe:
    """The merge in which each source has the given weight, the others 0, and the base the rest."""
    sources = [
        RecipeSource(name=name, path=str(source.path), parameters={"weight": weights.get(name, 0.0)})
        for name, source in models.sources.items()
    ]
    base = Model(path=str(models.base.path))
    return Recipe(method="task_arithmetic", dtype=dtype, base=base, sources=sources)


def token_ids(tokenizer: Any, lines: Sequence[Line]) -> list[tuple[list[int], int]]:
    """For each line its ids, prompt included, and the place of the first one that counts.

    Prompts are cut at their beginning, texts at their end; lines without a token to predict are left out, and so are
    those after ALL_TOKENS.
    """
    found: list[tuple[list[int], int]] = []
    for line in lines:
        if sum(len(ids) for ids, _ in found) >= ALL_TOKENS:
            break
        prompt = tokenizer.encode(line.prompt) if line.prompt else []
        text = tokenizer.encode(line.text, add_special_tokens=not line.prompt)[:TOKENS]
        prompt = prompt[-TOKENS:]
        start = max(1, len(prompt))
        if len(prompt) + len(text) > start:
            found.append(([*prompt, *text], start))
    return found


def batched(asked: Sequence[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    """Texts of about one length together, at most BATCH padded tokens at a time.  asked: see `token_ids`."""
    found: list[list[tuple[list[int], int]]] = []
    for line in sorted(asked, key=lambda line: -len(line[0])):  # the first of a batch is its longest
        if not found or (1 + len(found[-1])) * len(found[-1][0][0]) > BATCH:
            found.append([])
        found[-1].append(line)
    return found


@torch.inference_mode()
def mean_loss(model: Any, asked: Sequence[tuple[list[int], int]]) -> float:
    """Minus the mean log-probability of the tokens that count.  asked: see `token_ids`.

    Rows are padded at their end, where no other token sees the padding.
    """
    total, count = 0.0, 0
    for batch in batched(asked):
        rows = torch.zeros((len(batch), len(batch[0][0])), dtype=torch.long)  # (B, T)
        for row, (ids, _) in zip(rows, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits  # (B, T, V)
        for row, scores, (ids, start) in zip(rows, logits, batch, strict=True):
            own = scores[start - 1 : len(ids) - 1].float()
            total += float(torch.nn.functional.cross_entropy(own, row[start : len(ids)], reduction="sum"))
            count += len(ids) - start
    return total / count

"""A family of models small enough to be held whole in float32: answers and gradients at any point, by plain torch.

The product's engine scores trials; this is a second way, independent of it, by which benchmarks compare what searches
found.  It is cheap: the weights at a point are a sum of task vectors, and one forward of padded rows gives both the
gold answers' log-probabilities and whether they are right.

Only for task_arithmetic, whose weights are linear in the point, and for tasks whose answer is right where greedy
decoding gives the gold answer and then the stop string.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from evomerge.config.schema import SearchConfig
from evomerge.evaluate.tasks import Split
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.space.baselines import Baseline, base_alone, baselines
from evomerge.search.space.space import Space, build_space
from evomerge.sources.tensor_names import tensor_role

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What a model answered to the N items of one task.

    logprobs, margins: (N, T) of the gold answer's tokens: log-probability, and logit minus the best other one's.
    mask: (N, T) which of them are tokens.
    choices: (N, C) the log-likelihood of every choice; None for generation.
    gold: (N,) the index of the gold choice; None for generation.
    """

    logprobs: Tensor
    margins: Tensor
    mask: Tensor
    choices: Tensor | None = None
    gold: Tensor | None = None

    def right(self) -> Tensor:
        """(N,) accuracy or exact match of every item."""
        if self.choices is not None and self.gold is not None:
            return (self.choices.argmax(1) == self.gold).float()
        return (self.margins.masked_fill(~self.mask, 1.0) > 0).all(1).float()


@dataclass(frozen=True)
class Rows:
    """The rows of one task's items.

    tokens: (R, L) padded on the right.  scored: (R, T) where the tokens lie whose predictions are scored.
    mask: (R, T) which of these are real.  gold: (N,) the row of each gold answer.
    choices: (N, C) the rows of its choices; None for generation.
    """

    tokens: Tensor
    scored: Tensor
    mask: Tensor
    gold: Tensor
    choices: Tensor | None

    def pick(self, items: Tensor) -> "Rows":
        """The rows of some items."""
        if self.choices is None:
            rows = self.gold[items]
            return Rows(self.tokens[rows], self.scored[rows], self.mask[rows], torch.arange(len(items)), None)
        rows = self.choices[items]  # (n, C)
        numbers = torch.arange(rows.numel()).view(rows.shape)
        gold = numbers[rows == self.gold[items][:, None]]
        flat = rows.flatten()
        return Rows(self.tokens[flat], self.scored[flat], self.mask[flat], gold, numbers)


def with_changes(config: SearchConfig, **changes: Any) -> SearchConfig:
    """A configuration with other keys.  objective: of every task; None is the default."""
    content = config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    objective = changes.pop("objective", "keep")
    for task in content["tasks"] if objective != "keep" else []:
        task.pop("objective", None)
        task |= {} if objective is None else {"objective": objective}
    return SearchConfig.model_validate(content | changes)


class SmallFamily:
    """The models, the space and the items of a configuration.

    config: as it was read; a generation task's gold answer then gets the stop string at its end, if it has none.
    """

    dtype = "float32"

    def __init__(self, config: SearchConfig) -> None:
        assert config.method == "task_arithmetic", "the weights must be linear in the point"
        self.config = config.model_copy(update={"dtype": self.dtype, "compute_dtype": self.dtype})
        self.models = open_config_models(self.config)
        self.task_set: TaskSet = open_task_set(self.config)
        self.space: Space = build_space(self.config, self.models)
        self.evaluator = Evaluator(self.config, self.models, self.task_set, log=lambda text: None)
        self.axes = list(self.space.axes)
        self.low = np.array([d.low for d in self.space.axes.values()])
        self.width = np.array([d.high - d.low for d in self.space.axes.values()])
        self.rows: dict[tuple[str, Split], Rows] = {}
        torch.set_num_threads(1)
        self.names, self.base, self.changes, self.jacobian = self.weights()
        self.baselines: list[Baseline] = [base_alone(self.space), *baselines(self.space)]

    def weights(self) -> tuple[list[str], list[Tensor], list[Tensor], Tensor]:
        """Names, base tensors, task vectors (S, ...) of each tensor, the jacobian (tensors, S, D) of their weights."""
        parameters = {n: p.detach().clone() for n, p in self.evaluator.model.named_parameters()}
        names = [n for n in parameters if n in self.models.base.tensors]
        base, changes, places = [], [], []
        for name in names:
            start = self.models.base.read(name).float()
            base.append(start)
            changes.append(torch.stack([s.read(name).float() - start for s in self.models.sources.values()]))
            places.append(tensor_role(name))
        sources = [s.name for s in self.config.sources]
        columns = []
        for axis in self.axes:
            recipe = self.space.recipe({a: float(a == axis) for a in self.axes})
            order = [s.name for s in recipe.sources]
            each = [recipe.knobs(place, self.space.layers).each["weight"] for place in places]
            columns.append([[weights[order.index(s)] for s in sources] for weights in each])
        return names, base, changes, torch.tensor(columns).permute(1, 2, 0)

    def unit(self, point: Mapping[str, float]) -> Vector:
        """(D,) a point in the unit cube."""
        return (np.array([point[a] for a in self.axes]) - self.low) / self.width

    def values(self, unit: Tensor) -> dict[str, Tensor]:
        """The weights of the model at a place (D,) of the unit cube, or outside it; differentiable."""
        point = torch.as_tensor(self.low).float() + torch.as_tensor(self.width).float() * unit.float()
        return self.blend(self.jacobian.float() @ point)

    def blend(self, weights: Tensor) -> dict[str, Tensor]:
        """The weights of the model by the weight of each source in each tensor, (tensors, S)."""
        triples = zip(self.names, self.base, self.changes, weights, strict=True)
        return {name: base + torch.tensordot(w, change, 1) for name, base, change, w in triples}

    def of_recipe(self, recipe: Recipe) -> dict[str, Tensor]:
        """The weights of the model that a recipe makes, by the product's own merge."""
        from evomerge.evaluate.clock import Clock

        self.evaluator.materialise(recipe, Clock(lambda: None))
        return {n: p.detach().clone() for n, p in self.evaluator.model.named_parameters() if n in set(self.names)}

    def items(self, task: str, split: Split) -> Rows:
        """The rows of a task's items of a split; tokenised by the product's own code."""
        key = (task, split)
        if key not in self.rows:
            found = next(t for t in self.task_set.tasks if t.name == task)
            work = self.evaluator.engine.workload(found, self.task_set.items[task][split], True)
            rows, gold, choices = [], [], []
            ended = found.kind == "multiple_choice" or ends_with_stop(found)
            stop = [] if ended else stop_tokens(self.evaluator.engine.tokenizer, found)
            for asked in work.items:
                assert asked.gold is not None
                spans = [s.start for s in asked.spans] or [asked.gold]
                spans = spans if found.kind == "multiple_choice" else [asked.gold]
                gold.append(len(rows) + spans.index(asked.gold))
                choices.append(range(len(rows), len(rows) + len(spans)))
                for k in spans:
                    row = asked.rows[k]
                    rows.append(([*row.tokens, *stop], row.scored + len(stop)))
            length, most = max(len(t) for t, _ in rows), max(scored for _, scored in rows)
            tokens = torch.zeros(len(rows), length, dtype=torch.long)
            scored = torch.zeros(len(rows), most, dtype=torch.long)
            mask = torch.zeros(len(rows), most, dtype=torch.bool)
            for r, (ids, count) in enumerate(rows):
                tokens[r, : len(ids)] = torch.tensor(ids)
                scored[r, :count] = torch.arange(len(ids) - count, len(ids))
                scored[r, count:] = len(ids) - 1
                mask[r, :count] = True
            kind = torch.tensor(choices) if found.kind == "multiple_choice" else None
            self.rows[key] = Rows(tokens, scored, mask, torch.tensor(gold), kind)
        return self.rows[key]

    def answers(self, values: dict[str, Tensor], rows: Rows) -> Answers:
        """The answers of the model with these weights; differentiable by them."""
        model = self.evaluator.model
        module: Any = HiddenStates(model)
        hidden = functional_call(module, {f"model.{n}": v for n, v in values.items()}, (rows.tokens,))  # (R, L, H)
        picked = hidden.gather(1, (rows.scored - 1)[..., None].expand(-1, -1, hidden.shape[2]))[rows.mask]  # (M, H)
        head = values.get("lm_head.weight", values["model.embed_tokens.weight"])
        logits = picked @ head.T  # (M, V)
        target = rows.tokens.gather(1, rows.scored)[rows.mask]  # (M,)
        right = logits.gather(1, target[:, None])[:, 0]
        others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
        logprobs = torch.zeros(rows.mask.shape).masked_scatter(rows.mask, right - logits.logsumexp(1))
        margins = torch.zeros(rows.mask.shape).masked_scatter(rows.mask, right - others)
        gold = rows.gold
        if rows.choices is None:
            return Answers(logprobs[gold], margins[gold], rows.mask[gold])
        each = logprobs.sum(1)[rows.choices]
        which = (rows.choices == gold[:, None]).long().argmax(1)
        return Answers(logprobs[gold], margins[gold], rows.mask[gold], each, which)

    @torch.no_grad()
    def score(self, values: dict[str, Tensor], split: Split) -> dict[str, Answers]:
        """The answers to all items of a split, by task."""
        return {t.name: self.answers(values, self.items(t.name, split)) for t in self.task_set.tasks}

    def metric(self, values: dict[str, Tensor], split: Split) -> float:
        """The mean over tasks of accuracy or exact match."""
        return float(np.mean([a.right().mean().item() for a in self.score(values, split).values()]))


class HiddenStates(torch.nn.Module):
    """The last hidden states of a causal model, for `functional_call`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


def ends_with_stop(task: Any) -> bool:
    """Whether the template of a generation task's gold answer ends with a stop string."""
    until = task.lm.config.generation_kwargs["until"]
    return task.gold is not None and task.gold.endswith((until,) if isinstance(until, str) else tuple(until))


def stop_tokens(tokenizer: Any, task: Any) -> list[int]:
    """The first stop string of a generation task as tokens."""
    until = task.lm.config.generation_kwargs["until"]
    ids: list[int] = tokenizer.encode([until] if isinstance(until, str) else until[0], add_special_tokens=False)
    return ids

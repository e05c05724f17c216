"""The answers of a model of real size at any point: merged by evomerge, and scored by plain torch in bfloat16."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from small_family import Answers, SmallFamily
from torch import Tensor

from evomerge.evaluate.clock import Clock
from evomerge.sources.tensor_names import tensor_role

BATCH = 1500  # tokens of a forward

Vector = NDArray[np.float64]


class Asked(NamedTuple):
    """The tokens that one item's forward sees, and what it must predict.

    tokens: without the last one, which is only predicted.
    targets: (T,) the gold tokens, the last ones.
    choices: (C,) a token of each choice; empty for generation.
    """

    tokens: Tensor
    targets: Tensor
    choices: Tensor


class RealFamily(SmallFamily):
    """A family whose space has a weight of attention and MLP for each source and layer."""

    dtype = "bfloat16"

    def weights(self) -> tuple[list[str], list[Tensor], list[Tensor], Tensor]:
        """Nothing: no tensor is held."""
        self.asked: list[list[Asked]] = []
        return [], [], [], torch.zeros(0)

    def sizes(self) -> Vector:
        """(D,) the norm of the change that each weight scales, in the order of the axes."""
        squares = dict.fromkeys(self.axes, 0.0)
        for source in self.config.sources:
            for name in self.models.base.tensors:
                role = tensor_role(name)
                axis = f"weight.{source.name}.{role.component}.layer{role.layer}"
                if axis in squares:
                    change = self.models.sources[source.name].read(name).float() - self.models.base.read(name).float()
                    squares[axis] += change.double().pow(2).sum().item()
        return np.array(list(squares.values())) ** 0.5

    def answers_at(self, weights: Vector) -> list[Answers]:
        """The answers to each task's search items at a point.  weights: (D,) in the order of the axes."""
        recipe = self.space.recipe(dict(zip(self.axes, weights.tolist(), strict=True)))
        self.evaluator.materialise(recipe, Clock(lambda: None))
        self.asked = self.asked or [self.ask(task.name) for task in self.task_set.tasks]
        return [self.answer(asked) for asked in self.asked]

    def ask(self, task: str) -> list[Asked]:
        """The tokens of a task's search items."""
        rows = self.items(task, "search")
        found = []
        for item, gold in enumerate(rows.gold.tolist()):
            where = rows.scored[gold][rows.mask[gold]]  # (T,)
            choices = torch.zeros(0, dtype=torch.long)
            if rows.choices is not None:
                assert len(where) == 1, "a choice must be one token, so that one forward scores all"
                choices = rows.tokens[rows.choices[item], int(where)]
            found.append(Asked(rows.tokens[gold, : int(where[-1])], rows.tokens[gold, where], choices))
        return found

    @torch.no_grad()
    def answer(self, asked: list[Asked]) -> Answers:
        """The answers of the live model."""
        most, count = max(len(a.targets) for a in asked), len(asked)
        logprobs, margins = torch.zeros(count, most), torch.zeros(count, most)
        mask = torch.zeros(count, most, dtype=torch.bool)
        choices = torch.zeros(count, len(asked[0].choices))
        for batch in self.batches(asked):
            tokens = torch.nn.utils.rnn.pad_sequence([asked[n].tokens for n in batch], batch_first=True)
            hidden = self.evaluator.model.model(input_ids=tokens, use_cache=False).last_hidden_state  # (R, L, H)
            sizes = [len(asked[n].targets) for n in batch]
            ends = [(states, len(asked[n].tokens)) for n, states in zip(batch, hidden, strict=True)]
            picked = torch.cat([states[end - size : end] for (states, end), size in zip(ends, sizes, strict=True)])
            logits = self.evaluator.model.lm_head(picked).float()  # (M, V)
            target = torch.cat([asked[n].targets for n in batch])[:, None]
            right = logits.gather(1, target)[:, 0]
            logprob = (right - logits.logsumexp(1)).split(sizes)
            margin = (right - logits.scatter_(1, target, -torch.inf).amax(1)).split(sizes)
            logits.scatter_(1, target, right[:, None])
            for n, size, *each in zip(batch, sizes, logprob, margin, logits.split(sizes), strict=True):
                logprobs[n, :size], margins[n, :size], mask[n, :size] = each[0], each[1], True
                choices[n] = each[2][-1, asked[n].choices]
        if not choices.numel():
            return Answers(logprobs, margins, mask)
        gold = torch.tensor([a.choices.tolist().index(int(a.targets[0])) for a in asked])
        return Answers(logprobs, margins, mask, choices, gold)

    def batches(self, asked: list[Asked]) -> list[list[int]]:
        """Numbers of items of about equal length, of at most BATCH tokens together."""
        found: list[list[int]] = [[]]
        for n in sorted(range(len(asked)), key=lambda n: len(asked[n].tokens)):
            if (len(found[-1]) + 1) * len(asked[n].tokens) > BATCH:
                found.append([])
            found[-1].append(n)
        return [batch for batch in found if batch]

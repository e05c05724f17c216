"""The live model of a playground, which holds one recipe at a time and belongs to one caller at a time.

Several tabs of a browser may want it.  So everything that needs it takes the lock, makes sure that its own recipe is
merged, and says which recipe that was.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evomerge.device import free_memory
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.item_values import MetricFailed
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.merge.materialise import NotFinite
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.search.evaluation.evaluator import Evaluator


@dataclass(frozen=True)
class Merged:
    """A recipe in the live model.

    recipe: its short name, see `recipe_name`.
    seconds: that the merge took; 0 if the live model held it already.
    """

    recipe: str
    seconds: float


class Closed(Exception):
    """The playground was closed while it worked."""


class LiveModel:
    """The live model of an evaluator.

    lock: held by whoever works with the model.
    held: the short name of the recipe in it; None while there is no whole one.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.lock = threading.RLock()
        self.held: str | None = None
        self.closed = False
        evaluator.check = self.check

    def check(self) -> None:
        """Called between tensors, batches and tokens.  Closed if the playground has been closed."""
        if self.closed:
            raise Closed

    def close(self) -> None:
        """Let work that goes on end at its next tensor, batch or token."""
        self.closed = True

    def clock(self) -> Clock:
        """For one piece of work with the model."""
        return Clock(self.check, device=self.evaluator.bank.live_device)

    @contextmanager
    def holding(self, recipe: Recipe) -> Iterator[Merged]:
        """Within the context, the live model holds this recipe and belongs to this caller alone.

        EvomergeError if the recipe gives no usable model.
        """
        name = recipe_name(recipe)
        with self.lock:
            try:
                started = time.perf_counter()
                if new := self.held != name:
                    self.held = None
                    self.evaluator.materialise(recipe, self.clock())
                    self.held = name
                yield Merged(name, time.perf_counter() - started if new else 0.0)
            except (NotFinite, NotFiniteScore, MetricFailed) as error:
                raise EvomergeError(f"this recipe gives no usable model: {error}") from error
            except (torch.OutOfMemoryError, MemoryError) as error:
                free_memory(self.evaluator.bank.live_device)
                raise EvomergeError("out of memory; close other programs, or set `device: cpu`") from error

    def merge(self, recipe: Recipe) -> Merged:
        """Merge a recipe into the live model, unless it holds it already."""
        with self.holding(recipe) as merged:
            return merged


def recipe_name(recipe: Recipe) -> str:
    """A short name that differs between recipes: the first digits of a hash of the recipe's file."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:8]

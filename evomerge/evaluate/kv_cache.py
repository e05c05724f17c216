"""Caches of keys and values for forwards: a trunk that all rows share, and the growing rows of a generation.

They are layers of transformers' own `Cache`, so that the model's code needs no change.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

KeysValues = list[tuple[Tensor, Tensor]]
"""Per layer, the keys and values (1, heads, T, head size) of a trunk of T tokens."""


class TrunkLayer(DynamicLayer):  # type: ignore[misc]
    """Puts a trunk's keys and values before those of every row, and stores nothing new.

    keys, values: (1, heads, T, head size).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return after_trunk(self.keys, key_states), after_trunk(self.values, value_states)


def after_trunk(trunk: Tensor, states: Tensor) -> Tensor:
    """Join (1, heads, T, head size) and (B, heads, W, head size) to (B, heads, T + W, head size)."""
    return torch.cat([trunk.expand(len(states), -1, -1, -1), states], dim=2)


class GenerationLayer(DynamicLayer):  # type: ignore[misc]
    """Memory for all rows and tokens of a generation, allocated once: a new token copies nothing old.

    rows, capacity: the rows of the batch, and the tokens of a row.
    trunk: keys and values that every row begins with, (1, heads, T, head size).
    part: which rows the next states belong to; `column`: the position of their first token.  Both are set before a
        forward.
    """

    def __init__(self, rows: int, capacity: int, trunk: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.shape, self.trunk = (rows, capacity), trunk
        self.part, self.column = slice(None), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self.allocate(key_states), self.allocate(value_states)
            if self.trunk is not None:
                depth = self.trunk[0].shape[2]
                self.keys[:, :, :depth], self.values[:, :, :depth] = self.trunk
        end = self.column + key_states.shape[2]
        self.keys[self.part, :, self.column : end] = key_states
        self.values[self.part, :, self.column : end] = value_states
        return self.keys[self.part, :, :end], self.values[self.part, :, :end]

    def allocate(self, states: Tensor) -> Tensor:
        """Zeros (rows, heads, capacity, head size); attention multiplies masked values by 0, so they must be finite."""
        rows, capacity = self.shape
        return states.new_zeros(rows, states.shape[1], capacity, states.shape[3])

    def get_seq_length(self) -> int:
        return self.column

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows.  rows: (B,) indices."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def empty_cache() -> Any:
    """A cache that keeps all tokens, also where the model has sliding windows."""
    return Cache(layer_class_to_replicate=DynamicLayer)


def empty_cache_of(model: Any) -> Any:
    """`empty_cache`, or transformers' own cache for a hybrid, whose layers keep states instead of keys and values."""
    own = DynamicCache(config=model.config)
    return own if any(hasattr(layer, "has_previous_state") for layer in own.layers) else empty_cache()


def trunk_cache(trunk: KeysValues) -> Any:
    """The cache for a forward of packed rows behind a trunk."""
    return Cache(layers=[TrunkLayer(keys, values) for keys, values in trunk])


def generation_cache(layers: int, rows: int, capacity: int, trunk: KeysValues | None) -> Any:
    """The cache for a generation.  capacity: the tokens of a row, the trunk's included."""
    return Cache(layers=[GenerationLayer(rows, capacity, trunk[k] if trunk else None) for k in range(layers)])

"""Keys and values that several rows share, and those of a generation, in transformers' own form of a cache."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KeysValues = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values (1, heads, T, size) of tokens that many rows begin with."""


class TrunkLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that shows the trunk before whatever comes, for every row, and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return behind(self.keys, key_states), behind(self.values, value_states)


def behind(trunk: Tensor, states: Tensor) -> Tensor:
    """(1, heads, T, size) and (B, heads, W, size) as (B, heads, T + W, size)."""
    return torch.cat([trunk.expand(len(states), -1, -1, -1), states], dim=2)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer with room for every row and token of a generation, so that a new one is written and no old one copied.

    shape: (rows, capacity).  part: the rows that the next states belong to.  column: where they go.
    """

    def __init__(self, rows: int, capacity: int, trunk: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.shape, self.trunk = (rows, capacity), trunk
        self.part, self.column = slice(None), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self.room(key_states), self.room(value_states)
            if self.trunk is not None:
                depth = self.trunk[0].shape[2]
                self.keys[:, :, :depth], self.values[:, :, :depth] = self.trunk
        end = self.column + key_states.shape[2]
        self.keys[self.part, :, self.column : end] = key_states
        self.values[self.part, :, self.column : end] = value_states
        return self.keys[self.part, :, :end], self.values[self.part, :, :end]

    def room(self, states: Tensor) -> Tensor:
        """(rows, heads, capacity, size) zeros: what is masked must be finite all the same."""
        rows, capacity = self.shape
        return states.new_zeros(rows, states.shape[1], capacity, states.shape[3])

    def get_seq_length(self) -> int:
        return self.column

    def keep_rows(self, rows: Tensor) -> None:
        """Forget the other rows."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def empty_cache() -> Any:
    """A cache that grows and forgets nothing, sliding windows or not."""
    return Cache(layer_class_to_replicate=DynamicLayer)


def trunk_cache(trunk: KeysValues) -> Any:
    """A cache for one packed forward behind a trunk."""
    return Cache(layers=[TrunkLayer(keys, values) for keys, values in trunk])


def roomy_cache(layers: int, rows: int, capacity: int, trunk: KeysValues | None) -> Any:
    """A cache for a generation of some rows, each with `capacity` tokens, its trunk among them."""
    return Cache(layers=[RoomyLayer(rows, capacity, trunk[k] if trunk else None) for k in range(layers)])

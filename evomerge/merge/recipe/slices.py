"""Slices: which layers of which model stand in the output, as a recipe says it."""

from pydantic import BaseModel, ConfigDict, model_validator

BASE = "base"


class Slice(BaseModel):
    """Consecutive layers of the output.

    layers: a source's name, or `base`, -> (start, end): its layers start .. end - 1 go into this slice, in order.
    Equal ends are no layer: such a slice, the first or the last, only says whose tensors stand before or after the
    stack.
    """

    model_config = ConfigDict(extra="forbid")
    layers: dict[str, tuple[int, int]]

    @model_validator(mode="after")
    def check_ranges(self) -> "Slice":
        if not self.layers:
            raise ValueError("layers: names no model")
        for name, (start, end) in self.layers.items():
            if not 0 <= start <= end:
                raise ValueError(f"layers.{name}: [{start}, {end}] is no range; it must be 0 <= start <= end")
        if len({end - start for start, end in self.layers.values()}) > 1:
            lengths = ", ".join(f"{name} {end - start}" for name, (start, end) in self.layers.items())
            raise ValueError(f"layers: all ranges of a slice must be equally long, here are {lengths}")
        return self

    @property
    def length(self) -> int:
        start, end = next(iter(self.layers.values()))
        return end - start

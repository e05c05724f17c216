"""Slices: which layers of which models form the layers of the output, as a recipe states it."""

from pydantic import BaseModel, ConfigDict, model_validator

BASE = "base"


class Slice(BaseModel):
    """Consecutive layers of the output.

    layers: `base` or a source's name -> (start, end): its layers start .. end - 1 form this slice, in order.
        With start = end the slice has no layer; as first or last slice it only decides which models the tensors
        before or after the layers are made of.
    """

    model_config = ConfigDict(extra="forbid")
    layers: dict[str, tuple[int, int]]

    @model_validator(mode="after")
    def check_ranges(self) -> "Slice":
        if not self.layers:
            raise ValueError("layers: names no model")
        for name, (start, end) in self.layers.items():
            if not 0 <= start <= end:
                raise ValueError(f"layers.{name}: [{start}, {end}] is not a range; it must be 0 <= start <= end")
        if len({end - start for start, end in self.layers.values()}) > 1:
            lengths = ", ".join(f"{name} {end - start}" for name, (start, end) in self.layers.items())
            raise ValueError(f"layers: all ranges of a slice must be equally long, here are {lengths}")
        return self

    @property
    def length(self) -> int:
        start, end = next(iter(self.layers.values()))
        return end - start

"""The keys of a configuration that say which coefficients or layers are searched."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from evomerge.config.strict import Strict
from evomerge.merge.methods.method import Method
from evomerge.sources.tensor_names import Component, Part

Granularity = Literal["model", "depth", "group", "layer"]


class Axis(Strict):
    """One coefficient of the space.

    low, high: its bounds; equal ones fix it.
    choice: the name of its only value, for coefficients whose values have names (`rescale: l1`).
    granularity, components: as in `SpaceConfig`; None takes the space's.
    """

    low: float
    high: float
    choice: str | None = None
    granularity: Granularity | None = None
    components: list[Literal[Component, Part]] | None = None

    @model_validator(mode="after")
    def bounds_in_order(self) -> "Axis":
        if self.low > self.high:
            raise ValueError(f"impossible bounds: low {self.low:g} is above high {self.high:g}")
        return self


def parse_axis(value: object) -> object:
    """`0.5`, `true` or a name as a fixed coefficient, `[0, 1]` as its bounds; a mapping is returned unchanged."""
    if isinstance(value, str):
        return {"low": 0.0, "high": 0.0, "choice": value}
    if isinstance(value, (bool, int, float)):
        return {"low": value, "high": value}
    if isinstance(value, list) and len(value) == 2:
        return {"low": value[0], "high": value[1]}
    return value


AxisValue = Annotated[Axis, BeforeValidator(parse_axis)]


class LayersConfig(Strict):
    """The search for the layers of the output: which source gives each of them (`passthrough` only).

    skip: whether a layer may be left out.
    passes: how many times the layers of `range` may follow one another.
    range: (start, end): the layers start .. end - 1; None: all.
    scale: the bounds of a factor for what each layer adds; None: it adds what it does in its source.
    """

    skip: bool = False
    passes: int = Field(default=1, ge=1, le=8)
    range: tuple[Annotated[int, Field(ge=0)], int] | None = None
    scale: tuple[float, float] | None = None

    @model_validator(mode="after")
    def in_order(self) -> "LayersConfig":
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range: {list(self.range)} has no layer; give [start, end] with start < end")
        if self.range is not None and self.passes == 1:
            raise ValueError("range: says which layers may follow again, so it needs `passes: 2` or more")
        if self.scale is not None and self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: give bounds [low, high] with low < high, not {list(self.scale)}")
        return self


def parse_layers(value: object) -> object:
    """`true` as a mapping; a mapping is returned unchanged."""
    return {} if value is True else value


class SpaceConfig(BaseModel):
    """Which coefficients are searched.

    granularity: `model` is one value for all layers, `depth` a piecewise linear function of the depth with `knots`
        values, `group` one value for each of `groups` runs of layers, `layer` one value for each layer.
    components: those, or parts of them, with coefficients of their own; the others share one.
    sources: for one source, by name: coefficients that differ from the others'.
    order: whether the order of the sources is searched, where the method's result depends on it.
    layers: the search for layers instead of coefficients.

    Every other key is a coefficient of the method; those that are not named keep their defaults.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, AxisValue]
    granularity: Granularity = "model"
    knots: int = Field(default=3, ge=2, le=64)
    groups: int = Field(default=4, ge=1, le=256)
    components: list[Literal[Component, Part]] = []
    sources: dict[str, dict[str, AxisValue]] = {}
    order: bool = Field(default=True, exclude_if=lambda order: order)
    layers: Annotated[LayersConfig | None, BeforeValidator(parse_layers)] = Field(
        default=None, exclude_if=lambda layers: layers is None
    )

    def axes(self, method: Method) -> dict[str, Axis]:
        """The coefficients that the file names; the name of a value becomes its number if the method has that name."""
        found = dict(self.__pydantic_extra__)
        for name, value in found.items():
            if value.choice is not None and name in method.knobs and value.choice in method.knobs[name].choices:
                number = method.knobs[name].choices[value.choice]
                found[name] = Axis(low=number, high=number)
        return found

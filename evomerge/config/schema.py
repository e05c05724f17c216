"""The keys of a search configuration: their types, defaults and the checks of single values."""

import re
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from evomerge.config.strict import Strict
from evomerge.config.tasks import GuardConfig, SplitsConfig, TaskConfig
from evomerge.merge.methods.method import Method
from evomerge.merge.recipe.recipe import Dtype, Recipe
from evomerge.sources.config_differences import Allowed
from evomerge.sources.tensor_names import Component, Part

Granularity = Literal["model", "depth", "group", "layer"]


RESERVED = ("base", "winner")  # names that a run's tables give to other models


class SourceConfig(Strict):
    """One model to merge.

    name: how tables and recipes call it; none of RESERVED.
    path: a folder or a hub id.
    recipe: instead of a path, the recipe of the merge that is this source.
    role: used only to choose the recommended recipes.
    statistics: a file of `evomerge statistics`, for the methods that need one.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str = Field(default="", exclude_if=lambda path: not path)
    recipe: Recipe | None = Field(default=None, exclude_if=lambda recipe: recipe is None)
    role: Literal["specialist", "generalist"] | None = None
    statistics: str | None = None

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} is the name of another model in tables; choose another name for the source")
        return name

    @model_validator(mode="after")
    def check_origin(self) -> "SourceConfig":
        if bool(self.path) == (self.recipe is not None):
            raise ValueError("needs a `path` or a `recipe`, and not both")
        if self.recipe is not None and self.statistics is not None:
            raise ValueError("statistics: can be given for a model on disk, not for a recipe")
        return self


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


COARSE = 30


class SamplerConfig(Strict):
    """What proposes the coefficients.

    name: a sampler of search/samplers/registry.py, or one that an installed package brings; `sampler_kind` checks it.
    sigma0: the first step of cma-es, as a share of the bounds.
    population: samples per generation of cma-es.
    coarse: trials of cma-es that search one value for each knob and source before those that search all; 0: none.
    steps: gradient steps of `auto` and `learned`, at most.
    """

    name: str = Field(default="auto", pattern=r"^[A-Za-z0-9._-]+$")
    sigma0: float = Field(default=0.2, gt=0, le=1)
    population: int | None = Field(default=None, ge=4)
    coarse: int = Field(default=COARSE, ge=0, exclude_if=lambda coarse: coarse == COARSE)
    steps: int | None = Field(default=None, ge=1)


def parse_duration(value: object) -> object:
    """`8h`, `90m`, `45s` and `1h30m` as seconds; ValueError for other text.  A number is returned unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", value.strip())
    if not match or not value.strip():
        raise ValueError(f"{value!r} is not a duration; write 8h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()


class BudgetConfig(Strict):
    """When the search ends: at the limit that is reached first.

    trials: the number of finished trials, baselines included.
    timeout: the seconds from the beginning to the result, over every resume.
    target: a score that the best trial reaches.
    patience: the number of the sampler's trials that have finished since the best one.
    """

    trials: int | None = Field(default=None, ge=1)
    timeout: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] | None = None
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        """The number of trials that ends the search: 100 if neither `trials`, `timeout` nor `patience` is given."""
        return self.trials or (100 if self.timeout is None and self.patience is None else None)


class PriceConfig(Strict):
    """The price of an hour of one device, and its currency (EUR, USD)."""

    per_device_hour: float = Field(ge=0)
    currency: str = Field(pattern=r"^[^\s]{1,8}$")


class OnFinishConfig(Strict):
    """What happens when a search has ended, see `api/on_finish.py`.

    command: for the shell.
    webhook: an http or https address; `${NAME}` is a variable of the environment.
    """

    command: str | None = Field(default=None, min_length=1)
    webhook: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")

    @model_validator(mode="after")
    def check_something(self) -> "OnFinishConfig":
        if self.command is None and self.webhook is None:
            raise ValueError("give a `command`, a `webhook` or both")
        return self


Tracker = Literal["trackio", "mlflow", "wandb"]


def parse_trackers(value: object) -> object:
    """One name as a list; a list is returned unchanged."""
    return [value] if isinstance(value, str) else value


class WorkersConfig(Strict):
    """Limits of workers.

    stuck: a worker that sends nothing for so many seconds during a job is replaced.
    trial: a trial that takes more seconds fails; None is no limit.
    """

    stuck: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] = 300.0
    trial: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] | None = None


class RacingConfig(Strict):
    """Races: candidates that are worse than the best so far are stopped before all items are scored.

    enabled: whether there are races.
    alpha: the greatest probability that a candidate which is as good on the search items is stopped, over the random
        order of the items.
    informative: whether items on which models differ come early.
    """

    enabled: bool = True
    alpha: float = Field(default=0.02, gt=0, lt=1)
    informative: bool = True


def parse_racing(value: object) -> object:
    """`true` and `false` as a mapping; a mapping is returned unchanged."""
    if not isinstance(value, (bool, dict, RacingConfig)):
        raise ValueError("give true, false, or what to change: {alpha: 0.05, informative: false}")
    return {"enabled": value} if isinstance(value, bool) else value


RacingValue = Annotated[RacingConfig, BeforeValidator(parse_racing)]


def check_method(value: object) -> object:
    """ValueError if a value is not the name of a method."""
    if not isinstance(value, str):
        raise ValueError("give the name of a method, or a list of names")
    return value


MethodName = Annotated[str, BeforeValidator(check_method)]


class SearchConfig(Strict):
    """A whole search.  In the file relative paths are relative to its folder; here they are absolute.

    name: of the study and of the run folder.
    base, sources, allow_differences, vocabulary: as in a recipe.
    method: as in a recipe; of a list of methods the first, and once the search has chosen, the chosen one.
    methods: the list that the search chooses from; None if the file names one method.
    space: the coefficients that are searched.
    tasks, splits: what candidates are scored on.
    guards: tasks that must not get worse.
    baselines: the user's own recipe files on the same sources, which the winner must beat too.
    start_from: where the search begins: a recipe, a mergekit file or the folder of an earlier run; it also gives the
        base, the sources and the method where the configuration does not.
    simplify: the largest loss of the mean metric for which the candidate may get fewer sources and coefficients; None
        leaves it as it is.
    sampler, budget, price, workers, racing: see their classes.
    scale: `parents`: in every task 0 is the base and 1 the best parent; `none`: scores are used as they are.
    goals: `mean`: the best mean over the tasks; `pareto`: also the best models for other weights of the tasks.
    seed: of the splits, the sampler, random masks and the bootstrap.
    device: of the workers; `auto` is an accelerator if there is one.
    dtype: the type of the candidate's values.
    compute_dtype: the type that forwards are computed in, see `merge/compute_dtype.py`.
    batch_tokens: padded tokens per forward, see `evaluate/token_budget.py`.
    storage: a database URL; None is SQLite in the run folder.
    on_finish: what happens when the search has ended.
    log_to: the programs that every trial is logged to, see `search/monitor/trackers.py`.
    hub: hub id -> `owner/name@commit`, the commit that the search began with; evomerge writes it.
    """

    name: str = Field(pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9._-]*$")  # a folder; `..` would be another one
    base: str
    sources: list[SourceConfig] = Field(min_length=1)
    allow_differences: list[Allowed] = []
    vocabulary: str | None = Field(default=None, exclude_if=lambda vocabulary: vocabulary is None)
    method: MethodName
    methods: list[MethodName] | None = None
    space: SpaceConfig = Field(default_factory=lambda: SpaceConfig.model_validate({}))
    tasks: list[TaskConfig] = Field(min_length=1)
    guards: list[GuardConfig] = []
    splits: SplitsConfig = SplitsConfig()
    baselines: list[str] = []
    start_from: str | None = None
    simplify: float | None = Field(default=None, gt=0)
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    price: PriceConfig | None = None
    workers: WorkersConfig = WorkersConfig()
    racing: RacingValue = RacingConfig()
    scale: Literal["parents", "none"] = "parents"
    goals: Literal["mean", "pareto"] = "mean"
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: str = "auto"
    dtype: Dtype = "bfloat16"
    compute_dtype: Dtype | Literal["auto"] = "auto"
    batch_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = "auto"
    storage: str | None = None
    on_finish: OnFinishConfig | None = Field(default=None, exclude_if=lambda on_finish: on_finish is None)
    log_to: Annotated[list[Tracker], BeforeValidator(parse_trackers)] = Field(
        default=[], exclude_if=lambda log_to: not log_to
    )
    hub: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def take_list_of_methods(cls, content: object) -> object:
        """`method: [ties, linear]` as `method: ties` and `methods: [ties, linear]`."""
        if not isinstance(content, dict) or content.get("methods") is not None:
            return content
        listed = content.get("method")
        if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
            return content
        return content | {"method": listed[0]} | ({"methods": listed} if len(listed) > 1 else {})

    @property
    def candidate_methods(self) -> list[str]:
        """The methods that the search chooses from, or the only one."""
        return self.methods or [self.method]

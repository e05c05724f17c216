"""What a search configuration may say: the keys, their types, their defaults."""

import re
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from evomerge.merge.methods.method import Method
from evomerge.merge.recipe.recipe import Dtype
from evomerge.sources.config_differences import Allowed
from evomerge.sources.tensor_names import Component

Granularity = Literal["model", "depth", "group", "layer"]
GOLD_METRICS = ("gold_logprob", "gold_prob", "bits_per_byte")  # they need the gold answer's log-probability alone
CHOICE_METRICS = ("margin", "brier")  # they need every choice's


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


RESERVED = ("base", "winner")


class SourceConfig(Strict):
    """One model to merge.  path: a folder or a hub id.  role: only guides the recommended recipes.

    name: any but those that a run's tables give the base and the chosen candidate (RESERVED).
    statistics: a file of `evomerge statistics`, for the methods that need one.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str
    role: Literal["specialist", "generalist"] | None = None
    statistics: str | None = None

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} is what tables call another model; call the source otherwise")
        return name


class Axis(Strict):
    """One knob of the space: bounds (low = high fixes it) and, if it differs from the space's, how fine it is.

    choice: the name of its only value, for knobs that have names (`rescale: l1`).
    """

    low: float
    high: float
    choice: str | None = None
    granularity: Granularity | None = None
    components: list[Component] | None = None

    @model_validator(mode="after")
    def bounds_in_order(self) -> "Axis":
        if self.low > self.high:
            raise ValueError(f"impossible bounds: low {self.low:g} is above high {self.high:g}")
        return self


def axis(value: object) -> object:
    """`0.5`, `true` and a name fix a knob, `[0, 1]` bounds it, a mapping says more."""
    if isinstance(value, str):
        return {"low": 0.0, "high": 0.0, "choice": value}
    if isinstance(value, (bool, int, float)):
        return {"low": value, "high": value}
    if isinstance(value, list) and len(value) == 2:
        return {"low": value[0], "high": value[1]}
    return value


AxisValue = Annotated[Axis, BeforeValidator(axis)]


class SpaceConfig(BaseModel):
    """Which coefficients may move.

    granularity: one value for the model, `knots` along the depth with straight lines between, `groups` of layers,
    or one per layer.  components: those with coefficients of their own; the others share one.  sources: knobs that
    differ for one source.  Every other key is a knob of the method; one that is not named keeps its default.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, AxisValue]
    granularity: Granularity = "model"
    knots: int = Field(default=3, ge=2, le=64)
    groups: int = Field(default=4, ge=1, le=256)
    components: list[Component] = []
    sources: dict[str, dict[str, AxisValue]] = {}

    def axes(self, method: Method) -> dict[str, Axis]:
        """The knobs that the file names; the name of a choice becomes its number where the method knows it."""
        found = dict(self.__pydantic_extra__)
        for name, value in found.items():
            if value.choice is not None and name in method.knobs and value.choice in method.knobs[name].choices:
                number = method.knobs[name].choices[value.choice]
                found[name] = Axis(low=number, high=number)
        return found


class TaskConfig(Strict):
    """One lm-eval task.

    task: a YAML file or the name of one of lm-eval's own.  weight: its share in the score.  objective: the metric
    that the search climbs (default: `metric`); any per-item metric of the task, or a smooth one: of the gold answer
    its log-probability `gold_logprob`, its probability `gold_prob`, its `bits_per_byte`; of multiple choice the
    `margin` between the gold choice and the best other, and the `brier` score.  metric: what the verdict is about
    (default: the task's first).  gold: a Jinja template of the gold answer, if it is not `doc_to_target`.

    num_fewshot, apply_chat_template, fewshot_as_multiturn (with a chat template, examples as turns of their own),
    limit (the first so many documents): as in lm-eval.  allow_task_code: whether the task's file may run Python.
    """

    task: str
    weight: float = Field(default=1.0, gt=0)
    objective: str | None = None
    metric: str | None = None
    gold: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    limit: int | None = Field(default=None, ge=1)
    allow_task_code: bool = False

    @property
    def is_file(self) -> bool:
        return self.task.endswith((".yaml", ".yml"))


def share(value: object) -> object:
    """Refuse what is neither a count, a share nor a split's name; 1.0 and `true` are not taken for one item."""
    is_count = type(value) is int and value >= 1
    is_share = type(value) is float and 0 < value < 1
    if not is_count and not is_share and value not in ("train", "validation", "test"):
        raise ValueError("give a count of 1 or more, a share between 0 and 1, or one of train, validation, test")
    return value


Share = Annotated[int | float | Literal["train", "validation", "test"], BeforeValidator(share)]


class SplitsConfig(Strict):
    """How items are dealt, per task: a count, a share of the items, or the task's own split of that name."""

    search: Share = 0.4
    selection: Share = 0.2
    holdout: Share = 0.4

    @model_validator(mode="after")
    def fit(self) -> "SplitsConfig":
        dealt = (self.search, self.selection, self.holdout)
        shares = [s for s in dealt if isinstance(s, float)]
        if sum(shares) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(shares):g}, which is more than 1")
        named = [s for s in dealt if isinstance(s, str)]
        if len(set(named)) < len(named):
            raise ValueError(
                f"two splits use the task's split {max(named, key=named.count)!r}; they must not share items"
            )
        return self


class SamplerConfig(Strict):
    """Who proposes.  sigma0 (first step, as a share of the bounds) and population concern cma-es only."""

    name: Literal["cma-es", "tpe", "nsga-ii", "gp", "qmc", "random"] = "cma-es"
    sigma0: float = Field(default=0.2, gt=0, le=1)
    population: int | None = Field(default=None, ge=4)


def duration(value: object) -> object:
    """`8h`, `90m`, `45s` and `1h30m` as seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", value.strip())
    if not match or not value.strip():
        raise ValueError(f"{value!r} is not a duration; write 8h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()


class BudgetConfig(Strict):
    """When the search ends, whichever comes first.

    trials: finished ones, baselines included.  timeout: from the beginning to the result, over every resume.  target:
    the best score is as high as this.  patience: so many trials of the sampler have finished since the best one.
    """

    trials: int | None = Field(default=None, ge=1)
    timeout: Annotated[float, BeforeValidator(duration), Field(gt=0)] | None = None
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        """The number of trials that ends the search: a hundred if nothing else is sure to end it."""
        return self.trials or (100 if self.timeout is None and self.patience is None else None)


class PriceConfig(Strict):
    """What an hour of one device costs, and in what: EUR, USD."""

    per_device_hour: float = Field(ge=0)
    currency: str = Field(pattern=r"^[^\s]{1,8}$")


class WorkersConfig(Strict):
    """stuck: a worker that is silent for so long in the midst of a job counts as hung, and is replaced.  trial: the
    longest that a trial may take, then it has failed (default: any time)."""

    stuck: Annotated[float, BeforeValidator(duration), Field(gt=0)] = 300.0
    trial: Annotated[float, BeforeValidator(duration), Field(gt=0)] | None = None


class RacingConfig(Strict):
    """Candidates that fall behind the best so far are stopped before all items are scored.

    alpha: the chance, at most, that a candidate just as good on the search items is stopped, over the random order in
    which the items come.  informative: items that tell models apart come early.
    """

    enabled: bool = True
    alpha: float = Field(default=0.02, gt=0, lt=1)
    informative: bool = True


def racing(value: object) -> object:
    """`true` and `false` as well as a mapping."""
    if not isinstance(value, (bool, dict, RacingConfig)):
        raise ValueError("give true, false, or what to change: {alpha: 0.05, informative: false}")
    return {"enabled": value} if isinstance(value, bool) else value


RacingValue = Annotated[RacingConfig, BeforeValidator(racing)]


class SearchConfig(Strict):
    """A whole search.  Relative paths count from the folder of the file (here they are absolute already).

    allow_differences: as in a recipe.

    baselines: recipe files of one's own, on the same sources, that the winner must beat too.  start_from: one more, a
    recipe or a mergekit file, which also gives the base, the sources and the method where they are not said here.
    dtype: of the candidate's values.  compute_dtype: what forwards are computed in, see merge/compute.py.
    hub: what each hub id stood for when the search began, as `owner/name@commit`; evomerge writes it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    base: str
    sources: list[SourceConfig] = Field(min_length=1)
    allow_differences: list[Allowed] = []
    method: str
    space: SpaceConfig = Field(default_factory=lambda: SpaceConfig.model_validate({}))
    tasks: list[TaskConfig] = Field(min_length=1)
    splits: SplitsConfig = SplitsConfig()
    baselines: list[str] = []
    start_from: str | None = None
    sampler: SamplerConfig = SamplerConfig()
    budget: BudgetConfig = BudgetConfig()
    price: PriceConfig | None = None
    workers: WorkersConfig = WorkersConfig()
    racing: RacingValue = RacingConfig()
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: str = "auto"
    dtype: Dtype = "bfloat16"
    compute_dtype: Dtype | Literal["auto"] = "auto"
    batch_tokens: Annotated[int, Field(ge=64)] | Literal["auto"] = "auto"
    storage: str | None = None
    hub: dict[str, str] = {}

"""A whole search configuration and its sources; `space.py`, `tasks.py` and `running.py` have its sections."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from evomerge.config.running import (
    BudgetConfig,
    OnFinishConfig,
    PriceConfig,
    RacingConfig,
    RacingValue,
    SamplerConfig,
    Trackers,
    WorkersConfig,
)
from evomerge.config.space import SpaceConfig
from evomerge.config.strict import Strict
from evomerge.config.tasks import GuardConfig, SplitsConfig, TaskConfig
from evomerge.merge.recipe.recipe import Dtype, Recipe
from evomerge.sources.config_differences import Allowed

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
    log_to: Trackers = Field(default=[], exclude_if=lambda log_to: not log_to)
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

"""A recipe of a search's models: what all recipes of one search have in common comes from its configuration."""

from collections.abc import Mapping, Sequence

from evomerge.config.schema import SearchConfig, SourceConfig
from evomerge.merge.recipe.coefficients import Coefficient
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.merge.recipe.slices import Slice
from evomerge.sources.tensor_names import Component


def config_recipe(
    config: SearchConfig,
    sources: Sequence[RecipeSource],
    parameters: Mapping[str, Coefficient] | None = None,
    method: str | None = None,
    slices: Sequence[Slice] = (),
    keep: Sequence[Component] = (),
) -> Recipe:
    """A recipe of some of a search's sources.  method: None is the search's.  keep: components that are the base's."""
    return Recipe(
        method=method or config.method,
        dtype=config.dtype,
        seed=config.seed,
        base=Model(path=config.base),
        sources=list(sources),
        parameters=dict(parameters or {}),
        slices=list(slices),
        vocabulary=config.vocabulary,
        keep=list(keep),
        allow_differences=config.allow_differences,
    )


def config_source(source: SourceConfig, parameters: Mapping[str, Coefficient] | None = None) -> RecipeSource:
    """A source of a search as a recipe has it."""
    return RecipeSource(
        name=source.name,
        path=source.path,
        recipe=source.recipe,
        statistics=source.statistics,
        parameters=dict(parameters or {}),
    )


def source_key(source: SourceConfig | RecipeSource) -> str:
    """What says which model a source is: its path, or its recipe as JSON."""
    return source.path if source.recipe is None else without_fingerprints(source.recipe).model_dump_json()

"""The method of a search whose configuration lists several: the one whose default recipes score best.

The default recipes of a method are points of its own space, so they are what a search of this method could reach.  All
sources have the same weight: 1/N, 0.5, 0.8 and 1, as far as the bounds allow.  Where the weights are divided by their
sum this changes nothing, and `lambda` varies instead: 1, 1.5 and 2.  Every other coefficient is in the middle of its
bounds, `lambda` at 1.

The best default recipe of the chosen method is a point at which the search may start.  Those of the other methods stay
baselines outside the space, so that a method which was not searched can still win.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import optuna

from evomerge.config.config_file import write_config
from evomerge.config.schema import SearchConfig
from evomerge.search.monitor.monitor import Monitor
from evomerge.search.run import Run
from evomerge.search.space.baselines import Baseline
from evomerge.search.space.space import Point, Space, build_space
from evomerge.search.storage.method_choice import DefaultRecipe, MethodChoice, recorded_choice
from evomerge.search.storage.study import SearchStudy

if TYPE_CHECKING:
    from evomerge.sources.open_models import Models

WEIGHTS = (0.5, 0.8, 1.0)  # and 1/N
LAMBDAS = (1.0, 1.5, 2.0)


async def choose_method(
    config: SearchConfig,
    models: "Models",
    score: Callable[[list[Baseline]], Awaitable[list[DefaultRecipe]]],
) -> MethodChoice:
    """The method whose best default recipe has the highest value; of equal ones the first in the configuration.

    score: the results of default recipes on the search split, in their order.
    """
    tried = {method: default_recipes(space_of(config, method, models)) for method in config.candidate_methods}
    results = iter(await score([baseline for found in tried.values() for baseline in found]))
    return best_method({method: [next(results) for _ in found] for method, found in tried.items()})


def best_method(results: Mapping[str, Sequence[DefaultRecipe]]) -> MethodChoice:
    """The choice by the results of every method's default recipes."""
    best = {method: max(found, key=standing) for method, found in results.items()}
    return MethodChoice(max(best, key=lambda method: standing(best[method])), best)


def standing(result: DefaultRecipe) -> tuple[float, bool]:
    """The key by which results are compared; of two equal values a measured one is above an estimated one."""
    return -float("inf") if result.value is None else result.value, result.partial is None


def tried_baselines(config: SearchConfig, models: "Models", choice: MethodChoice | None) -> list[Baseline]:
    """The best default recipe of every method that was tried: a point of the space for the chosen one alone.

    config: with the chosen method.
    """
    if choice is None or choice.chosen != config.method:
        return []
    found = []
    listed = {method: best for method, best in choice.best.items() if method in config.candidate_methods}
    for method, best in listed.items():
        recipes = {b.name: b for b in default_recipes(space_of(config, method, models))}
        if best.value is None or best.name not in recipes:  # not there if the bounds were changed since
            continue
        own = recipes[best.name]
        found.append(own if method == choice.chosen else Baseline(own.name, own.kind, own.recipe, None))
    return found


def space_of(config: SearchConfig, method: str, models: "Models") -> Space:
    """The search space of a configuration with another method."""
    return build_space(config.model_copy(update={"method": method, "methods": None}), models)


def default_recipes(space: Space) -> list[Baseline]:
    """The default recipes of a space's method: different points of the space, at least one."""
    name = space.config.method
    divided = any(g.knob == "normalize" and g.low for g in space.groups)
    weights = (1.0 / len(space.config.sources), *WEIGHTS)
    knob, values = ("lambda", LAMBDAS) if divided else ("weight", weights)
    bounds = [(g.low, g.high) for g in space.groups if g.knob == knob and not g.fixed]
    allowed = [v for v in dict.fromkeys(values) if bounds and all(low <= v <= high for low, high in bounds)]
    points = {f"{name} {knob} {v:.3g}": default_point(space, {knob: v}) for v in allowed}
    points = points or {f"{name} middle": default_point(space, {})}
    return [Baseline(n, "recommended", space.recipe(point), point) for n, point in points.items()]


def default_point(space: Space, wanted: dict[str, float]) -> Point:
    """The point with these values of knobs; other knobs are in the middle of their bounds, `lambda` at 1 if it can."""
    point: Point = dict(space.given_order)
    for group in space.groups:
        middle = (group.low + group.high) / 2
        if group.knob == "lambda" and group.low <= 1.0 <= group.high:
            middle = 1.0
        if not group.fixed:
            point |= dict.fromkeys(group.axes, wanted.get(group.knob, middle))
    return point


def settle_method(run: Run, config: SearchConfig, stored: optuna.Study, monitor: Monitor) -> SearchConfig:
    """The configuration with the method that the study has chosen; config.yaml and the monitor get the method too.

    Nothing changes if the study has not chosen (yet).
    """
    choice = recorded_choice(stored.user_attrs)
    if choice is None or choice.chosen not in (config.methods or ()):
        return config
    monitor.name_method(choice.chosen)
    if (written := run.config()).method != choice.chosen:
        write_config(run.config_file, written.model_copy(update={"method": choice.chosen}))
    return config.model_copy(update={"method": choice.chosen})


def must_choose_method(config: SearchConfig, study: SearchStudy) -> bool:
    """Whether the method still has to be chosen; a study that has trials goes on with the method that they have."""
    choice = recorded_choice(study.stored.user_attrs)
    chosen = choice is not None and choice.chosen == config.method
    return bool(config.methods) and not chosen and not study.trials

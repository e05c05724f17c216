"""Which recipe of a run is exported: the one that its verdict recommends, or that of one trial."""

from typing import Any

from optuna.trial import TrialState

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.search.models import open_config_models
from evomerge.search.run import Run
from evomerge.search.space.space import build_space


def recommended_recipe(run: Run) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that the verdict recommends, and the verdict.  Raises EvomergeError if there is no verdict yet."""
    if (verdict := run.verdict()) is None:
        raise EvomergeError(
            f"{run.folder}: has no verdict yet; go on with `evomerge resume {run.folder}`, or export one trial "
            "with --trial"
        )
    return load_recipe(run.recommended_file), verdict


def recipe_of_trial(run: Run, number: int) -> Recipe:
    """The recipe of one finished trial.  Raises EvomergeError if no finished trial has that number."""
    config = run.config()
    complete = {t.number: t for t in run.study().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if number not in complete:
        raise EvomergeError(f"{run.folder}: has no finished trial {number}; there are {len(complete)} finished ones")
    return build_space(config, open_config_models(config)).recipe(complete[number].params)

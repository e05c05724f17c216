"""The recipes that a playground may begin with: base, parents, uniform, recommended ones, and what the run found."""

from contextlib import suppress
from dataclasses import dataclass

from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.search.run import Run
from evomerge.search.space.baselines import base_alone, baselines
from evomerge.search.space.space import Space
from evomerge.search.storage.study import in_full, rank

FOUND = ("winner of the run", "candidate of the run", "best so far")
"""The names of what a run found, of which it has one at most."""


@dataclass(frozen=True)
class Presets:
    """Recipes by name.

    recipes: in the order in which they are shown.
    parent: the name of the best source, as far as its scores are known.
    found: the name of what the run found; without a run `uniform`, of one source that source.
    about: one sentence about what the run found, else empty.
    """

    recipes: dict[str, Recipe]
    parent: str
    found: str
    about: str


def presets_of(space: Space, run: Run | None) -> Presets:
    """The presets of a run, or of a configuration that has no run yet.

    EvomergeError if a file of the run cannot be read.
    """
    known = [base_alone(space), *baselines(space)]
    recipes = {b.name: b.recipe for b in known}
    parents = [b.name for b in known if b.kind == "parent"]
    uniform = next((b.name for b in known if b.kind == "uniform"), parents[0])
    if run is None:
        return Presets(recipes, parents[0], uniform, "")
    verdict = run.verdict()
    about, found, scores = "", uniform, {}
    with suppress(EvomergeError):  # the recipes that the run wrote can be used although its database is not there
        trials = [t for t in run.study().get_trials(deepcopy=False) if in_full(t)]
        scores = {t.user_attrs.get("baseline"): t.value or 0.0 for t in trials}
        if verdict is None and trials:
            best = max(trials, key=rank)
            found, about = FOUND[2], f"This search has no verdict yet; its best trial so far is {best.number}."
            recipes = {found: space.recipe(best.params), **recipes}
    if verdict is not None:
        found, about = FOUND[0 if verdict["winner"] else 1], str(verdict["sentence"])
        recommended = str(verdict["recommended"])
        if recommended not in recipes and not verdict["winner"]:
            recipes = {recommended: load_recipe(run.recommended_file), **recipes}
        recipes = {found: load_recipe(run.winner_file), **recipes}
    return Presets(recipes, max(parents, key=lambda name: scores.get(name, float("-inf"))), found, about)

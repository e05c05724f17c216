"""Where a search begins: `start_from`, a recipe, a mergekit file or the folder of an earlier run.

Of an earlier run its chosen candidate is taken, and its best trials.  Its space and its sources may be others: the
search begins at the nearest points of its own space (nearest.py).

The recipes are read once and kept in the study, so a resumed search begins with the same ones, whatever has become of
the file or the run since.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Split
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, load_recipe
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.models import open_config_models
from evomerge.search.run import Run, open_run
from evomerge.search.space.baselines import Baseline, Kind, given_recipe, renamed
from evomerge.search.space.config_recipe import source_key
from evomerge.search.space.nearest import nearest_point
from evomerge.search.space.space import Space, build_space
from evomerge.search.storage.item_scores import evaluation_records, item_ids
from evomerge.search.storage.study import in_full, rank
from evomerge.search.storage.trial_record import record_of
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.locate import locate

START = "evomerge:start"  # study attribute: `start_from` and its recipes
BEST = 3  # trials of an earlier run


@dataclass(frozen=True)
class Start:
    """A recipe of `start_from`.

    name: its name in tables.
    rival: whether the winner must beat it: a file's recipe, or the chosen candidate of an earlier run.
    recipe: with the names of the search's sources.
    """

    name: str
    rival: bool
    recipe: Recipe


def start_baselines(study: optuna.Study, space: Space, log: Callable[[str], None]) -> list[Baseline]:
    """The baselines of `start_from`; none without that key.

    study: in which the recipes are kept.  log: takes lines for the run's log, when the recipes are first read.

    Raises EvomergeError as `read_start` does.
    """
    if space.config.start_from is None:
        return []
    stored = study.user_attrs.get(START, {})
    if stored.get("from") != space.config.start_from:
        starts, notes = read_start(space.config)
        found, more = points_of(space, starts)
        for note in (*notes, *more):
            log(f"start_from: {note}")
        content = [{"name": s.name, "rival": s.rival, "recipe": s.recipe.model_dump(mode="json")} for s in starts]
        study.set_user_attr(START, {"from": space.config.start_from, "recipes": content})
        return found
    starts = [Start(s["name"], s["rival"], Recipe.model_validate(s["recipe"])) for s in stored["recipes"]]
    return points_of(space, starts)[0]


def points_of(space: Space, starts: Sequence[Start]) -> tuple[list[Baseline], list[str]]:
    """The baselines of recipes, and notes.

    A recipe that the space can express is its point.  Of another one that is to be beaten, the recipe itself is a
    baseline outside the space; its nearest point is one more, at which the search may begin.
    """
    found, notes = [], []
    for start in starts:
        near = nearest_point(space, start.recipe)
        if near is None or not near.exact:
            if start.rival:
                found.append(Baseline(start.name, "given", start.recipe, None))
            if near is None:
                notes.append(f"{start.name}: this space has no point like it (another method, or another switch)")
                continue
            notes.append(
                f"{start.name}: the nearest point of this space, largest difference {near.difference:.2g} "
                f"({near.where})"
            )
        name = start.name if near.exact else f"{start.name}, nearest point"
        kind: Kind = "given" if near.exact and start.rival else "start"
        found.append(Baseline(name, kind, space.recipe(near.point), near.point))
    return found, notes


def read_start(config: SearchConfig) -> tuple[list[Start], list[str]]:
    """The recipes of a configuration's `start_from`, the most promising first, and notes.

    Raises EvomergeError if it is neither a file nor a run folder, if the run has no trial that was evaluated in full,
    another base model or none of the search's sources, or if the file's recipe does not fit the search.
    """
    assert config.start_from is not None
    path = Path(config.start_from)
    if not path.is_dir():
        if not path.is_file():
            raise EvomergeError(f"start_from: no such file or run folder: {path}")
        return [Start(path.stem, True, given_recipe(config, path))], []
    try:
        run = open_run(path)
    except EvomergeError:
        raise EvomergeError(f"start_from: {path} is no run folder (it has no config.yaml)") from None
    refuse_other_base(config, run)
    recipes, notes = recipes_of_run(run)
    gone: dict[str, None] = {}
    starts = []
    for name, rival, recipe in recipes:
        if recipe.slices and config.space.layers is None:
            raise EvomergeError(f"start_from: {path} was a search for layers (`space.layers`), and this is none")
        sources, lost = sources_here(recipe, config)
        gone |= dict.fromkeys(lost)
        if not sources:
            here = ", ".join(s.name for s in config.sources)
            raise EvomergeError(f"start_from: {path} has none of this search's sources ({here})")
        method = METHODS[recipe.method]
        if lost and ("weight" not in method.knobs or len(sources) < method.sources[0]):
            raise EvomergeError(
                f"start_from: {path} merges {', '.join(lost)} with {method.name}, which cannot leave a source out, and "
                "this search does not have it"
            )
        new = {"base": Model(path=config.base), "sources": sources, "outputs": {}}
        starts.append(Start(f"{path.name} {name}", rival, renamed(recipe.model_copy(update=new), config)))
    return starts, notes + [f"{name} is a source of {path} and not of this search; left out" for name in gone]


def sources_here(recipe: Recipe, config: SearchConfig) -> tuple[list[RecipeSource], list[str]]:
    """The sources of a recipe that a search has too, with the search's paths, and the names of the others.

    A source is the search's with its path or recipe, else the one with its name.
    """
    by_key, by_name = {source_key(s): s for s in config.sources}, {s.name: s for s in config.sources}
    taken = {source_key(s) for s in recipe.sources} & by_key.keys()
    found, gone = [], []
    for source in recipe.sources:
        same = by_key.get(source_key(source)) or by_name.get(source.name)
        if same is None or (source_key(source) != source_key(same) and source_key(same) in taken):
            gone.append(source.name)
        else:
            found.append(source.model_copy(update={"name": same.name, "path": same.path, "recipe": same.recipe}))
    return found, gone


def recipes_of_run(run: Run) -> tuple[list[tuple[str, bool, Recipe]], list[str]]:
    """The recipes of a run that a search may begin at: name, whether it is the chosen candidate, recipe; and notes.

    They are the chosen candidate, if there is a verdict, and the best trials that were evaluated in full: those of the
    sampler, and the best of all even if it is a baseline.
    """
    found: list[tuple[str, bool, Recipe]] = []
    if run.verdict() is not None and run.winner_file.is_file():
        found.append(("winner", True, load_recipe(run.winner_file)))
    ranked = sorted(filter(in_full, run.study().get_trials(deepcopy=False)), key=rank, reverse=True)
    sampled = [t for t in ranked if "baseline" not in t.user_attrs][:BEST]
    wanted = [t for t in ranked if t in ranked[:1] or t in sampled]
    if not wanted and not found:
        raise EvomergeError(
            f"start_from: {run.folder}: no trial of this run was evaluated in full yet; go on with `evomerge resume "
            f"{run.folder}`"
        )
    config = run.config()
    try:
        space = build_space(config, open_config_models(config))
    except EvomergeError as error:
        if not found:
            raise
        return found, [f"only the winner of {run.folder}, whose models cannot be opened: {error}"]
    return found + [(f"trial {t.number}", False, space.recipe(t.params)) for t in wanted], []


def refuse_other_base(config: SearchConfig, run: Run) -> None:
    """EvomergeError if a run has another base model than the search: neither the same path nor the same files."""
    earlier = run.config()
    if earlier.base == config.base:
        return
    recorded = run.manifest().get("inputs", {}).get("base")
    if recorded != model_fingerprint(locate(config.base)):
        raise EvomergeError(
            f"start_from: {run.folder} has another base model, {earlier.base}; here it is {config.base}"
        )


def refuse_seen_items(config: SearchConfig, task_set: TaskSet) -> None:
    """EvomergeError if the run of `start_from` was scored on items by which this search will judge.

    Its trials must not have seen items of this search's selection or holdout split, nor its finalists those of the
    holdout split, else what it found would be judged by the items that it was found with.
    """
    if config.start_from is None or not Path(config.start_from).is_dir():
        return
    study = open_run(Path(config.start_from)).study()
    attributes = study.user_attrs
    trials = [record_of(t) for t in study.get_trials(deepcopy=False) if in_full(t)]
    finalists = list(evaluation_records(attributes, ["selection"]).values())
    of_trials: list[Split] = ["selection", "holdout"]
    for records, splits in ((trials, of_trials), (finalists, of_trials[1:])):
        named = {r.items: r for r in records if r.items is not None}.values()  # few lists, which many records share
        seen = {i for record in named for ids in item_ids(attributes, record).values() for i in ids}
        for split in splits:
            refuse_items(config.start_from, seen, task_set, split)


def refuse_items(folder: str, seen: set[str], task_set: TaskSet, split: Split) -> None:
    """EvomergeError if items of a split are among the ids `seen`."""
    for task, items in task_set.split(split).items():
        if count := sum(i.id in seen for i in items):
            raise EvomergeError(
                f"start_from: {folder} was searched with {count} items of {task} that belong to this search's {split} "
                "split, so its verdict would not be honest; give the same `splits` and `seed` as there"
            )

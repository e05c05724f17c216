"""landscape.json: scores on the straight lines in weight space from the candidate to each parent and to the base.

    w(t) = (1 - t) candidate + t other        for t in SHARES; rounded once to the model's type

Each point is a model that is scored by the metric on a few items of the search split, so it costs about as much as a
trial.  A point is written when it is known; what was broken off goes on where it stopped.
"""

from pydantic import BaseModel, ConfigDict

from evomerge.errors import EvomergeError
from evomerge.files.read import read_model
from evomerge.files.write import write_text
from evomerge.search.run import Run

SHARES = (0.25, 0.5, 0.75, 1.0)
ITEMS = 64  # of each task's search split, at most


class Landscape(BaseModel):
    """The content of landscape.json.

    recipe: digest of the candidate's.
    items: how many items of the search split each point was scored on.
    lines: the other model -> its share, from 0 (the candidate) to 1 -> the mean metric over the tasks by their weights.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    recipe: str
    items: int
    lines: dict[str, dict[float, float]]


def read_landscape(run: Run) -> Landscape | None:
    """What was measured; None if nothing was.  EvomergeError if the file is damaged."""
    return read_model(run.landscape_file, Landscape) if run.landscape_file.exists() else None


def measure_landscape(run: Run) -> Landscape:
    """Score the points that are not known yet, and write landscape.json after each.

    EvomergeError if the run has no verdict, if its candidate has other layers than the parents, or if the models or
    tasks cannot be opened.
    """
    # Only this command needs what follows, and a report does not wait for it.
    import torch

    from evomerge.evaluate.clock import Clock
    from evomerge.evaluate.loglikelihood import NotFiniteScore
    from evomerge.merge.recipe.recipe import Recipe, load_recipe
    from evomerge.search.agreements import refuse_task_code
    from evomerge.search.evaluation.evaluator import Evaluator
    from evomerge.search.evaluation.scale import with_first_objectives
    from evomerge.search.evaluation.score_checks import finite_scores
    from evomerge.search.evaluation.stored_evaluations import digest
    from evomerge.search.evaluation.task_set import open_task_set
    from evomerge.search.models import open_config_models
    from evomerge.search.space.baselines import base_alone, baselines
    from evomerge.search.space.space import build_space
    from evomerge.search.storage.study import recorded_type
    from evomerge.search.verdict.intervals import mean_score

    if run.verdict() is None:
        raise EvomergeError(f"{run.folder}: has no verdict yet; go on with `evomerge resume {run.folder}`")
    stored, candidate = run.study(), load_recipe(run.winner_file)
    config = with_first_objectives(stored, run.config())
    refuse_task_code(run, config)
    if config.space.layers is not None or candidate.slices:
        raise EvomergeError("landscape: the candidate has layers of its own, so no straight line leads to a parent")
    config = config.model_copy(update={"compute_dtype": recorded_type(stored.user_attrs) or config.dtype})
    models, task_set = open_config_models(config), open_task_set(config)
    space = build_space(config, models)
    others = [base_alone(space), *(b for b in baselines(space) if b.kind == "parent")]
    evaluator = Evaluator(config, models, task_set, log=run.log, cache=run.folder / "cache")
    chosen = {t.name: task_set.items[t.name]["search"][:ITEMS] for t in task_set.goals}
    works = [evaluator.engine.workload(task, chosen[task.name], True) for task in task_set.goals]
    work, clock = evaluator.engine.join(works), Clock(evaluator.check)
    live = evaluator.live.fitted[1]

    def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
        """The weights of a recipe's model, on the CPU."""
        evaluator.materialise(recipe, clock)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}

    def metric() -> float | None:
        """The mean metric of the live model; None if it is broken."""
        try:
            found = zip(work.by_task, evaluator.engine.score_parts(work, clock), strict=True)
            scores = {part.task.name: finite_scores(part.task, part.task.metric, each) for part, each in found}
        except NotFiniteScore:
            return None
        return mean_score(scores, task_set.weights)

    known = read_landscape(run) if run.landscape_file.exists() else None
    result = Landscape(recipe=digest(candidate), items=sum(map(len, chosen.values())), lines={})
    if known is not None and (known.recipe, known.items) == (result.recipe, result.items):
        result = known
    begin = weights_of(candidate)
    centre = next((line[0.0] for line in result.lines.values() if 0.0 in line), None) or metric()
    for other in others:
        line = result.lines.setdefault(other.name, {})
        if centre is not None:
            line[0.0] = centre
        if missing := [share for share in SHARES if share not in line]:
            run.log(f"landscape: {len(missing)} points on the line to {other.name}")
            end = weights_of(other.recipe)
            for share in missing:
                with torch.no_grad():
                    for name, tensor in live.items():
                        tensor.copy_(torch.lerp(begin[name].float(), end[name].float(), share))
                if (score := metric()) is not None:
                    line[share] = score
                write_text(run.landscape_file, result.model_dump_json() + "\n")
    write_text(run.landscape_file, result.model_dump_json() + "\n")
    return result

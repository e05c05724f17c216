"""While a search runs: does the objective, which trials are scored by, still rank models as the metric does?"""

from evomerge.search.evaluation.agreement import agreements, model_name, scored_models
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.storage.study import SearchStudy, in_full, rank

EVERY = 20  # finished trials after which the incumbent is scored by the metrics that trials are not scored by


class AgreementCheck:
    """Scores the incumbent by the metric from time to time, and says where objective and metric disagree."""

    def __init__(self, study: SearchStudy, evaluations: Evaluations) -> None:
        self.study = study
        self.evaluations = evaluations
        self.checked = 0  # how many times EVERY trials had finished when the incumbent was last scored

    async def score_incumbent(self) -> bool:
        """Score the incumbent by every metric on the search items if EVERY more trials have finished; whether it was.

        Where trials are scored by the objective alone, this finds the finalist that is best by the metric too.  The
        count of trials decides, never the time.
        """
        task_set, due = self.evaluations.task_set, len(self.study.finished) // EVERY
        if due <= self.checked:
            return False
        self.checked = due
        best = max(filter(in_full, self.study.finished[: due * EVERY]), key=rank, default=None)
        if best is None or all(t.metric in task_set.wanted(t, "search") for t in task_set.tasks):
            return False
        try:
            recipe = self.study.space.recipe(best.params)
            await self.evaluations.score("search", recipe, model_name(best), everything=True)
        except (ArithmeticError, RuntimeError) as error:
            self.evaluations.pool.log(f"trial {best.number} cannot be scored by every metric: {error}")
            return False
        return True

    def log(self) -> None:
        """Write down how alike objective and metric rank models; say where they disagree."""
        attributes, monitor = self.study.stored.user_attrs, self.evaluations.monitor
        for found in agreements(scored_models(self.study.trials, attributes), attributes):
            (monitor.say if found.disagrees else monitor.run.log)(found.sentence)

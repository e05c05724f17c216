"""Scores the candidate in the live model as trials are scored: on the search split, at once or in a race."""

import numpy as np

from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine, Trunks
from evomerge.evaluate.racing import Race
from evomerge.evaluate.workload import Workload
from evomerge.search.evaluation.race_setup import RaceChunk, RaceSetup, build_race_chunks
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.evaluation.split_workloads import SplitWorkloads
from evomerge.search.evaluation.task_set import Scores


class TrialScorer:
    """Scores by what trials are scored by (`TaskSet.wanted`).

    engine: of the live model.
    workloads: its items.
    """

    def __init__(self, engine: Engine, workloads: SplitWorkloads) -> None:
        self.engine = engine
        self.workloads = workloads
        self.task_set = workloads.task_set
        self.race_chunks: dict[str, list[RaceChunk]] = {}  # of the latest race setup, under its name

    def score(self, work: Workload, clock: Clock, trunks: Trunks | None = None) -> Scores:
        """The item scores of a workload of the search split.  NotFiniteScore if one is not finite.

        trunks: see `Engine.score_parts`.
        """
        found = zip(work.by_task, self.engine.score_parts(work, clock, trunks), strict=True)
        with clock.time("score"):
            tasks = [(part.task, metrics) for part, metrics in found]
            return {
                t.name: {m: finite_scores(t, m, metrics) for m in self.task_set.wanted(t, "search")}
                for t, metrics in tasks
            }

    def score_in_race(self, race_setup: RaceSetup, race: Race, clock: Clock) -> Scores:
        """Score chunk by chunk until the race stops the candidate; items that were not scored are NaN.

        The race is run on the values of the goals' items (`scale.py`).  The items of tasks that are only guards are
        scored when the candidate has not been stopped.
        """
        items = self.task_set.split("search")
        every = {
            t.name: {m: np.full(len(items[t.name]), np.nan) for m in self.task_set.wanted(t, "search")}
            for t in self.task_set.tasks
        }
        trunks: Trunks = {}
        for race_chunk in self.chunks(race_setup):
            found = self.score(race_chunk.work, clock, trunks)
            with clock.time("race"):
                for (task, metrics), where in zip(found.items(), race_chunk.where, strict=True):
                    for metric, scores in metrics.items():
                        every[task][metric][where - race_setup.starts[task]] = scores
                if race.observe(race_setup.values(every)[race_chunk.items]):
                    break
        if not race.stopped and (guards := self.workloads.guards()) is not None:
            for task, metrics in self.score(guards, clock).items():
                every[task] = {metric: np.array(scores) for metric, scores in metrics.items()}
        return {task: {m: scores.tolist() for m, scores in metrics.items()} for task, metrics in every.items()}

    def chunks(self, race_setup: RaceSetup) -> list[RaceChunk]:
        """The chunks of a race setup; those of another one are forgotten."""
        if race_setup.name not in self.race_chunks:
            chunks = build_race_chunks(race_setup, self.engine, self.workloads.goals())
            self.race_chunks = {race_setup.name: chunks}
        return self.race_chunks[race_setup.name]

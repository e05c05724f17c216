"""The learned start: from the best baseline along the gradient, by mini-batches, to a trial of the sampler's study.

    climb      gradient steps by one set of task weights (climbs.py); there is one, or with `goals: pareto` several
    start      of the first climb the best baseline that is a point of the space; of the others what the climb with the
               nearest weights reached
    step       a mini-batch for each worker; their mean gradient moves the point (steps.py); a guard takes part in the
               gradient by its multiplier (multipliers.py)
    look       now and then the mean point of the last AVERAGED share of the steps so far is scored as a trial
    end        of a climb after its steps, or at a look whose trial is not better than the one before

A step is in the study before the next one begins, so a resumed search computes none twice and goes on with the same
bits as long as it has as many workers.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from evomerge.evaluate.gradient import has_derivative
from evomerge.merge.gradient import learnable
from evomerge.merge.methods import METHODS
from evomerge.search.evaluation.guards import Guard
from evomerge.search.evaluation.jobs import Failure, GradientJob, Outcome
from evomerge.search.evaluation.scale import Scale
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.learned.climbs import Climb, Weights, climbs, distance
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.learned.multipliers import Multiplier, State, multiplier
from evomerge.search.learned.steps import Climber, average
from evomerge.search.monitor.monitor import GRADIENT_STEPS, Monitor
from evomerge.search.space.baselines import Baseline, base_alone, reference
from evomerge.search.space.space import Point, Space
from evomerge.search.storage.step_record import StepRecord, step_key, step_records
from evomerge.search.storage.study import LearnedPoint, SearchStudy, in_full, rank
from evomerge.search.storage.trial_record import record_of
from evomerge.search.trial import TrialRunner
from evomerge.search.verdict.intervals import mean_score
from evomerge.search.workers.pool import Pool, run_all

RATE = 0.05  # the root mean square of a step, in units of the coefficients
STEPS = 100
ITEMS = 16  # of all tasks together, in one mini-batch
AVERAGED = 0.3  # share of the steps so far whose mean point is tried


class Learner:
    """Takes the steps of a search's learned start.

    study, evaluations, pool, monitor: the search's.
    trials: runs the trials of the looks.
    baselines: all of the search.
    """

    def __init__(
        self,
        study: SearchStudy,
        evaluations: Evaluations,
        pool: Pool,
        monitor: Monitor,
        trials: TrialRunner,
        baselines: Sequence[Baseline],
    ) -> None:
        self.study = study
        self.space = study.space
        self.task_set = evaluations.task_set
        self.pool = pool
        self.monitor = monitor
        self.trials = trials
        self.baselines = baselines
        self.scale = evaluations.scale
        self.ids = {t: [i.id for i in items] for t, items in self.task_set.split("search").items()}
        self.steps = self.space.config.sampler.steps or STEPS
        self.objectives = {task.name: task.objective for task in self.task_set.tasks}
        self.evaluations = evaluations
        self.guards: dict[str, Multiplier] = {}
        self.left: set[str] = set()  # axes that stay where they are
        self.climbs = climbs(self.task_set.weights, self.steps, self.space.config.goals == "pareto")

    async def multiplier(self, guard: Guard) -> Multiplier:
        """The multiplier of a guard, by what base and parents score."""
        evaluations = self.evaluations
        models = [base_alone(self.space), *(b for b in self.baselines if b.kind == "parent")]
        every = [evaluations.known("search", model.recipe) for model in models]
        wanted = [(task, {self.objectives[task], metric}) for task, metric in guard.metrics.items()]
        others = [known for known in every if all(names <= known.get(task, {}).keys() for task, names in wanted)]
        own = reference(self.space, self.baselines, guard.of).recipe
        await evaluations.score("search", own, guard.of, everything=True)  # not stored if the method was chosen since
        return multiplier(guard, self.objectives, evaluations.known("search", own), others)

    async def learn(self, ended: Callable[[], str | None]) -> None:
        """Climb by each set of task weights, until a limit of the search is reached.

        ended: why the search must end, None if it need not.
        """
        start = self.start()
        if start is None:
            self.pool.log("no learned start: no baseline is a point of the search space")
            return
        self.guards = {guard.name: await self.multiplier(guard) for guard in self.task_set.guards}
        self.left = self.left_alone()
        if self.left == self.space.axes.keys() - self.space.given_order.keys():
            self.pool.log("no learned start: no source is better than the base in any task")
            return
        reached: list[tuple[Weights, Point]] = []
        for climb in self.climbs:
            near = min(reached, key=lambda found: distance(found[0], climb.weights), default=(climb.weights, start))
            point = await self.climb(climb, near[1], ended)
            if point is not None:
                reached.append((climb.weights, point))
            elif not reached:
                return

    def left_alone(self) -> set[str]:
        """The coefficients of sources that are better than the base in no task, by the objective on the search split.

        There is little to gain in them, and a source that has forgotten everything wrecks the model at a weight of a
        few hundredths, where no gradient leads out again.  Those that can only be subtracted are climbed all the same.
        """
        scores = {b.name: self.mean_objectives(b) for b in self.baselines if b.kind == "parent"}
        base = self.mean_objectives(base_alone(self.space))
        useless = {n for n, own in scores.items() if own and all(own[t] <= base.get(t, -math.inf) for t in own)}
        for name in sorted(useless):
            self.pool.log(f"{name} is better than the base in no task; the learned start leaves its coefficients")
        groups = [g for g in self.space.groups if g.source in useless and not g.fixed and g.high > 0.0]
        return {axis for group in groups for axis in group.axes}

    def mean_objectives(self, baseline: Baseline) -> dict[str, float]:
        """Task -> a baseline's mean objective on the search split; without tasks whose scores are not stored."""
        known = self.evaluations.known("search", baseline.recipe)
        found = {
            task: scores[name] for task, name in self.objectives.items() if name in (scores := known.get(task, {}))
        }
        return {task: sum(items.values()) / len(items) for task, items in found.items()}

    async def climb(self, climb: Climb, start: Point, ended: Callable[[], str | None]) -> Point | None:
        """Take the steps of a climb; return the point of its last good look, None if there was none.

        start: where it begins, if it has not begun in an earlier session.
        """
        climber = Climber(self.space.axes, RATE, climb.steps)
        points: list[Point] = []
        states = {name: State() for name in self.guards}
        known = step_records(self.study.stored.user_attrs, climb.number)
        point = known[0].point if known else start
        best: tuple[float, Point] | None = None
        weights = f", weights {climb.text}" if climb.text else ""
        self.monitor.phase(f"learning the coefficients{weights}", climb.steps, GRADIENT_STEPS, len(known))
        while len(points) < climb.steps and ended() is None:
            number = len(points)
            step = known[number] if number < len(known) else await self.step(climb, number, point, states)
            if step is None:
                break
            if number >= len(known):
                self.monitor.part()
            points.append(step.point)
            point = climber.step(step.point, step.gradient)
            for name, drop in step.drops.items():
                if name in states:  # a guard may have been taken out of the configuration
                    states[name] = self.guards[name].after(states[name], drop)
            if len(points) in climb.looks:
                mean = average(points[-max(1, round(AVERAGED * len(points))) :])
                value = await self.look(LearnedPoint(len(points), mean, climb.own_weights), ended)
                if value is None or (best is not None and value <= best[0]):
                    before = best and best[0]
                    self.pool.log(f"the learned coefficients end after {len(points)} steps: {value} after {before}")
                    break
                best = value, mean
        return best and best[1]

    def start(self) -> Point | None:
        """The point of the best baseline in the space, None if no baseline in it has a value."""
        tried = [self.study.of_baseline(name) for name in self.study.baselines]
        valued = [trial for trial in tried if trial is not None and in_full(trial)]
        return dict(max(valued, key=rank).params) if valued else None

    async def step(self, climb: Climb, number: int, point: Point, states: Mapping[str, State]) -> StepRecord | None:
        """Compute the gradient at a point and store it; None, with a line in the log, if that fails.

        number: of the step in its climb, from 0.
        states: of the guards' multipliers, by name.
        """
        recipe = self.space.recipe(point)
        count = self.pool.size
        first = (climb.number * self.steps + number) * count  # other climbs take other items
        batches = [minibatch(self.ids, self.space.config.seed, first + k, ITEMS) for k in range(count)]
        jobs = [GradientJob(recipe, batch, self.weights(batch, climb.weights, states)) for batch in batches]
        results = await run_all(*(self.pool.run(job, f"gradient step {number}") for job in jobs))
        done = [result for result in results if isinstance(result, Outcome)]
        if len(done) < len(results):
            failures = [f"{r.reason}\n{r.traceback}".strip() for r in results if isinstance(r, Failure)]
            self.pool.log(f"the learned coefficients end, gradient step {number} failed: {failures[0]}")
            return None
        gradients = [self.space.gradient(result.gradient) | dict.fromkeys(self.left, 0.0) for result in done]
        used = sum((result.used for result in done[1:]), done[0].used)
        record = StepRecord(
            point,
            average(gradients),
            sum(self.value(result, climb.weights) for result in done) / count,
            sum(len(items) for batch in batches for items in batch.values()),
            used,
            self.monitor.stopwatch.elapsed,
            {name: self.drop(guard, done, batches) for name, guard in self.guards.items()},
        )
        if not climb.number and not number:
            known = [record_of(trial).used for trial in self.study.trials]
            before = max((each.peak_bytes for each in known if each is not None), default=0)
            self.pool.log(
                f"a gradient step of {record.items} items takes {used.worker_seconds / count:.2f} s of a worker; "
                f"its peak memory is {used.peak_bytes / 1e9:.2f} GB, that of trials {before / 1e9:.2f} GB"
            )
        self.study.stored.set_user_attr(step_key(number, climb.number), record.to_json())
        self.monitor.add_used(used)
        self.monitor.trackers.gradient_step(climb.number * self.steps + number, record.value)
        return record

    def weights(
        self, batch: Mapping[str, list[str]], weights: Weights, states: Mapping[str, State]
    ) -> dict[str, float]:
        """What a unit of the raw objective of one item is worth, by task: the loss is minus the scaled mean of the
        goals, plus what the guards' multipliers make of their drops.

        weights: of the climb.
        """
        found = {
            task: weights[task] / len(items) / self.scale.tasks[task].objective.unit if task in weights else 0.0
            for task, items in batch.items()
        }
        for name, guard in self.guards.items():
            for task, items in batch.items():
                found[task] += guard.weight(states[name], task, len(items))
        return found

    def drop(self, guard: Multiplier, done: Sequence[Outcome], batches: Sequence[Mapping[str, list[str]]]) -> float:
        """By how much a guard's objective is worse than the reference's, in the mean of all mini-batches of a step."""
        drops = []
        for result, batch in zip(done, batches, strict=True):
            scores = {task: result.scores[task][self.objectives[task]] for task in guard.guard.metrics}
            drops.append(guard.drop(scores, batch))
        return sum(drops) / len(drops)

    def value(self, result: Outcome, weights: Weights) -> float:
        """The mean scaled objective of the goals in a mini-batch.  weights: of the climb."""
        return mean_score(
            {
                task.name: self.scale.scaled(task.name, "objective", result.scores[task.name][task.objective]).tolist()
                for task in self.task_set.goals
            },
            weights,
        )

    async def look(self, learned: LearnedPoint, ended: Callable[[], str | None]) -> float | None:
        """The value of the trial at a point; None if it has none."""
        steps, weights = learned.steps, learned.weights
        while (trial := self.study.of_learned(steps, weights)) is None and ended() is None:
            await self.trials.run(self.baselines, None, learned)
        return None if trial is None or not in_full(trial) else trial.value


def why_not(space: Space, task_set: TaskSet, scale: Scale) -> str | None:
    """Why the coefficients of a search cannot be learned, None if they can."""
    method = METHODS[space.config.method]
    searched = {group.knob for group in space.groups if not group.fixed}
    if not searched & learnable(method, len(space.config.sources)):
        return f"no searched coefficient of {method.name} has a derivative"
    for task in task_set.tasks:
        if not has_derivative(task):
            return f"task {task.name}: its objective {task.objective} has no derivative"
        if task.name in scale.tasks and scale.tasks[task.name].share == 1.0:
            return f"task {task.name}: models do not write its gold answer; give `gold`, the answer as they write it"
    return None

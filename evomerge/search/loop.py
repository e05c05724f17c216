"""The search: its phases in the order in which they happen.

    0  choice of the method                    only if the configuration lists several (space/choose_method.py)
    1  base, parents, baselines outside the    scored on all items of the search split; base and parents give the scale
       search space                            of all values (evaluation/settled_scale.py)
    2  baselines that are points of the space  the first trials
    3  race setup and greedy soup              what needs the baselines' scores
    4  learned start                           gradient steps, with the samplers `auto` and `learned`
    5  search                                  trials of the sampler, until the budget ends
    6  finals                                  finalists and baselines on the selection and the holdout split

Phase 0 is in session.py, which opens what a search needs.  One trial is in trial.py, the finals in verdict/finals.py.
A trial may fail, the search may not.
"""

from collections.abc import Awaitable, Callable

from evomerge.errors import EvomergeError
from evomerge.search.budget.running import RunningBudget
from evomerge.search.evaluation.agreement_check import AgreementCheck
from evomerge.search.evaluation.race_policy import Races, settle_races
from evomerge.search.evaluation.settled_scale import settle_scale
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.learned.learn import Learner, why_not
from evomerge.search.run import Run
from evomerge.search.samplers.registry import sampler_kind
from evomerge.search.samplers.settle import settle_sampler
from evomerge.search.scored_baselines import ScoredBaselines
from evomerge.search.storage.study import SearchStudy
from evomerge.search.trial import TrialRunner, next_baseline
from evomerge.search.verdict.finals import finish
from evomerge.search.verdict.verdict import Verdict
from evomerge.search.workers.pool import run_all

SEARCHING = "searching"


class Driver:
    """Owns study and sampler, and takes a search through its phases.

    Phases 2 to 5 run in as many slots as there are workers, and a slot does one thing at a time.  So a free worker
    always gets a trial, also while another slot is in phase 3; and with one worker everything happens in one order.

    run: the run folder.
    study: proposes points and stores results.
    evaluations: scores recipes outside of trials; has the workers, and the monitor with the limits.
    baselines: recipes that the search did not find.
    export: seconds that writing the model will take.
    """

    def __init__(
        self, run: Run, study: SearchStudy, evaluations: Evaluations, baselines: ScoredBaselines, export: float
    ) -> None:
        self.run = run
        self.study = study
        self.evaluations = evaluations
        self.baselines = baselines
        self.pool = evaluations.pool
        self.monitor = evaluations.monitor
        self.trials = TrialRunner(run, study, evaluations)
        self.budget = RunningBudget(baselines, export)
        self.agreement = AgreementCheck(study, evaluations)
        self.sampler_name = study.space.config.sampler.name
        self.preparing = False  # whether a slot has begun phase 3
        self.races: Races | None = None  # None before phase 3, and where races do not pay

    async def search(self) -> Verdict:
        """Run all phases and return the verdict."""
        learned_start = sampler_kind(self.sampler_name).learned_start
        self.monitor.steps_to_come = learned_start
        await settle_scale(self.study, self.evaluations, self.baselines.found)
        await self.baselines.score_outside()
        self.show_incumbent()
        self.budget.say_if_too_short()
        if untried := self.baselines.untried():
            self.monitor.phase("trying the baselines", len(untried), "baselines")
        if learned_start:
            await self.run_slots(self.run_given_trials)
            await self.prepare_search()
            await self.run_slots(self.run_given_trials)  # the greedy soup, and what was interrupted
            await self.learn()
        await self.run_slots(self.run_slot)
        return await self.judge_finalists()

    async def run_slots(self, slot: Callable[[], Awaitable[None]]) -> None:
        """Run something in every slot, and wait for all of them."""
        await run_all(*(slot() for _ in range(self.pool.size)))

    async def run_slot(self) -> None:
        """Phases 2 to 5 in one slot, as far as they have not been done."""
        await self.run_baseline_trials()
        await self.prepare_search()
        await self.run_search_trials()

    async def run_trial(self) -> None:
        """Run the next trial."""
        await self.trials.run(self.baselines.found, self.races)

    async def run_baseline_trials(self) -> None:
        """Phase 2: trials until every baseline in the space has a result.

        A slot that finds none left to begin, while others still run, gets trials of the sampler.
        """
        while self.baselines.untried() and self.budget.ended() is None:
            await self.run_trial()

    async def run_given_trials(self) -> None:
        """Trials that have begun before, or whose points are baselines, until none is left to begin.

        Before phase 3 these are the baselines alone: a trial that races must race when it is begun again, too.
        """
        while self.study.interrupted or next_baseline(self.study, self.baselines.found):
            if self.budget.ended() is not None or not (self.preparing or self.baselines.untried()):
                return
            await self.run_trial()

    async def prepare_search(self) -> None:
        """Phase 3, in the first slot that comes to it: how candidates race, then the greedy soup."""
        if self.preparing or self.baselines.untried() or self.budget.ended() is not None:
            return
        self.preparing = True
        self.monitor.phase("choosing where races look, and making the greedy soup")
        self.races = await settle_races(self.study, self.baselines.found, self.evaluations)
        await self.baselines.make_soup()
        self.agreement.log()

    async def learn(self) -> None:
        """Phase 4: gradient steps from the best baseline, and the choice of the sampler that follows."""
        study, evaluations, monitor = self.study, self.evaluations, self.monitor
        monitor.steps_to_come = False
        if (reason := why_not(study.space, evaluations.task_set, evaluations.scale)) is not None:
            if self.sampler_name == "learned":
                raise EvomergeError(f"sampler: the coefficients cannot be learned: {reason}")
            monitor.say(f"no learned start: {reason}")
        else:
            learner = Learner(study, evaluations, self.pool, monitor, self.trials, self.baselines.found)
            monitor.steps_to_come = True
            await learner.learn(self.budget.ended)
            monitor.steps_to_come = False
        settle_sampler(study, monitor.limits.trials, self.pool.size, len(evaluations.scale.tasks))

    async def run_search_trials(self) -> None:
        """Phase 5: the greedy soup's trial, if it is a point of the space, and trials of the sampler."""
        if self.sampler_name == "learned":
            return
        while (end := self.budget.ended()) is None:
            if self.monitor.current_phase != SEARCHING:
                self.monitor.phase(SEARCHING)
            if await self.agreement.score_incumbent():
                self.show_incumbent()
                self.agreement.log()
            await self.run_trial()
        self.run.log(f"no more trials: {end}")

    async def judge_finalists(self) -> Verdict:
        """Phase 6: the verdict, written to the run folder."""
        self.budget.say_if_too_short()
        if self.baselines.soup is None:  # the budget ended in phase 2
            self.monitor.phase("making the greedy soup")
        soup = await self.baselines.make_soup()
        self.agreement.log()
        self.monitor.judge()
        return await finish(self.run, self.study, self.evaluations, self.baselines.found, soup)

    def show_incumbent(self) -> None:
        """Show the best trial, also of earlier sessions."""
        self.trials.show_incumbent(self.monitor.progress.best_number)

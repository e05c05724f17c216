"""CMA-ES (Hansen 2016) as an Optuna sampler, on the `cmaes` library; it keeps no state outside the study.

In a new process, all finished trials are told to the optimizer again, in the order in which their results came.  So a
resumed study goes on exactly as the uninterrupted one would have, and nothing is pickled.  What the order does not say
is stored with the trials: with each one the generation that it was drawn from, and with the first one the start of the
search.

With several workers no worker waits until a generation is complete, so results come late: the distribution has changed
since the trial was drawn.  All results are told, in groups of the population size, in the order in which they come.
Told at its own point, a late result pulls the mean back to where it was.  Told at its displacement from the mean that
it was drawn with, it repeats a step that other results have made already, and the search diverges.  So a late result
is told at its point moved by half of what the mean has moved since.  Near an optimum, where a generation takes the
share k of the way, the mean then follows m' = m / 2 + (1/2 - k) m_then, which contracts for every k < 1, however late
results are.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from evomerge.search.samplers.mixed_cma import MixedCMA
from evomerge.search.samplers.sampler_kind import SamplerKind, SamplerSetup, WholePointSampler, trial_seed
from evomerge.search.samplers.stages import Stage, stages_of
from evomerge.search.storage.optuna_private import FIXED_PARAMETERS, set_system_attribute
from evomerge.search.storage.trial_record import LEARNED, place_in_order

if TYPE_CHECKING:
    from cmaes import CMA, SepCMA

GENERATION = "cma:generation"  # on every sampled trial: the generation of the distribution it was drawn from
START = "cma:start"  # on the first sampled trial: where the search starts, and how (`choose_start`)
SHIFT = "cma:shift"  # on trials drawn by `ties`: the coordinates that were drawn, from which the parameters follow
WIDE = 40  # axes; above it a learned start is followed by shifts of whole groups of axes
PATIENCE = 5.0  # seconds of a resume without a line that says how long it takes
SEPARABLE = 100  # coordinates; above it the distribution has a variance for each, and no covariance


def is_enqueued(trial: FrozenTrial) -> bool:
    """Whether the trial's parameters were given, by a baseline or by the user, and not chosen by the sampler."""
    return FIXED_PARAMETERS in trial.system_attrs


class CmaEsSampler(WholePointSampler):
    """Maximises over float axes, scaled to the unit cube, and over choices (mixed_cma.py).

    axes: the bounds or the choices of each parameter by name; D of them.
    seed: the study's.
    sigma0: the first step size in the unit cube.
    population: samples per generation.  None: 4 + floor(3 ln D), or a third of the workers if that is more, so that few
        results are more than three generations late.
    workers: how many trials may run at once; it matters to a study's first proposal only.

    ties: axis -> the name of its group; None searches every axis by itself.
    stages: searches of fewer coordinates that come first (stages.py).
    say: shows one line, if telling the results of a resumed study again takes long.

    After a learned start in more than WIDE axes, the search shifts whole groups: the d coordinates, each from 0 to 1,
    say by how much of the bounds every axis of a group moves away from the start (0.5: not at all).  A trial could not
    tell as many axes apart, and the gradient has done so already.

    The first mean is the best enqueued trial known at the first proposal, or the middle of the cube.  A stage ends with
    the generation that completes its results, and the next begins at the best point so far, with half of sigma0.  One
    that cannot hold that point, as a learned start is finer, is left out.

    In more than SEPARABLE coordinates, the separable CMA-ES (Ros and Hansen 2008): a full covariance of D coordinates
    costs D^3 operations a proposal, and so few trials cannot tell it from none.

    When the distribution has collapsed, the search starts again at a random point with twice the population (IPOP,
    Auger and Hansen 2005); in a stage the next one begins.  Results of trials drawn before that, at most one per
    worker, are not told.
    """

    def __init__(
        self,
        axes: Mapping[str, FloatDistribution | CategoricalDistribution],
        seed: int,
        sigma0: float,
        population: int | None,
        workers: int = 1,
        ties: Mapping[str, str] | None = None,
        stages: Sequence[Stage] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        bounds = {name: axis for name, axis in axes.items() if isinstance(axis, FloatDistribution)}
        self.choices = {n: list(a.choices) for n, a in axes.items() if isinstance(a, CategoricalDistribution)}
        self.axes = {name: axes[name] for name in [*bounds, *self.choices]}
        """In the order of the coordinates: first what has bounds."""
        self.say = say
        self.seed = seed
        self.sigma0 = sigma0
        self.given_population = population
        self.workers = workers
        names = list(dict.fromkeys((ties or {}).values()))
        # (D,) the group of each axis; choices are in none
        self.groups = [names.index(ties[axis]) for axis in axes] if ties and not self.choices else []
        self.start: NDArray[np.float64] | None = None  # (D,) where shifts begin; None without shifts
        self.stages = [] if self.choices else list(stages)
        self.populations: list[int] = []  # of the stages, then of the search of all axes
        self.separable = math.inf  # more coordinates have no covariance
        self.separable_mixed = math.inf  # the same of coefficients beside choices
        self.left: list[Stage] = []  # the stages that are not over; the first is searched now
        self.best: tuple[float, NDArray[np.float64]] | None = None  # value and point (D,) of the best trial so far
        self.low = np.array([d.low for d in bounds.values()])
        self.width = np.array([d.high - d.low for d in bounds.values()])
        self.optimizer: CMA | SepCMA | MixedCMA | None = None
        self.means: list[NDArray[np.float64]] = []  # per generation, restarts counted on; each (D,) in the unit cube
        self.began = 0  # the generation at which the present distribution began
        self.group: list[FrozenTrial] = []  # results that came since the last generation
        self.seen = 0  # trials that `replay` has met
        self.open: list[int] = []  # numbers of those that were not finished then
        self.told = 0  # results that the optimizers were told
        self.told_before = 0  # those before the present stage
        self.settled: dict[str, Any] | None = None  # the mean of the latest distribution that was told something

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a trial, drawn from the newest distribution."""
        if is_enqueued(trial):
            return {}  # its parameters are given
        optimizer = self.replay(study, first=trial)
        assert optimizer is not None, "the first sampled trial starts it"
        set_system_attribute(study, trial, GENERATION, len(self.means) - 1)
        optimizer.reseed_rng(trial_seed(self.seed, trial.number))
        drawn = optimizer.ask()
        if self.start is not None:
            set_system_attribute(study, trial, SHIFT, drawn.tolist())
        return self.point(drawn)

    def distribution_mean(self, study: Study) -> dict[str, Any] | None:
        """The mean after the latest complete generation, None before the first one is complete.

        After a restart, until the new distribution is told something, this is the mean of the one before.
        """
        self.replay(study, first=None)
        return self.settled

    def replay(self, study: Study, first: FrozenTrial | None) -> "CMA | SepCMA | MixedCMA | None":
        """The optimizer after all results so far; only those that came since the last call are told.

        first: the trial that is sampled now, for the case that it is the study's first; None if none is.
        """
        trials = study.get_trials(deepcopy=False)
        if self.optimizer is None:
            start = next((t.system_attrs[START] for t in trials if START in t.system_attrs), None)
            if start is None:
                if first is None:
                    return None
                start = self.choose_start(trials)
                set_system_attribute(study, first, START, start)
            known = start["trial"] is not None
            at = self.unit(trials[start["trial"]]) if known else np.full(len(self.axes), 0.5)
            if start.get("shifts"):
                self.start, at = at, np.full(start["shifts"], 0.5)
            self.populations = [*start.get("stages", []), start["population"]]
            self.separable = start.get("separable", math.inf)
            self.separable_mixed = start.get("separable_mixed", math.inf)
            self.left = self.stages[: len(self.populations) - 1]
            coordinates = self.left[0].coordinates(at) if self.left else at
            self.begin(coordinates, self.populations[-1 - len(self.left)], anywhere=not known)
        self.open += range(self.seen, len(trials))
        self.seen = len(trials)
        came = [trials[n] for n in self.open if trials[n].state.is_finished()]
        self.open = [n for n in self.open if not trials[n].state.is_finished()]
        began, said = time.monotonic(), False
        for count, trial in enumerate(sorted(came, key=place_in_order)):
            self.take(trial)
            spent, left = time.monotonic() - began, len(came) - count - 1
            if not said and spent > PATIENCE and (seconds := spent / (count + 1) * left) > PATIENCE:
                said = True
                self.say(
                    f"note: CMA-ES is told the {len(came)} results of this study again, which takes about "
                    f"{math.ceil(seconds / 60)} min more"
                )
        return self.optimizer

    def choose_start(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """What START stores.

        trial: the best enqueued trial that has a result now; None: the middle of the cube.
        population: samples per generation.  stages: the same of each stage, if there are any.
        shifts: the number of groups, if whole groups are shifted.
        separable: SEPARABLE; a study from before it keeps its covariance.  separable_mixed: the same in a space with
            choices, which came later.
        """
        given = [t for t in trials if is_enqueued(t) and t.state == TrialState.COMPLETE and self.has_all_parameters(t)]
        best = max(given, key=lambda t: (t.value, -t.number), default=None)
        shifts = max(self.groups) + 1 if self.groups and len(self.axes) > WIDE else 0
        if best is None or LEARNED not in best.user_attrs:
            shifts = 0
        start: dict[str, Any] = {"trial": best.number if best else None}
        start |= {"population": self.population(shifts or len(self.axes)), "separable": SEPARABLE}
        if self.choices:
            start["separable_mixed"] = SEPARABLE
        if shifts:
            return start | {"shifts": shifts}
        if self.stages and (best is None or self.stages[0].holds(self.unit(best))):
            start["stages"] = [self.population(stage.dimension) for stage in self.stages]
        return start

    def population(self, dimension: int) -> int:
        """The samples per generation in so many coordinates."""
        return self.given_population or max(4 + math.floor(3 * math.log(dimension)), self.workers // 3)

    def has_all_parameters(self, trial: FrozenTrial) -> bool:
        return self.axes.keys() <= trial.params.keys()

    def take(self, trial: FrozenTrial) -> None:
        """Add one finished trial to the group, and tell the group when it is complete; a failed trial is left out."""
        if trial.state != TrialState.COMPLETE or not self.has_all_parameters(trial):
            return
        if self.left and (self.best is None or (trial.value or 0.0) > self.best[0]):
            self.best = trial.value or 0.0, self.unit(trial)
        if is_enqueued(trial):
            return
        if self.generation(trial) < self.began:
            return
        assert self.optimizer is not None
        self.group.append(trial)
        if len(self.group) == self.optimizer.population_size:
            self.tell(self.optimizer, self.group)
            self.group = []

    def generation(self, trial: FrozenTrial) -> int:
        """The generation that a trial was drawn from."""
        return int(trial.system_attrs.get(GENERATION, len(self.means) - 1))

    def tell(self, optimizer: "CMA | SepCMA | MixedCMA", group: Sequence[FrozenTrial]) -> None:
        """Tell the optimizer one generation.

        Then go on: with the next stage if this one is over, at a random point if the distribution has collapsed.
        """
        optimizer.tell([(self.caught_up(t), -float(t.value or 0.0)) for t in group])
        self.settled = self.point(optimizer.mean)
        self.told += len(group)
        collapsed = optimizer.should_stop()
        if self.left and (collapsed or self.told - self.told_before >= self.left[0].results):
            self.next_stage()
        elif collapsed:
            rng = np.random.RandomState(trial_seed(self.seed, group[-1].number))
            self.begin(rng.uniform(size=optimizer.dim), 2 * optimizer.population_size, anywhere=True)
        else:
            self.means.append(optimizer.mean.copy())

    def next_stage(self) -> None:
        """Begin the next stage that can hold the best point so far, or the search of all axes there."""
        assert self.best is not None, "a generation has been told"
        at = self.best[1]
        self.left = next((self.left[k:] for k in range(1, len(self.left)) if self.left[k].holds(at)), [])
        self.told_before = self.told
        coordinates = self.left[0].coordinates(at) if self.left else at
        self.begin(coordinates, self.populations[-1 - len(self.left)], anywhere=False, sigma=self.sigma0 / 2)

    def caught_up(self, trial: FrozenTrial) -> NDArray[np.float64]:
        """A trial's coordinates; those of a late one are moved by half of what the mean has moved."""
        drawn, at = self.generation(trial), self.coordinates(trial)
        if drawn == len(self.means) - 1:
            return at
        count = len(at) - len(self.choices)  # what was chosen stays
        moved = np.clip(at[:count] + (self.means[-1] - self.means[drawn])[:count] / 2, 0.0, 1.0)
        return np.concatenate([moved, at[count:]])

    def begin(self, mean: NDArray[np.float64], population: int, anywhere: bool, sigma: float | None = None) -> None:
        """Start a new distribution, which counts as the next generation.

        mean: its coordinates.  anywhere: whether every choice is open, else the mean's is the likely one.
        sigma: its first step; None is sigma0.
        """
        if self.choices:
            counts = [len(values) for values in self.choices.values()]
            separable = len(self.low) > self.separable_mixed
            self.optimizer = MixedCMA(mean, self.sigma0, counts, population, anywhere, separable)
            self.began = len(self.means)
            self.means.append(self.optimizer.mean)
            return
        from cmaes import CMA, SepCMA  # it imports scipy: seconds that commands like `status` need not spend

        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        first = self.sigma0 if sigma is None else sigma
        kind = SepCMA if len(mean) > self.separable else CMA
        self.optimizer = kind(mean=mean.copy(), sigma=first, bounds=bounds, population_size=population, seed=0)
        self.began = len(self.means)
        self.means.append(mean)

    def coordinates(self, trial: FrozenTrial) -> NDArray[np.float64]:
        """What the optimizer knows a trial by: its point in the unit cube, (D,), or in a stage, (d,); or its shifts."""
        if self.start is not None:
            return np.array(trial.system_attrs[SHIFT])
        unit = self.unit(trial)
        return self.left[0].coordinates(unit) if self.left else unit

    def unit(self, trial: FrozenTrial) -> NDArray[np.float64]:
        """(D,) a trial's parameters: in the unit cube, and the number of what was chosen."""
        values = np.array([trial.params[name] for name in self.axes if name not in self.choices])
        unit = np.clip((values - self.low) / self.width, 0.0, 1.0)
        chosen = [values.index(trial.params[name]) for name, values in self.choices.items()]
        return np.concatenate([unit, np.array(chosen, dtype=np.float64)])

    def point(self, coordinates: NDArray[np.float64]) -> dict[str, Any]:
        """The parameters at the coordinates of a trial."""
        unit = coordinates if self.start is None else self.start + coordinates[self.groups] - 0.5
        unit = unit[self.left[0].of_axis] if self.left else unit
        numbers = self.low + self.width * np.clip(unit[: len(self.low)], 0.0, 1.0)
        chosen = zip(self.choices.values(), unit[len(self.low) :], strict=True)
        return dict(zip(self.axes, [*numbers.tolist(), *(values[int(k)] for values, k in chosen)], strict=True))


def make_cma_es(setup: SamplerSetup) -> CmaEsSampler:
    """The sampler of a study; it reads the trials' numbers itself."""
    config = setup.config
    stages = stages_of([*setup.axes], [setup.pairs, setup.ties], config.coarse)
    return CmaEsSampler(
        setup.axes, setup.study_seed, config.sigma0, config.population, setup.workers, setup.ties, stages, setup.say
    )


CMA_ES = SamplerKind(make_cma_es, serves_all_trials=True)

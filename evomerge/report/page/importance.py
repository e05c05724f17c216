"""Which coefficients matter: by the gradient along the learned start's way, else by the trials.

gradient    the gain of coefficient j is the sum over steps k of g[k+1][j] (p[k+1][j] - p[k][j]): p are the points, g
            the derivatives of the value there.  All gains together are, to first order, the rise of the value from
            the first point to the last (the path integral of the gradient; Sundararajan et al. 2017, "Axiomatic
            Attribution for Deep Networks").  g[k+1] comes from other items than the step before it, so that the noise
            of a mini-batch does not count as a gain.
trials      PED-ANOVA (Watanabe et al. 2023): how differently the best tenth of the trials is distributed along one
            coefficient.  It needs no gradient, and sees each coefficient alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import optuna
from optuna.trial import FrozenTrial

from evomerge.report.page.material import Material
from evomerge.report.page.parts import folded, section, text
from evomerge.report.page.winner import bar_table, heat_table
from evomerge.search.storage.optuna_private import MemoryStorage, key_of_study
from evomerge.search.storage.step_record import StepRecord
from evomerge.search.storage.study import in_full

FEWEST_TRIALS = 40  # that were scored in full; fewer say little
MOST = 14  # rows of bars
DEPTH = re.compile(r"\.(?:layer|depth|group)(\d+)$")  # the end of an axis's name, see `space.axis_names`


def importance_section(material: Material) -> str:
    """Bars of the coefficients that matter most; empty where nothing can be said."""
    climb = material.status.climbs[0] if material.status.climbs else []
    if len(climb) > 1:
        gains = path_gains(climb)
        groups = by_group(gains)
        rows = sorted(((name, sum(each.values())) for name, each in groups.items()), key=lambda row: -abs(row[1]))
        total = math.fsum(gains.values())
        about = (
            f"What moving each coefficient brought on the way of the learned start, by the gradient at its "
            f"{len(climb)} steps: together {total:+.3f} of the value. Orange: the move cost value, for instance "
            "because it helped another coefficient."
        )
        layers = {name: list(each.values()) for name, each in groups.items()}
        heat = folded("By layer", heat_table(layers, 3)) if max(map(len, layers.values())) > 1 else ""
        bars = bar_table([(name, gain, f"{gain:+.3f}") for name, gain in rows[:MOST]])
        return section("importance", "Which coefficients matter", text(about), bars, heat)
    full = [t for t in material.status.trials if in_full(t) and t.params]
    if len(full) < FEWEST_TRIALS:
        if material.verdict is None or not full:
            return ""
        few = f"There was no gradient, and {len(full)} trials that were scored in full are too few to tell."
        return section("importance", "Which coefficients matter", text(few, "dim"))
    found = by_trials(full)
    if not found:
        return ""
    about = (
        f"The part of each coefficient in what sets the best tenth of {len(full)} trials apart from the others "
        "(PED-ANOVA). It looks at one coefficient at a time."
    )
    rows = sorted(found.items(), key=lambda row: -row[1])[:MOST]
    bars = bar_table([(name, share, f"{share:.0%}") for name, share in rows])
    return section("importance", "Which coefficients matter", text(about), bars)


def path_gains(climb: Sequence[StepRecord]) -> dict[str, float]:
    """Axis -> what moving it brought from the first step's point to the last one's."""
    axes = climb[0].point.keys()
    pairs = list(pairwise(climb))
    return {
        axis: math.fsum(b.gradient.get(axis, 0.0) * (b.point[axis] - a.point[axis]) for a, b in pairs) for axis in axes
    }


def by_group(gains: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Knob (if there are several), source and component -> layer, or place along the depth -> the gain."""
    found: dict[str, dict[int, float]] = {}
    stems = {DEPTH.sub("", axis) for axis in gains}
    knobs = {axis.split(".")[0] for axis in gains}
    for axis, gain in gains.items():
        place = DEPTH.search(axis)
        stem = DEPTH.sub("", axis)
        knob, *rest = stem.split(".")
        if any(other.startswith(f"{stem}.") for other in stems):  # of the components that have no axes of their own
            rest.append("other")
        name = " · ".join(rest if rest and len(knobs) == 1 else [knob, *rest])
        found.setdefault(name, {})[int(place[1]) if place else 0] = gain
    return found


def by_trials(full: Sequence[FrozenTrial]) -> dict[str, float]:
    """Coefficient -> its importance by PED-ANOVA, together 1; empty if the trials do not differ."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    storage = MemoryStorage()
    study = optuna.create_study(storage=storage, direction="maximize")
    for trial in full:
        storage.create_new_trial(key_of_study(study), trial)
    try:
        found: dict[str, float] = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError):  # all values are equal, or no coefficient is in every trial
        return {}
    return found

"""The samplers by name: those of evomerge, and those that other packages bring.

A new sampler of evomerge is a file beside this one and a line in BUILT_IN.  Another package brings one by an entry
point, which names a `SamplerKind`:

    [project.entry-points."evomerge.samplers"]
    my-sampler = "my_package:kind"
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from evomerge.errors import EvomergeError, did_you_mean, first_line
from evomerge.plugins import load_plugin
from evomerge.search.samplers import auto, cmaes, optuna_samplers
from evomerge.search.samplers.sampler_kind import SamplerKind, SamplerSetup

GROUP = "evomerge.samplers"  # of entry points

BUILT_IN = {
    "auto": auto.AUTO,
    "learned": auto.LEARNED,
    "cma-es": cmaes.CMA_ES,
    "tpe": optuna_samplers.TPE,
    "nsga-ii": optuna_samplers.NSGA_II,
    "gp": optuna_samplers.GP,
    "qmc": optuna_samplers.QMC,
    "random": optuna_samplers.RANDOM,
}


def make_sampler(setup: SamplerSetup) -> BaseSampler:
    """The sampler that a setup's configuration names.  EvomergeError as in `sampler_kind`."""
    return made(sampler_kind(setup.config.name).make, setup)


def made(make: Callable[[SamplerSetup], BaseSampler], setup: SamplerSetup) -> BaseSampler:
    """The sampler of a setup, without Optuna's warnings of what may change in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make(setup)


@lru_cache
def sampler_kind(name: str) -> SamplerKind:
    """The sampler of that name; a built-in one comes before one of another package.

    EvomergeError if there is none of that name, it cannot be loaded, or a package that it requires is missing.
    """
    kind = BUILT_IN.get(name) or plugged_in(name)
    missing = [package for package in kind.requires if importlib.util.find_spec(package) is None]
    if missing:
        raise EvomergeError(f"sampler.name: {name!r} needs {', '.join(missing)}; pip install {' '.join(missing)}")
    return kind


def plugged_in(name: str) -> SamplerKind:
    """The sampler of that name that another package brings.  EvomergeError if there is none or it cannot be loaded."""
    points = entry_points(group=GROUP)
    if name not in points.names:
        names = [*BUILT_IN, *sorted(points.names - BUILT_IN.keys())]
        hint = did_you_mean(name, names)
        raise EvomergeError(f"sampler.name: {name!r} is not a sampler; give one of {', '.join(names)}{hint}")
    point = points[name]
    where = f"sampler.name: {name!r} is {point.value}, which"
    return load_plugin(point, SamplerKind, where, "is not a SamplerKind", first_line)

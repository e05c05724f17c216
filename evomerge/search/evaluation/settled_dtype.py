"""The type in which a study's forwards are computed: settled once, kept, the same for all workers and every resume."""

import platform
from collections.abc import Callable, Mapping

import optuna

from evomerge.config.schema import SearchConfig
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.recipe.recipe import Dtype
from evomerge.search.models import shapes_of
from evomerge.search.storage.study import COMPUTE, FINISHED, recorded_type
from evomerge.sources.open_models import Models


def settle(
    study: optuna.Study, config: SearchConfig, models: Models, device: str, say: Callable[[str], None]
) -> SearchConfig:
    """The configuration with `compute_dtype` settled: what it says, else what the study recorded, else the faster type.

    Scores in two types differ by rounding, so a study keeps the one it began with.  device: the kind of device that
    will compute.  say: told in one line if that is not the candidate's own type, or is slow here.
    """
    recorded = recorded_type(study.user_attrs)
    if recorded is None and study.get_trials(deepcopy=False, states=FINISHED):
        recorded = config.dtype  # no other type was there when this study began
    if config.compute_dtype != "auto":
        chosen: Dtype = config.compute_dtype
        if recorded not in (None, chosen):
            say(f"note: trials so far were computed in {recorded}; from now on it is {chosen}, as compute_dtype says")
        keep(study, recorded, chosen, {})
        return config
    seconds = measure(config.dtype, device, shapes_of(models))
    here = faster_type(config.dtype, seconds)
    chosen = recorded or here
    if chosen != here:
        say(
            f"note: this study computes in {chosen} and goes on so, which keeps its scores comparable; on this machine "
            f"{here} is faster{times(seconds, chosen, here)}"
        )
    elif chosen != config.dtype:
        say(
            f"note: forwards are computed in {chosen} with weights rounded to {config.dtype}; on this machine that is "
            f"faster{times(seconds, config.dtype, chosen)}"
        )
    keep(study, recorded, chosen, seconds)
    return config.model_copy(update={"compute_dtype": chosen})


def times(seconds: Mapping[Dtype, float], slow: Dtype, fast: Dtype) -> str:
    """By how much, where it was measured."""
    return f": products of matrices take {seconds[slow] / seconds[fast]:.1f} times as long in {slow}" if seconds else ""


def keep(study: optuna.Study, recorded: Dtype | None, chosen: Dtype, seconds: Mapping[Dtype, float]) -> None:
    if COMPUTE not in study.user_attrs or recorded != chosen:
        content = {"dtype": chosen, "seconds_per_weight": dict(seconds), "machine": platform.node()}
        study.set_user_attr(COMPUTE, content)

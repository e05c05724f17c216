"""The type in which a study computes forwards: settled once and kept, the same for all workers and every resume."""

import platform
from collections.abc import Callable, Mapping

import optuna

from evomerge.config.schema import SearchConfig
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.recipe.recipe import Dtype
from evomerge.search.models import shapes_of
from evomerge.search.storage.study import COMPUTE, FINISHED, recorded_type
from evomerge.sources.open_models import Models


def settle_compute_dtype(
    study: optuna.Study, config: SearchConfig, models: Models, device: str, say: Callable[[str], None]
) -> SearchConfig:
    """Return the configuration with `compute_dtype` settled.

    It is what the configuration says, else what the study recorded, else the faster type.  Scores in two types differ
    by rounding, so a study keeps the type that it began with.

    device: the kind of device that will compute (`cpu`, `cuda`).
    say: gets one line if the type is not that of the weights, or is the slower one here.
    """
    recorded = recorded_type(study.user_attrs)
    if recorded is None and study.get_trials(deepcopy=False, states=FINISHED):
        recorded = config.dtype  # when this study began, there was no other choice
    if config.compute_dtype != "auto":
        chosen: Dtype = config.compute_dtype
        if recorded not in (None, chosen):
            say(f"note: trials so far were computed in {recorded}; from now on it is {chosen}, as compute_dtype says")
        store_type(study, recorded, chosen, {})
        return config
    seconds = measure(config.dtype, device, shapes_of(models))
    here = faster_type(config.dtype, seconds)
    chosen = recorded or here
    if chosen != here:
        say(
            f"note: this study computes in {chosen} and keeps to it, so that its scores stay comparable; on this "
            f"machine {here} is faster{ratio_text(seconds, chosen, here)}"
        )
    elif chosen != config.dtype:
        say(
            f"note: forwards are computed in {chosen} with weights rounded to {config.dtype}; on this machine that is "
            f"faster{ratio_text(seconds, config.dtype, chosen)}"
        )
    store_type(study, recorded, chosen, seconds)
    return config.model_copy(update={"compute_dtype": chosen})


def ratio_text(seconds: Mapping[Dtype, float], slow: Dtype, fast: Dtype) -> str:
    """How many times as long the slower type takes; empty if that was not measured."""
    return f": products of matrices take {seconds[slow] / seconds[fast]:.1f} times as long in {slow}" if seconds else ""


def store_type(study: optuna.Study, recorded: Dtype | None, chosen: Dtype, seconds: Mapping[Dtype, float]) -> None:
    """Record the chosen type in the study, unless it is recorded already."""
    if COMPUTE not in study.user_attrs or recorded != chosen:
        content = {"dtype": chosen, "seconds_per_weight": dict(seconds), "machine": platform.node()}
        study.set_user_attr(COMPUTE, content)

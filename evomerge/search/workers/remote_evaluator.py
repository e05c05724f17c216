"""How a worker outside the driver's process opens its evaluator, and makes sure that its inputs are the driver's."""

import platform
from collections.abc import Callable, Mapping

from evomerge.errors import EvomergeError
from evomerge.files import locked
from evomerge.merge.kernels.compiler import user_cache
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.inputs import input_fingerprints, item_fingerprints
from evomerge.search.models import model_folders, open_config_models, refuse_changed, stamps
from evomerge.search.workers.worker import Progress, Setup


def open_evaluator(
    setup: Setup, check: Callable[[], None], log: Callable[[str], None], progress: Progress
) -> Evaluator:
    """The evaluator on `setup.config.device`.  EvomergeError if models or items are not those that the driver has.

    Where the run's folder is not there (another machine), what takes long to make is kept in the user's cache.
    """
    if platform.node() == setup.host:
        refuse_changed(setup.stamps, stamps(model_folders(setup.config)))
    else:
        refuse_others("the model files", setup.inputs, input_fingerprints(setup.config))
    task_set = open_task_set(setup.config)
    refuse_others("the items", setup.items, item_fingerprints(task_set))
    cache = setup.folder / "cache"
    if not setup.folder.is_dir():
        cache = user_cache("sources")
        cache.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(
        setup.config, open_config_models(setup.config), task_set, check, log, cache, progress, setup.share
    )
    with locked(cache / "lock"):  # the first measures, the others find it measured
        evaluator.prepare(setup.inputs)
    return evaluator


def refuse_others(what: str, driver: Mapping[str, Mapping[str, str]], here: Mapping[str, Mapping[str, str]]) -> None:
    """EvomergeError if this machine's inputs are not the driver's."""
    names = [n for n in driver if n not in here or dict(driver[n]) != dict(here[n])]
    if names:
        raise EvomergeError(
            f"{what} of {', '.join(names)} on {platform.node()} are not those that the driver has; every machine must "
            "read the same files: share the folder, or copy them anew"
        )

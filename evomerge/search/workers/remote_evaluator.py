"""How a worker outside the driver's process opens its evaluator, and checks that it reads the driver's files."""

import platform
from collections.abc import Callable, Mapping

from evomerge.errors import EvomergeError
from evomerge.files.write import locked
from evomerge.merge.kernels.compiler import user_cache
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.inputs import input_fingerprints, item_fingerprints
from evomerge.search.models import model_folders, model_stamps, open_config_models, refuse_changed
from evomerge.search.workers.worker import BatchProgress, WorkerSetup


def open_evaluator(
    setup: WorkerSetup, check: Callable[[], None], log: Callable[[str], None], progress: BatchProgress
) -> Evaluator:
    """Open the evaluator on `setup.config.device` and prepare it for the first job.

    Where the run folder does not exist, as on another machine, the user's cache keeps what takes long to compute.

    check: called between batches.
    log: gets the lines that belong into the run's log.
    EvomergeError if models or items are not the driver's.
    """
    if platform.node() == setup.host:
        refuse_changed(setup.stamps, model_stamps(model_folders(setup.config)))
    else:
        refuse_different("the model files", setup.inputs, input_fingerprints(setup.config))
    task_set = open_task_set(setup.config)
    refuse_different("the items", setup.items, item_fingerprints(task_set))
    cache = setup.folder / "cache"
    if not setup.folder.is_dir():
        cache = user_cache("sources")
        cache.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(
        setup.config, open_config_models(setup.config), task_set, check, log, cache, progress, setup.share
    )
    with locked(cache / "lock"):  # the first worker measures the sources, the others read its results
        evaluator.prepare(setup.inputs)
    return evaluator


def refuse_different(what: str, driver: Mapping[str, Mapping[str, str]], here: Mapping[str, Mapping[str, str]]) -> None:
    """EvomergeError if the hashes on this machine are not the driver's.  what: is hashed, for the message."""
    names = [n for n in driver if n not in here or dict(driver[n]) != dict(here[n])]
    if names:
        raise EvomergeError(
            f"{what} of {', '.join(names)} on {platform.node()} are not those that the driver has; every machine must "
            "read the same files: share the folder, or copy them again"
        )

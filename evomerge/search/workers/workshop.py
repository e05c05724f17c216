"""How a worker outside the driver's process opens its workshop, and makes sure that its inputs are the driver's."""

import platform
from collections.abc import Callable, Mapping

from evomerge.errors import EvomergeError
from evomerge.files import locked
from evomerge.merge.compiled import user_cache
from evomerge.search.exam import open_exam
from evomerge.search.run import input_fingerprints, item_fingerprints
from evomerge.search.scorer import Scorer, model_folders, open_config_models, refuse_changed, stamps
from evomerge.search.workers.worker import Progress, Setup


def open_workshop(setup: Setup, check: Callable[[], None], log: Callable[[str], None], progress: Progress) -> Scorer:
    """The workshop on `setup.config.device`.  EvomergeError if models or items are not those that the driver has.

    Where the run's folder is not there (another machine), what takes long to make is kept in the user's cache.
    """
    if platform.node() == setup.host:
        refuse_changed(setup.stamps, stamps(model_folders(setup.config)))
    else:
        refuse_others("the model files", setup.inputs, input_fingerprints(setup.config))
    exam = open_exam(setup.config)
    refuse_others("the items", setup.items, item_fingerprints(exam))
    cache = setup.folder / "cache"
    if not setup.folder.is_dir():
        cache = user_cache().parent / "sources"
        cache.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(setup.config, open_config_models(setup.config), exam, check, log, cache, progress, setup.share)
    with locked(cache / "lock"):  # the first measures, the others find it measured
        scorer.prepare(setup.inputs)
    return scorer


def refuse_others(what: str, driver: Mapping[str, Mapping[str, str]], here: Mapping[str, Mapping[str, str]]) -> None:
    """EvomergeError if this machine's inputs are not the driver's."""
    names = [n for n in driver if n not in here or dict(driver[n]) != dict(here[n])]
    if names:
        raise EvomergeError(
            f"{what} of {', '.join(names)} on {platform.node()} are not those that the driver has; every machine must "
            "read the same files: share the folder, or copy them anew"
        )

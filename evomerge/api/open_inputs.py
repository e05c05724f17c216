"""The models and tasks of a search, opened and checked before there is a run folder."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from evomerge.config.schema import SearchConfig
from evomerge.printable import say

if TYPE_CHECKING:
    from evomerge.search.opened import Opened
    from evomerge.sources.open_models import Models

LOADING = "loading PyTorch and transformers"  # what takes seconds before anything is opened


def open_inputs(
    config: SearchConfig,
    show: bool,
    stage: Callable[[str], None] = lambda text: None,
    download: Callable[[int, int], None] | None = None,
) -> "Opened":
    """The models and tasks of a search, opened and checked.

    config: with the versions of its models pinned.  show: whether to print what to know about the models.
    stage: told what happens now.  download: told how many bytes of a download have come, and of how many.

    Raises EvomergeError for whatever a search cannot use.
    """
    from evomerge.merge.output.load_check import check_loads
    from evomerge.merge.recipe.layout import build_layout
    from evomerge.search.evaluation.task_set import (
        check_chat_templates,
        check_language,
        check_statistics,
        open_task_set,
    )
    from evomerge.search.models import open_config_models
    from evomerge.search.opened import Opened
    from evomerge.search.space.layer_assembly import build_assembly

    def check(models: "Models") -> list[str]:
        build_assembly(config, models)
        return check_loads(build_layout(models), models.base)

    stage("opening the models")
    models = open_config_models(config, progress=download, check=check)
    for note in check(models):
        if show:
            say(f"note: {note}", error=True)
    stage("opening the tasks")
    task_set = open_task_set(config)
    check_language(models, task_set)
    check_chat_templates(models, task_set)
    check_statistics(config, models, task_set)
    return Opened(config, models, task_set)

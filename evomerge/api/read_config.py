"""A search configuration from any of its forms, checked as far as it can be before anything is opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.api.merge import plain
from evomerge.config.config_file import load_config, parse_config
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError, did_you_mean
from evomerge.evaluate.metrics import CHOSEN, METRICS
from evomerge.search.samplers.registry import sampler_kind


def read_config(config: SearchConfig | Mapping[str, Any] | str | Path) -> tuple[SearchConfig, Path | None]:
    """A checked configuration from any of its forms, and the file that it comes from, if it comes from one."""
    if isinstance(config, (str, Path)):
        return load_config(Path(config), name_problems), Path(config)
    content = config.model_dump(by_alias=True, exclude_none=True) if isinstance(config, SearchConfig) else config
    return parse_config(plain(content), Path("configuration"), name_problems), None


def name_problems(config: SearchConfig, others: bool) -> list[str]:
    """The problems with the names of sampler, objectives and metrics.

    others: whether there are other problems.  Then a metric that looks misspelt is one; a task that is opened may have
    it after all.
    """
    problems = []
    try:
        sampler_kind(config.sampler.name)
    except EvomergeError as error:
        problems.append(str(error))
    known = ["metric", *METRICS, *CHOSEN]
    for number, task in enumerate(config.tasks if others or problems else []):
        for key, name in (("objective", task.objective), ("metric", task.metric or "metric")):
            plain_name = name.partition(",")[0]
            if plain_name not in known and (hint := did_you_mean(plain_name, known)):
                problems.append(f"tasks.{number}.{key}: {name!r} is not a metric that evomerge knows{hint}")
    return problems

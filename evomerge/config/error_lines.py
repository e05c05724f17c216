"""What pydantic says of a configuration, in lines for the person who wrote it."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from evomerge.config.running import BudgetConfig, PriceConfig, RacingConfig, SamplerConfig, WorkersConfig
from evomerge.config.schema import SearchConfig, SourceConfig
from evomerge.config.space import LayersConfig
from evomerge.config.tasks import GuardConfig, PythonTask, SplitsConfig, TaskConfig
from evomerge.errors import did_you_mean

SECTIONS: dict[str, type[BaseModel]] = {
    "": SearchConfig, "sources": SourceConfig, "tasks": TaskConfig, "guards": GuardConfig, "splits": SplitsConfig,
    "task": PythonTask, "sampler": SamplerConfig, "budget": BudgetConfig, "price": PriceConfig,
    "workers": WorkersConfig, "racing": RacingConfig, "layers": LayersConfig,
}  # fmt: skip
"""Where a key of the file stands -> the keys that may stand there."""


def error_line(error: Mapping[str, Any]) -> str:
    """One pydantic error as a line: the YAML path, the problem, the value."""
    place = [part for part in error["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))]
    where = ".".join(map(str, place))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        names = [part for part in place if isinstance(part, str)]
        section = SECTIONS.get(names[-2] if len(names) > 1 else "")
        return f"{where}: unknown key" + did_you_mean(names[-1], section.model_fields if section else ())
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["loc"][0] == "storage":  # the value may contain a password
        return f"{where}: {message}"
    shown = repr(error.get("input"))
    allowed = re.findall("'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
    hint = did_you_mean(str(error.get("input")), allowed) if error["type"] == "literal_error" else ""
    return f"{where}: {message}" + (f" (found {shown})" if len(shown) < 60 else "") + hint

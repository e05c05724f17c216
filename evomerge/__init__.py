"""evomerge searches for the best way to merge fine-tuned language models, and proves the result.

The names in `__all__` are the public interface; docs/reference/python.md shows how to use them.  Each is loaded when it
is first used, so `import evomerge` takes milliseconds.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.api.check import check
    from evomerge.api.evaluate import Evaluation, evaluate
    from evomerge.api.merge import merge
    from evomerge.api.run import Run, Trial, open_run
    from evomerge.api.search import resume, search
    from evomerge.config.schema import SearchConfig
    from evomerge.errors import EvomergeError
    from evomerge.merge.recipe.recipe import Recipe
    from evomerge.report.inspection import Inspection, inspect
    from evomerge.search.verdict.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "EvomergeError",
    "Inspection",
    "Recipe",
    "Run",
    "SearchConfig",
    "Trial",
    "Verdict",
    "check",
    "evaluate",
    "inspect",
    "merge",
    "open_run",
    "resume",
    "search",
]

_MODULES = {
    "Evaluation": "evomerge.api.evaluate",
    "EvomergeError": "evomerge.errors",
    "Inspection": "evomerge.report.inspection",
    "Recipe": "evomerge.merge.recipe.recipe",
    "Run": "evomerge.api.run",
    "SearchConfig": "evomerge.config.schema",
    "Trial": "evomerge.api.run",
    "Verdict": "evomerge.search.verdict.verdict",
    "check": "evomerge.api.check",
    "evaluate": "evomerge.api.evaluate",
    "inspect": "evomerge.report.inspection",
    "merge": "evomerge.api.merge",
    "open_run": "evomerge.api.run",
    "resume": "evomerge.api.search",
    "search": "evomerge.api.search",
}
"""Where each public name is defined."""
_PACKAGES = ("evaluate", "merge", "search")
"""Public functions that have the names of packages."""


def _load(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    if name in _PACKAGES:  # the function has the package's attributes, so that `import evomerge.search.run as r` works
        found.__dict__ = import_module(f"{__name__}.{name}").__dict__
    globals()[name] = found
    return found


if not TYPE_CHECKING:  # a type checker would take any name for a public one
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps the functions of `_PACKAGES`: importing the package of the same name would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PACKAGES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

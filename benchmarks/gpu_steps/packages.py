"""What must be installed."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement


def absent(project: Path) -> list[str]:
    """The packages that a pyproject.toml asks for, itself or by what it asks for, and that are not installed."""
    waiting = list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    seen: set[str] = set()
    missing = []
    while waiting:
        wanted = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            waiting += requires(name) or []
        except PackageNotFoundError:
            missing.append(name)
    return sorted(missing)

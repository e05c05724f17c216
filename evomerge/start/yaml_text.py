"""Names and paths as the text of a configuration that is written with comments."""

import os
from pathlib import Path

import yaml


def relative(text: str, file: Path) -> str:
    """A path as a file names it; a hub id, a name of a task or an absolute path elsewhere stays."""
    path = Path(text)
    folder = file.resolve().parent
    if not path.exists() or (path.is_absolute() and folder not in path.parents):
        return text
    return os.path.relpath(path.resolve(), folder)


def plain(text: str) -> str:
    """A text as a YAML scalar on one line, which may stand within brackets."""
    listed: str = yaml.safe_dump([text], allow_unicode=True, width=10**6, default_flow_style=True)
    return listed.strip()[1:-1]

"""Names and paths: as the command line gives them, and as the text of a configuration that is written."""

import os
from pathlib import Path

import yaml


def named_source(text: str) -> tuple[str, str]:
    """Name and path of a source: of NAME=PATH, or of a path, whose last part is the name."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name:
        return name, path
    return text.rstrip("/").split("/")[-1].split("@")[0], text


def relative(text: str, file: Path) -> str:
    """A path as a file names it; a hub id, a name of a task or an absolute path elsewhere stays."""
    path = Path(text)
    folder = file.resolve().parent
    if not os.path.exists(path) or (path.is_absolute() and folder not in path.parents):
        return text
    return os.path.relpath(path.resolve(), folder)


def plain(text: str) -> str:
    """A text as a YAML scalar on one line, which may stand within brackets."""
    style = None if text.isprintable() else '"'  # with escapes
    listed: str = yaml.safe_dump([text], allow_unicode=True, width=10**6, default_flow_style=True, default_style=style)
    return listed.strip()[1:-1]

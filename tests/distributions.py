"""A distribution that offers entry points, as pip would have installed it."""

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, code: str, group: str, points: Mapping[str, str]) -> Path:
    """Write a module and its dist-info into a folder for sys.path, which is returned.

    name: of the distribution; its module has underscores for the dashes.  points: name -> object, in the group.
    """
    module = name.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}\n" for point, value in points.items()]
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(lines))
    return folder

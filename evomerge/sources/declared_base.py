"""The base model that a source says it was made from, and whether it is the base of the merge."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.files.read import read_json, read_text
from evomerge.parse import parse_yaml
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, open_checkpoint
from evomerge.sources.locate import looks_like_hub_id
from evomerge.sources.quantised import quantisation_settings

QUANTISED_NAME = re.compile(r"(?i)[-_.](bnb|gptq|awq|fp8|nvfp4|mxfp4|int[48]|[48]-?bit)(?![a-z0-9])")
SAME, OTHER = 0.01, 0.5  # of the weights' size: bfloat16 rounds by 0.002; a fine-tune is below 0.1, a stranger at 1.4


@dataclass
class Told:
    """What is said about a source's base, a line each.

    problems: why it cannot be merged.
    notes: what to know.
    doubts: what may mean that the merge is worth nothing.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def declared_base(source: Checkpoint | Adapter) -> str | None:
    """The base model that a source names, in its configuration or in its model card; None if it names none."""
    for key in ("base_model_name_or_path", "base_model"):
        if isinstance(source.config.get(key), str) and source.config[key]:
            return str(source.config[key])
    declared = front_matter(source.path).get("base_model")
    if isinstance(declared, list):
        declared = declared[0] if len(declared) == 1 else None
    return declared if isinstance(declared, str) else None


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the top of the model card (README.md) in a folder; empty if there is none that can be read."""
    try:
        parts = read_text(folder / "README.md").split("---\n", 2)
        block = parse_yaml(parts[1], "README.md") if len(parts) == 3 and not parts[0].strip() else {}
    except EvomergeError:  # nobody promised that a card can be read
        return {}
    return block if isinstance(block, dict) else {}


def quantised_base(declared: str) -> str | None:
    """How the model that an adapter was trained on is quantised; None if nothing says that it is.

    declared: the model that the adapter names.  Its configuration decides if it is on this machine, else its name.
    """
    if os.path.isfile(Path(declared) / "config.json"):
        try:
            config = read_json(Path(declared) / "config.json")
        except EvomergeError:  # what lies there is no reason to refuse the adapter
            return None
        return next((method for _, method in quantisation_settings(config)), None)
    named = QUANTISED_NAME.search(declared)
    return named.group(1) if named else None


def compare_declared_base(name: str, base: Checkpoint, source: Checkpoint | Adapter) -> Told:
    """Tell whether a source names another base model, or was trained on a quantised one.

    An adapter adds to the weights that it was trained on, so if these are on this machine, they are compared with the
    base's; if they are those of another model, that is a problem.
    """
    declared, told = declared_base(source), Told()
    if declared is None:
        return told
    if isinstance(source, Adapter):
        if method := quantised_base(declared):
            told.notes.append(
                f"{name}: was trained on a quantised model, {declared} ({method}); the base model here is not "
                "quantised, so its results may be a little better or worse"
            )
        elif (apart := distance_to(declared, base, list(source.changes))) is not None:
            if apart >= OTHER:
                told.problems.append(
                    f"{name}: was trained on {declared}, which is another model than the base here (its weights are "
                    f"{apart:.0%} of their size apart); give `base: {declared}`, or an adapter of this base"
                )
            elif apart > SAME:
                told.doubts.append(
                    f"{name}: was trained on {declared}, whose weights differ from the base's by {apart:.1%} of their "
                    f"size; with `base: {declared}` it would do what it was trained for"
                )
            return told
    here = {base.path.name.lower(), str(base.config.get("_name_or_path", "")).split("/")[-1].lower()}
    # A hub snapshot lies under models--owner--name/snapshots/<commit>.
    here |= {part.split("--")[-1].lower() for part in base.path.parts if part.startswith("models--")}
    if declared.rstrip("/").split("/")[-1].lower() not in here:
        kind = "hub model" if looks_like_hub_id(declared) else "model"
        line = f"{name}: says that it was trained from the {kind} {declared!r}; the base here is {base.path.name!r}"
        if isinstance(source, Adapter):
            told.doubts.append(f"{line}. If that is another model, its change does not fit: give `base: {declared}`")
        else:
            told.notes.append(line)
    return told


def distance_to(declared: str, base: Checkpoint, names: Sequence[str]) -> float | None:
    """How far the model that an adapter names is from the base, as a share of the base's length: of the farthest of a
    few tensors.  None if it is not on this machine or cannot be opened; infinite if it has other tensors.

    declared: an absolute path; other names are not looked for.  names: the tensors that the adapter changes.
    """
    folder = Path(declared)
    if not folder.is_absolute() or not os.path.isfile(folder / "config.json"):
        return None
    if os.path.realpath(folder) == os.path.realpath(base.path):
        return 0.0
    try:
        other = open_checkpoint(folder)
    except EvomergeError:
        return None
    found = 0.0
    for name in sorted({names[0], names[len(names) // 2], names[-1]}) if names else []:
        if name not in other.tensors or other.tensors[name].shape != base.tensors[name].shape:
            return float("inf")
        ours = base.read(name).float()
        if not ours.any():  # zeros, or the weights are not downloaded yet
            continue
        found = max(found, float((other.read(name).float() - ours).norm() / ours.norm()))
    return found

"""Where the sources pull against each other: cosines and sign conflicts of their task vectors."""

from html import escape

from evomerge.errors import EvomergeError
from evomerge.report.page.material import Material
from evomerge.report.page.parts import section, table, text
from evomerge.search.verdict.conflicts import Conflicts, read_conflicts


def conflicts_section(material: Material) -> str:
    """Two tables; empty if nothing was measured."""
    try:
        found = read_conflicts(material.run)
    except EvomergeError as error:
        return section("conflicts", "Conflicts between sources", text(f"They cannot be read: {error}.", "dim"))
    if found is None or len(found.cosines) < 2:
        return ""
    about = (
        f"Of the task vectors, in layers {', '.join(map(str, found.layers))}. Cosine: 1 is the same direction, 0 is "
        "unrelated, below 0 they work against each other. Sign conflicts: of the elements that both sources change "
        "most, the share that they move in opposite directions; unrelated sources have 50%."
    )
    return section(
        "conflicts",
        "Conflicts between sources",
        text(about),
        "<h3>Cosines</h3>",
        cosine_table(found),
        "<h3>Sign conflicts</h3>",
        sign_table(found),
    )


def cosine_table(found: Conflicts) -> str:
    """Source by source."""
    names = list(found.cosines)
    rows = [[escape(one), *(number(found.cosines[one].get(other)) for other in names)] for one in names]
    return table(["", *map(escape, names)], rows, "numbers")


def sign_table(found: Conflicts) -> str:
    """Pair of sources by component."""
    kinds = list(dict.fromkeys(k for pair in found.signs for k, share in pair.shares.items() if share is not None))
    rows = [
        [escape(f"{pair.one} and {pair.other}"), *(percent(pair.shares.get(kind)) for kind in kinds)]
        for pair in found.signs
    ]
    return table(["", *map(escape, kinds)], rows, "numbers")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
